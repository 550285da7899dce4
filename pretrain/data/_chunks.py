"""A text in pieces of whole sentences."""

from __future__ import annotations

from itertools import pairwise

import regex

from pretrain.core.grammar.sentences import sentences

# Of a script without spaces each letter is a word; of more than eight letters a word is several tokens.
_SPACELESS = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_TOKEN = regex.compile(rf"{_SPACELESS}|(?:(?!{_SPACELESS})\w){{1,8}}|[^\w\s]")


def count_tokens(text: str) -> int:
    """About as many as a tokenizer of many languages makes of a text: words, and marks between them."""
    return sum(1 for _ in _TOKEN.finditer(text))


def chunks(text: str, most: int) -> list[str]:
    """A text in pieces of at most `most` tokens, as few as whole sentences allow; longer ones are cut."""
    pieces, held = [""], 0
    for sentence in sentences(text):
        starts = [match.start() for match in _TOKEN.finditer(sentence)]
        cuts = [0, *starts[most::most], len(sentence)]
        for number, (start, end) in enumerate(pairwise(cuts)):
            size = min(most, len(starts) - number * most)
            if held + size > most:
                pieces.append("")
                held = 0
            pieces[-1] += sentence[start:end]
            held += size
    return [piece for piece in pieces if piece.strip()]

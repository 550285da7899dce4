"""Token healing: the last word of a prompt is written anew, in tokens that go on where the prompt stops.

A tokenizer makes "def main" of "def" and " main", so after "def" and " ", which is what it makes of "def ", a model has
never read a word. The tokens of a prompt's last word are therefore taken back, and the first new ones have to be what
the tokenizer makes of some longer text: its own tokens of a beginning of the word, and one that goes on with the rest;
or all of the word's. After https://github.com/guidance-ai/guidance and `token_healing` of `transformers`, which take
back the last token alone: that leaves four spaces four, where an indented word is three and " return".

Shape letters: B rows, N tokens, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain.core.encoding import encode_plain, encoded, ids_of, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 32  # characters of a word, and its tokens, that are taken back; of a longer one the last token alone
TRIED = 256  # tokens that might go on from one place in a word, of which it is seen whether the tokenizer makes them
LAST = "\U0010ffff"


@dataclass(frozen=True)
class Healing:
    """What may come first after one prompt without its last word."""

    again: tuple[int, ...]  # the word's own tokens, which are taken back
    following: dict[tuple[int, ...], list[int]] = field(repr=False)  # the tokens that may come after those new ones
    length: int  # tokens of the prompt before them

    def __call__(self, tokens_BN: Tensor, logits_BV: Tensor) -> Tensor:
        """`logits_BV` of the next tokens after prompts and new tokens, -inf for those that do not write the word."""
        if tokens_BN.shape[1] - self.length > self.most:
            return logits_BV
        healed_BV = logits_BV.clone()
        for row, new in enumerate(tokens_BN[:, self.length :].tolist()):
            may = self.following.get(tuple(new))
            if may is not None:
                healed_BV[row].fill_(-torch.inf)
                healed_BV[row, may] = logits_BV[row, may]
        return healed_BV

    @cached_property
    def most(self) -> int:
        """New tokens after which one is still bound."""
        return max(map(len, self.following))


class _Names:
    """A vocabulary's entries as it spells them, in order, without those that stand for no text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
        known = sorted((name, token) for name, token in tokenizer.get_vocab().items() if token not in special)
        self.names, self.ids, self.special = [name for name, _ in known], [token for _, token in known], special

    def beyond(self, start: str) -> list[int]:
        """The tokens that begin with `start` and go on."""
        low, high = bisect_left(self.names, start), bisect_left(self.names, start + LAST)
        return self.ids[low + (low < high and self.names[low] == start) : high]


@lru_cache(maxsize=1)
def _names(tokenizer: PreTrainedTokenizerBase, entries: int) -> _Names:
    """Those of the tokenizer that is at work, which has so many entries."""
    return _Names(tokenizer)


def healing(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: Sequence[int], before: int) -> Healing | None:
    """How to write the last word of a prompt anew, whose last tokens are `ids`; None where it stands as it must.

    `before`: tokens that stand before `ids`. None too for tokenizers that are not fast (without `tokenizer.json`).
    """
    if not tokenizer.is_fast or not ids:
        return None
    names = _names(tokenizer, len(tokenizer))
    if ids[-1] in names.special:
        return None
    word, count = _last_word(tokenizer, prompt, ids)
    count = max(1, count)
    again = tuple(ids[len(ids) - count :])
    spelt = _spelt(tokenizer, again)
    # Of what the tokenizer makes other tokens alone, as in the middle of a text, the last token is taken as it stands.
    paths = list(_paths(tokenizer, names, word, spelt)) if word else [((), names.beyond(spelt))]
    if len(ids) + before == count or not any(longer for _, longer in paths):
        return None
    may: dict[tuple[int, ...], set[int]] = {}
    for path, longer in [*paths, (again, [])]:
        for number, token in enumerate(path):
            may.setdefault(path[:number], set()).add(token)
        if longer and path != again:
            may.setdefault(path, set()).update(longer)
    may.pop(again, None)  # all of the word is written, and anything may follow
    return Healing(again, {path: sorted(each) for path, each in may.items()}, len(ids) + before - count)


def _last_word(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: Sequence[int]) -> tuple[str, int]:
    """A prompt's last word, as the tokenizer parts them, and how many tokens; nothing where it is not by itself so."""
    encoding = encoded(tokenizer, prompt, add_special_tokens=False)
    words = encoding.word_ids()
    count = next((n for n, word in enumerate(reversed(words)) if word != words[-1]), len(words))
    place = encoding.token_to_chars(len(words) - count)
    word = "" if place is None or count > min(LONGEST, len(ids)) else prompt[place.start :]
    if not word or len(word) > LONGEST or _ids(tokenizer, [word])[0] != tuple(ids[len(ids) - count :]):
        return "", 0
    return word, count


def _paths(
    tokenizer: PreTrainedTokenizerBase, names: _Names, word: str, whole: str
) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Tokens that write a beginning of a word, which is spelt `whole`, and those that go on beyond its end."""
    starts = [word[:place] for place in range(len(word))]
    for start, path in zip(starts, _ids(tokenizer, starts), strict=True):
        spelt = _spelt(tokenizer, path)
        longer = names.beyond(whole[len(spelt) :]) if whole.startswith(spelt) else []
        some = longer[:: max(1, -(-len(longer) // TRIED))]
        made = _ids(tokenizer, [start + text_of(tokenizer, [token]) for token in some])
        fitting = [token for token, ids in zip(some, made, strict=True) if ids == (*path, token)]
        if fitting:
            yield path, fitting if len(some) == len(longer) else longer


def _spelt(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return "".join(map(str, tokenizer.convert_ids_to_tokens(list(ids))))


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[tuple[int, ...]]:
    return [tuple(ids_of(each)) for each in encode_plain(tokenizer.backend_tokenizer, tokenizer, texts)]

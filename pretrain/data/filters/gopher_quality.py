"""Drop what does not look like prose: by the number and length of its words, its symbols, lines and stop words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import nan
from typing import ClassVar

from pretrain.core.bounds import Count, NonNegative, Positive, Share, Whole
from pretrain.data.filters._filter import Filter, Rule
from pretrain.data.filters._words import is_unspaced, words

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


@dataclass(frozen=True)
class GopherQuality(Filter):
    """Scaling Language Models: Methods, Analysis & Insights from Training Gopher (arXiv:2112.11446).

    A document is kept if it has between `least_words` and `most_words` words, of a mean length between
    `least_word_length` and `most_word_length` characters; for each word at most `symbols` hash marks, and as many
    ellipses; a bullet at the beginning of at most `bullet_lines` of its lines and an ellipsis at the end of at most
    `ellipsis_lines`; a letter in at least `letter_words` of its words; and `stop_words` of the eight stop words of
    English (the, be, to, of, and, that, have, with; 0 for other languages). Words without a letter or digit count for
    the ratios alone. Of documents mostly in scripts without spaces, as Chinese or Thai, each character counts as a word
    and the length of words and stop words are not asked for. With `tag` nothing is dropped and the numbers become
    columns, which a later gopher_quality reads.
    """

    speed: ClassVar[float] = 10e6
    numbers: ClassVar[tuple[str, ...]] = (
        "words", "word_length", "hashes", "ellipses", "bullet_lines", "ellipsis_lines", "letter_words", "stop_words",
    )  # fmt: skip

    least_words: Whole = 50
    most_words: Count = 100_000
    least_word_length: NonNegative = 3.0
    most_word_length: Positive = 10.0
    symbols: NonNegative = 0.1
    bullet_lines: Share = 0.9
    ellipsis_lines: Share = 0.3
    letter_words: Share = 0.8
    stop_words: Whole = 2
    tag: bool = False

    def rules(self) -> tuple[Rule, ...]:
        """In the order of the paper."""
        return (
            Rule("words", "words", self.least_words, self.most_words),
            Rule("mean word length", "word_length", self.least_word_length, self.most_word_length),
            Rule("hash marks", "hashes", most=self.symbols),
            Rule("ellipses", "ellipses", most=self.symbols),
            Rule("bullet lines", "bullet_lines", most=self.bullet_lines),
            Rule("ellipsis lines", "ellipsis_lines", most=self.ellipsis_lines),
            Rule("words with letters", "letter_words", least=self.letter_words),
            Rule("stop words", "stop_words", least=self.stop_words),
        )

    def measure(self, text: str) -> tuple[float, ...]:
        """The eight numbers; ratios of nothing have no meaning."""
        counts, lines, unspaced = Counter(words(text)), text.splitlines(), is_unspaced(text)
        total = real = length = lettered = 0
        for word, count in counts.items():
            total += count
            if word.isalpha() or any(map(str.isalpha, word)):
                lettered += count
            elif not any(map(str.isalnum, word)):
                continue
            real += count
            length += count * len(word)
        dots = text.count("...") + text.count("…")
        bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
        ends = sum(line.rstrip().endswith(("...", "…")) for line in lines) if dots else 0
        return (
            real,
            nan if unspaced or not real else length / real,
            text.count("#") / total if total else nan,
            dots / total if total else nan,
            bullets / len(lines) if lines else nan,
            ends / len(lines) if lines else nan,
            lettered / total if total else nan,
            nan if unspaced else sum(word in counts for word in STOP_WORDS),
        )

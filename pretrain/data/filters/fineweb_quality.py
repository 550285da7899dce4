"""Drop lists and menus: by how lines end, how short they are, how many are copies, and how many there are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import nan
from typing import ClassVar

from pretrain.core.bounds import NonNegative, Share, Whole
from pretrain.data.filters._filter import Filter, Rule
from pretrain.data.filters._words import is_unspaced, words
from pretrain.data.filters.gopher_repetition import repeated


@dataclass(frozen=True)
class FinewebQuality(Filter):
    """The FineWeb Datasets: Decanting the Web for the Finest Text Data at Scale (arXiv:2406.17557).

    Of a document's lines that are not blank at least `ended_lines` end with a sentence's end, in any script; at most
    `short_lines` have `short` characters or fewer; and at most `line_characters` of the characters are in lines that
    stand before. 0.12, 0.67 and 0.1 are the paper's; the code that made the data set has 0.01 for the last, and asks in
    addition for at most `newlines` line ends a word, of documents in scripts with spaces. With `tag` nothing is dropped
    and the numbers become columns, which a later fineweb_quality reads.
    """

    speed: ClassVar[float] = 13e6
    numbers: ClassVar[tuple[str, ...]] = ("lines", "ended_lines", "short_lines", "line_characters", "newlines")
    measures: ClassVar[tuple[str, ...]] = ("short",)

    ended_lines: Share = 0.12
    short_lines: Share = 0.67
    short: Whole = 30
    line_characters: Share = 0.1
    newlines: NonNegative = 0.3
    tag: bool = False

    def rules(self) -> tuple[Rule, ...]:
        """In the order of the code."""
        return (
            Rule("empty", "lines", least=1),
            Rule("lines that end", "ended_lines", least=self.ended_lines),
            Rule("short lines", "short_lines", most=self.short_lines),
            Rule("characters of duplicate lines", "line_characters", most=self.line_characters),
            Rule("line ends a word", "newlines", most=self.newlines),
        )

    def measure(self, text: str) -> tuple[float, ...]:
        """The five numbers."""
        lines = [line for line in text.split("\n") if line.strip()]
        if not lines:
            return (0, nan, nan, nan, nan)
        ended = sum(ends_sentence(line[-1]) for line in lines)
        short = sum(len(line) <= self.short for line in lines)
        breaks = text.count("\n")
        copied = repeated(lines)[1] / (len(text) - breaks)
        rate = nan if is_unspaced(text) else breaks / len(words(text)) if breaks else 0.0
        return (len(lines), ended / len(lines), short / len(lines), copied, rate)


@cache
def ends_sentence(character: str) -> bool:
    """Whether a character ends sentences, in any script (Unicode's Sentence_Terminal)."""
    import regex

    return regex.match(r"\p{Sentence_Terminal}", character) is not None

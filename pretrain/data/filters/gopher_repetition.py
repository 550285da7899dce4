"""Drop what repeats itself: paragraphs, lines and runs of words that stand in a document more than once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import nan
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pretrain.core.bounds import Share
from pretrain.data.filters._filter import Filter, Rule
from pretrain.data.filters._words import is_unspaced, words

TOP, DUPLICATE = (2, 3, 4), (5, 6, 7, 8, 9, 10)
_PARAGRAPHS, _LINES = re.compile(r"\n{2,}"), re.compile(r"\n+")
Shares3 = tuple[Share, Share, Share]
Shares6 = tuple[Share, Share, Share, Share, Share, Share]


@dataclass(frozen=True)
class GopherRepetition(Filter):
    """Scaling Language Models: Methods, Analysis & Insights from Training Gopher (arXiv:2112.11446).

    The thresholds of its Table A1, on what of a document is repetition: the share of paragraphs and of lines that stand
    in it before, and of characters in such; of characters in all occurrences of the commonest 2-, 3- and 4-gram of
    words (`top`); and of characters in 5- to 10-grams that stand in it before (`duplicate`), none counted twice.
    Documents mostly in scripts without spaces are judged by paragraphs and lines alone. With `tag` nothing is dropped
    and the numbers become columns, which a later gopher_repetition reads.
    """

    speed: ClassVar[float] = 3.5e6
    numbers: ClassVar[tuple[str, ...]] = (
        "paragraphs", "paragraph_characters", "lines", "line_characters",
        "top_2_gram", "top_3_gram", "top_4_gram", "duplicate_5_grams", "duplicate_6_grams", "duplicate_7_grams",
        "duplicate_8_grams", "duplicate_9_grams", "duplicate_10_grams",
    )  # fmt: skip

    paragraphs: Share = 0.3
    paragraph_characters: Share = 0.2
    lines: Share = 0.3
    line_characters: Share = 0.2
    top: Shares3 = (0.2, 0.18, 0.16)
    duplicate: Shares6 = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    tag: bool = False

    def rules(self) -> tuple[Rule, ...]:
        """Paragraphs, lines, and runs of words from short to long."""
        most = (
            self.paragraphs, self.paragraph_characters, self.lines, self.line_characters, *self.top, *self.duplicate,
        )  # fmt: skip
        reasons = {"paragraphs": "duplicate paragraphs", "lines": "duplicate lines"} | {
            "paragraph_characters": "characters of duplicate paragraphs",
            "line_characters": "characters of duplicate lines",
        }
        return tuple(
            Rule(reasons.get(number, number.replace("_", " ")), number, most=limit)
            for number, limit in zip(self.numbers, most, strict=True)
        )

    def measure(self, text: str) -> tuple[float, ...]:
        """The thirteen shares; of an empty text there are none."""
        if not text:
            return (nan,) * len(self.numbers)
        paragraphs, lines = _PARAGRAPHS.split(text.strip()), _LINES.split(text)
        shares = []
        for parts in (paragraphs, lines):
            count, characters = repeated(parts)
            shares += [count / len(parts), characters / len(text)]
        if is_unspaced(text):
            return (*shares, *(nan,) * (len(TOP) + len(DUPLICATE)))
        return (*shares, *(characters / len(text) for characters in of_n_grams(words(text))))


def repeated(parts: list[str]) -> tuple[int, int]:
    """How many parts stand before already, and their characters."""
    if len(set(parts)) == len(parts):
        return 0, 0
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count, characters = count + 1, characters + len(part)
        seen.add(part)
    return count, characters


def of_n_grams(text: list[str]) -> list[float]:
    """Characters in the commonest n-gram (2 to 4, the spaces between its words too), then in those of n = 5 to 10.

    A longer n-gram can only be repeated where its beginning is, so each n looks at the places that the one before left.
    """
    number_of: dict[str, int] = {}
    word_W = np.array([number_of.setdefault(word, len(number_of)) for word in text], np.int64)
    end_W = np.concatenate([[0], np.cumsum([len(word) for word in text], dtype=np.int64)])
    places_P, label_P = np.arange(len(text)), word_W
    shares = []
    for n in (*TOP, *DUPLICATE):
        inside_P = places_P + n <= len(text)
        places_P, label_P = places_P[inside_P], label_P[inside_P]
        pair_P = label_P * len(number_of) + word_W[places_P + n - 1]
        _, first_U, label_P, count_U = np.unique(pair_P, return_index=True, return_inverse=True, return_counts=True)
        if n in TOP:
            shares.append(_top(n, len(text), places_P[first_U], count_U, end_W))
        repeated_P = count_U[label_P] > 1
        places_P, label_P = places_P[repeated_P], label_P[repeated_P]
        if n in DUPLICATE:
            shares.append(_duplicates(n, places_P, label_P, end_W))
    return shares


def _top(n: int, total: int, first_U: NDArray[np.int64], count_U: NDArray[np.int64], end_W: NDArray[np.int64]) -> float:
    """Characters in all occurrences of the commonest n-gram, of equals the first; of no two alike the first of all."""
    if total < n:
        return 0.0
    most = int(count_U.max(initial=1))
    first = int(first_U[count_U == most].min()) if most > 1 else 0
    return most * (int(end_W[first + n] - end_W[first]) + n - 1)


def _duplicates(n: int, places_P: NDArray[np.int64], label_P: NDArray[np.int64], end_W: NDArray[np.int64]) -> float:
    """Characters in n-grams that stand before, read from the left, none over another."""
    seen: set[int] = set()
    characters, free = 0, 0
    for place, label in zip(places_P.tolist(), label_P.tolist(), strict=True):
        if place < free:
            continue
        if label in seen:
            characters += int(end_W[place + n] - end_W[place])
            free = place + n
        seen.add(label)
    return characters

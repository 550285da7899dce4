"""ROUGE-L of texts, as the package `rouge_score` measures it without its stemmer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_OTHER = re.compile(r"[^a-z0-9]+")


def rouge_tokens(text: str) -> list[str]:
    """The words: letters and digits of ASCII, in lower case; of a text without any, its characters."""
    return _OTHER.sub(" ", text.lower()).split() or [letter for letter in text if not letter.isspace()]


def rouge_l(first: Sequence[str], second: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two lists of words, from 0 to 1."""
    if not first or not second:
        return 0.0
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, 1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    precision, recall = row[-1] / len(second), row[-1] / len(first)
    return 2 * precision * recall / (precision + recall) if row[-1] else 0.0


class Words(NamedTuple):
    """The words of a text in their order, and how often each occurs."""

    order: list[str]
    counts: Counter[str]

    @classmethod
    def of(cls, text: str) -> Words:
        """Those of a text."""
        order = rouge_tokens(text)
        return cls(order, Counter(order))

    def shared(self, other: Words) -> float:
        """F1 of the words in common, whatever their order: ROUGE-L is never above it."""
        fewer, more = sorted((self.counts, other.counts), key=len)
        common = sum(min(count, more[word]) for word, count in fewer.items() if word in more)
        return 2 * common / max(1, len(self.order) + len(other.order))


def alike(words: Words, others: Iterable[Words], threshold: float) -> bool:
    """Whether ROUGE-L to one of the others is above the threshold."""
    for other in others:
        most = 2 * min(len(words.order), len(other.order)) / max(1, len(words.order) + len(other.order))
        if most > threshold and words.shared(other) > threshold and rouge_l(words.order, other.order) > threshold:
            return True
    return False

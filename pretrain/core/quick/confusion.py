"""Which classes a classifier takes for which: counts by true class and answer, and what follows of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Confusion = dict[str, dict[str, int]]  # true class -> answered class -> how often
MOST = 12  # classes that a table of all of them can show


@dataclass(frozen=True)
class ClassRow:
    """A class: how many are of it, how many were answered so, and how well that fits."""

    name: str
    count: int
    answered: int
    precision: float | None  # of what was answered so, how much is; None where nothing was
    recall: float | None  # of what is so, how much was answered; None where nothing is
    f1: float


def confusion_of(answered: Iterable[str], true: Iterable[str]) -> Confusion:
    """The counts of pairs."""
    counts: Confusion = {}
    for answer, truth in zip(answered, true, strict=True):
        row = counts.setdefault(truth, {})
        row[answer] = row.get(answer, 0) + 1
    return counts


def classes_of(confusion: Mapping[str, Mapping[str, int]]) -> list[str]:
    """All classes, the commonest first."""
    names = {*confusion, *(name for row in confusion.values() for name in row)}
    return sorted(names, key=lambda name: (-sum(confusion.get(name, {}).values()), name))


def class_rows(confusion: Mapping[str, Mapping[str, int]]) -> list[ClassRow]:
    """Each class's counts, precision, recall and F1, the commonest class first."""
    rows = []
    for name in classes_of(confusion):
        count, hits = sum(confusion.get(name, {}).values()), confusion.get(name, {}).get(name, 0)
        answered = sum(row.get(name, 0) for row in confusion.values())
        precision = hits / answered if answered else None
        recall = hits / count if count else None
        rows.append(ClassRow(name, count, answered, precision, recall, 2 * hits / max(1, count + answered)))
    return rows


def mistakes(confusion: Mapping[str, Mapping[str, int]], most: int = MOST) -> list[tuple[str, str, int]]:
    """The commonest mistakes: true class, what was answered, how often."""
    wrong = [(truth, answer, n) for truth, row in confusion.items() for answer, n in row.items() if truth != answer]
    return sorted(wrong, key=lambda each: (-each[2], each[0], each[1]))[:most]


def never_answered(confusion: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Classes that occur and are never answered."""
    return [row.name for row in class_rows(confusion) if row.count and not row.answered]

"""Which classes a classifier takes for which: counts by true class and answer, and what follows of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from pretrain.core.errors import plain
from pretrain.core.quick.quantities import counted

Confusion = dict[str, dict[str, int]]  # true class -> answered class -> how often
MOST = 12  # classes that a table of all of them can show
ENOUGH = 10  # documents of a class that say how well it is answered
LISTED, BEGINNING = 50, 240  # wrong answers that are kept, and the letters of each text
LEARNT = "as it stands it is learnt as another label"
RARE, SPELLED = 8, 5  # times as common is what a label may be a misspelling of; letters of one at least
# What labels are joined, quoted or ended with; not between digits (1.5).
_MARKS = re.compile(r"(?<!\d)[\s_.,;:!/'\"()-]+|[\s_.,;:!/'\"()-]+(?!\d)")
_MINUS = re.compile(r"(?<!\S)-(?=\d)|(?<=\w)-$")  # of -1, and of A-


@dataclass(frozen=True)
class ClassRow:
    """A class: how many are of it, how many were answered so, and how well that fits."""

    name: str
    count: int
    answered: int
    precision: float | None  # of what was answered so, how much is; None where nothing was
    recall: float | None  # of what is so, how much was answered; None where nothing is
    f1: float


class Mistake(TypedDict):
    """A wrong answer to a document: how the text begins, what is true, what was answered, how likely that was held."""

    id: NotRequired[str]
    text: str
    true: str
    answered: str
    probability: float


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


def worst_class(confusion: Mapping[str, Mapping[str, int]], least: int = ENOUGH) -> ClassRow | None:
    """The class of the least F1 among those that are answered at all and have enough documents; None of a single."""
    rows = [row for row in class_rows(confusion) if row.count >= least and row.answered]
    return min(rows, key=lambda row: row.f1) if len(rows) > 1 else None


def wrong_answers(
    texts: Sequence[str], true: Sequence[str], answered: Sequence[str], probabilities: Sequence[float],
    ids: Sequence[object],
) -> list[Mistake]:  # fmt: skip
    """The wrong answers, the most confident first, at most `LISTED`; of a text its first `BEGINNING` letters."""
    wrong = [number for number, (truth, answer) in enumerate(zip(true, answered, strict=True)) if truth != answer]
    kept: list[Mistake] = []
    for n in sorted(wrong, key=lambda number: (-probabilities[number], number))[:LISTED]:
        text = texts[n] if len(texts[n]) <= BEGINNING else texts[n][: BEGINNING - 1] + "…"
        row: Mistake = {"text": text, "true": true[n], "answered": answered[n], "probability": probabilities[n]}
        kept.append(row if ids[n] is None else {"id": str(ids[n])[:BEGINNING], **row})
    return kept


def mistakes(confusion: Mapping[str, Mapping[str, int]], most: int = MOST) -> list[tuple[str, str, int]]:
    """The commonest mistakes: true class, what was answered, how often."""
    wrong = [(truth, answer, n) for truth, row in confusion.items() for answer, n in row.items() if truth != answer]
    return sorted(wrong, key=lambda each: (-each[2], each[0], each[1]))[:most]


def never_answered(confusion: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Classes that occur and are never answered."""
    return [row.name for row in class_rows(confusion) if row.count and not row.answered]


def doubtful(column: str, counts: Mapping[str, int]) -> Iterator[str]:
    """A line for all labels that others differ from in how they are written alone, and one for each misspelt label."""
    if same := respelt(counts):
        some = ", ".join(f"{a!r} ({counted(counts[a], 'row')}) and {b!r} ({counts[b]:,})" for a, b in same[:MOST])
        some += f", and {len(same) - MOST} more" if len(same) > MOST else ""
        many = f"{len(same):,} labels differ from others" if len(same) > 1 else "1 label differs from another"
        learnt = "as they stand they are learnt as other labels" if len(same) > 1 else LEARNT
        yield f"{column!r}: {many} in {_differing(same)} alone: {some}: {learnt}"
    for rare, common in misspelt(counts):
        rows = counted(counts[rare], "row")
        yield f"{column!r}: {rare!r} ({rows}) is likely {common!r} ({counts[common]:,}) misspelt: {LEARNT}"


def respelt(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of a label and the commonest that differs from it in case, blanks or punctuation alone.

    How common they are does not matter. Punctuation that tells labels apart stays: C++ and C#, 1.5 and 15, A- and A.
    """
    commonest: dict[str, str] = {}
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        commonest.setdefault(_bare(name), name)
    pairs = [(name, commonest[_bare(name)]) for name in counts if commonest[_bare(name)] != name]
    return sorted(pairs, key=lambda pair: (-counts[pair[0]], pair[0]))


def _bare(label: str) -> str:
    """A label whatever its case, blanks and punctuation; of signs alone, all of them."""
    word = plain(label)
    return _MARKS.sub("", _MINUS.sub("\N{MINUS SIGN}", word)) or word


def _differing(pairs: Sequence[tuple[str, str]]) -> str:
    """What the labels of pairs differ in: `case`, `case or blanks`."""
    blanks, marks = r"[^\s]", r"[\w\s]"
    differences = {
        "case": any(re.sub(r"[\W_]", "", a) != re.sub(r"[\W_]", "", b) for a, b in pairs),
        "blanks": any(re.sub(blanks, "", a) != re.sub(blanks, "", b) for a, b in pairs),
        "punctuation": any(re.sub(marks, "", a.replace("_", "-")) != re.sub(marks, "", b.replace("_", "-"))
                           for a, b in pairs),
    }  # fmt: skip
    *first, last = [name for name, differ in differences.items() if differ] or ["writing"]
    return f"{', '.join(first)} or {last}" if first else last


def misspelt(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of a rare label and a much commoner one that it is likely a misspelling of.

    They differ in one letter (or two neighbours that changed places) after the first, whatever their case and blanks.
    """
    names = sorted(counts, key=lambda name: (-counts[name], name))
    pairs = []
    for name in names[1:]:
        common = next((other for other in names if counts[other] >= RARE * counts[name] and _alike(name, other)), None)
        pairs += [] if common is None else [(name, common)]
    return pairs


def _alike(a: str, b: str) -> bool:
    same, a, b = _bare(a) == _bare(b), plain(a), plain(b)
    if same or not a or not b or a[0] != b[0] or min(len(a), len(b)) < SPELLED:
        return False
    a, b = _without_common_start(a, b)
    a, b = (end[::-1] for end in _without_common_start(a[::-1], b[::-1]))
    if not (a + b).isalpha():  # numbers and signs tell classes apart
        return False
    return max(len(a), len(b)) == 1 or (len(a) == 2 and a == b[::-1])


def _without_common_start(a: str, b: str) -> tuple[str, str]:
    same = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[same:], b[same:]

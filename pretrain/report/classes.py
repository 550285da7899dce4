"""The report's tables of a classifier: each class, and which is taken for which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pretrain.core.quick.confusion import MOST, Mistake, class_rows, classes_of, mistakes
from pretrain.report.markup import Html, join, table, tag

MOST_ROWS = 40
SHOWN = 12  # wrong answers
NARROW = 16  # letters of a label


def classes(confusion: Mapping[str, Mapping[str, int]], split: str) -> Html:
    """Each class's precision, recall and F1; below, of a few classes all that was answered, of many the mistakes."""
    rows = class_rows(confusion)
    note = f"How many {split} documents are of a class, how many are answered so, and how well the two agree."
    note += f" The {MOST_ROWS} commonest of {len(rows)}." if len(rows) > MOST_ROWS else ""
    cells = [
        (row.name, f"{row.count:,}", f"{row.answered:,}", _share(row.precision), _share(row.recall), f"{row.f1:.3f}")
        for row in rows[:MOST_ROWS]
    ]
    heads = ("class", "documents", "answered", "precision", "recall", "F1")
    names = classes_of(confusion)
    second = _matrix(confusion, names) if len(names) <= MOST else _mistakes(confusion)
    return join([tag("p", note, class_="note"), table(heads, cells), second])


def _matrix(confusion: Mapping[str, Mapping[str, int]], names: list[str]) -> Html:
    """A cell is darker the larger its share of its row; its own is the diagonal."""
    rows = []
    for truth in names:
        counts = confusion.get(truth, {})
        total = sum(counts.values()) or 1
        cells = [_count(counts.get(name, 0), total, truth == name, f"{truth}: answered {name}") for name in names]
        rows.append(tag("tr", tag("th", truth), *cells))
    head = tag("tr", tag("th", "true"), *(tag("th", name) for name in names))
    title = tag("h3", "What is answered, by what is true")
    return join([title, tag("div", tag("table", tag("tbody", head, *rows), class_="matrix"), class_="scroll")])


def _count(count: int, total: int, right: bool, title: str) -> Html:
    share = round(100 * count / total)
    colour = "var(--right)" if right else "var(--wrong)"
    style = f"background:color-mix(in srgb, {colour} {share}%, transparent)" if count else None
    return tag("td", f"{count:,}", style=style, title=f"{title}, {share}%")


def _mistakes(confusion: Mapping[str, Mapping[str, int]]) -> Html:
    rows = [(truth, answer, f"{times:,}") for truth, answer, times in mistakes(confusion)]
    return join([tag("h3", "The commonest mistakes"), table(("true", "answered", "times"), rows)])


def confident(wrong: Sequence[Mistake]) -> Html:
    """The wrong answers that the model was surest of: often a label that is wrong, or two classes that are one."""
    rows = [
        (row["text"], _label(row["true"]), _label(row["answered"]), f"{row['probability']:.2f}")
        for row in wrong[:SHOWN]
        if {"text", "true", "answered"} <= row.keys() and isinstance(row.get("probability"), int | float)
    ]
    if not rows:
        return join([])
    more = f"; evaluation.json has {len(wrong)}" if len(wrong) > len(rows) else ""
    note = f"Wrong answers by the model's own probability{more}. Where the true label looks wrong, it may be."
    heads = ("text", "true", "answered", "probability")
    return join([tag("h3", "Its surest mistakes"), tag("p", note, class_="note"), table(heads, rows)])


def _label(words: str) -> Html:
    """A short cell beside a long text, which is not broken inside a word; of a long label it may be."""
    wide = "display:inline-block;min-width:5.5em" if len(words) <= NARROW else None
    return tag("span", words, style=wide)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"

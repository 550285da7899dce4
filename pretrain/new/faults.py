"""What is wrong with the rows of a table, in a line each with how many and the first: a recipe leaves them out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pretrain.corpus.sources._containers import Row, has_sentences
from pretrain.corpus.sources._files import Document, given
from pretrain.corpus.sources._tables import is_number

SHOWN = 3  # rows that are named
UNDECODED, ICONV = "lines with bad bytes", "iconv -f latin1 -t utf-8 may make it that"
Broken = tuple[str, str, str, str]  # of a row: where it stands, what is wrong, the reason, what is accepted


@dataclass(frozen=True)
class Fault:
    """Some rows of those looked at, what they are or lack, and the field of the source that leaves them out."""

    count: int
    what: str  # after `3 rows …`
    rows: tuple[str, ...]  # the first
    field: str = ""  # `on_error: skip`; empty where they are left out anyway

    def __str__(self) -> str:
        more = ", …" if self.count > len(self.rows) else ""
        rows = f"{self.count:,} row{'s' if self.count != 1 else ''}"
        return f"{rows} {self.what} ({', '.join(self.rows)}{more})"


def place(where: str) -> str:
    """Where a row stands in its file: `line 4`, `row 3`."""
    match = re.search(r":(\d+)(?: \(row \d+\))?$", where) or re.search(r", ((?:row|item) \d+)$", where)
    return where if match is None else f"line {match[1]}" if match[1].isdigit() else match[1]


def unreadable(wrong: Sequence[Broken]) -> list[Fault]:
    """Rows that cannot be read, by the reason."""
    words = {UNDECODED: f"not in UTF-8 ({ICONV})"}
    faults = []
    for reason in dict.fromkeys(reason for _, _, reason, _ in wrong):
        some = [(where, what) for where, what, each, _ in wrong if each == reason]
        what = words.get(reason, f"cannot be read: {some[0][1]}")
        faults.append(Fault(len(some), what, tuple(place(where) for where, _ in some[:SHOWN]), "on_error: skip"))
    return faults


def remedy(broken: Broken) -> str:
    """What is accepted in place of a row that cannot be read."""
    _, _, reason, accepted = broken
    return f"{accepted} ({ICONV})" if reason == UNDECODED else accepted


def lacking(rows: Iterable[Row], column: str, what: str, field: str = "") -> list[Fault]:
    """Rows without a value in a column."""
    missing = [where for where, row in rows if not given(row, column)]
    return [Fault(len(missing), what, tuple(map(place, missing[:SHOWN])), field)] if missing else []


def contradicting(rows: Iterable[Row], columns: Sequence[str], label: str) -> list[Fault]:
    """Rows whose texts stand with more than one label."""
    labels: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for where, row in rows:
        if all(given(row, column) for column in (*columns, label)):
            texts = tuple(str(row[column]) for column in columns)
            labels.setdefault(texts, {}).setdefault(str(row[label]), []).append(where)
    odd = [by_label for by_label in labels.values() if len(by_label) > 1]
    places = [where for by_label in odd for rows_of in by_label.values() for where in rows_of]
    texts_of = f"of {len(odd):,} text{'s' if len(odd) != 1 else ''}"
    what = f"{texts_of} that stand{'s' if len(odd) == 1 else ''} with more than one {label}"
    return [Fault(len(places), what, tuple(map(place, places[:SHOWN])))] if odd else []


def unnumbered(rows: Iterable[Row], column: str) -> list[Fault]:
    """Rows whose cell in a column of numbers is none, each with what it holds."""
    odd = [(where, row[column]) for where, row in rows if given(row, column) and not is_number(row[column])]
    cells = tuple(f"{place(where)}: {value!r}" for where, value in odd[:SHOWN])
    return [Fault(len(odd), f"without a number in {column}", cells, f"numbers: {column}")] if odd else []


def headless(names: Sequence[str], rows: Sequence[Document]) -> bool:
    """Whether what a table takes for the names of its columns is a row like the others.

    So it is where a name is a sentence, or stands among the values of its own column, which come again.
    """
    if has_sentences(names):
        return True
    for name in names:
        values = [row.get(name) for row in rows]
        if name in values and len(set(map(str, values))) <= len(values) / 2:
            return True
    return False

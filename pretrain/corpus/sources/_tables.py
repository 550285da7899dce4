"""Tables of text: rows of a CSV or TSV, with or without a header."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from pretrain.core.errors import PretrainError, nearest
from pretrain.corpus.sources._files import lines_of
from pretrain.corpus.sources._skipped import Skipped


def rows_of(path: Path, skipped: Skipped) -> tuple[list[str], Iterator[list[str]]]:
    """The names of a table's columns (`0`, `1`, … where it has no header) and its rows, which are not empty.

    A header is a first row in which nothing is a number. The separator is a tab in `.tsv` files; in others a comma,
    or the semicolon or tab that the first line has in place of one.
    """
    lines = (line for line in lines_of(path, skipped) if line.strip())
    first = next(lines, "")
    separator = "\t" if ".tsv" in path.name else next((mark for mark in ",;\t" if mark in first), ",")
    head = next(_cells(iter([first]), separator, skipped, path), [])
    rows = _cells(lines, separator, skipped, path)
    if any(number(cell) is not None for cell in head):
        return [str(index) for index in range(len(head))], _chain(head, rows)
    return [name.strip() for name in head], rows


def _cells(lines: Iterator[str], separator: str, skipped: Skipped, path: Path) -> Iterator[list[str]]:
    """The rows; what is no row of a table is counted."""
    csv.field_size_limit(min(skipped.longest, 2**31 - 1))
    reader = csv.reader(lines, delimiter=separator)
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:
            skipped.add("bad lines", path)


def _chain(first: list[str], rest: Iterator[list[str]]) -> Iterator[list[str]]:
    yield first
    yield from rest


def number(cell: str) -> float | None:
    """A cell as a number; None where it is none."""
    try:
        return float(cell)
    except ValueError:
        return None


def is_number(value: object) -> bool:
    """Whether a cell is a number that can be learnt: none that is infinite or NaN, no truth value."""
    if isinstance(value, str):
        value = number(value)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def column(names: list[str], wanted: str, field: str, path: Path) -> int:
    """The place of a column, by its name or its number; `-1` is the last."""
    if wanted in names:
        return names.index(wanted)
    if wanted.removeprefix("-").isdecimal() and -len(names) <= int(wanted) < len(names):
        return int(wanted) % len(names)
    known = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    raise PretrainError(
        f"{field} {wanted!r}: {path.name} has no such column{nearest(wanted, names)}; accepted: {known}"
    )

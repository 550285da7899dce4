"""Tables of text: rows of a CSV or TSV, with or without a header."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from pretrain.core.errors import PretrainError, nearest
from pretrain.core.foreign.archives import Place, open_text
from pretrain.corpus.sources._files import Document, Size, numbered_lines, plain_name, size_of
from pretrain.corpus.sources._skipped import Skipped

FEW, MUCH = 1000, 2 << 20  # rows that are read to know how much of a table is text, and bytes of them
SEPARATORS = ",;\t|"  # of cells; a colon stands in texts, times and addresses
_QUOTED = re.compile(r'"(?:[^"]|"")*(?:"|$)')


def extent(documents: Iterator[tuple[str, Document]], path: Path) -> Size:
    """Bytes of text of a table, and its documents, from the first of them, each with where it stands.

    Of these it is known how much of the file they take: what is left is taken for like them. How many are read goes by
    no clock, since sizes of models are chosen by it.
    """
    whole = size_of([path]).bytes
    count, text, taken, last = 0, 0, 0, ""
    escaped = None
    for where, document in documents:
        if where != last and (count >= FEW or text > MUCH):
            times = whole / max(1, _before(where, path) or taken)
            if path.suffix == ".parquet" and (place := re.search(r", row (\d+)$", where)):
                times = _rows_in(path) / max(1, int(place[1]) - 1)
            return Size(text * times, count * times, max(whole, text * times))
        count, last = count + 1, where
        text += len(document["text"].encode())
        if ", item " in where:  # of an array, whose lines say nothing
            escaped = _escaped(path) if escaped is None else escaped
            row = {name: value for name, value in document.items() if name != "domain"}
            taken += len(json.dumps(row, ensure_ascii=escaped, default=str).encode()) + 2
    return Size(text, count, max(whole, text))


def _before(where: str, path: Path) -> int:
    """Bytes of the lines before that at which a row stands; 0 of a row that stands at none."""
    line = re.search(r":(\d+) \(row \d+\)$", where)
    if line is None:
        return 0
    with open_text(path, errors="surrogateescape", newline="") as opened:
        return sum(len(each.encode(errors="surrogateescape")) for each in islice(opened, int(line[1]) - 1))


def _escaped(path: Path) -> bool:
    """Whether JSON has letters beyond ASCII as `\\u00e9`."""
    with open_text(path, errors="surrogateescape") as opened:
        return "\\u" in opened.read(1 << 16)


def _rows_in(path: Path) -> int:
    """Of a Parquet file, as its footer has them."""
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(path).num_rows


def separator_of(first: str, path: Place) -> str:
    """What stands between the cells of a table: a tab in `.tsv` files, in others by the first line.

    That is the first of comma, semicolon, tab and `|` that the line has outside of quotes; a comma where it has none.
    """
    if Path(plain_name(path)).suffix.lower() == ".tsv":
        return "\t"
    bare = _QUOTED.sub("", first)
    return next((mark for mark in SEPARATORS if mark in bare), ",")


def rows_of(path: Path, skipped: Skipped) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The names of a table's columns (`0`, `1`, … where it has no header) and its rows, which are not empty.

    Each row comes with the line that it begins at. A header is a first row in which nothing is a number. The separator
    is told by `separator_of`.
    """
    lines = ((number, line) for number, line in numbered_lines(path, skipped) if line.strip())
    first = next(lines, (1, ""))
    separator = separator_of(first[1], path)
    at, head = next(_cells(iter([first]), separator, skipped, path), (1, []))
    rows = _cells(lines, separator, skipped, path)
    if any(number(cell) is not None for cell in head):
        return [str(index) for index in range(len(head))], chain([(at, head)], rows)
    return [name.strip() for name in head], rows


def _cells(
    lines: Iterator[tuple[int, str]], separator: str, skipped: Skipped, path: Path
) -> Iterator[tuple[int, list[str]]]:
    """The rows; what is no row of a table is counted."""
    csv.field_size_limit(min(skipped.longest, 2**31 - 1))
    for at, cells in cells_of(lines, separator):
        if isinstance(cells, csv.Error):
            skipped.add("bad lines", f"{path}:{at}")
        else:
            yield at, cells


def cells_of(
    lines: Iterator[tuple[int, str]], separator: str, strict: bool = False
) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Each row of a table with the line that it begins at, or what is wrong with it.

    A cell in quotes may go over several lines; the lines' numbers are those of the file, whatever was left out of it.
    """
    taken: list[int] = []

    def texts() -> Iterator[str]:
        for count, line in lines:
            taken.append(count)
            yield line

    reader = csv.reader(texts(), delimiter=separator, strict=strict)
    while True:
        taken.clear()
        try:
            cells: list[str] | csv.Error = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells = error
        yield taken[0], cells


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

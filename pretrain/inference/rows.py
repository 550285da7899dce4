"""Rows in and rows out: a file of any kind read a little at a time, and results written beside what they are of."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
import tempfile
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TextIO

from pretrain.core.errors import PretrainError
from pretrain.core.files import atomic_text, output_file
from pretrain.core.folders import near
from pretrain.core.foreign.paths import expanded
from pretrain.corpus.sources._containers import READERS, Row, ending, has_bad_bytes, lines, no_column, reader_of, unread
from pretrain.corpus.sources._files import Wrong, name_of
from pretrain.corpus.sources._paths import is_secret
from pretrain.corpus.sources._skipped import Skipped

CHUNK = 2048  # rows that are held at once
LETTERS = 8 << 20  # or fewer, where they are long
TABLES = [name for name in READERS if name != ".ipynb"]
TEXTS = ("", ".txt", ".text")
ACCEPTED = f"{', '.join(TABLES)}, .txt"
OUTPUTS = (".jsonl", ".csv")
NULLS = ("NAType", "NaTType")  # of pandas, which need not be there
Write = Callable[[Mapping[str, object]], None]


def wrong_of(skipped: Skipped | None) -> Wrong:
    """What is done with a row that cannot be read: an error, or with `skipped` it is counted there."""

    def wrong(where: str, what: str, reason: str, accepted: str) -> None:
        if skipped is None:
            raise PretrainError(f"{where}: {what}; accepted: {accepted}, or --on-error skip")
        skipped.add(reason, name_of(where))

    return wrong


class _Refusing(Skipped):
    """Refuses what is passed over elsewhere: each row has its answer."""

    def add(self, reason: str, name: str | Path = "") -> None:
        raise PretrainError(f"{name}: {reason}; accepted: shorter ones, or --on-error skip")


def rows_of(name: str, text: str, skipped: Skipped | None = None, header: bool | None = None) -> Iterator[Row]:
    """Each row of a file with where it stands. A `.txt` has a text a line; `-` is standard input, JSON lines or texts.

    `text` is the column of the texts; `header` says of a CSV whether it has one, where that is known. Raises
    `PretrainError` with file, line and row for what cannot be read, which is passed over and counted where there is a
    `skipped`.
    """
    if name == "-":
        yield from _piped(text, skipped)
        return
    path = expanded(name)
    yield from _read(path, name, text, ending(path), skipped, header)


def check(name: str, output: Path | None, force: bool = True) -> None:
    """Refuse an input that is not there or of a kind that is not read, and an output that cannot be written.

    Without `force` an output that is there already is refused too.
    """
    path = expanded(name)
    if name != "-":
        if not path.is_file():
            what = "a folder" if path.is_dir() else f"no such file{near(path)}"
            raise PretrainError(f"{name}: {what}; accepted: a file: {ACCEPTED}, or - for standard input")
        if is_secret(path.name):
            raise PretrainError(f"{name} looks like a secret; accepted: another file")
        if ending(path) not in (*TABLES, *TEXTS):
            raise PretrainError(
                f"{name} is {unread(path) or f'of an unknown kind ({ending(path)})'}; accepted: {ACCEPTED}"
            )
    if output is not None and output.suffix not in OUTPUTS:
        raise PretrainError(f"--output {output}: accepted: a file that ends with {' or '.join(OUTPUTS)}")
    if output is not None and name != "-" and output.exists() and output.samefile(path):
        raise PretrainError(f"--output {output} is the input; accepted: another file")
    if output is not None:
        output_file(output, force)


def _read(
    path: Path, name: str, text: str, end: str, skipped: Skipped | None, header: bool | None = None
) -> Iterator[Row]:
    reader = (reader_of(path, header) or READERS[end]) if end in TABLES else _lines
    yield from reader(path, name, text, wrong_of(skipped), _Refusing() if skipped is None else skipped)


def _lines(path: Path, name: str, text: str, wrong: Wrong, skipped: Skipped) -> Iterator[Row]:
    """A text a line; empty ones too, so that results stand where the lines do."""
    for number, line in lines(path, name, wrong, skipped):
        if has_bad_bytes(line):
            wrong(f"{name}:{number}", "bytes that are not UTF-8", "not UTF-8", "text in UTF-8")
            continue
        yield f"{name}:{number} (row {number})", {text: line.rstrip("\r\n")}


def _piped(text: str, skipped: Skipped | None) -> Iterator[Row]:
    """Standard input, kept in a file as it is read: JSON lines if it begins with an object, else a text a line."""
    with tempfile.TemporaryDirectory(prefix="pretrain-") as folder:
        path = Path(folder) / "input"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        with path.open("rb") as file:
            jsonl = file.read(4096).lstrip().startswith(b"{")
        yield from _read(path, "standard input", text, ".jsonl" if jsonl else ".txt", skipped)


def chunks(rows: Iterable[Row], column: str) -> Iterator[list[Row]]:
    """The rows a few at a time, as many as fit into a bounded memory."""
    chunk: list[Row] = []
    letters = 0
    for row in rows:
        chunk.append(row)
        letters += len(str(row[1].get(column, "")))
        if len(chunk) >= CHUNK or letters >= LETTERS:
            yield chunk
            chunk, letters = [], 0
    if chunk:
        yield chunk


def absent(value: object) -> bool:
    """Whether a value stands for none: null, NaN, and what tables of pandas have in their place."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ in NULLS


def document_of(value: object, column: str, number: int) -> dict[str, object]:
    """A text as the document with it in a column, a document as it is; one that is missing has None there."""
    if isinstance(value, str) or absent(value):
        return {column: value if isinstance(value, str) else None}
    if not isinstance(value, Mapping):
        raise PretrainError(
            f"text {number}: {str(value)[:40]!r} is {type(value).__name__}; accepted: a text, a document with one, or "
            "None"
        )
    return {str(name): None if absent(each) else each for name, each in value.items()}


def text_in(row: Row, column: str, option: str) -> str | None:
    """The text in a column of a row, None of one that is empty; errors name the place."""
    where, columns = row
    if column not in columns:
        missing = no_column(column, columns).replace("header: false", "--no-header")
        raise PretrainError(f"{where}: {missing}; accepted: {option} with one of {', '.join(columns)}")
    value = columns[column]
    if absent(value):
        return None
    if not isinstance(value, str):
        raise PretrainError(f"{where}: column {column!r} is {type(value).__name__}; accepted: text")
    return value if value.strip() else None


@contextmanager
def writer(output: Path | None) -> Iterator[Write]:
    """What writes results: to a file that is whole or not there, `.jsonl` or `.csv`, or as JSON lines to the screen."""
    if output is None:
        yield lambda row: print(_json(row))
        return
    with atomic_text(output_file(output, True)) as file:
        yield _csv(file) if output.suffix == ".csv" else lambda row: print(_json(row), file=file)


def _json(value: object) -> str:
    """One line of JSON, which has no words for NaN and infinity: null stands for them; bytes are in base64."""
    try:
        return json.dumps(value, ensure_ascii=False, default=_text_of, allow_nan=False)
    except ValueError:
        return json.dumps(nulled(value), ensure_ascii=False, default=_text_of)


def _text_of(value: object) -> str:
    """What JSON has no type for, as text: bytes in base64, all else as Python writes it."""
    return b64encode(value).decode() if isinstance(value, bytes) else str(value)


def nulled(value: object) -> object:
    """A value with None in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {name: nulled(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [nulled(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(file: TextIO) -> Write:
    """Rows of a CSV under the first one's columns; what is no number or text stands as JSON."""
    table = csv.writer(file)
    names: list[str] = []

    def write(row: Mapping[str, object]) -> None:
        if not names:
            names.extend(row)
            table.writerow(names)
        extra = next((name for name in row if name not in names), None)
        if extra is not None:
            raise PretrainError(
                f"row {row}"[:80] + f" …: a column {extra!r} that the first row has not; accepted: .jsonl"
            )
        table.writerow([_cell(row.get(name)) for name in names])

    return write


def _cell(value: object) -> object:
    if value is None or isinstance(value, str | int | float):
        return "" if value is None else value
    return _json(value) if isinstance(value, list | dict | tuple) else _text_of(value)


def batches(sizes: Sequence[int], batch: int) -> Iterator[list[int]]:
    """The numbers of rows in batches of alike sizes, the largest first, so that memory that lasts once lasts."""
    order = iter(sorted(range(len(sizes)), key=lambda i: -sizes[i]))
    while chosen := list(islice(order, batch)):
        yield chosen

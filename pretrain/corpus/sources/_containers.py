"""Containers of rows: JSON lines and arrays, CSV and TSV, Parquet, Arrow and ORC files, notebooks.

A reader yields each row with where it stands, as messages say it: `FILE:LINE (row N)`, or `FILE, row N`. What cannot be
read is told to `wrong`, which raises, or counts it and lets the reader go on.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.core.errors import PretrainError, nearest
from pretrain.corpus.sources._files import BROKEN, Document, Wrong, open_text, plain_name
from pretrain.corpus.sources._tables import number

if TYPE_CHECKING:
    import pyarrow

Row = tuple[str, Document]  # where it stands, and its columns
Reader = Callable[[Path, str, str, Wrong], Iterator[Row]]  # of a file, its name, the column of the text
# What is not read, by its ending: nobody shall take it for text, or miss it.
UNREAD = {
    "an archive": (".zip", ".tar", ".tgz", ".7z", ".rar", ".jar", ".whl", ".deb", ".rpm", ".iso", ".dmg"),
    "a document": (".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".mobi", ".ppt", ".pptx", ".odp", ".pages"),
    "a workbook": (".xls", ".xlsx", ".ods", ".numbers"),
    "a database": (".sqlite", ".sqlite3", ".db", ".mdb", ".duckdb", ".dbf"),
    "a container of arrays": (".npy", ".npz", ".h5", ".hdf5", ".mat", ".rds", ".rdata", ".sas7bdat", ".dta", ".sav"),
    "a container of records": (".avro", ".msgpack", ".tfrecord", ".lmdb", ".proto.bin", ".bson", ".cbor"),
    "a pickle, which is never read": (".pkl", ".pickle", ".pt", ".pth", ".joblib", ".ckpt"),
    "weights": (".safetensors", ".gguf", ".onnx"),
}


def ending(path: Path) -> str:
    """A file's ending in small letters, without the one that says how it is compressed."""
    return Path(plain_name(path)).suffix.lower()


def unread(path: Path) -> str | None:
    """What a file is that is not read: `an archive (.zip)`."""
    end = ending(path)
    return next((f"{what} ({end})" for what, ends in UNREAD.items() if end in ends), None)


def lines(path: Path, name: str, wrong: Wrong, newline: str | None = None) -> Iterator[tuple[int, str]]:
    """The lines with their numbers, bytes that are not UTF-8 as lone surrogates (see `has_bad_bytes`)."""
    import zstandard

    count = 0
    try:
        with open_text(path, errors="surrogateescape", newline=newline) as opened:
            for count, line in enumerate(opened, 1):
                yield count, line
    except (*BROKEN, zstandard.ZstdError) as error:
        what = f"cannot be read after line {count} ({error}): truncated or damaged"
        wrong(name, what, f"unreadable ({type(error).__name__})", "a whole file")


def has_bad_bytes(text: str) -> bool:
    """Whether a line was read from bytes that are not UTF-8."""
    return any("\udc80" <= letter <= "\udcff" for letter in text) if not text.isascii() else False


def _whole(where: str, text: str, wrong: Wrong) -> bool:
    if has_bad_bytes(text):
        byte = next(ord(letter) - 0xDC00 for letter in text if "\udc80" <= letter <= "\udcff")
        wrong(where, f"byte 0x{byte:02x} is not UTF-8", "lines with bad bytes", "text in UTF-8")
        return False
    return True


def read_jsonl(path: Path, name: str, text: str, wrong: Wrong) -> Iterator[Row]:
    """One JSON object a line."""
    rows = 0
    for line_number, line in lines(path, name, wrong):
        if not line.strip():
            continue
        rows, where = rows + 1, f"{name}:{line_number}"
        if not _whole(where, line, wrong):
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", None) or error
            wrong(where, f"not JSON ({reason}): truncated or damaged", "bad lines", "one JSON object a line")
            continue
        if isinstance(row, dict):
            yield f"{where} (row {rows})", row
        else:
            wrong(where, f"{type(row).__name__}, no object", "bad lines", "one JSON object a line")


def read_csv(path: Path, name: str, text: str, wrong: Wrong) -> Iterator[Row]:
    """Rows under a header; without one (a number stands in the first row) columns are named `0`, `1`, …

    The separator is a tab in `.tsv` files; in others a comma, or the semicolon or tab that the first line has in place
    of one. A cell in quotes may hold line ends.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    source = (line for _, line in lines(path, name, wrong, newline=""))
    first = next(source, "")
    separator = "\t" if ending(path) == ".tsv" else next((mark for mark in ",;\t" if mark in first), ",")
    reader = csv.reader(chain([first], source), delimiter=separator, strict=True)
    names: list[str] = []
    count = 0
    while True:
        where = f"{name}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            wrong(where, f"no row of a table ({error})", "bad lines", "cells in CSV")
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if not names:
            names, headed = _header(cells, text, where)
            if headed:
                continue
        count += 1
        where = f"{where} (row {count})"
        if len(cells) != len(names):
            wrong(where, f"{len(cells)} cells", "bad lines", f"{len(names)} cells, as the header has")
        elif _whole(where, "".join(cells), wrong):
            yield where, dict(zip(names, cells, strict=True))


def _header(cells: list[str], text: str, where: str) -> tuple[list[str], bool]:
    """The columns' names, and whether the first row says them."""
    names = [cell.strip() for cell in cells]
    if text not in names and any(number(name) is not None for name in names):
        return [str(place) for place in range(len(names))], False
    names = [name or str(place) for place, name in enumerate(names)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PretrainError(f"{where}: two columns are named {twice!r}; accepted: a name of its own for each")
    return names, True


def read_json(path: Path, name: str, text: str, wrong: Wrong) -> Iterator[Row]:
    """An array of objects or texts, or one object with the column; a file of JSON lines that is named `.json` too."""
    content = "".join(line for _, line in lines(path, name, wrong))
    if not content.strip():
        return
    try:
        value = json.loads(content)
    except (json.JSONDecodeError, RecursionError) as error:
        if content.lstrip().startswith("{"):
            yield from read_jsonl(path, name, text, wrong)
            return
        line = getattr(error, "lineno", 1)
        reason = getattr(error, "msg", None) or error
        wrong(f"{name}:{line}", f"not JSON ({reason}): truncated or damaged", "bad files", "a JSON array")
        return
    for index, item in enumerate(value if isinstance(value, list) else [value], 1):
        where = f"{name}, item {index}"
        item = {text: item} if isinstance(item, str) else item
        if not isinstance(item, dict):
            wrong(where, f"{type(item).__name__}, no object", "bad items", "objects or texts")
        elif _whole(where, json.dumps(item, ensure_ascii=False), wrong):
            yield where, item


def read_notebook(path: Path, name: str, text: str, wrong: Wrong) -> Iterator[Row]:
    """The cells of a Jupyter notebook, without what they have put out: `cell` is `code`, `markdown` or `raw`."""
    content = "".join(line for _, line in lines(path, name, wrong))
    try:
        book = json.loads(content)
        sheets = book.get("worksheets") or [book]  # of format 3
        cells = [cell for sheet in sheets for cell in sheet["cells"]]
        read = [(str(cell["cell_type"]), cell.get("source", cell.get("input", ""))) for cell in cells]
    except (json.JSONDecodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
        wrong(f"{name}:{getattr(error, 'lineno', 1)}", "no notebook", "bad files", "a Jupyter notebook with cells")
        return
    for index, (kind, source) in enumerate(read, 1):
        where, source = f"{name}, cell {index}", "".join(source) if isinstance(source, list) else source
        if _whole(where, str(source), wrong):
            yield where, {text: source, "cell": kind, "domain": "ipynb", "group": name}


def read_arrow(path: Path, name: str, text: str, wrong: Wrong) -> Iterator[Row]:
    """The rows of a Parquet, Arrow (file or stream), Feather or ORC file."""
    import pyarrow

    count = 0
    try:
        for batch in _batches(path):
            for row in batch.to_pylist():
                count += 1
                yield f"{name}, row {count}", row
    except (pyarrow.ArrowException, OSError) as error:
        kind = {".parquet": "Parquet", ".orc": "ORC"}.get(ending(path), "Arrow")
        reason = " ".join(str(error).split())[:200]
        wrong(name, f"not a whole {kind} file ({reason})", "bad files", "a whole file")


def _batches(path: Path) -> Iterator[pyarrow.RecordBatch | pyarrow.Table]:
    import pyarrow
    import pyarrow.orc
    import pyarrow.parquet

    if ending(path) == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=256)
    elif ending(path) == ".orc":
        file = pyarrow.orc.ORCFile(path)
        yield from (file.read_stripe(stripe) for stripe in range(file.nstripes))
    else:
        with pyarrow.memory_map(str(path)) as source:
            try:
                reader = pyarrow.ipc.open_file(source)
                yield from (reader.get_batch(place) for place in range(reader.num_record_batches))
            except pyarrow.ArrowInvalid:
                source.seek(0)
                yield from pyarrow.ipc.open_stream(source)


READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_json, ".csv": read_csv, ".tsv": read_csv,
    ".ipynb": read_notebook, ".parquet": read_arrow, ".arrow": read_arrow, ".feather": read_arrow, ".orc": read_arrow,
}  # fmt: skip


def no_column(column: str, row: Document) -> str:
    """What is said of a row without the column of the text."""
    return f"no column {column!r}{nearest(column, row)}"

"""Containers of rows: JSON lines and arrays, CSV and TSV, Parquet, Arrow and ORC files, notebooks.

A reader yields each row with where it stands, as messages say it: `FILE:LINE (row N)`, or `FILE, row N`. What cannot be
read is told to `wrong`, which raises, or counts it and lets the reader go on.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.core.errors import PretrainError, nearest
from pretrain.core.foreign import json, rows, texts
from pretrain.core.foreign.archives import BROKEN, Member, Place, open_text, seekable
from pretrain.core.foreign.parsing import raise_memory, reason
from pretrain.corpus.sources._files import Document, Wrong, plain_name
from pretrain.corpus.sources._skipped import Skipped
from pretrain.corpus.sources._tables import cells_of, number, separator_of

if TYPE_CHECKING:
    import pyarrow

LARGE = 64 << 20  # bytes of a batch whose rows are taken out one by one
BYTES = 16  # a character of the longest cell, with what else is in its row, before the row is made of it
GROUP = 2 << 30  # bytes of a row group, which may have to be held whole
FOOTER = 64 << 20  # bytes of what a Parquet file says of itself: 1,000 columns in 100 row groups take 10 MB
LONGEST_NAME, MOST_WORDS = 60, 5  # of a column
Row = tuple[str, Document]  # where it stands, and its columns
# Of a file, its name, the column of the text, what is told of what is wrong, and how long rows may be.
Reader = Callable[[Place, str, str, Wrong, Skipped], Iterator[Row]]
# What is not read, by its ending: nobody shall take it for text, or miss it.
_BAD_BYTE = re.compile("[\udc80-\udcff]")
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


def ending(path: Place) -> str:
    """A file's ending in small letters, without the one that says how it is compressed."""
    return Path(plain_name(path)).suffix.lower()


def unread(path: Place) -> str | None:
    """What a file is that is not read: `an archive (.zip)`."""
    end = ending(path)
    return next((f"{what} ({end})" for what, ends in UNREAD.items() if end in ends), None)


def lines(
    path: Place, name: str, wrong: Wrong, skipped: Skipped, newline: str | None = None
) -> Iterator[tuple[int, str]]:
    """The lines with their numbers, bytes that are not UTF-8 as lone surrogates (see `has_bad_bytes`).

    One that is too long is counted in `skipped`, and never held.
    """
    count = 0
    try:
        with open_text(path, errors="surrogateescape", newline=newline) as opened:
            for count, line in rows.lines(opened, skipped.longest):
                if line is None:
                    skipped.too_long("lines", f"{name}:{count}")
                else:
                    yield count, line
    except BROKEN as error:
        raise_memory(error, name)
        what = f"cannot be read after line {count} ({reason(error)}): truncated or damaged"
        wrong(name, what, f"unreadable ({type(error).__name__})", "a whole file")


def has_bad_bytes(text: str) -> bool:
    """Whether a line was read from bytes that are not UTF-8."""
    return not text.isascii() and _BAD_BYTE.search(text) is not None


def _whole(where: str, text: str, wrong: Wrong) -> bool:
    if has_bad_bytes(text):
        bad = _BAD_BYTE.search(text)
        byte = ord(bad[0]) - 0xDC00 if bad else 0
        wrong(where, f"byte 0x{byte:02x} is not UTF-8", "lines with bad bytes", "text in UTF-8")
        return False
    return True


def read_jsonl(path: Place, name: str, text: str, wrong: Wrong, skipped: Skipped) -> Iterator[Row]:
    """One JSON object a line."""
    count = 0
    for line_number, line in lines(path, name, wrong, skipped):
        if not line.strip():
            continue
        count, where = count + 1, f"{name}:{line_number}"
        if not _whole(where, line, wrong):
            continue
        try:
            row = json.loads(line, halves=True)
        except json.NotJSON as error:
            wrong(where, f"not JSON ({error}): truncated or damaged", "bad lines", "one JSON object a line")
            continue
        if isinstance(row, dict):
            yield f"{where} (row {count})", row
        else:
            wrong(where, f"{type(row).__name__}, no object", "bad lines", "one JSON object a line")


def read_csv(
    path: Place, name: str, text: str, wrong: Wrong, skipped: Skipped, header: bool | None = None
) -> Iterator[Row]:
    """Rows under a header; without one (by default if a number stands in the first row) columns are named `0`, `1`, …

    The separator is told by `separator_of`. A cell in quotes may hold line ends.
    """
    csv.field_size_limit(min(skipped.longest, 2**31 - 1))
    source = lines(path, name, wrong, skipped, newline="")
    first = next(source, (1, ""))
    names: list[str] = []
    count = 0
    for line, cells in cells_of(chain([first], source), separator_of(first[1], path), strict=True):
        where = f"{name}:{line}"
        if isinstance(cells, csv.Error):
            wrong(where, f"no row of a table ({cells})", "bad lines", "cells in CSV")
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if not names:
            names, headed = _header(cells, text, where, header)
            if headed and not _whole(where, "".join(cells), wrong):
                return  # whose columns have no names
            if headed:
                continue
        count += 1
        where = f"{where} (row {count})"
        if len(cells) != len(names):
            wrong(where, f"{len(cells)} cells", "bad lines", f"{len(names)} cells, as the header has")
        elif _whole(where, "".join(cells), wrong):
            yield where, dict(zip(names, cells, strict=True))


def _header(cells: list[str], text: str, where: str, header: bool | None) -> tuple[list[str], bool]:
    """The columns' names, and whether the first row says them."""
    names = [cell.strip() for cell in cells]
    numbered = text not in names and any(number(name) is not None for name in names)
    if header is False or (header is None and numbered):
        return [str(place) for place in range(len(names))], False
    names = [name or str(place) for place, name in enumerate(names)]
    _check_names(names, where)
    return names, True


def read_json(path: Place, name: str, text: str, wrong: Wrong, skipped: Skipped) -> Iterator[Row]:
    """An array of objects or texts, or one object with the column; a file of JSON lines that is named `.json` too.

    An array is read an item at a time.
    """
    try:
        with open_text(path, errors="surrogateescape") as opened:
            start = opened.read(4096).lstrip()
    except BROKEN as error:
        raise_memory(error, name)
        wrong(name, f"cannot be read ({reason(error)})", f"unreadable ({type(error).__name__})", "a whole file")
        return
    if not start:
        return
    if start.startswith("{"):
        yield from _one_object(path, name, text, wrong, skipped)
        return
    index = 0
    try:
        with open_text(path, errors="surrogateescape") as opened:
            for index, item in enumerate(json.items(opened, skipped.longest), 1):
                yield from _item(f"{name}, item {index}", item, text, wrong)
    except (json.NotJSON, *BROKEN) as error:
        raise_memory(error, name)
        what = f"not JSON ({reason(error)}): truncated or damaged"
        wrong(f"{name}, item {index + 1}" if index else f"{name}:1", what, "bad files", "a JSON array")


def _one_object(path: Place, name: str, text: str, wrong: Wrong, skipped: Skipped) -> Iterator[Row]:
    """The object that a file is, or those of its lines."""
    content = "".join(islice(_pieces(path, name, wrong, skipped), 1))
    try:
        yield from _item(f"{name}, item 1", json.loads(content, halves=True), text, wrong)
    except json.NotJSON:  # several objects, or too many characters for one
        yield from read_jsonl(path, name, text, wrong, skipped)


def _pieces(path: Place, name: str, wrong: Wrong, skipped: Skipped) -> Iterator[str]:
    """A file's text where it is no longer than a document may be; nothing of one that is longer."""
    try:
        with open_text(path, errors="surrogateescape") as opened:
            content = opened.read(skipped.longest + 1)
        yield content if len(content) <= skipped.longest else ""
    except BROKEN as error:
        raise_memory(error, name)
        wrong(name, f"cannot be read ({reason(error)})", f"unreadable ({type(error).__name__})", "a whole file")


def _item(where: str, item: object, text: str, wrong: Wrong) -> Iterator[Row]:
    """The row that an item of an array is."""
    item = {text: item} if isinstance(item, str) else item
    if not isinstance(item, dict):
        wrong(where, f"{type(item).__name__}, no object", "bad items", "objects or texts")
        return
    bad = next((each for each in texts.strings_in(item) if has_bad_bytes(each)), "")
    if _whole(where, bad, wrong):
        yield where, item


def read_notebook(path: Place, name: str, text: str, wrong: Wrong, skipped: Skipped) -> Iterator[Row]:
    """The cells of a Jupyter notebook, without what they have put out: `cell` is `code`, `markdown` or `raw`."""
    content = next(_pieces(path, name, wrong, skipped), None)
    if not content:
        if content is not None:
            skipped.too_long("notebooks", name)
        return
    try:
        book = json.loads(content, halves=True)
        sheets = book.get("worksheets") or [book]  # of format 3
        cells = [cell for sheet in sheets for cell in sheet["cells"]]
        read = [(str(cell["cell_type"]), cell.get("source", cell.get("input", ""))) for cell in cells]
        sources = ["".join(source) if isinstance(source, list) else source for _, source in read]
    except (json.NotJSON, KeyError, TypeError, AttributeError) as error:
        wrong(f"{name}:{getattr(error, 'line', 1)}", "no notebook", "bad files", "a Jupyter notebook with cells")
        return
    for index, ((kind, _), source) in enumerate(zip(read, sources, strict=True), 1):
        where = f"{name}, cell {index}"
        if _whole(where, str(source), wrong):
            yield where, {text: source, "cell": kind, "domain": "ipynb", "group": name}


def read_arrow(path: Place, name: str, text: str, wrong: Wrong, skipped: Skipped) -> Iterator[Row]:
    """The rows of a Parquet, Arrow (file or stream), Feather or ORC file."""
    import pyarrow

    count = 0
    try:
        for batch in _batches(path):
            _check_names(batch.schema.names, name)
            batch.validate(full=True)  # whatever its offsets say else, of memory that is not its own too, is read
            large = batch.nbytes > LARGE
            for piece in (batch.slice(place, 1) for place in range(len(batch))) if large else [batch]:
                if large and piece.nbytes > BYTES * skipped.longest:
                    count += 1
                    skipped.too_long("rows", f"{name}, row {count}")
                    continue
                for row in _values(piece, name):
                    count += 1
                    if isinstance(row, str):
                        wrong(f"{name}, row {count}", row, "bad rows", "values that Python has")
                    else:
                        yield f"{name}, row {count}", row
    except (pyarrow.ArrowException, *BROKEN) as error:
        raise_memory(error, name)
        kind = {".parquet": "Parquet", ".orc": "ORC"}.get(ending(path), "Arrow")
        wrong(name, f"not a whole {kind} file after row {count} ({reason(error)})", "bad files", "a whole file")


def _values(piece: pyarrow.RecordBatch | pyarrow.Table, name: str) -> Iterator[Document | str]:
    """Each row as Python has it, or what is wrong with it: Arrow holds years and time zones that Python has none of."""
    try:
        rows = _columns(piece)
    except Exception as error:  # of each type, and of what is installed for it, another one
        raise_memory(error, name)
        alone = len(piece) == 1
        for place in range(len(piece)):
            yield from [_odd_in(piece, error)] if alone else _values(piece.slice(place, 1), name)
    else:
        yield from rows


def _odd_in(piece: pyarrow.RecordBatch | pyarrow.Table, error: Exception) -> str:
    """What is wrong with the only row, by its first column that cannot be read."""
    for field in piece.schema:
        try:
            _columns(piece.select([field.name]))
        except Exception as odd:
            return f"column {field.name!r} ({field.type}) holds what cannot be read ({reason(odd)})"
    return f"it cannot be read ({reason(error)})"


def _columns(piece: pyarrow.RecordBatch | pyarrow.Table) -> list[Document]:
    """Rows as Python has them; a map with texts for keys is an object, any other a list of keys with values."""
    rows = piece.to_pylist()
    maps = [field for field in piece.schema if "map<" in str(field.type)]
    for row in rows if maps else ():
        row |= {field.name: _of_maps(row[field.name], field.type) for field in maps}
    return rows


def _of_maps(value: object, kind: pyarrow.DataType) -> object:
    """A value of Arrow's type `kind` with objects and lists in place of the pairs that maps are."""
    from pyarrow import types

    if types.is_map(kind) and isinstance(value, list):
        pairs = [(key, _of_maps(each, kind.item_type)) for key, each in value]
        if not all(isinstance(key, str) for key, _ in pairs):
            return [{"key": key, "value": each} for key, each in pairs]
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key is given twice")
        return dict(pairs)
    if types.is_struct(kind) and isinstance(value, dict):
        return {field.name: _of_maps(value[field.name], field.type) for field in kind}
    return [_of_maps(each, kind.value_type) for each in value] if isinstance(value, list) else value


def _check_names(names: Sequence[str], where: str) -> None:
    """Refuse columns of a name: a row has a value for each name."""
    counts = Counter(names)
    twice = next((name for name in names if counts[name] > 1), None)
    if twice is not None:
        raise PretrainError(f"{where}: two columns are named {twice!r}; accepted: a name of its own for each")


def _batches(path: Place) -> Iterator[pyarrow.RecordBatch | pyarrow.Table]:
    import pyarrow
    import pyarrow.orc
    import pyarrow.parquet

    with seekable(path) as opened:  # a regular one
        size = opened.seek(0, 2)
        opened.seek(max(0, size - 8))
        footer = int.from_bytes(opened.read(4), "little")
        opened.seek(0)
        held = pyarrow.BufferReader(opened.read()) if isinstance(path, Member) else None
    if ending(path) == ".parquet":
        if footer > min(FOOTER, size):
            raise ValueError(f"a footer of {footer} bytes, where at most {min(FOOTER, size)} are read")
        with pyarrow.parquet.ParquetFile(held or path) as file:
            for number in range(file.num_row_groups):
                size = file.metadata.row_group(number).total_byte_size
                if size > GROUP:
                    raise ValueError(f"row group {number} of {size} bytes, where at most {GROUP} are read")
            yield from file.iter_batches(batch_size=256)
    elif ending(path) == ".orc":
        file = pyarrow.orc.ORCFile(held or path)
        yield from (file.read_stripe(stripe) for stripe in range(file.nstripes))
    else:
        with held or pyarrow.memory_map(str(path)) as source:
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


def reader_of(path: Place, header: bool | None = None) -> Reader | None:
    """What reads the rows of a file, by its ending; `header` says of a CSV whether it has one, where that is known."""
    reader = READERS.get(ending(path))
    return partial(read_csv, header=header) if reader is read_csv else reader


def no_column(column: str, row: Document) -> str:
    """What is said of a row without the column of the text."""
    guess = ", and the first row looks like no header (header: false)" if has_sentences(row) else ""
    return f"no column {column!r}{nearest(column, row)}{guess}"


def has_sentences(names: Iterable[str]) -> bool:
    """Whether what a table takes for the names of its columns are rather values: one is as long as a sentence."""
    return any(len(name) > LONGEST_NAME or len(name.split()) > MOST_WORDS for name in names)

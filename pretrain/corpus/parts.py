"""The Parquet files of a split of a corpus: written as documents come, read a little at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.core.errors import PretrainError
from pretrain.corpus.payload import table_of
from pretrain.corpus.sources import Document

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

Columns = Sequence[str] | Callable[[list[str]], Sequence[str]]
TEXTS = ("text", "domain", "id")
NAMES = TEXTS[1:]
CELLS = 1 << 23  # of a part, rows times columns
PART_BYTES = 64 << 20
GROUP_BYTES = 16 << 20  # of one Parquet row group, read at once


class Writer:
    """Parquet parts of one split, written as they fill."""

    def __init__(self, folder: Path, columns: set[str]) -> None:
        self.folder, self.columns, self.parts, self.bytes = folder, columns, 0, 0
        self.rows: list[Document] = []
        folder.mkdir()

    def add(self, document: Document, size: int) -> None:
        """One more document, whose payload has `size` bytes."""
        self.rows.append(document)
        self.bytes += size
        if self.bytes >= PART_BYTES or len(self.rows) * len(self.columns) >= CELLS:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            write_table(table_of(self.rows), self.folder / f"part-{self.parts:05d}.parquet")
            self.parts, self.rows, self.bytes = self.parts + 1, [], 0


def write_table(table: pyarrow.Table, path: Path) -> None:
    """Write a part; no row group is much larger than `GROUP_BYTES`."""
    import pyarrow.parquet

    rows = max(1, min(1024, len(table) * GROUP_BYTES // max(1, table.nbytes)))
    pyarrow.parquet.write_table(table, path, compression="zstd", row_group_size=rows)


def iterate(split: Path, columns: Columns = TEXTS) -> Iterator[Document]:
    """The documents of a split's folder, in order, read a little at a time: those of `columns` that there are.

    `columns` are names, or choose among all names. Images and audio come as they lie there, `{"bytes", "path"}`.
    """
    for path in sorted(split.glob("*.parquet")):
        yield from read_part(path, columns)


def count_rows(split: Path) -> int:
    """How many documents the files of a split hold, each read whole."""
    rows = 0
    for path in sorted(split.glob("*.parquet")):
        with opened_part(path) as file:
            rows += sum(file.read_row_group(number).num_rows for number in range(file.num_row_groups))
    return rows


def read_part(path: Path, columns: Columns) -> Iterator[Document]:
    with opened_part(path) as file:
        known = file.schema_arrow.names
        wanted = set(columns(known) if callable(columns) else columns)
        for number in range(file.num_row_groups):
            yield from file.read_row_group(number, columns=[n for n in known if n in wanted]).to_pylist()


@contextmanager
def opened_part(path: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    """A part's file, whose columns of text are text."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for field in file.schema_arrow:
                if field.name in ("text", "domain") and str(field.type) not in ("string", "large_string", "null"):
                    raise PretrainError(f"{path}: column {field.name!r} holds {field.type}; accepted: text")
            yield file
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PretrainError(f"{path}: not a whole Parquet file ({reason})") from error

"""What documents take on the disk as a corpus keeps them: columns of Parquet, packed by zstd in groups of rows."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

ROWS = 1024  # of a group
PAGE = 1 << 20  # bytes of a column that are packed together
MOST = 1 << 24  # bytes of a split that are packed to see how small they get; the rest is taken to be like them
FILE, COLUMN = 500, 120  # bytes of a part's schema and end; of what each group says of a column
EXTREME = 4096  # bytes of the longest value that stands in a group's statistics, as its least or greatest
PARQUET_LEVEL = 1  # zstd's, of pyarrow


def packed(documents: Sequence[Mapping[str, object]], group_bytes: int) -> float:
    """Bytes of a split on the disk, in groups of at most `group_bytes`, by packing its first `MOST`; 0 of none."""
    if not documents:
        return 0.0
    names = list(dict.fromkeys(name for document in islice(documents, ROWS) for name in document))
    size = sum(len(_bytes(value)) for document in islice(documents, ROWS) for value in document.values())
    rows = max(1, min(ROWS, int(group_bytes / max(1.0, size / min(ROWS, len(documents))))))
    taken = looked = 0.0
    seen = 0
    for start in range(0, len(documents), rows):
        group = documents[start : start + rows]
        for name in names:
            values = [_bytes(document.get(name)) for document in group]
            looked += sum(map(len, values))
            taken += COLUMN + _column(values)
        seen += len(group)
        if looked >= MOST:
            break
    return FILE + taken * len(documents) / seen


def _column(values: Sequence[bytes]) -> float:
    """A group's values of a column, page by page, and the least and the greatest of them, by two names each."""
    import zstandard

    pack = zstandard.ZstdCompressor(level=PARQUET_LEVEL).compress
    whole = b"".join(struct.pack("<I", len(value)) + value for value in values)
    ends = 2 * sum(len(value) for value in (min(values), max(values)) if len(value) <= EXTREME)
    return sum(len(pack(whole[at : at + PAGE])) for at in range(0, len(whole), PAGE)) + ends


def _bytes(value: object) -> bytes:
    """A value as a column holds it, or nearly so."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool | int | float) and abs(value) < 1 << 62:
        return struct.pack("<d", value) if isinstance(value, float) else struct.pack("<q", value)
    if isinstance(value, Mapping):
        return b"".join(map(_bytes, value.values()))
    if isinstance(value, Iterable) and not isinstance(value, str):
        return b"".join(map(_bytes, value))
    return b"" if value is None else str(value).encode(errors="replace")

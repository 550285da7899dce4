"""Headers of safetensors files, read without torch: names, types and shapes, within bounds."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.foreign import json
from pretrain.core.foreign.parsing import parsing
from pretrain.core.foreign.reading import open_file

MOST = 100 << 20  # bytes of a header, as safetensors itself bounds it
TYPES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I64": 8, "I32": 4, "I16": 2,
    "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        """Whether its values are numbers with a point."""
        return self.dtype.startswith(("F", "BF"))


def header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name; an error of one line for a damaged one.

    Raises `OSError` where the file cannot be opened.
    """
    with open_file(path) as file, parsing(f"{path} is truncated or damaged", "a whole safetensors file"):
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MOST, size - 8):
            raise ValueError(f"its header should have {length} bytes, of {max(0, size - 8)}")
        rows = json.loads(file.read(length).decode())
        if not isinstance(rows, dict):
            raise ValueError("its header is no JSON object")
        tensors = {name: _stored(name, row, size - 8 - length) for name, row in rows.items() if name != "__metadata__"}
    return tensors


def _stored(name: str, row: object, size: int) -> Stored:
    if not isinstance(row, dict) or not isinstance(row.get("dtype"), str):
        raise ValueError(f"{name[:80]!r} has no type")
    if not all(map(_counts, (row.get("shape"), row.get("data_offsets")))) or len(row["data_offsets"]) != 2:
        raise ValueError(f"{name[:80]!r} has no shape, or no place")
    shape, dtype = tuple(row["shape"]), row["dtype"]
    begin, end = row["data_offsets"]
    if not 0 <= begin <= end <= size or math.prod(shape) * TYPES.get(dtype, 0) not in (0, end - begin):
        raise ValueError(f"{name[:80]!r} of {list(shape)} does not lie in the file")
    return Stored(dtype, shape)


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def headers(paths: list[Path]) -> dict[str, Stored]:
    """The tensors of several files."""
    tensors: dict[str, Stored] = {}
    for path in paths:
        try:
            tensors |= header(path)
        except OSError as error:
            raise PretrainError(f"{path} cannot be read: {error.strerror or error}") from error
    return tensors

"""Headers of GGUF files, the format of llama.cpp: fields, and names, types and places of tensors, within bounds.

A file is magic, version, counts, fields (name, type, value), tensors (name, sizes, type, place) and then their bytes;
all numbers are little-endian (github.com/ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

from pretrain.core.errors import PretrainError
from pretrain.core.files import JSONObject
from pretrain.core.foreign.parsing import parsing
from pretrain.core.foreign.reading import open_file

MOST = 256 << 20  # bytes of a header: a vocabulary of a million tokens with its merges takes 50 MB
DEPTH = 4  # arrays in one another
DIMENSIONS = 8
TEXT, ARRAY = 8, 9  # types of fields that are no plain numbers
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TYPES = {  # of tensors: name, values in a block, bytes of a block
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8), 2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
}  # fmt: skip

Value: TypeAlias = "str | int | float | bool | list[Value]"


@dataclass(frozen=True)
class Packed:
    """What a header says of a tensor."""

    type: str
    shape: tuple[int, ...]  # the last size is that of a row, as in torch


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself."""

    fields: dict[str, Value]
    tensors: dict[str, Packed]

    def text(self, name: str) -> str:
        """A field that is a text; empty where there is none."""
        value = self.fields.get(name)
        return value if isinstance(value, str) else ""


def header(path: Path) -> Header:
    """The fields and tensors of a GGUF file; an error of one line for a damaged one, and for one that ends too early.

    Raises `PretrainError` where the file cannot be opened, too.
    """
    try:
        with open_file(path) as file, parsing(f"{path} is truncated or damaged", "a whole GGUF file"):
            return _Reader(file).header()
    except OSError as error:
        raise PretrainError(f"{path} cannot be read: {error.strerror or error}") from error


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size = file, os.fstat(file.fileno()).st_size
        self.read = 0

    def header(self) -> Header:
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, where 2 and 3 are read")
        tensors, fields = self._number("Q"), self._number("Q")
        values: dict[str, Value] = {}
        for _ in range(self._count(fields, 12)):
            name = self._text()
            values[name] = self._value(self._number("I"))
        packed = [self._tensor() for _ in range(self._count(tensors, 24))]
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise ValueError(f"general.alignment is {str(alignment)[:40]}")
        start = -(-self.read // alignment) * alignment
        for name, tensor, place, length in packed:
            if start + place + length > self.size:
                raise ValueError(f"{name[:80]!r} of {list(tensor.shape)} does not lie in the file")
        return Header(values, {name: tensor for name, tensor, _, _ in packed})

    def _bytes(self, count: int) -> bytes:
        if self.read + count > min(self.size, MOST):
            raise ValueError(f"its header goes on beyond {min(self.size, MOST)} bytes")
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError("it ends within its header")
        self.read += count
        return data

    def _number(self, letter: str) -> int:
        return int(struct.unpack(f"<{letter}", self._bytes(struct.calcsize(f"<{letter}")))[0])

    def _count(self, count: int, least: int) -> int:
        """A count of things of which each takes at least so many bytes."""
        if count * least > min(self.size, MOST) - self.read:
            raise ValueError(f"it should have {count} entries, more than its bytes can hold")
        return count

    def _text(self) -> str:
        return self._bytes(self._number("Q")).decode(errors="replace")

    def _value(self, kind: int, depth: int = 0) -> Value:
        if kind == TEXT:
            return self._text()
        if kind != ARRAY:
            return self._numbers(kind, 1)[0]
        inner, count = self._number("I"), self._number("Q")
        if depth == DEPTH:
            raise ValueError(f"more than {DEPTH} arrays in one another")
        if inner in NUMBERS:
            return [*self._numbers(inner, count)]
        return [self._value(inner, depth + 1) for _ in range(self._count(count, 8))]

    def _numbers(self, kind: int, count: int) -> tuple[int | float | bool, ...]:
        if kind not in NUMBERS:
            raise ValueError(f"a field of the type {kind}, which is not known")
        width = struct.calcsize(f"<{NUMBERS[kind]}")
        return struct.unpack(f"<{self._count(count, width)}{NUMBERS[kind]}", self._bytes(count * width))

    def _tensor(self) -> tuple[str, Packed, int, int]:
        """Name, type and shape, place and length of a tensor."""
        name, dimensions = self._text(), self._number("I")
        if not 0 < dimensions <= DIMENSIONS:
            raise ValueError(f"{name[:80]!r} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        kind, place = self._number("I"), self._number("Q")
        label, block, width = TYPES.get(kind, (f"type {kind}", 1, 0))
        if width and shape[-1] % block:
            raise ValueError(f"{name[:80]!r}: rows of {shape[-1]} values, of {label}, whose blocks have {block}")
        return name, Packed(label, shape), place, math.prod(shape) // block * width


_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
SPLITS = {_ENDINGS + _WORDS % r"\p{N}": "qwen2", _ENDINGS + _WORDS % r"\p{N}{1,3}": "llama-bpe"}


def splitting(facts: JSONObject) -> str | None:
    """The name that llama.cpp gives the way in which a `tokenizer.json` splits text; None of one that it cannot keep.

    It keeps byte-level BPE that splits as GPT-2, SmolLM, Llama 3 or Qwen 2; without merges any splitting will do.
    """
    model, rule = facts.get("model") or {}, facts.get("pre_tokenizer") or {}
    normalised = (facts.get("normalizer") or {}).get("type") not in (None, "NFC")
    if model.get("type") != "BPE" or model.get("byte_fallback") or normalised:
        return None
    parts = rule.get("pretokenizers") or [rule]
    last = parts[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not model.get("merges") or (len(parts) == 1 and last.get("use_regex", True)):
        return "gpt-2"
    if len(parts) == 2 and parts[0].get("type") == "Digits" and parts[0].get("individual_digits") and last["use_regex"]:
        return "smollm"
    pattern = parts[0].get("pattern", {}).get("Regex") if len(parts) == 2 and not last["use_regex"] else None
    return SPLITS.get(str(pattern))

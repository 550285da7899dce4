"""Weights that torch has pickled: read when someone asks for a conversion, by the reader that makes tensors alone."""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO

import torch

from pretrain.core.errors import PretrainError
from pretrain.core.foreign import json
from pretrain.core.foreign.parsing import parsing, raise_memory, reason
from pretrain.core.foreign.reading import irregular, open_file

STEM = "pytorch_model"
MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(
    10, "little"
)  # with which files begin that torch wrote before they were archives
STREAMS = 4  # of such a file, the last the state dict
MOST = 256 << 20  # bytes of an archive's program, in which no numbers of tensors are
OPERATIONS = 4_000_000  # of a program: about 30 for each tensor
DEPTH = 200
OPENING = ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "EMPTY_TUPLE")
KEEPING = ("MARK", "BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def pickled(folder: Path) -> list[Path]:
    """The files of a folder's pickled weights, one or as its index names them; none where there are none."""
    index = folder / f"{STEM}.bin.index.json"
    if (folder / f"{STEM}.bin").exists() or not index.exists():
        return [path for path in (folder / f"{STEM}.bin",) if path.exists()]
    table = json.read(index)
    names = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(names, dict) or not names or not all(Path(str(name)).name == name for name in names.values()):
        raise PretrainError(f"{index} is damaged: accepted: a weight_map from weights to files beside it")
    return [folder / name for name in sorted(set(names.values()))]


def read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, on the CPU; a file that holds anything else is an error that says what.

    Nothing in it is called but what builds tensors: torch's reader for `weights_only` knows no other names.
    """
    accepted = "a file of tensors by their names, as torch writes a state dict"
    if kind := irregular(path):
        raise PretrainError(f"{path}: it is {kind}; accepted: {accepted}")
    _check_streams(path, accepted)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise_memory(error, path)
        named = _GLOBAL.search(str(error))
        why = f"it names {named[1]}, which is not read" if named else reason(error)
        raise PretrainError(f"{path}: {why.removesuffix('.')}; accepted: {accepted}") from error
    if not isinstance(loaded, dict):
        raise PretrainError(f"{path}: it holds a {type(loaded).__name__}; accepted: {accepted}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise PretrainError(f"{path}: {str(name)[:80]!r} is a {type(value).__name__}; accepted: {accepted}")
        if (what := _odd(value)) is not None:
            raise PretrainError(f"{path}: {name[:80]!r} is a {what} tensor; accepted: {accepted}, dense ones")
    return {name: value.detach() for name, value in loaded.items()}


def _odd(tensor: torch.Tensor) -> str | None:
    """What kind of tensor it is, if not one whose numbers stand one after another in memory."""
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_meta or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return "meta" if tensor.is_meta else type(tensor).__name__
    return None if tensor.layout is torch.strided else str(tensor.layout).removeprefix("torch.").replace("_", " ")


def _check_streams(path: Path, accepted: str) -> None:
    """Refuse programs of pickles that would be run for long before they are seen to make no state dict."""
    with parsing(f"{path}", accepted), open_file(path) as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            if MAGIC not in file.read(len(MAGIC) + 16):
                raise ValueError("it begins with nothing that torch writes")
            file.seek(0)
            for _ in range(STREAMS):
                _check_stream(file)
            return
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(".pkl"):
                    if entry.file_size > MOST:
                        raise ValueError(f"its {entry.filename[-40:]} has {entry.file_size:,} bytes")
                    with archive.open(entry) as stream:
                        _check_stream(stream)


def _check_stream(stream: IO[bytes]) -> None:
    marks = depth = 0
    for count, (opcode, _, _) in enumerate(pickletools.genops(stream), 1):
        if opcode.name == "MARK":
            marks += 1
        elif pickletools.markobject in opcode.stack_before:
            marks -= 1
        depth = depth + 1 if opcode.name in OPENING else 0 if opcode.name not in KEEPING else depth
        if marks > DEPTH or depth > DEPTH:
            raise ValueError(f"more than {DEPTH} lists or tables in one another")
        if count > OPERATIONS:
            raise ValueError(f"more than {OPERATIONS:,} operations")

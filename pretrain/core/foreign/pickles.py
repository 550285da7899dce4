"""Weights that torch has pickled: read when someone asks for a conversion, by the reader that makes tensors alone."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from pretrain.core.errors import PretrainError
from pretrain.core.foreign import json
from pretrain.core.foreign.parsing import raise_memory, reason
from pretrain.core.foreign.reading import irregular

STEM = "pytorch_model"
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
    return {name: value.detach() for name, value in loaded.items()}

"""Tensors on disk in pieces: each process writes what it holds of them, and reads what it is to hold.

A file of pieces is a safetensors file whose header says, under `pieces`, of which shape each whole tensor is and where
in it the piece begins. Pieces of all files together are the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from pretrain.core.errors import PretrainError
from pretrain.core.foreign import json as foreign

Box = tuple[tuple[int, ...], tuple[int, ...]]  # where a piece begins in its tensor, and its shape


@dataclass(frozen=True)
class Piece:
    """A part of a tensor."""

    tensor: Tensor
    whole: tuple[int, ...]  # the shape that it is part of
    start: tuple[int, ...]


def held(tensor: Tensor) -> Box | None:
    """Which part of a sharded tensor this process holds; None of one that every process has whole."""
    if not isinstance(tensor, DTensor) or not any(isinstance(p, Shard) for p in tensor.placements):
        return None
    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(start), tuple(shape)


def local(tensor: Tensor) -> Tensor:
    """The values that this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def snapshot(alike: dict[str, Tensor], others: dict[str, Tensor], rank: int, size: int) -> dict[str, Piece]:
    """Copies in the host's memory of what process `rank` is to write.

    Of sharded tensors each process writes its part. Of those that all processes hold `alike` each is written by the
    process that has the least to write so far; the `others`, in which processes may differ, by the first.
    """
    load, pieces = [0] * size, {}
    for name, tensor in (others | alike).items():
        box = held(tensor)
        writer = rank if box else 0 if name in others else load.index(min(load))
        if box is None:
            load[writer] += tensor.numel() * tensor.element_size()
        if writer == rank and (box is None or local(tensor).numel()):
            start = box[0] if box else (0,) * tensor.ndim
            pieces[name] = Piece(_copy(local(tensor).detach()), tuple(tensor.shape), start)
    if any(piece.tensor.is_pinned() for piece in pieces.values()):
        torch.cuda.synchronize()  # the copies must be whole before the next step changes what they are of
    return pieces


def _copy(tensor: Tensor) -> Tensor:
    """A copy on the host, pinned where the device can then write it by itself."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return copy.copy_(tensor, non_blocking=True)


def write(pieces: dict[str, Piece], path: Path) -> None:
    """Write a file of pieces."""
    index = {name: [piece.whole, piece.start] for name, piece in pieces.items()}
    save_file({name: piece.tensor for name, piece in pieces.items()}, path, {"pieces": json.dumps(index)})


class Stored:
    """The tensors of some files, of pieces or whole ones, by name; `files` gives what stands before a file's names."""

    def __init__(self, files: dict[Path, str]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[Path, str, Box]]] = {}
        for path, before in files.items():
            try:
                with safe_open(path, framework="pt") as file:
                    index = foreign.loads((file.metadata() or {}).get("pieces", "{}"))
                    for key in file.keys():  # noqa: SIM118
                        shape = tuple(file.get_slice(key).get_shape())
                        whole, start = index.get(key, [shape, (0,) * len(shape)])
                        self.shapes[before + key] = tuple(whole)
                        self._pieces.setdefault(before + key, []).append((path, key, (tuple(start), shape)))
            except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
                raise PretrainError(f"{path} cannot be read ({error})") from error

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A tensor, or the part of it that begins at `box[0]` and has the shape `box[1]`; no more than that is read."""
        start, shape = box or ((0,) * len(self.shapes[name]), self.shapes[name])
        parts = list(self._overlaps(name, (start, shape)))
        # Memory of its own, aligned as kernels like it, which that of a mapped file is not.
        tensor = torch.empty(shape, dtype=parts[0][0].dtype if parts else self._dtype(name))
        covered = 0
        for values, place in parts:
            tensor[place] = values
            covered += values.numel()
        if covered != tensor.numel():
            raise PretrainError(
                f"{name}: {covered} of {tensor.numel()} values are on disk: a file of the state is gone"
            )
        return tensor

    def _dtype(self, name: str) -> torch.dtype:
        path, key, _ = self._pieces[name][0]
        with safe_open(path, framework="pt") as file:
            return file.get_slice(key)[:0].dtype

    def _overlaps(self, name: str, box: Box) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
        """The values of each piece inside the box, and where in the box they belong."""
        for path, key, (start, shape) in self._pieces[name]:
            low = [max(a, b) for a, b in zip(start, box[0], strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, shape, *box, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)) or 0 in shape:
                with safe_open(path, framework="pt") as file:
                    inside = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
                    values = file.get_slice(key)[inside] if inside else file.get_tensor(key)
                yield values, tuple(slice(a - s, b - s) for a, b, s in zip(low, high, box[0], strict=True))


def like(stored: Stored, name: str, current: Tensor) -> Tensor:
    """The stored tensor placed as `current` is: on its device, of a sharded one the part that this process holds."""
    box = held(current)
    values = stored.read(name, box).to(current.device)
    if not isinstance(current, DTensor):
        return values
    return DTensor.from_local(
        values, current.device_mesh, current.placements, run_check=False, shape=current.shape, stride=current.stride()
    )

"""Weights in memory as the kernels want it: from an address that 64 divides.

safetensors maps a file, so a weight begins wherever the length of the file's header leaves it, and kernels of matrix
products that find other addresses than 64's multiples take other paths: slower ones, which sum in another order. A
model just built, whose memory is torch's own, would then differ in its last bits from the same model loaded (Intel
oneMKL promises the same bits from run to run for arrays aligned to 64 bytes only). So whatever is computed with is
copied once, when it is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.core.folders import verify_file

ALIGNMENT = 64  # bytes: a cache line, the widest vector register, and what torch's allocator on CPUs gives
M = TypeVar("M", bound=nn.Module)


def aligned(tensor: Tensor) -> Tensor:
    """`tensor` itself where its first element lies on a multiple of 64 bytes, else a copy that does."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def align(model: M) -> M:
    """The same model, each parameter and buffer of it in aligned memory; what was shared stays shared.

    A parameter stays the object that it is, so that ties and optimisers hold; two that are one piece of memory under
    two objects get one copy.
    """
    copies: dict[tuple[object, ...], Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % ALIGNMENT:
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if place not in copies:
                copies[place] = tensor.data.clone()
            tensor.data = copies[place]
    return model


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, in aligned memory on the CPU.

    Raises `PretrainError` for a file that is not as the checksums of its folder say, and what safetensors raises:
    `SafetensorError` for a damaged file, `OSError` for one that cannot be read.
    """
    verify_file(path)
    return {name: aligned(tensor) for name, tensor in load_file(path).items()}

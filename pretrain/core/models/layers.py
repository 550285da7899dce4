"""Linear layers, and tensors made like others, with their types."""

from __future__ import annotations

from typing import TypeAlias, TypedDict

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Linear: TypeAlias = nn.Linear | Conv1D  # a Conv1D stores its weight as inputs × outputs


class Like(TypedDict):
    """What a new tensor needs to go with another."""

    dtype: torch.dtype
    device: torch.device


def like(tensor: Tensor) -> Like:
    """The type and the device of a tensor: `torch.zeros(3, **like(weight))`."""
    return {"dtype": tensor.dtype, "device": tensor.device}


def sides(layer: Linear) -> tuple[int, int]:
    """How many outputs and inputs a linear layer has."""
    first, second = layer.weight.shape
    return (second, first) if isinstance(layer, Conv1D) else (first, second)

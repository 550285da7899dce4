"""Linear layers, and tensors made like others, with their types."""

from __future__ import annotations

from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

Arguments: TypeAlias = dict[str, Any]  # of a model's `forward`, of which `transformers` says no types
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


def at(module: nn.Module, path: str) -> Any:
    """What is at a dotted path, a submodule or an attribute; numbers index into lists, from the end when negative."""
    place: Any = module
    for name in filter(None, path.split(".")):
        place = place[int(name)] if name.lstrip("-").isdigit() else getattr(place, name)
    return place


class Attention(nn.Module):
    """What an attention layer of `transformers` has beside its modules; a name for its type, never made."""

    config: PreTrainedConfig
    layer_idx: int
    head_dim: int
    scaling: float
    embed_dim: int  # GPT-2's width
    num_heads: int  # of GPT-2
    num_key_value_groups: int  # of the others


class Saved(FunctionCtx):
    """What an autograd function's forward pass leaves to its backward pass."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors, or None in the place of one."""

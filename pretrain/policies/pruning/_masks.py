"""Weights held at zero: what the policies that train sparse models share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pretrain.core.errors import PretrainError
from pretrain.core.models.families import linears

if TYPE_CHECKING:
    from collections.abc import Mapping


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the blocks' linear layers, by the names that these have in `families.linears`."""
    return {name: weight for name, layer in linears(model).items() if isinstance(weight := layer.weight, Tensor)}


def unsharded_weights(model: nn.Module, method: str) -> dict[str, Tensor]:
    """The same; sharded ones are refused."""
    weights = weights_of(model)
    if any(hasattr(weight, "full_tensor") for weight in weights.values()):
        raise PretrainError(f"{method}: sharded weights are not supported; accepted: strategy: ddp")
    return weights


@torch.no_grad()
def hold(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """w ← m ⊙ w, in the layers that have a mask."""
    for name, weight in weights_of(model).items():
        if name in masks:
            weight.mul_(masks[name])


@torch.no_grad()
def hold_gradients(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """∂w ← m ⊙ ∂w, in the layers that have a mask: what is clipped and what moments remember is of the rest alone."""
    for name, weight in weights_of(model).items():
        if name in masks and weight.grad is not None:
            weight.grad.mul_(masks[name])


def zero_count(sparsity: float, weight: Tensor) -> int:
    """How many entries of a weight are zero at this sparsity."""
    return round(sparsity * weight.numel())


def zero_shares(model: nn.Module, sparsity: float) -> dict[str, float]:
    """The share of zeros in each linear layer at this sparsity, as `Policy.zeros` wants it."""
    if not sparsity:
        return {}
    return {name: zero_count(sparsity, weight) / weight.numel() for name, weight in weights_of(model).items()}

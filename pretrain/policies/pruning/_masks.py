"""Weights held at zero: what the policies that train sparse models share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from pretrain.core.errors import PretrainError
from pretrain.core.models.families import linears

if TYPE_CHECKING:
    from collections.abc import Mapping


def whole_linears(model: nn.Module, who: str) -> dict[str, nn.Module]:
    """The linear layers of the blocks; sharded ones are refused."""
    found = linears(model)
    if any(hasattr(module.weight, "full_tensor") for module in found.values()):
        raise PretrainError(f"{who}: sharded weights are not supported; accepted: strategy: ddp")
    return found


@torch.no_grad()
def hold(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """w ← m ⊙ w, in the layers that have a mask."""
    for name, module in linears(model).items():
        if name in masks:
            module.weight.mul_(masks[name])


def zero_count(sparsity: float, weight: torch.Tensor) -> int:
    """How many entries of a weight are zero at this sparsity."""
    return round(sparsity * weight.numel())


def zero_shares(model: nn.Module, sparsity: float) -> dict[str, float]:
    """The share of zeros in each linear layer at this sparsity, as `Policy.zeros` wants it."""
    if not sparsity:
        return {}
    return {n: zero_count(sparsity, m.weight) / m.weight.numel() for n, m in linears(model).items()}

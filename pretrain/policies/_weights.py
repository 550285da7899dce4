"""The weights in training, by name: what the policies that keep copies of them share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pretrain.core.errors import PretrainError

if TYPE_CHECKING:
    from collections.abc import Mapping


def trained(model: nn.Module, method: str) -> dict[str, nn.Parameter]:
    """The parameters that are trained; sharded ones are refused."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if any(hasattr(p, "full_tensor") for p in weights.values()):
        raise PretrainError(f"{method}: sharded weights are not supported; accepted: strategy: ddp")
    return weights


def copies(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies in the weights' own type."""
    return {name: p.detach().clone() for name, p in parameters.items()}


def by_parameter(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor]:
    """Values by name as values by parameter."""
    return {parameters[name]: value for name, value in values.items()}


@torch.no_grad()
def mean(weights: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several copies, summed in float64 and rounded once, so that equal weights are their own mean."""
    return {
        name: (sum((w[name].double() for w in weights[1:]), weights[0][name].double()) / len(weights)).to(value.dtype)
        for name, value in weights[0].items()
    }

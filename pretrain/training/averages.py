"""Averages of the weights, which evaluations and the end of a training use in place of the weights in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pretrain.training.running import Training


def averages(training: Training) -> dict[nn.Parameter, Tensor]:
    """What stands for the weights in training, by parameter: a policy's or the optimiser's; empty where none does."""
    weights: dict[nn.Parameter, Tensor] = dict(getattr(training.optimizer, "averages", {}))
    for policy in training.policies:
        weights |= policy.averages(training, training.state[policy.name])
    return weights


@contextmanager
def averaged(training: Training) -> Iterator[None]:
    """While open, the model has its averages, and afterwards, to the bit, what it had."""
    weights = averages(training)
    kept = {parameter: parameter.detach().clone() for parameter in weights}
    put(weights)
    try:
        yield
    finally:
        put(kept)


def settle(training: Training) -> None:
    """Give the model, when training is over, the weights that it is to end with."""
    put(averages(training))
    for policy in training.policies:
        policy.finish(training, training.state[policy.name])


@torch.no_grad()
def put(weights: Mapping[nn.Parameter, Tensor]) -> None:
    """Copy values into parameters."""
    for parameter, values in weights.items():
        parameter.copy_(values)

"""Adafactor: a second moment kept as the averages of rows and columns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from pretrain.core.bounds import Ge, NonNegative, Positive
from pretrain.optim import Optimizer, decay_groups, whole


@dataclass(frozen=True)
class Adafactor(Optimizer):
    """Adafactor: Adaptive Learning Rates with Sublinear Memory Cost (arXiv:1804.04235).

    The second moment of a matrix is R C / mean(R), of its rows' and columns' averages R and C, which decay by 1 -
    t^(-decay); without momentum. The step is g / √V, cut to a root mean square of `d`, times max(epsilon2, RMS(w)) ·
    min(lr, 1/√t). Decay is decoupled. `torch.optim.Adafactor`, where the paper's first epsilon is the rounding of the
    weights' type.
    """

    lr: NonNegative = 1e-2
    weight_decay: NonNegative = 0.0
    decay: NonNegative = 0.8
    epsilon2: Positive = 1e-3
    d: Annotated[float, Ge(1)] = 1.0

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """`torch.optim.Adafactor`."""
        groups = [dict(group) for group in decay_groups(whole(named_parameters, self.name), self.weight_decay)]
        return torch.optim.Adafactor(groups, lr=self.lr, beta2_decay=-self.decay, eps=(None, self.epsilon2), d=self.d)

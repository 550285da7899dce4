"""Warm-up, then the peak learning rate for good."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.core.bounds import NonNegative
from pretrain.optim import Schedule, warmup_steps


@dataclass(frozen=True)
class Constant(Schedule):
    """Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour (arXiv:1706.02677).

    The paper's gradual warm-up, then a constant rate. `warmup` is a share of training (below 1) or a number of steps.
    """

    warmup: NonNegative = 0.0

    def factor(self, step: int, total: int) -> float:
        """The factor on the peak learning rate at `step` (from 0) of `total`."""
        warm = warmup_steps(self.warmup, total)
        return (step + 1) / warm if step < warm else 1.0

"""Warm-up, then half a cosine down to a share of the peak."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.core.bounds import NonNegative, Share
from pretrain.optim import Schedule, between, warmup_steps


@dataclass(frozen=True)
class Cosine(Schedule):
    """SGDR: Stochastic Gradient Descent with Warm Restarts (arXiv:1608.03983).

    One period of the paper's annealing, without restart: final + (1 - final) · (1 + cos(π · t)) / 2, after a linear
    warm-up. `warmup` is a share of training (below 1) or a number of steps.
    """

    warmup: NonNegative = 0.02
    final: Share = 0.1

    def factor(self, step: int, total: int) -> float:
        """The factor on the peak learning rate at `step` (from 0) of `total`."""
        warm = warmup_steps(self.warmup, total)
        if step < warm:
            return (step + 1) / warm
        t = min(1.0, (step - warm) / max(1, total - warm))
        return between(self.final, (1 + math.cos(math.pi * t)) / 2)

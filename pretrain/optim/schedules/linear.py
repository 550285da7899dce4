"""Warm-up, then a straight line down to a share of the peak."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.core.bounds import NonNegative, Share
from pretrain.optim import Schedule, warmup_steps


@dataclass(frozen=True)
class Linear(Schedule):
    """BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding (arXiv:1810.04805).

    The paper's schedule: linear warm-up, then linear decay to `final` (0) of the peak. `warmup` is a share of training
    (below 1) or a number of steps.
    """

    warmup: NonNegative = 0.01
    final: Share = 0.0

    def factor(self, step: int, total: int) -> float:
        """The factor on the peak learning rate at `step` (from 0) of `total`."""
        warm = warmup_steps(self.warmup, total)
        if step < warm:
            return (step + 1) / warm
        return 1 - (1 - self.final) * min(1.0, (step - warm) / max(1, total - warm))

"""Raise the learning rate again for new data, then let it fall once more."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.core.bounds import NonNegative, Share
from pretrain.optim import Schedule, between, warmup_steps


@dataclass(frozen=True)
class Rewarm(Schedule):
    """Continual Pre-Training of Large Language Models: How to (re)warm your model? (arXiv:2308.04014).

    A checkpoint whose schedule has ended goes on with new data: the rate rises in a straight line from `initial` of the
    peak, where the pretraining ended, to the peak, and falls by half a cosine to `final` of it. The paper's findings:
    how long the warm-up is matters little; a higher peak learns the new data better and forgets more of the old; both
    losses rise at first, and a rate that is not raised again learns the new data less well.
    """

    warmup: NonNegative = 0.01
    initial: Share = 0.1
    final: Share = 0.1

    def factor(self, step: int, total: int) -> float:
        """The factor on the peak learning rate at `step` (from 0) of `total`."""
        warm = warmup_steps(self.warmup, total)
        if step < warm:
            return between(self.initial, (step + 1) / warm)
        t = min(1.0, (step - warm) / max(1, total - warm))
        return between(self.final, (1 + math.cos(math.pi * t)) / 2)

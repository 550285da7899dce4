"""Warm-up, stable, decay: a constant rate that can be cooled down at any moment."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.core.bounds import NonNegative, Share
from pretrain.optim import Schedule, warmup_steps


@dataclass(frozen=True)
class WSD(Schedule):
    """MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies (arXiv:2404.06395).

    Linear warm-up, a constant stage, and over the last `decay` of training an exponential fall to `final` of the peak
    (the paper's f(s) = 0.5^(s / T), with T such that the end is at `final`). `warmup` is a share or a number of steps.
    """

    warmup: NonNegative = 0.01
    decay: NonNegative = 0.1
    final: Share = 0.1

    def factor(self, step: int, total: int) -> float:
        """The factor on the peak learning rate at `step` (from 0) of `total`."""
        warm = warmup_steps(self.warmup, total)
        if step < warm:
            return (step + 1) / warm
        decay = warmup_steps(self.decay, total)
        t = (step - (total - decay)) / max(1, decay)
        return self.final ** min(1.0, t) if t > 0 else 1.0

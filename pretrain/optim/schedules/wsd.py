"""Warm-up, stable, decay: a constant rate that can be cooled down at any moment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pretrain.core.bounds import NonNegative, Share
from pretrain.core.errors import PretrainError
from pretrain.optim import Schedule, between, warmup_steps


@dataclass(frozen=True)
class WSD(Schedule):
    """MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies (arXiv:2404.06395).

    Linear warm-up, a constant stage, and over the last `decay` of training a fall to `final` of the peak. Its `shape`
    is the paper's f(s) = 0.5^(s / T), with T such that the end is at `final`; or `linear`; or `sqrt`, 1 - √t, which
    Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations (arXiv:2405.18392) found best. `warmup`
    and `decay` are shares of training (below 1) or numbers of steps.
    """

    warmup: NonNegative = 0.01
    decay: NonNegative = 0.1
    final: Share = 0.1
    shape: Literal["exponential", "linear", "sqrt"] = "exponential"

    def __post_init__(self) -> None:
        """Refuse an exponential that ends at 0: it would be there at once."""
        super().__post_init__()
        if self.shape == "exponential" and self.final == 0:
            raise PretrainError("wsd: final 0: accepted: above 0, or shape linear or sqrt")

    def factor(self, step: int, total: int) -> float:
        """The factor on the peak learning rate at `step` (from 0) of `total`."""
        warm = warmup_steps(self.warmup, total)
        if step < warm:
            return (step + 1) / warm
        decay = warmup_steps(self.decay, total)
        t = min(1.0, max(0.0, (step - (total - decay)) / max(1, decay)))
        if self.shape == "exponential":
            return self.final**t
        return between(self.final, 1 - (t if self.shape == "linear" else math.sqrt(t)))

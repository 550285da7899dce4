"""A schedule without an end: warm up, cool down, stay, and fall only to release a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.core.bounds import NonNegative, Share
from pretrain.core.errors import PretrainError
from pretrain.optim import Schedule, between, warmup_steps


@dataclass(frozen=True)
class Infinite(Schedule):
    """Beyond Cosine Decay: On the effectiveness of Infinite Learning Rate Schedule for Continual Pre-training
    (arXiv:2503.02844).

    Four phases: linear warm-up to the peak; a cosine cool-down to `constant` of it; that constant rate for as long as
    data come; an exponential annealing, constant · (final / constant)^t, to `final`. `warmup`, `cooldown` and `anneal`
    are shares of training (below 1) or numbers of steps. The next data set goes on from the state before the annealing,
    with `warmup: 0`, `cooldown: 0`; `anneal: 0` leaves the last phase out.
    """

    warmup: NonNegative = 0.01
    cooldown: NonNegative = 0.3
    anneal: NonNegative = 0.15
    constant: Share = 0.5
    final: Share = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.final <= self.constant <= 1:
            given = f"constant {self.constant}, final {self.final}"
            raise PretrainError(f"infinite: {given}: accepted: shares of the peak, 0 < final <= constant <= 1")
        shares = [share for share in (self.warmup, self.cooldown, self.anneal) if share < 1]
        if min(self.warmup, self.cooldown, self.anneal) < 0 or sum(shares) > 1:
            given = f"warmup {self.warmup}, cooldown {self.cooldown}, anneal {self.anneal}"
            raise PretrainError(f"infinite: {given}: accepted: shares of training that sum to at most 1, or steps")

    def factor(self, step: int, total: int) -> float:
        """The factor on the peak learning rate at `step` (from 0) of `total`."""
        warm, cool, anneal = (warmup_steps(share, total) for share in (self.warmup, self.cooldown, self.anneal))
        if step < warm:
            return (step + 1) / warm
        if step < warm + cool:
            t = (step - warm) / cool
            return between(self.constant, (1 + math.cos(math.pi * t)) / 2)
        if not anneal or step < total - anneal:
            return self.constant
        t = min(1.0, (step - (total - anneal)) / anneal)
        return self.constant * (self.final / self.constant) ** t

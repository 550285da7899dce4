"""Online data mixing: a bandit draws the domains, and what is hard to predict is drawn more often."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pretrain.core.batch import Batch
from pretrain.core.bounds import ProperShare, Share
from pretrain.core.errors import PretrainError
from pretrain.objectives import Loss
from pretrain.policies import Policy, State, Training
from pretrain.policies.mixing._domains import domain_losses


@dataclass(frozen=True)
class ODM(Policy):
    """Efficient Online Data Mixing For Language Model Pre-Training (arXiv:2312.02406).

    Exp3 over the K domains. The reward of a domain is the training loss on its rows, importance-weighted and smoothed:
    R_i ← α R_i + (1 - α) L_i / π_i, for the domains that the step has seen. Then, with the exploration rate
    ε_t = min(1/K, √(ln K / (K t))), π_i = (1 - K ε_t) · exp(ε_{t-1} R_i) / Σ_j exp(ε_{t-1} R_j) + ε_t. For the first
    `warmup` of training the domains are drawn as they were, while the rewards are already estimated and t counts the
    steps: exploration does not begin anew after it. The losses are those of the training step: nothing is computed
    anew.

    These are the paper's formulas. The published code has two others, and neither: one adds up R_i ← R_i + L_i / 10 π_i
    and never forgets; the other, named there as the paper's, smooths exp(L_i) without dividing by π_i and mixes by
    R_i / Σ_j R_j instead of the exponentials. In both t counts the steps of the warm-up, as here.
    """

    version: ClassVar[int] = 2  # the steps of the warm-up count

    smoothing: ProperShare = 0.9
    warmup: Share = 0.01

    def start(self, training: Training, state: State) -> None:
        """Begin with the mixture that is set, or with each domain's share of the rows."""
        if state:
            return
        loader = training.loader
        rows = {name: len(loader.plan.rows_of_domain(d)) for d, name in enumerate(loader.shards.domain_names)}
        mixture = loader.mixture or {name: count / len(loader.plan) for name, count in rows.items() if count}
        if len(mixture) < 2:
            raise PretrainError(
                f"odm: the corpus has the one domain {', '.join(mixture)}; accepted: two or more to mix"
            )
        state |= {
            "mixture": dict(mixture),
            "reward": dict.fromkeys(mixture, 0.0),
            "rate": 1 / len(mixture),
            "updates": 0,
        }
        loader.mixture = mixture

    def after_step(self, training: Training, state: State, batches: Sequence[Batch], losses: Sequence[Loss]) -> None:
        """Update the rewards by the step's losses, and from them the mixture of the next step."""
        rewards, mixture = state["reward"], state["mixture"]
        for name, (total, count) in domain_losses("odm", training, batches, losses).items():
            rewards[name] = self.smoothing * rewards[name] + (1 - self.smoothing) * total / count / mixture[name]
        state["updates"] += 1
        mixture, state["rate"] = probabilities(rewards, state["updates"], state["rate"])
        if training.progress >= self.warmup:
            state["mixture"] = training.loader.mixture = mixture


def probabilities(rewards: dict[str, float], step: int, rate_before: float) -> tuple[dict[str, float], float]:
    """Exp3's mixture after step number `step` (from 1), and its exploration rate."""
    count = len(rewards)
    rate = min(1 / count, math.sqrt(math.log(count) / (count * step)))
    top = max(rewards.values())
    powers = {name: math.exp(rate_before * (reward - top)) for name, reward in rewards.items()}
    total = sum(powers.values())
    return {name: (1 - count * rate) * power / total + rate for name, power in powers.items()}, rate

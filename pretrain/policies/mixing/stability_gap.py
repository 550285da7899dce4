"""Learn a new domain from a part of it, several times over, among text like that of the pretraining."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pretrain.core.batch import Batch
from pretrain.core.bounds import Ge, NonNegative, ProperShare
from pretrain.core.errors import PretrainError
from pretrain.objectives import Loss
from pretrain.policies import Policy, State, Training


@dataclass(frozen=True)
class StabilityGap(Policy):
    """Efficient Continual Pre-training by Mitigating the Stability Gap (arXiv:2406.14833).

    A model that goes on with a new `domain` loses at first what it knew, and wins it back slowly. Two of the paper's
    three remedies: of the domain only so many rows are used as the budget goes through `epochs` times, rows =
    steps · batch · (1 - `replay_share`) / `epochs`; and `replay_share` of all rows are text like that of the
    pretraining, its domains weighted by `replay` (by default: as often as they are in the corpus). The third, only the
    best documents, is the data operation `quality_subset`.
    """

    domain_fields: ClassVar[tuple[str, ...]] = ("domain", "replay")

    domain: str
    epochs: Annotated[float, Ge(1)] = 4.0
    replay_share: ProperShare = 0.18
    replay: dict[str, NonNegative] | None = None

    def start(self, training: Training, state: State) -> None:
        """Set the mixture; after a resume, take the same part of the domain."""
        training.loader.mixture = self.mixture(training)
        if "rows" in state:
            training.loader.restrict(self.domain, state["rows"])

    def mixture(self, training: Training) -> dict[str, float]:
        """The weight of each domain: the new one, and those of the pretraining."""
        loader = training.loader
        rows = {name: len(loader.plan.rows_of_domain(d)) for d, name in enumerate(loader.shards.domain_names)}
        if not rows.get(self.domain):
            known = ", ".join(name for name, count in rows.items() if count)
            raise PretrainError(f"stability_gap: domain {self.domain!r} has no rows; accepted: {known}")
        others = dict(self.replay or {name: n for name, n in rows.items() if name != self.domain and n})
        total = sum(others.values())
        if self.domain in others or (self.replay_share and not total):
            given = f"replay {others}, domain {self.domain!r}"
            raise PretrainError(f"stability_gap: {given}: accepted: weights of other domains, or replay_share: 0")
        kept = {name: self.replay_share * weight / total for name, weight in others.items()} if total else {}
        return {self.domain: 1 - self.replay_share} | kept

    def after_step(self, training: Training, state: State, batches: Sequence[Batch], losses: Sequence[Loss]) -> None:
        """After the first step it is known how many steps the budget makes, and so how many rows are enough."""
        if "rows" in state:
            return
        loader = training.loader
        drawn = training.settings.budget.total_steps(training.spent) * loader.batch_rows * (1 - self.replay_share)
        state["rows"] = max(1, math.ceil(drawn / self.epochs))
        loader.restrict(self.domain, state["rows"])

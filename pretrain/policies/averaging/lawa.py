"""Latest weight averaging: the mean of the newest k copies of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from pretrain.core.batch import Batch
from pretrain.core.bounds import Count, Positive
from pretrain.objectives import Loss
from pretrain.policies import Policy, State, Training, due
from pretrain.policies._weights import by_parameter, copies, mean, trained


@dataclass(frozen=True)
class LAWA(Policy):
    """Early Weight Averaging meets High Learning Rates for LLM Pre-training (arXiv:2306.03241).

    A copy of the weights is taken each `every` steps (below 1: each such share of training), the newest `k` are kept,
    and evaluations and the checkpoint use their mean; training goes on at the weights themselves. The farther apart the
    copies and the higher the rate, the more it brings. The copies are kept in memory and in the training's state.
    """

    averages_weights: ClassVar[bool] = True

    k: Count = 5
    every: Positive = 0.02

    @property
    def remembered(self) -> float:
        """The latest copies."""
        return float(self.k)

    def start(self, training: Training, state: State) -> None:
        """Refuse weights that are sharded."""
        trained(training.model, self.name)

    def after_step(self, training: Training, state: State, batches: Sequence[Batch], losses: Sequence[Loss]) -> None:
        """Take a copy where it is time, and drop the oldest."""
        if due(training, state, self.every):
            kept = [*state.get("latest", []), copies(trained(training.model, self.name))]
            state["latest"] = kept[-self.k :]

    def averages(self, training: Training, state: State) -> Mapping[nn.Parameter, Tensor]:
        """The mean of the copies that there are."""
        kept = state.get("latest", [])
        return by_parameter(trained(training.model, self.name), mean(kept) if kept else {})

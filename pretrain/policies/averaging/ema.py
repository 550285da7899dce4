"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch
from pretrain.core.bounds import Count, ProperShare
from pretrain.objectives import Loss
from pretrain.policies import Policy, State, Training
from pretrain.policies._weights import by_parameter, trained


@dataclass(frozen=True)
class EMA(Policy):
    """Exponential Moving Average of Weights in Deep Learning: Dynamics and Benefits (arXiv:2411.18704).

    θ̄ ← α θ̄ + (1 - α) θ after each `every`-th step, from θ̄ = θ after the first; α is `decay`, or (1 + n) / (10 + n)
    at the n-th update while that is smaller, so that short trainings are averaged too. Evaluations and the checkpoint
    use θ̄, training goes on at θ. θ̄ is in float32 whatever the weights are in.
    """

    averages_weights: ClassVar[bool] = True

    decay: ProperShare = 0.999
    every: Count = 1

    @property
    def remembered(self) -> float:
        """The average."""
        return 1.0

    def start(self, training: Training, state: State) -> None:
        """Refuse weights that are sharded."""
        trained(training.model, self.name)

    @torch.no_grad()
    def after_step(self, training: Training, state: State, batches: Sequence[Batch], losses: Sequence[Loss]) -> None:
        """Move the average."""
        parameters = trained(training.model, self.name)
        if not state:
            state |= {"updates": 0, "average": {name: p.detach().float().clone() for name, p in parameters.items()}}
            return
        if training.step % self.every:
            return
        state["updates"] += 1
        decay = min(self.decay, (1 + state["updates"]) / (10 + state["updates"]))
        for name, p in parameters.items():
            state["average"][name].lerp_(p.float(), 1 - decay)

    def averages(self, training: Training, state: State) -> Mapping[nn.Parameter, Tensor]:
        """θ̄."""
        return by_parameter(trained(training.model, self.name), state.get("average", {}))

"""Weigh the loss by topic: first what is hard to learn counts more, then what stays hard counts less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from pretrain.core.batch import Batch
from pretrain.core.bounds import Ge, Positive, PositiveShare, Share
from pretrain.core.errors import PretrainError
from pretrain.objectives import Loss
from pretrain.policies import Policy, State, Training, due
from pretrain.policies.mixing._domains import domain_losses


@dataclass(frozen=True)
class ToReMi(Policy):
    """ToReMi: Topic-Aware Data Reweighting for Dynamic Pre-Training Data Selection (arXiv:2504.00695).

    Topics are the corpus's domains. Every `interval` steps (below 1: share of training) each topic's mean loss L in the
    interval is compared with the mean M of the topics' losses. In the first stage w ← min(w · (1 + (L - M) / M),
    `highest`) where L > M, other weights stay. From `switch` of training on, noise is suspected:
    w ← max(w · (1 - (L - M) / M), `lowest`) where L > M, and w ← min(w · (1 + (M - L) / M), `highest`) elsewhere. A
    token's loss is multiplied by its topic's weight.
    """

    weighs_tokens: ClassVar[bool] = True

    interval: Positive = 100
    switch: Share = 0.875
    lowest: PositiveShare = 0.1
    highest: Annotated[float, Ge(1)] = 5.0

    def start(self, training: Training, state: State) -> None:
        """All topics begin with a weight of 1."""
        names = training.loader.shards.domain_names
        if len(names) < 2:
            raise PretrainError(f"toremi: the corpus has the one domain {', '.join(names)}; accepted: two or more")
        if not state:
            state |= {"weights": dict.fromkeys(names, 1.0), "sums": {}, "counts": {}}

    def before_step(self, training: Training, state: State, batches: Sequence[Batch]) -> None:
        """Write the weights of the step's tokens."""
        weights = [state["weights"][name] for name in training.loader.shards.domain_names]
        for batch in batches:
            weight_K = torch.tensor(weights, device=batch["domain_B"].device)
            weight_BL = weight_K[batch["domain_B"]][:, None].expand_as(batch["target_BL"])
            batch["token_weight_BL"] = weight_BL * batch.get("token_weight_BL", 1.0)

    def after_step(self, training: Training, state: State, batches: Sequence[Batch], losses: Sequence[Loss]) -> None:
        """Gather the topics' losses; at the end of an interval, change the weights."""
        for name, (total, count) in domain_losses("toremi", training, batches, losses).items():
            state["sums"][name] = state["sums"].get(name, 0.0) + total
            state["counts"][name] = state["counts"].get(name, 0.0) + count
        if not due(training, state, self.interval) or not state["sums"]:
            return
        means = {name: total / state["counts"][name] for name, total in state["sums"].items()}
        state["weights"] = self.adjusted(state["weights"], means, late=training.progress >= self.switch)
        state |= {"sums": {}, "counts": {}}

    def adjusted(self, weights: dict[str, float], losses: dict[str, float], *, late: bool) -> dict[str, float]:
        """The weights after an interval with these mean losses, in the first stage or in the `late` one."""
        mean = sum(losses.values()) / len(losses)
        changed = dict(weights)
        for name, loss in losses.items():
            above = (loss - mean) / mean
            if late:
                changed[name] = min(max(weights[name] * (1 - above), self.lowest), self.highest)
            elif above > 0:
                changed[name] = min(weights[name] * (1 + above), self.highest)
        return changed

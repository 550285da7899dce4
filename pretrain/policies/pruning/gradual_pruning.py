"""Prune the smallest weights little by little while pretraining, and average the parameters that are left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from pretrain.core.batch import Batch
from pretrain.core.bounds import Positive, ProperShare, Share
from pretrain.core.errors import PretrainError
from pretrain.objectives import Loss
from pretrain.policies import Policy, State, Training, due
from pretrain.policies.pruning._masks import hold, hold_gradients, unsharded_weights, zero_count, zero_shares


@dataclass(frozen=True)
class GradualPruning(Policy):
    """The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense Scaling Laws
    (arXiv:2501.12486).

    Dense until `start_share` of training; then every `every` steps (below 1: share of training) the smallest weights of
    each linear layer in the blocks join those that are held at zero,
    s(t) = sparsity · (1 - (1 - (t - start) / (end - start))³); from `end_share` on the sparse model recovers. The
    model's loss follows the law of dense models with N the number of non-zero parameters averaged over training: the
    metric `average_parameters`. Products with zeros are not counted as FLOPs, unless `credit: false`.
    """

    version: ClassVar[int] = 2  # the gradient is clipped by the norm of what is not masked
    families: ClassVar[tuple[str, ...]] = ()

    sparsity: ProperShare = 0.8
    start_share: Share = 0.25
    end_share: Share = 0.75
    every: Positive = 100
    credit: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_share > self.end_share:
            given = f"start_share {self.start_share}, end_share {self.end_share}"
            raise PretrainError(f"gradual_pruning: {given}: accepted: start_share <= end_share")

    def start(self, training: Training, state: State) -> None:
        """Begin dense, or go on with the masks that there are."""
        weights = unsharded_weights(training.model, "gradual_pruning")
        if not state:
            parameters = sum(p.numel() for p in training.model.parameters())
            state |= {"sparsity": 0.0, "masks": {}, "parameters": parameters, "parameter_steps": 0, "steps": 0}
        state["masks"] = {name: mask.to(weights[name].device) for name, mask in state["masks"].items()}

    def zeros(self, training: Training, state: State) -> dict[str, float]:
        """The share that is pruned so far."""
        return zero_shares(training.model, state["sparsity"]) if self.credit else {}

    def before_update(self, training: Training, state: State) -> None:
        """Zeros have no gradient."""
        hold_gradients(training.model, state["masks"])

    def after_step(self, training: Training, state: State, batches: Sequence[Batch], losses: Sequence[Loss]) -> None:
        """Count the step's parameters; prune when it is time; put the zeros back."""
        state["parameter_steps"] += state["parameters"]
        state["steps"] += 1
        sparsity = self.wanted(training.progress)
        scheduled = due(training, state, self.every)
        last = training.progress >= self.end_share
        if sparsity > state["sparsity"] and (scheduled or last):
            self._prune(training, state, sparsity)
        hold(training.model, state["masks"])

    def on_evaluation(self, training: Training, state: State, metrics: dict[str, float]) -> None:
        """`average_parameters` of the steps so far, and the `parameters` that are not zero now."""
        metrics["average_parameters"] = state["parameter_steps"] / max(1, state["steps"])
        metrics["parameters"] = state["parameters"]

    def wanted(self, progress: float) -> float:
        """The sparsity at this share of training."""
        if progress >= self.end_share:
            return self.sparsity
        t = max(0.0, progress - self.start_share) / max(self.end_share - self.start_share, 1e-12)
        return self.sparsity * (1 - (1 - t) ** 3)

    @torch.no_grad()
    def _prune(self, training: Training, state: State, sparsity: float) -> None:
        """Mask the smallest weights of each layer; what is masked stays so."""
        for name, weight in unsharded_weights(training.model, "gradual_pruning").items():
            mask = state["masks"].get(name)
            size = weight.abs() if mask is None else weight.abs().masked_fill(~mask, -1.0)
            smallest = size.flatten().argsort(stable=True)[: zero_count(sparsity, weight)]
            mask = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
            mask[smallest] = False
            state["masks"][name] = mask.view(weight.shape)
        total = sum(p.numel() for p in training.model.parameters())
        state["parameters"] = total - sum(int((~mask).sum()) for mask in state["masks"].values())
        state["sparsity"] = sparsity

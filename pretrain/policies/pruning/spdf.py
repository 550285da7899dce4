"""Sparse pre-training, dense fine-tuning: a fixed random part of each matrix is held at zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from pretrain.core.batch import Batch
from pretrain.core.bounds import ProperShare, Whole
from pretrain.objectives import Loss
from pretrain.policies import Policy, State, Training
from pretrain.policies.pruning._masks import hold, hold_gradients, unsharded_weights, zero_count, zero_shares


@dataclass(frozen=True)
class SPDF(Policy):
    """SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models (arXiv:2303.10464).

    Before training, `sparsity` of the weights of each linear layer in the blocks (uniformly; embeddings, norms, biases
    and head stay dense) are chosen at random and set to zero, and they stay zero: ∂w ← m ⊙ ∂w and w ← m ⊙ w in each
    step, so that the gradient is clipped by the norm of the rest. Fine-tuning without this policy is dense: the zeros
    are then trained like all others. As in the paper the products with zeros, forward and backward, are not counted as
    FLOPs; `credit: false` counts what dense hardware spends.
    """

    version: ClassVar[int] = 2  # the gradient is clipped by the norm of what is not masked
    families: ClassVar[tuple[str, ...]] = ()

    sparsity: ProperShare = 0.75
    seed: Whole = 0
    credit: bool = True

    def start(self, training: Training, state: State) -> None:
        """Draw the masks, from the seed and the layers' names alone, and apply them."""
        weights = unsharded_weights(training.model, "spdf")
        state["masks"] = {name: self.mask(weight, n) for n, (name, weight) in enumerate(weights.items())}
        hold(training.model, state["masks"])

    def zeros(self, training: Training, state: State) -> dict[str, float]:
        """The same share in all masked layers, up to rounding."""
        return zero_shares(training.model, self.sparsity) if self.credit else {}

    def before_update(self, training: Training, state: State) -> None:
        """Zeros have no gradient."""
        hold_gradients(training.model, state["masks"])

    def after_step(self, training: Training, state: State, batches: Sequence[Batch], losses: Sequence[Loss]) -> None:
        """Put the zeros back."""
        hold(training.model, state["masks"])

    def mask(self, weight: torch.Tensor, number: int) -> torch.Tensor:
        """The mask of the `number`-th layer: exactly `sparsity` of its entries (rounded) are zero."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        mask = torch.ones(weight.numel(), dtype=torch.bool)
        mask[torch.randperm(weight.numel(), generator=generator)[: zero_count(self.sparsity, weight)]] = False
        return mask.view(weight.shape).to(weight.device)

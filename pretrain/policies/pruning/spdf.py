"""Sparse pre-training, dense fine-tuning: a fixed random part of each matrix is held at zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pretrain.core.batch import Batch
from pretrain.core.errors import PretrainError
from pretrain.objectives import Loss
from pretrain.policies import Policy, Training
from pretrain.policies.pruning._masks import hold, whole_linears, zero_count, zero_shares


@dataclass(frozen=True)
class SPDF(Policy):
    """SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models (arXiv:2303.10464).

    Before training, `sparsity` of the weights of each linear layer in the blocks (uniformly; embeddings, norms, biases
    and head stay dense) are chosen at random and set to zero, and they stay zero: w ← m ⊙ w after each step.
    Fine-tuning without this policy is dense: the zeros are then trained like all others. As in the paper the products
    with zeros, forward and backward, are not counted as FLOPs; `credit: false` counts what dense hardware spends.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert", "modernbert", "t5")

    sparsity: float = 0.75
    seed: int = 0
    credit: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise PretrainError(f"spdf: sparsity {self.sparsity}: accepted: from 0 to below 1")

    def start(self, training: Training, state: dict[str, Any]) -> None:
        """Draw the masks, from the seed and the layers' names alone, and apply them."""
        layers = whole_linears(training.model, "spdf")
        state["masks"] = {name: self.mask(module.weight, n) for n, (name, module) in enumerate(layers.items())}
        hold(training.model, state["masks"])

    def zeros(self, training: Training, state: dict[str, Any]) -> dict[str, float]:
        """The same share in all masked layers, up to rounding."""
        return zero_shares(training.model, self.sparsity) if self.credit else {}

    def after_step(
        self, training: Training, state: dict[str, Any], batches: Sequence[Batch], losses: Sequence[Loss]
    ) -> None:
        """Put the zeros back."""
        hold(training.model, state["masks"])

    def mask(self, weight: torch.Tensor, number: int) -> torch.Tensor:
        """The mask of the `number`-th layer: exactly `sparsity` of its entries (rounded) are zero."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        mask = torch.ones(weight.numel(), dtype=torch.bool)
        mask[torch.randperm(weight.numel(), generator=generator)[: zero_count(self.sparsity, weight)]] = False
        return mask.view(weight.shape).to(weight.device)

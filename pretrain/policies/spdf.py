"""Sparse pre-training, dense fine-tuning: a fixed random part of each matrix is held at zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from pretrain.core.batch import Batch
from pretrain.core.errors import PretrainError
from pretrain.core.families import linears
from pretrain.objectives import Loss
from pretrain.policies import Policy

if TYPE_CHECKING:
    from pretrain.training.loop import Training


@dataclass(frozen=True)
class SPDF(Policy):
    """SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models (arXiv:2303.10464).

    Before training, `sparsity` of the weights of each linear layer in the blocks (uniformly; embeddings, norms, biases
    and head stay dense) are chosen at random and set to zero, and they stay zero: w ← m ⊙ w after each step.
    Fine-tuning without this policy is dense: the zeros are then trained like all others. The meter counts dense FLOPs;
    hardware that skips zeros needs `1 - sparsity` of those of the masked layers.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert", "modernbert", "t5")

    sparsity: float = 0.75
    seed: int = 0

    def start(self, training: Training, state: dict[str, Any]) -> None:
        """Draw the masks, from the seed and the layers' names alone, and apply them."""
        if not 0 <= self.sparsity < 1:
            raise PretrainError(f"spdf: sparsity {self.sparsity}: accepted: from 0 to below 1")
        masks = {}
        for number, (name, module) in enumerate(linears(training.model).items()):
            if hasattr(module.weight, "full_tensor"):
                raise PretrainError("spdf: sharded weights are not supported; accepted: strategy: ddp")
            masks[name] = self.mask(module.weight, number)
        state["masks"] = masks
        self._hold(training.model, masks)

    def after_step(
        self, training: Training, state: dict[str, Any], batches: Sequence[Batch], losses: Sequence[Loss]
    ) -> None:
        """Put the zeros back."""
        self._hold(training.model, state["masks"])

    @torch.no_grad()
    def _hold(self, model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
        for name, module in linears(model).items():
            module.weight.mul_(masks[name])

    def mask(self, weight: torch.Tensor, number: int) -> torch.Tensor:
        """The mask of the `number`-th layer: exactly `sparsity` of its entries (rounded) are zero."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        mask = torch.ones(weight.numel(), dtype=torch.bool)
        mask[torch.randperm(weight.numel(), generator=generator)[: round(self.sparsity * weight.numel())]] = False
        return mask.view(weight.shape).to(weight.device)

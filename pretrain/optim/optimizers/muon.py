"""Muon: momentum made orthogonal, for matrices; AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from pretrain.core.bounds import Count, NonNegative, Positive, ProperShare
from pretrain.core.errors import PretrainError
from pretrain.optim import Optimizer, decay_groups, hidden_matrices
from pretrain.optim.optimizers._together import Together


@dataclass(frozen=True)
class Muon(Optimizer):
    """Muon is Scalable for LLM Training (arXiv:2502.16982).

    The momentum M of each hidden A × B matrix is brought near U Vᵀ of its singular value decomposition by `ns_steps`
    Newton-Schulz iterations O ← a O + (b O Oᵀ + c (O Oᵀ)²) O, and the step is 0.2 √max(A, B) · O: as large, in root
    mean square, as AdamW's, so that its rate and decay can be kept. Embeddings, heads and vectors take AdamW's steps at
    `adamw_lr` (none: `lr`). `torch.optim.Muon`, which iterates in bfloat16.
    """

    momentum: ProperShare = 0.95
    nesterov: bool = True
    ns_steps: Count = 5
    adamw_lr: NonNegative | None = None
    beta1: ProperShare = 0.9
    beta2: ProperShare = 0.95
    eps: Positive = 1e-8

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """`torch.optim.Muon` over the hidden matrices and `torch.optim.AdamW` over the rest, as one."""
        if not hasattr(torch.optim, "Muon"):
            raise PretrainError(f"muon: torch {torch.__version__} has none; accepted: torch 2.9 or newer")
        hidden, rest = hidden_matrices(named_parameters, self.name)
        parts: list[torch.optim.Optimizer] = []
        if hidden:
            parts.append(
                torch.optim.Muon(
                    [p for _, p in hidden], lr=self.lr, weight_decay=self.weight_decay, momentum=self.momentum,
                    nesterov=self.nesterov, ns_steps=self.ns_steps, adjust_lr_fn="match_rms_adamw",
                )
            )  # fmt: skip
        if rest:
            groups = [dict(group) for group in decay_groups(rest, self.weight_decay)]
            lr = self.lr if self.adamw_lr is None else self.adamw_lr
            parts.append(torch.optim.AdamW(groups, lr=lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True))
        return Together(parts)

    def update_flops(self, width: int) -> float:
        """Three products an iteration: 4 A + 2 A² / B a weight of an A × B matrix, A the smaller side."""
        return self.ns_steps * 5.0 * width

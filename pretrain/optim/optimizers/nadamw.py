"""NAdamW: AdamW with Nesterov's momentum."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from pretrain.core.bounds import NonNegative, Positive, ProperShare
from pretrain.optim import Optimizer, decay_groups


@dataclass(frozen=True)
class NAdamW(Optimizer):
    """Benchmarking Neural Network Training Algorithms (arXiv:2306.07179).

    One of the paper's baselines: Dozat's Adam with Nesterov's momentum, with AdamW's decay. With the momentum
    μ_t = beta1 (1 - 0.96^(t · momentum_decay) / 2), which grows from half of beta1 to beta1, it steps along
    μ_{t+1} m_t / (1 - μ_1 ⋯ μ_{t+1}) + (1 - μ_t) g_t / (1 - μ_1 ⋯ μ_t) where Adam has m_t / (1 - beta1^t).
    """

    beta1: ProperShare = 0.9
    beta2: ProperShare = 0.999
    eps: Positive = 1e-8
    momentum_decay: NonNegative = 4e-3

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """`torch.optim.NAdam`, with decoupled decay."""
        groups = [dict(group) for group in decay_groups(named_parameters, self.weight_decay)]
        return torch.optim.NAdam(
            groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, momentum_decay=self.momentum_decay,
            decoupled_weight_decay=True,
        )  # fmt: skip

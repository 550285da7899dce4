"""Lion: the sign of a momentum."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from pretrain.core.bounds import NonNegative, ProperShare
from pretrain.optim import Optimizer, decay_groups


@dataclass(frozen=True)
class Lion(Optimizer):
    """Symbolic Discovery of Optimization Algorithms (arXiv:2302.06675).

    The step is sign(beta1 · m + (1 - beta1) · g), after which m ← beta2 · m + (1 - beta2) · g; one moment, all weights
    move by the same amount. Decay is decoupled. The authors take a rate three to ten times below AdamW's, and a decay
    as many times above. From the package `pytorch-optimizer`.
    """

    lr: NonNegative = 1e-4
    weight_decay: NonNegative = 1.0
    beta1: ProperShare = 0.9
    beta2: ProperShare = 0.99

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """`pytorch_optimizer.Lion`."""
        import pytorch_optimizer

        groups = [dict(group) for group in decay_groups(named_parameters, self.weight_decay)]
        return pytorch_optimizer.Lion(groups, lr=self.lr, betas=(self.beta1, self.beta2), weight_decouple=True)

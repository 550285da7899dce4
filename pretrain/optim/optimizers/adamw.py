"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from pretrain.core.bounds import Positive, ProperShare
from pretrain.optim import Optimizer, decay_groups


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Decoupled Weight Decay Regularization (arXiv:1711.05101).

    Adam's step m̂ / (√v̂ + eps), with the decay lr · weight_decay · w taken from the weight itself instead of being
    added to the gradient. Norms, biases and scales do not decay, whatever their shape.
    """

    beta1: ProperShare = 0.9
    beta2: ProperShare = 0.95
    eps: Positive = 1e-8

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """`torch.optim.AdamW`, in its fused form."""
        groups = [dict(group) for group in decay_groups(named_parameters, self.weight_decay)]
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)

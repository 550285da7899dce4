"""AdEMAMix: Adam with a second momentum that forgets slowly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from pretrain.core.bounds import NonNegative, OpenShare, Positive, ProperShare
from pretrain.optim import Optimizer, decay_groups


@dataclass(frozen=True)
class AdEMAMix(Optimizer):
    """The AdEMAMix Optimizer: Better, Faster, Older (arXiv:2409.03137).

    AdamW's step with (m̂₁ + alpha · m₂) / (√v̂ + eps), where m₂ is a momentum of `beta3`, much longer than m₁'s
    `beta1`. While T = `warmup` (a share of training, or above 1 a number of steps) lasts, alpha grows linearly from 0
    and beta3 from beta1 so that its half-life does; the paper's T is the whole training. From the package
    `pytorch-optimizer`.
    """

    beta1: OpenShare = 0.9
    beta2: ProperShare = 0.999
    beta3: OpenShare = 0.9999
    alpha: NonNegative = 5.0
    eps: Positive = 1e-8
    warmup: NonNegative = 1.0

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """`pytorch_optimizer.AdEMAMix`, told before each step how long its warm-up is."""
        import pytorch_optimizer

        def plan(optimizer: torch.optim.Optimizer, *_: object) -> None:
            for group in optimizer.param_groups:
                # Out of a training no share of it is known, and there is no warm-up.
                steps = self.warmup * group.get("total_steps", 0) if self.warmup <= 1 else self.warmup
                group["t_alpha_beta3"] = steps or None

        groups = [dict(group) for group in decay_groups(named_parameters, self.weight_decay)]
        betas = (self.beta1, self.beta2, self.beta3)
        built = pytorch_optimizer.AdEMAMix(
            groups, lr=self.lr, betas=betas, alpha=self.alpha, eps=self.eps, weight_decouple=True
        )
        built.register_step_pre_hook(plan)
        return built

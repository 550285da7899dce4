"""Schedule-Free AdamW: an average of the weights in place of a falling rate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from pretrain.core.bounds import NonNegative, OpenShare, Positive, ProperShare
from pretrain.optim import Optimizer, decay_groups

if TYPE_CHECKING:
    from pytorch_optimizer import ScheduleFreeAdamW


@dataclass(frozen=True)
class ScheduleFree(Optimizer):
    """The Road Less Scheduled (arXiv:2405.15682).

    Gradients are taken at y = (1 - beta1) z + beta1 x, where z makes AdamW's steps without momentum and x is the
    average of all z, weighted by t^r and by the highest rate so far to the power `weight_lr_power`. Training goes on at
    y; evaluations and the checkpoint use x. For a constant rate after a warm-up. From the package `pytorch-optimizer`.
    """

    schedules: ClassVar[tuple[str, ...]] = ("constant",)
    averages_weights: ClassVar[bool] = True

    lr: NonNegative = 2.5e-3
    beta1: OpenShare = 0.9
    beta2: ProperShare = 0.999
    eps: Positive = 1e-8
    r: NonNegative = 0.0
    weight_lr_power: NonNegative = 2.0

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """`pytorch_optimizer.ScheduleFreeAdamW`, with `averages`."""
        groups = [dict(group) for group in decay_groups(named_parameters, self.weight_decay)]
        return _averaging()(
            groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, r=self.r,
            weight_lr_power=self.weight_lr_power,
        )  # fmt: skip


@cache
def _averaging() -> type[ScheduleFreeAdamW]:
    """The package's optimiser, imported when it is wanted, with the averages beside the weights.

    Its own `eval` and `train` move the weights to the average and back, with rounding: evaluating would change
    training.
    """
    import pytorch_optimizer

    class Averaging(pytorch_optimizer.ScheduleFreeAdamW):
        @property
        def averages(self) -> dict[nn.Parameter, Tensor]:
            """x, by parameter: y + (1 - 1 / beta1) (z - y)."""
            with torch.no_grad():
                return {
                    p: torch.lerp(p, self.state[p]["z"], 1 - 1 / group["betas"][0])
                    for group in self.param_groups
                    for p in group["params"]
                    if "z" in self.state[p]
                }

    return Averaging

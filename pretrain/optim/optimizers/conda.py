"""Conda: Adam in a basis of the momentum's singular vectors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pretrain.core.bounds import Count, NonNegative, Positive, ProperShare
from pretrain.core.models.parameters import role
from pretrain.optim import Group, Optimizer, decay_groups
from pretrain.optim.optimizers._stepping import Stepping


@dataclass(frozen=True)
class Conda(Optimizer):
    """Conda: Column-Normalized Adam for Training Large Language Models Faster (arXiv:2509.24218).

    For the weight of each linear layer, every `update_gap` steps an orthogonal basis U is taken from the singular
    vectors of the momentum M (those of its shorter side). Momentum and gradient are projected, M' = Uᵀ M and G' = Uᵀ G,
    the second moment V is that of G', and the step is U · M' / (√V + eps), times `scale`, with Adam's bias correction.
    Tables, of tokens or of positions, the head and vectors take plain Adam steps. Weight decay is decoupled.
    """

    version: ClassVar[int] = 2  # tables are told by what they are

    lr: NonNegative = 1e-2
    weight_decay: NonNegative = 0.0
    beta1: ProperShare = 0.9
    beta2: ProperShare = 0.99
    eps: Positive = 1e-8
    update_gap: Count = 2000
    scale: NonNegative = 0.25

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """The matrices in one group, the rest as AdamW would group it."""
        named = [(name, p) for name, p in named_parameters if p.requires_grad]
        rotated = [(n, p) for n, p in named if p.ndim == 2 and role(p) == "matrix"]
        taken = {id(p) for _, p in rotated}
        groups = decay_groups([(n, p) for n, p in named if id(p) not in taken], self.weight_decay)
        for group in groups:
            group["rotate"] = False
        if rotated:
            groups.append({"params": [p for _, p in rotated], "weight_decay": self.weight_decay, "rotate": True})
        betas = (self.beta1, self.beta2)
        return CondaOptimizer(groups, self.lr, betas, eps=self.eps, update_gap=self.update_gap, scale=self.scale)


class CondaOptimizer(Stepping):
    """The optimiser of `Conda`; a group's parameters are stepped in their own basis where it says `rotate`."""

    def __init__(
        self, groups: list[Group], lr: float, betas: tuple[float, float], *, eps: float, update_gap: int, scale: float
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "update_gap": update_gap, "scale": scale}
        super().__init__([dict(group) for group in groups], defaults)

    @property
    def phase(self) -> str:
        """What the next step does; steps that make bases anew cost more."""
        rotated = [(g, p) for g in self.param_groups if g["rotate"] for p in g["params"] if p.grad is not None]
        taken = [(self.state[p]["step"] if self.state[p] else 0, g["update_gap"]) for g, p in rotated]
        return "new bases" if any(step % gap == 0 for step, gap in taken) else "rotated"

    def update(self) -> None:
        """Momentum and second moment, rotated where a group says so."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                momentum, second = state["exp_avg"], state["exp_avg_sq"]
                momentum.lerp_(p.grad, 1 - beta1)
                grad, moved, rotate = p.grad, momentum, group["rotate"]
                if rotate:
                    if state["step"] % group["update_gap"] == 0:
                        state["basis"] = basis(momentum)
                    grad, moved = into(grad, state["basis"]), into(momentum, state["basis"])
                second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                state["step"] += 1
                update = moved / second.sqrt().add_(group["eps"])
                if rotate:
                    update = out_of(update, state["basis"]).mul_(group["scale"])
                correction = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * correction)


def basis(matrix: Tensor) -> Tensor:
    """Orthogonal singular vectors of the shorter side: right ones (as rows) of a tall matrix, else left ones.

    Laid out as a state that is read back is, so that a training that goes on has the same bits.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    left, _, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    return (right if tall else left).to(matrix.dtype).contiguous()


def into(matrix: Tensor, vectors: Tensor) -> Tensor:
    """The matrix in the basis."""
    return matrix @ vectors.T if matrix.shape[0] >= matrix.shape[1] else vectors.T @ matrix


def out_of(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Back from the basis."""
    return matrix @ vectors if matrix.shape[0] >= matrix.shape[1] else vectors @ matrix

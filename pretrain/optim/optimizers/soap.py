"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.core.bounds import Count, NonNegative, Positive, ProperShare
from pretrain.optim import Group, Optimizer, decay_groups, hidden_matrices
from pretrain.optim.optimizers._stepping import Stepping


@dataclass(frozen=True)
class SOAP(Optimizer):
    """SOAP: Improving and Stabilizing Shampoo using Adam (arXiv:2409.11321).

    Of each matrix with gradient G the averages L of G Gᵀ and R of Gᵀ G are kept, and their eigenvectors Q_L and Q_R,
    taken from the first gradient and refined every `precondition_frequency` steps by one power iteration and a QR
    decomposition. The step is Adam's on the rotated gradient Q_Lᵀ G Q_R, rotated back. As in the authors' code the
    first step only begins L and R (here weights decay in it too), and the decay follows the step. Sides longer than
    `max_precondition_dim` and the longer sides of embeddings and heads are not rotated, vectors take Adam's steps.
    Averages and eigenvectors are in float32 whatever the weights are in. `shampoo_beta`: none is `beta2`.
    """

    lr: NonNegative = 3e-3
    weight_decay: NonNegative = 0.01
    beta1: ProperShare = 0.95
    beta2: ProperShare = 0.95
    shampoo_beta: ProperShare | None = None
    eps: Positive = 1e-8
    precondition_frequency: Count = 10
    max_precondition_dim: Count = 10_000

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """The hidden matrices in one group, the rest as AdamW would group it."""
        hidden, rest = hidden_matrices(named_parameters, self.name)
        groups = decay_groups(rest, self.weight_decay)
        if hidden:
            groups.append({"params": [p for _, p in hidden], "weight_decay": self.weight_decay, "rotate": True})
        return SOAPOptimizer(groups, self)


class SOAPOptimizer(Stepping):
    """The optimiser of `SOAP`; a group's matrices are rotated on both sides where it says `rotate`."""

    def __init__(self, groups: list[Group], method: SOAP) -> None:
        shampoo_beta = method.beta2 if method.shampoo_beta is None else method.shampoo_beta
        defaults = {"lr": method.lr, "betas": (method.beta1, method.beta2), "shampoo_beta": shampoo_beta}
        defaults |= {"eps": method.eps, "every": method.precondition_frequency, "most": method.max_precondition_dim}
        super().__init__([dict(group) for group in groups], defaults | {"rotate": False})

    @property
    def phase(self) -> str:
        """What the next step does: the first decomposes, and some refine the bases."""
        steps = {
            (self.state[p]["step"] if self.state[p] else 0, group["every"])
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        }
        names = {"first" if not step else "rotated" if step % every else "new bases" for step, every in steps}
        return ", ".join(sorted(names))

    def update(self) -> None:
        """Adam's step in the bases, then decay, then the bases' next averages."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, grad = self.state[p], p.grad.float()
                if not state:
                    zeros = torch.zeros(p.shape, device=p.device)
                    state |= {"step": 0, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
                    state |= {side: torch.zeros(n, n, device=p.device) for side, n in rotated_sides(p, group).items()}
                if state["step"]:
                    p.add_(adam_step(state, grad, group), alpha=-group["lr"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                precondition(state, grad, group)
                state["step"] += 1


State = dict[str, Any]  # of an optimiser: tensors and numbers by name; a group of its parameters too


def rotated_sides(p: Tensor, group: State) -> dict[str, int]:
    """The sides of a parameter that are rotated, `left` (rows) and `right` (columns), and how long they are."""
    if p.ndim != 2:
        return {}
    most = min(group["most"], max(p.shape) if group["rotate"] else min(p.shape))
    return {side: n for side, n in zip(("left", "right"), p.shape, strict=True) if n <= most}


def rotate(matrix: Tensor, state: State, *, back: bool = False) -> Tensor:
    """Q_Lᵀ X Q_R, or `back` Q_L X Q_Rᵀ, where a side that is not rotated has the identity."""
    if "left_basis" in state:
        matrix = (state["left_basis"] if back else state["left_basis"].T) @ matrix
    if "right_basis" in state:
        matrix = matrix @ (state["right_basis"].T if back else state["right_basis"])
    return matrix


def adam_step(state: State, grad: Tensor, group: State) -> Tensor:
    """Adam's step in the bases, rotated back; momentum is kept outside them, the second moment within."""
    beta1, beta2 = group["betas"]
    state["exp_avg"].lerp_(grad, 1 - beta1)
    state["exp_avg_sq"].lerp_(rotate(grad, state).square(), 1 - beta2)
    update = rotate(state["exp_avg"], state) / state["exp_avg_sq"].sqrt().add_(group["eps"])
    correction = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
    return rotate(update, state, back=True).mul_(correction)


def precondition(state: State, grad: Tensor, group: State) -> None:
    """Take the gradient into L and R; take or refine their eigenvectors, largest eigenvalue first, where it is time.

    Bases lie in memory as they do when they are read from a training state: products' bits depend on it.
    """
    for axis, side in enumerate(("left", "right")):
        if side not in state:
            continue
        state[side].lerp_(grad.T @ grad if axis else grad @ grad.T, 1 - group["shampoo_beta"])
        if not state["step"]:
            state[f"{side}_basis"] = torch.linalg.eigh(state[side])[1].flip(1).contiguous()
        elif state["step"] % group["every"] == 0:
            product = state[side] @ state[f"{side}_basis"]
            order = (state[f"{side}_basis"] * product).sum(0).argsort(descending=True, stable=True)
            state["exp_avg_sq"] = state["exp_avg_sq"].index_select(axis, order)
            state[f"{side}_basis"] = torch.linalg.qr(product[:, order])[0].contiguous()

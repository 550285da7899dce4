"""Muon: momentum made orthogonal, for matrices; AdamW for the rest.

Shape letters: N matrices of a shape, A their shorter side, B their longer one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.core.bounds import Count, NonNegative, Positive, ProperShare
from pretrain.core.hardware import precision
from pretrain.optim import Optimizer, decay_groups, hidden_matrices
from pretrain.optim.optimizers._stepping import Stepping
from pretrain.optim.optimizers._together import Together

COEFFICIENTS = (3.4445, -4.775, 2.0315)  # Keller Jordan's, whose slope at zero is steep
STACKED = 2**22  # numbers of small matrices that are iterated in one product


@dataclass(frozen=True)
class Muon(Optimizer):
    """Muon is Scalable for LLM Training (arXiv:2502.16982).

    The momentum M of each hidden A × B matrix is brought near U Vᵀ of its singular value decomposition by `ns_steps`
    Newton-Schulz iterations O ← a O + (b O Oᵀ + c (O Oᵀ)²) O, and the step is 0.2 √max(A, B) · O: as large, in root
    mean square, as AdamW's, so that its rate and decay can be kept. Embeddings, heads and vectors take AdamW's steps at
    `adamw_lr` (none: `lr`). The steps are those of `torch.optim.Muon`, which iterates one matrix after the other in
    bfloat16: here it is all of a shape at once, in bfloat16 where the hardware multiplies that in tiles, else in
    float32.
    """

    momentum: ProperShare = 0.95
    nesterov: bool = True
    ns_steps: Count = 5
    adamw_lr: NonNegative | None = None
    beta1: ProperShare = 0.9
    beta2: ProperShare = 0.95
    eps: Positive = 1e-8

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Orthogonal steps for the hidden matrices and `torch.optim.AdamW` for the rest, as one."""
        hidden, rest = hidden_matrices(named_parameters, self.name)
        parts: list[torch.optim.Optimizer] = []
        if hidden:
            parts.append(Orthogonal([p for _, p in hidden], self))
        if rest:
            groups = [dict(group) for group in decay_groups(rest, self.weight_decay)]
            lr = self.lr if self.adamw_lr is None else self.adamw_lr
            parts.append(torch.optim.AdamW(groups, lr=lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True))
        return Together(parts)

    def update_flops(self, width: int) -> float:
        """Three products an iteration: 4 A + 2 A² / B a weight of an A × B matrix, A the smaller side."""
        return self.ns_steps * 5.0 * width


class Orthogonal(Stepping):
    """The steps of `Muon`, for matrices alone."""

    def __init__(self, matrices: list[nn.Parameter], method: Muon) -> None:
        defaults = {"lr": method.lr, "weight_decay": method.weight_decay, "momentum": method.momentum}
        super().__init__(matrices, defaults | {"nesterov": method.nesterov, "ns_steps": method.ns_steps})

    def update(self) -> None:
        """Decay, and a step along the momentum made orthogonal."""
        for group in self.param_groups:
            for matrices in _alike(p for p in group["params"] if p.grad is not None):
                moved_NAB = torch.stack([_flat(self._momentum(p, group)) for p in matrices])
                moved_NAB = orthogonal(moved_NAB, group["ns_steps"])
                scale = 0.2 * max(matrices[0].shape) ** 0.5
                for p, moved_AB in zip(matrices, moved_NAB, strict=True):
                    step = moved_AB if p.shape == moved_AB.shape else moved_AB.T
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-group["lr"] * scale)

    def _momentum(self, p: nn.Parameter, group: dict[str, object]) -> Tensor:
        """The mean of the gradients; of Nesterov's, one step on."""
        assert p.grad is not None and isinstance(group["momentum"], float)
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        mean: Tensor = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        return p.grad.lerp(mean, group["momentum"]) if group["nesterov"] else mean


def orthogonal(matrices_NAB: Tensor, steps: int) -> Tensor:
    """Each near U Vᵀ of its singular value decomposition U S Vᵀ: singular values of 0.7 to 1.2 after five steps."""
    a, b, c = COEFFICIENTS
    x_NAB = matrices_NAB.to(precision(matrices_NAB.device) or torch.float32)
    x_NAB = x_NAB / x_NAB.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(steps):
        gram_NAA = x_NAB @ x_NAB.mT
        x_NAB = torch.baddbmm(x_NAB, torch.baddbmm(gram_NAA, gram_NAA, gram_NAA, beta=b, alpha=c), x_NAB, beta=a)
    return x_NAB.to(matrices_NAB.dtype)


def _flat(matrix: Tensor) -> Tensor:
    """With its shorter side first."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _alike(matrices: Iterable[nn.Parameter]) -> Iterator[Sequence[nn.Parameter]]:
    """Those of the same shape, type and device together, as many as one product is to take."""
    kinds: dict[object, list[nn.Parameter]] = defaultdict(list)
    for p in matrices:
        kinds[p.shape, p.dtype, p.device].append(p)
    for kind in kinds.values():
        count = max(1, STACKED // kind[0].numel())
        yield from (kind[first : first + count] for first in range(0, len(kind), count))

"""Optimisers and learning-rate schedules.

An optimiser's `build(named_parameters)` gives a `torch.optim.Optimizer`; a schedule's `factor(step, total)` gives what
the peak learning rate is multiplied by.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NotRequired, TypedDict

from pretrain.core.bounds import NonNegative
from pretrain.core.errors import PretrainError
from pretrain.core.method import Method

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Optimizer(Method):
    """Base of the optimisers. `lr` is the peak learning rate, `weight_decay` is for matrices and tables only."""

    kind: ClassVar[str] = "optimiser"
    schedules: ClassVar[tuple[str, ...]] = ()  # those that it is made for; empty: any
    averages_weights: ClassVar[bool] = False  # whether what it builds has `averages`
    lr: NonNegative = 1e-3
    weight_decay: NonNegative = 0.1

    @abstractmethod
    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Make the optimiser over these parameters, which `described` has marked with what they are.

        One whose steps do not all cost the same FLOPs says in a property `phase` what its next step is. One that
        `averages_weights` has in a property `averages`, by parameter, what evaluations and the end use in its place. A
        group's `total_steps` is how many steps the training makes, as far as is known.
        """
        raise NotImplementedError

    def update_flops(self, width: int) -> float:
        """FLOPs of a step's update for each weight of the blocks, of a model of that width."""
        return 0.0


class Schedule(Method):
    """Base of the schedules."""

    kind: ClassVar[str] = "schedule"

    @abstractmethod
    def factor(self, step: int, total: int) -> float:
        """The factor on the peak learning rate at `step` (from 0) of `total` steps."""
        raise NotImplementedError

    def check(self, total: int) -> None:
        """Refuse a warm-up that is longer than a training of `total` steps, whose rate would never be at its peak."""
        warmup = getattr(self, "warmup", 0.0)
        if warmup >= 1 and warmup > total:
            raise PretrainError(
                f"{self.name}: warmup {warmup:g}: accepted: at most the {total} steps of the budget, or a share below 1"
            )


if TYPE_CHECKING:
    Named = list[tuple[str, nn.Parameter]]


class Group(TypedDict):
    """Parameters that are stepped alike."""

    params: list[nn.Parameter]
    weight_decay: float
    rotate: NotRequired[bool]  # in a basis of its own


def decay_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[Group]:
    """Two parameter groups: matrices and tables, which decay, and vectors (norms, biases, scales), which do not."""
    from pretrain.core.models.parameters import role

    trained = [p for _, p in named_parameters if p.requires_grad]
    groups: list[Group] = [
        {"params": [p for p in trained if role(p) != "vector"], "weight_decay": weight_decay},
        {"params": [p for p in trained if role(p) == "vector"], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def warmup_steps(warmup: float, total: int) -> int:
    """A warm-up given as a share of training (below 1) or as a number of steps, in steps; the last is at the peak."""
    return round(warmup * total) if warmup < 1 else min(int(warmup), total)


def between(low: float, share: float) -> float:
    """The factor that lies a share of the way from `low` to the peak; never above it by a rounding."""
    return min(1.0, low + (1 - low) * share)


def whole(named_parameters: Iterable[tuple[str, nn.Parameter]], method: str) -> Named:
    """The trained parameters, of which steps need rows and columns: sharded ones are refused."""
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    if any(hasattr(p, "full_tensor") for _, p in named):
        raise PretrainError(f"{method}: sharded weights are not supported; accepted: strategy: ddp")
    return named


def hidden_matrices(named_parameters: Iterable[tuple[str, nn.Parameter]], method: str) -> tuple[Named, Named]:
    """The trained matrices that map one hidden state to another, and the rest: tables, heads, vectors."""
    from pretrain.core.models.parameters import role

    named = whole(named_parameters, method)
    inside = [role(parameter) == "matrix" and parameter.ndim == 2 for _, parameter in named]
    pairs = list(zip(inside, named, strict=True))
    return [pair for within, pair in pairs if within], [pair for within, pair in pairs if not within]

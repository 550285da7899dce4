"""What the merges share that add task vectors: the differences of fine-tuned models from the one they began as."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pretrain.core.bounds import AnyNumber
from pretrain.core.errors import PretrainError
from pretrain.core.method import Ref
from pretrain.dial.effort import Task, Work, through
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._random import generator
from pretrain.surgery.merging._streams import Place, Setting, at_place, check_settings, for_each, merge, streamed

Rescale = Literal["density", "l1", "none"]


@dataclass(frozen=True)
class TaskVectors(Surgery):
    """θ = θ_0 + scale · Σ w_k τ'_k, where τ'_k is what is left of τ_k = θ_k - θ_0; the checkpoint is θ_0.

    With `normalize` the sum is divided by that of the weights. With `elect` each number takes part only in the models
    whose w_k τ'_k has the sign of their sum (plus where that is 0), and the sum of the weights is over those.
    """

    shares_vocabulary: ClassVar[tuple[str, ...]] = ("models",)

    models: tuple[Ref, ...]
    weights: tuple[Setting, ...] = (1.0,)
    scale: AnyNumber = 1.0
    normalize: bool = False
    elect: bool = False

    def __post_init__(self) -> None:
        """Refuse no models, and settings that do not fit them."""
        super().__post_init__()
        if not self.models:
            raise PretrainError(f"{self.name}: models []: accepted: one or more fine-tuned models", place=("models",))
        check_settings(self.name, "weights", self.weights, len(self.models))

    def thin(self, vector: Tensor, number: int, place: Place, source: torch.Generator) -> Tensor:
        """What is left of the task vector of a model."""
        return vector

    def work(self, task: Task) -> Work:
        """What `thin` does to each model's weights, and their sum."""
        return len(self.models) * (self.thinning(task) + through(task.numbers, 3 * self.elect)) + streamed(
            task, len(self.models)
        )

    def thinning(self, task: Task) -> Work:
        """Of `thin`, on all weights of a model."""
        return Work()

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model, merged."""
        source = generator(self.name, inputs)

        def combine(place: Place, start: Tensor, others: Iterator[Tensor]) -> Tensor:
            weights = [at_place(for_each(self.weights, number), place) for number in range(len(self.models))]
            weighted = (
                self.thin(other.sub_(start), number, place, source).mul_(weights[number])
                for number, other in enumerate(others)
            )
            total, divisor = _agreed([*weighted], weights) if self.elect else (_sum(weighted), _divisor(weights))
            return start.add_(total.div_(divisor) if self.normalize else total, alpha=self.scale)

        folders = {f"models.{number}": folder for number, folder in enumerate(self.models)}
        return merge(self.name, model, folders, combine, inputs)


def _sum(weighted: Iterator[Tensor]) -> Tensor:
    total = next(weighted)
    for vector in weighted:
        total += vector
    return total


def _divisor(weights: list[float]) -> float:
    total = sum(weights)
    return total if abs(total) >= 1e-8 else 1.0


def _agreed(weighted: list[Tensor], weights: list[float]) -> tuple[Tensor, Tensor]:
    """The sum of the numbers that have the elected sign, and of the weights of their models (1 where there is none)."""
    positive = _sum(iter([weighted[0].clone(), *weighted[1:]])) >= 0
    total, divisor = torch.zeros_like(weighted[0]), torch.zeros_like(weighted[0])
    for vector, weight in zip(weighted, weights, strict=True):
        agrees = torch.where(positive, vector > 0, vector < 0)
        total += vector * agrees
        divisor += weight * agrees
    return total, divisor.masked_fill_(divisor == 0, 1.0)


def draw(kept: Tensor, source: torch.Generator, like: Tensor) -> Tensor:
    """1 with the probabilities `kept`, in float32 on the CPU, so that numbers are the same on each device; else 0."""
    return torch.bernoulli(kept, generator=source).to(like)


def rescaled(vector: Tensor, mask: Tensor, rescale: str, kept: Tensor | float) -> Tensor:
    """The numbers under a mask: divided by the probability `kept` (`density`), to the old L1 norm (`l1`), or as is."""
    thinned = vector * mask
    if rescale == "density":
        return thinned / kept
    before, after = vector.abs().sum(), thinned.abs().sum()
    return thinned * (before / after) if rescale == "l1" and min(before, after) >= 1e-7 else thinned

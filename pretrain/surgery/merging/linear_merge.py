"""A weighted mean of models, with weights by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from pretrain.core.errors import PretrainError
from pretrain.core.method import Ref
from pretrain.dial.effort import Task, Work
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery.merging._streams import Place, Setting, at_place, check_settings, for_each, merge, streamed


@dataclass(frozen=True)
class LinearMerge(Surgery):
    """Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time
    (arXiv:2203.05482).

    The uniform soup with weights: θ = Σ w_k θ_k / Σ w_k over the checkpoint, which is the first, and `models`; without
    `normalize` it is not divided. `weights` are one for all or one for each, the checkpoint's first; each is a number,
    a list of numbers spread over the blocks, or a mapping from parts of weights' names to either (`*`: all others).
    Sums are in float64 and rounded once; the models are read weight by weight, so that two tensors are in memory
    besides the checkpoint (`model_soup`, which measures its soups, has all models there). Checked against mergekit
    0.1.5 (arcee-ai/mergekit) on whole checkpoints.
    """

    shares_vocabulary: ClassVar[tuple[str, ...]] = ("models",)

    models: tuple[Ref, ...]
    weights: tuple[Setting, ...] = (1.0,)
    normalize: bool = True

    def __post_init__(self) -> None:
        """Refuse no models, and settings that do not fit them."""
        super().__post_init__()
        if not self.models:
            raise PretrainError(
                "linear_merge: models []: accepted: one or more besides the checkpoint", place=("models",)
            )
        check_settings(self.name, "weights", self.weights, len(self.models) + 1)

    def work(self, task: Task) -> Work:
        """One pass over all weights of the models."""
        return streamed(task, len(self.models))

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model, merged."""

        def combine(place: Place, start: Tensor, others: Iterator[Tensor]) -> Tensor:
            weights = [at_place(for_each(self.weights, number), place) for number in range(len(self.models) + 1)]
            total, divisor = start * weights[0], sum(weights)
            for other, weight in zip(others, weights[1:], strict=True):
                total.add_(other, alpha=weight)
            if self.normalize and abs(divisor) < 1e-9:
                raise PretrainError(
                    f"linear_merge: weights {weights} of {place.name}: accepted: numbers whose sum is not 0"
                )
            return total / divisor if self.normalize else total

        folders = {f"models.{number}": folder for number, folder in enumerate(self.models)}
        return merge(self.name, model, folders, combine, inputs)

"""Few fine-tuned models instead of many: how far their mean goes back to the pretrained one, by their angle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from pretrain.core.errors import PretrainError
from pretrain.core.method import Ref
from pretrain.dial.effort import Task, Work
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery.merging._streams import Place, merge, streamed

TINY = 1e-6  # below which a product of norms, or the share's divisor, is taken for it


@dataclass(frozen=True)
class ModelStock(Surgery):
    """Model Stock: All we need is just a few fine-tuned models (arXiv:2403.19522).

    Fine-tuned weights lie on a thin shell around a centre that a mean of many would reach. Two or more `models`,
    fine-tuned from the checkpoint θ_0, tell by their angle how near it is, weight by weight: with the cosine between
    two of θ_k - θ_0, θ = t · θ_mean + (1 - t) · θ_0, t = N cos / (1 + (N - 1) cos). The paper says nothing of
    unequal angles of more than two; the cosine is then the mean over all pairs, as mergekit takes it. Nothing is tuned.
    Sums are in float64 and rounded once; the models are read weight by weight, so that one tensor of each is in memory.
    Checked against mergekit 0.1.5 (arcee-ai/mergekit) on whole checkpoints.
    """

    shares_vocabulary: ClassVar[tuple[str, ...]] = ("models",)

    models: tuple[Ref, ...]

    def __post_init__(self) -> None:
        """Refuse fewer models than have an angle."""
        super().__post_init__()
        if len(self.models) < 2:
            raise PretrainError(
                f"model_stock: models {list(self.models)}: accepted: two or more fine-tuned models", place=("models",)
            )

    def work(self, task: Task) -> Work:
        """One pass over all weights of the models."""
        return streamed(task, len(self.models))

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model, merged."""

        def combine(place: Place, start: Tensor, others: Iterator[Tensor]) -> Tensor:
            vectors = [other.sub_(start) for other in others]
            mean = vectors[0].clone()
            for vector in vectors[1:]:
                mean += vector
            return start.add_(mean, alpha=share_of_mean(vectors) / len(vectors))

        folders = {f"models.{number}": folder for number, folder in enumerate(self.models)}
        return merge(self.name, model, folders, combine, inputs)


def share_of_mean(vectors: list[Tensor]) -> float:
    """t: how much of the mean of the differences there is in the merge; 0 where they have no direction."""
    norms, pairs = [float(vector.norm()) for vector in vectors], [*combinations(range(len(vectors)), 2)]
    cosines = [float((vectors[i] * vectors[j]).sum()) / max(norms[i] * norms[j], TINY) for i, j in pairs]
    cosine = sum(min(1.0, max(-1.0, each)) for each in cosines) / len(cosines)
    divisor = 1 + (len(vectors) - 1) * cosine
    return len(vectors) * cosine / divisor if abs(divisor) > TINY else 0.0

"""DEFT: any objective, and a loss on how many of the feed-forwards' activations are not zero.

Shape letters: B rows, L positions, F width of a feed-forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch, Context, Example, Row
from pretrain.core.errors import PretrainError
from pretrain.core.method import InnerObjective
from pretrain.core.models.density import activations
from pretrain.objectives import Loss, Objective

_OF_FINE_TUNING = ("predictions", "columns", "labels", "ready", "predict", "metrics", "expected")


@dataclass(frozen=True)
class Deft(Objective):
    """From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in Transformers
    (arXiv:2402.01911).

    The loss of the wrapped `objective` and a smooth count of the activations a that are not zero,

        L + weight · mean over blocks, tokens and neurons of a² / (a² + epsilon),

    a being what a feed-forward's nonlinearity (ReLU, GELU, SiLU; of a gated one the gate's) puts out. An
    encoder-decoder pays for the mean of each of its sides. Tokens of padding do not count where the batch says which
    they are. Meant for a model with adapters (`lora`, …), whose other weights are frozen. Evaluation sees the wrapped
    objective alone; the evaluation `activation_density` counts exactly. Parts: `objective`, its loss, and `density`,
    the mean itself.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert", "modernbert", "t5")

    objective: InnerObjective = "classification"
    weight: float = 1.0
    epsilon: float = 1e-7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight >= 0:
            raise PretrainError(f"deft: weight {self.weight}: accepted: 0 or more", place=("weight",))
        if not self.epsilon > 0:
            raise PretrainError(f"deft: epsilon {self.epsilon}: accepted: above 0", place=("epsilon",))
        if isinstance(self.wrapped, Deft):
            raise PretrainError("deft: objective 'deft': accepted: one that is not deft", place=("objective",))

    @cached_property
    def wrapped(self) -> Any:
        """The objective that pays for density."""
        return self.held()["objective"]

    def __getattr__(self, name: str) -> Any:
        """What an objective on labelled documents has besides, where the wrapped one is such."""
        if name in _OF_FINE_TUNING:
            return getattr(self.wrapped, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def task(self) -> str:  # type: ignore[override]
        """The kind of model that the wrapped objective trains."""
        return self.wrapped.task

    @property
    def labelled(self) -> bool:  # type: ignore[override]
        """As the wrapped objective."""
        return self.wrapped.labelled

    @property
    def own_evaluation(self) -> bool:  # type: ignore[override]
        """As the wrapped objective."""
        return self.wrapped.own_evaluation

    def raw_length(self, length: int) -> int:
        """The wrapped objective's."""
        return self.wrapped.raw_length(length)

    def prepare(self, rows: Sequence[Row] | Sequence[Example], context: Context) -> Batch:
        """What the wrapped objective prepares."""
        return self.wrapped.prepare(rows, context)

    def modules(self, model: nn.Module) -> nn.Module | None:
        """The wrapped objective's."""
        return self.wrapped.modules(model)

    def export(self, modules: nn.Module | None) -> dict[str, Any]:
        """The wrapped objective's."""
        return self.wrapped.export(modules)

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The two sums; parts `objective`, `density` and the wrapped objective's."""
        if not model.training:
            return self.wrapped.loss(model, batch, modules)
        with activations(model, self.name) as seen:
            own = self.wrapped.loss(model, batch, modules)
        sides: dict[str, list[Tensor]] = {}
        for place, found in seen.items():
            real_BL = None if place.startswith("decoder.") else _real(batch)
            for activation_BLF in found:
                sides.setdefault(place.rpartition(".")[0], []).append(self.density(activation_BLF, real_BL))
        if not sides:
            raise PretrainError("deft: the objective ran no feed-forward: accepted: an objective that runs the model")
        means = [torch.stack(densities).mean() for densities in sides.values()]
        density = torch.stack(means).sum()
        parts = {"objective": own.value.detach(), "density": torch.stack(means).mean().detach()} | own.parts
        return Loss(own.value + self.weight * density, parts, own.nll_BL)

    def density(self, activation_BLF: Tensor, real_BL: Tensor | None = None) -> Tensor:
        """The mean of a² / (a² + epsilon) over neurons and tokens, those of padding left out."""
        square_BLF = activation_BLF.float().square()
        share_BL = (square_BLF / (square_BLF + self.epsilon)).mean(-1)
        if real_BL is None or real_BL.shape != share_BL.shape:
            return share_BL.mean()
        return (share_BL * real_BL).sum() / real_BL.sum().clamp(min=1)


def _real(batch: Batch) -> Tensor | None:
    """Which positions hold tokens, if the batch says so."""
    for name in ("mask_BL", "document_BL"):
        if name in batch:
            return batch[name] != 0
    return None

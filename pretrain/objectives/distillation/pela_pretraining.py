"""PELA's intermediate pretraining: a factorised model learns the features of the original, near its weights.

Shape letters: B rows, L positions, E width, O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pretrain.core.batch import Batch, Context, Row
from pretrain.core.bounds import NonNegative, PositiveShare
from pretrain.core.errors import PretrainError
from pretrain.core.method import Ref
from pretrain.core.models.families import at, blocks, linears
from pretrain.objectives import Loss, summed
from pretrain.objectives._distil import (
    Taught,
    Teacher,
    block_states,
    distances,
    inside,
    open_teacher,
    same_width,
    states,
)
from pretrain.surgery.compression.pela import LowRank


@dataclass(frozen=True)
class PELAPretraining(Taught):
    """PELA: Learning Parameter-Efficient Models with Low-Rank Approximation (arXiv:2310.10700).

    Trains the model that the surgery `pela` has made of the `teacher`, which is only read:

        L = objective_weight · L_objective + features · mean over blocks of ‖s - t‖² / width
            + perturbation · mean over layers of (max |BA - W| - epsilon)²

    s and t are what the blocks of the two put out, at all tokens; BA and W the weights of a factorised layer and of the
    teacher's. An `objective_weight` of 0 is distillation alone.
    """

    version: ClassVar[int] = 2  # each term is weighed by its own number
    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert", "modernbert")
    shares_vocabulary: ClassVar[tuple[str, ...]] = ("teacher",)

    taught: ClassVar[float] = 0.0  # the teacher's states alone

    teacher: Ref
    objective: Literal["causal_lm", "masked_lm"] = "causal_lm"
    rate: PositiveShare = 0.15  # of masked_lm
    objective_weight: NonNegative = 1.0
    features: NonNegative = 1.0
    perturbation: NonNegative = 1.0
    epsilon: NonNegative = 1e-3

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """What the plain objective prepares, and over how many tokens features are compared."""
        batch = super().prepare(rows, context)
        return batch | {"weight_features": inside(batch)}

    def modules(self, model: nn.Module) -> nn.Module:
        """The teacher."""
        teacher = open_teacher(self.teacher, model, self.name)
        same_width(self.name, teacher, model)
        ours, theirs = (len(blocks(m)) for m in (model, teacher))
        if ours != theirs:
            raise PretrainError(f"{self.name}: the teacher has {theirs} blocks: accepted: {ours}, as the student")
        if self.perturbation and not low_rank(model):
            raise PretrainError(
                f"{self.name}: perturbation {self.perturbation}: accepted: 0, or a model that the surgery pela made"
            )
        plain = linears(teacher)
        for name in low_rank(model):
            if not isinstance(plain.get(name), nn.Linear | Conv1D):
                raise PretrainError(f"{self.name}: the teacher's {name} is factorised: accepted: the original model")
        return Teacher(teacher)

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The three losses; parts `objective`, `features`, `perturbation`."""
        assert isinstance(modules, Teacher), "pela_pretraining reads a teacher: see `modules`"
        numbers = range(len(blocks(model)) if self.features else 0)
        with block_states(model, numbers) as seen:
            plain = self._inner.loss(model, batch)
        # A term of weight 0 stays in the sum, so that every parameter has a gradient on every process.
        terms, parts = {"objective": self.objective_weight * plain.value}, {"objective": plain.value}
        if self.features:
            with torch.no_grad(), block_states(modules.model, numbers) as taught:
                states(modules.model, batch, causal=self.task == "causal")
            parts["features"] = distances([(seen[n], taught[n]) for n in numbers], batch)
            terms["features"] = self.features * parts["features"]
        if self.perturbation:
            parts["perturbation"] = perturbation(model, modules.model, self.epsilon)
            terms["perturbation"] = (
                self.perturbation * parts["perturbation"]
            )  # of the weights: of no token more or less
        return summed(terms, {name: part.detach() for name, part in parts.items()}, plain.nll_BL)


def low_rank(model: nn.Module) -> dict[str, LowRank]:
    """The factorised layers by qualified name."""
    return {name: layer for name, layer in linears(model).items() if isinstance(layer, LowRank)}


def perturbation(model: nn.Module, teacher: nn.Module, epsilon: float) -> Tensor:
    """The mean over the factorised layers of (max |BA - W| - epsilon)²."""
    plain = linears(teacher)
    largest = []
    for name, layer in low_rank(model).items():
        weight_OI = at(plain[name], "weight").T if isinstance(plain[name], Conv1D) else at(plain[name], "weight")
        largest.append(largest_change(layer.B, layer.A, weight_OI))
    return (torch.stack(largest) - epsilon).square().mean()


def largest_change(B_OR: Tensor, A_RI: Tensor, weight_OI: Tensor) -> Tensor:
    """max |BA - W|. The gradient is that of the one entry, so the products are not kept for the backward pass."""
    if hasattr(B_OR, "device_mesh"):
        raise PretrainError("pela_pretraining: strategy fsdp: accepted: ddp, or perturbation: 0")
    with torch.no_grad(), torch.autocast(B_OR.device.type, enabled=False):
        place = torch.addmm(weight_OI, B_OR, A_RI, beta=-1).abs_().argmax()
        row, column = (place // weight_OI.shape[1])[None], (place % weight_OI.shape[1])[None]
    entry = (B_OR.index_select(0, row) * A_RI.index_select(1, column).T).sum()
    return (entry - weight_OI.index_select(0, row).index_select(1, column).squeeze()).abs()

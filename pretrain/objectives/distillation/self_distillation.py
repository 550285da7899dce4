"""Self-distillation: further pretraining held near the representations of a model further pretrained before.

Shape letters: B rows, L positions, E width, N positions compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch, Context, Row
from pretrain.core.bounds import NonNegative, PositiveShare
from pretrain.core.errors import PretrainError
from pretrain.core.method import Ref
from pretrain.core.models.attention import attend
from pretrain.core.models.cross_entropy import IGNORE
from pretrain.core.models.families import base
from pretrain.objectives import Loss, summed
from pretrain.objectives._distil import (
    Taught,
    Teacher,
    last_states,
    open_teacher,
    same_width,
    weighted_mean,
)


@dataclass(frozen=True)
class SelfDistillation(Taught):
    """Self-Distillation for Further Pre-training of Transformers (arXiv:2210.02871).

    The `teacher` is the initial model after further pretraining on the target text; the student starts from the same
    initial model, on the same text, with its own loss plus the distance of the encoders' last states, neither masked
    nor normalised, from the teacher's (sg: no gradient):

        L = L_objective + distance · mean over states of ‖z(x) - sg z_teacher(x)‖²

    `states: first` compares each document's first, as the paper does with [CLS]; `all` those of all its tokens. `auto`
    is first with masked_lm, and all with causal_lm, whose first state knows of one token only.
    """

    version: ClassVar[int] = 2  # each term is weighed by its own number
    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert", "modernbert")
    shares_vocabulary: ClassVar[tuple[str, ...]] = ("teacher",)

    teacher: Ref
    objective: Literal["masked_lm", "causal_lm"] = "masked_lm"
    rate: PositiveShare = 0.15  # of masked_lm
    distance: NonNegative = 1.0
    states: Literal["auto", "first", "all"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        accepted = ("auto", "first", "all") if self.objective == "masked_lm" else ("auto", "all")
        if self.states not in accepted:
            raise PretrainError(
                f"self_distillation: states {self.states!r}: accepted with {self.objective}: {', '.join(accepted)}",
                place=("states",),
            )

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """What the plain objective prepares, and how many states are compared."""
        batch = super().prepare(rows, context)
        return batch | {"weight_distance": self._chosen(batch).sum()}

    def modules(self, model: nn.Module) -> nn.Module:
        """The teacher."""
        teacher = open_teacher(self.teacher, model, self.name)
        same_width(self.name, teacher, model)
        return Teacher(teacher)

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The objective's loss and the distance; parts `objective`, `distance`."""
        assert isinstance(modules, Teacher), "self_distillation reads a teacher: see `modules`"
        with last_states(model) as seen:
            plain = self._inner.loss(model, batch)
        # A causal model has read the same tokens already.
        chosen_BL = self._chosen(batch)
        ours_NE = (seen[-1] if self.task == "causal" else self._read(model, batch))[chosen_BL]
        with torch.no_grad():
            theirs_NE = self._read(modules.model, batch)[chosen_BL]
        distance = weighted_mean((ours_NE.float() - theirs_NE.float()).square().sum(-1), chosen_BL, batch)
        parts = {"objective": plain.value.detach(), "distance": distance.detach()}
        return summed({"objective": plain.value, "distance": self.distance * distance}, parts, plain.nll_BL)

    def _read(self, model: nn.Module, batch: Batch) -> Tensor:
        """`states_BLE` of the text with nothing masked."""
        causal, tokens_BL = self.task == "causal", batch["tokens_BL"]
        if not causal:
            tokens_BL = torch.where(batch["target_BL"] == IGNORE, tokens_BL, batch["target_BL"])
        return base(model)(input_ids=tokens_BL, **attend(model, batch, causal=causal)).last_hidden_state

    def _chosen(self, batch: Batch) -> Tensor:
        """`chosen_BL`: all tokens but padding, or each document's first."""
        chosen_BL = batch["document_BL"] != 0
        if self.states == "first" or (self.states == "auto" and self.task == "masked"):
            chosen_BL = chosen_BL & (batch["position_BL"] == 0)
        return chosen_BL

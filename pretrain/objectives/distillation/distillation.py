"""Distillation: a small model learns what a larger one, already trained, predicts.

Shape letters: B rows, L positions, N targets, V vocabulary, K most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch, Context, Row
from pretrain.core.bounds import NonNegative, Positive, PositiveShare, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.method import Ref
from pretrain.core.models.families import at, blocks, head
from pretrain.objectives import Loss, summed
from pretrain.objectives._distil import (
    Side,
    Taught,
    Teacher,
    block_states,
    distances,
    in_chunks,
    inside,
    kl,
    open_teacher,
    scattered,
    states,
    targets,
)


@dataclass(frozen=True)
class Distillation(Taught):
    """Distilling the Knowledge in a Neural Network (arXiv:1503.02531).

    With p the student's and q the teacher's predictions at `temperature` T, at the positions that have a target:

        L = hard · CE + soft · T² KL(q ‖ p) + features · mean over pairs of ‖W s - t‖² / width

    `divergence: reverse` is KL(p ‖ q), `jensen_shannon` the mean of the KLs of p and q from their mean. With `top_k`
    all but the teacher's k most likely tokens count as one. `features` compares the states s, t that blocks put out,
    at all tokens; `layers` maps the student's blocks to the teacher's, by number from 0 (default: evenly), and each
    pair has a trained W, the identity at first where the widths agree. The `teacher`, a checkpoint with the same
    tokenizer, is only read.
    """

    again: ClassVar[bool] = True
    version: ClassVar[int] = 2  # each term is weighed by its own number
    families: ClassVar[tuple[str, ...]] = ("causal", "masked")
    shares_vocabulary: ClassVar[tuple[str, ...]] = ("teacher",)

    teacher: Ref
    objective: Literal["causal_lm", "masked_lm"] = "causal_lm"
    rate: PositiveShare = 0.15  # of masked_lm
    hard: NonNegative = 0.5
    soft: NonNegative = 1.0
    temperature: Positive = 2.0
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "forward"
    top_k: Whole = 0  # 0: the whole vocabulary
    features: NonNegative = 0.0
    layers: dict[Whole, Whole] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers and not self.features:
            raise PretrainError(f"distillation: layers {self.layers}: accepted: with features above 0")

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """What the plain objective prepares, and over how many tokens features are compared."""
        batch = super().prepare(rows, context)
        return batch | {"weight_features": inside(batch)}

    def modules(self, model: nn.Module) -> nn.Module:
        """The teacher, and the projections from the student's width to its."""
        teacher = open_teacher(self.teacher, model, self.name)
        pairs = self._pairs(model, teacher)
        if not pairs:  # nor is a width needed, which not every configuration says
            return Teacher(teacher, nn.ModuleList())
        narrow, wide = (int(at(part, "config").hidden_size) for part in (model, teacher))
        projections = [nn.Linear(narrow, wide, bias=False) for _ in pairs]
        for projection in projections:
            if narrow == wide:
                nn.init.eye_(projection.weight)
        return Teacher(teacher, nn.ModuleList(projections))

    def _pairs(self, model: nn.Module, teacher: nn.Module) -> list[tuple[int, int]]:
        """The blocks that are compared: the student's and the teacher's."""
        if not self.features:
            return []
        ours, theirs = len(blocks(model)), len(blocks(teacher))
        for ours_i, theirs_i in self.layers.items():
            if not (0 <= ours_i < ours and 0 <= theirs_i < theirs):
                raise PretrainError(
                    f"distillation: layers {ours_i}: {theirs_i}: accepted: 0 to {ours - 1}, the student's blocks, to "
                    f"0 to "
                    f"{theirs - 1}, the teacher's",
                    place=("layers",),
                )
        return sorted(self.layers.items()) or [(i, -(-(i + 1) * theirs // ours) - 1) for i in range(ours)]

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The losses; parts `hard`, `soft` (the divergence without T²) and `features`."""
        assert isinstance(modules, Teacher), "distillation reads a teacher: see `modules`"
        causal, (has_target_BL, target_N, weight_N) = self.task == "causal", targets(batch)
        pairs = self._pairs(model, modules.model)
        with block_states(model, [i for i, _ in pairs]) as seen:
            ours = states(model, batch, causal=causal)[has_target_BL], *head(model)
        with torch.no_grad(), block_states(modules.model, {j for _, j in pairs}) as taught:
            theirs = states(modules.model, batch, causal=causal)[has_target_BL], *head(modules.model)
        losses_2N = in_chunks(self._losses, ours, theirs, target_N)
        hard, soft = (losses_2N * weight_N).sum(-1) / max(len(target_N), 1)
        # A term of weight 0 stays in the sum, so that every parameter has a gradient on every process.
        terms, parts = {"": self.hard * hard + self.soft * self.temperature**2 * soft}, {"hard": hard, "soft": soft}
        if pairs:
            assert isinstance(modules.learnt, nn.ModuleList), "pairs have projections: see `modules`"
            compared = [(w(seen[i]), taught[j]) for w, (i, j) in zip(modules.learnt, pairs, strict=True)]
            parts["features"] = distances(compared, batch)
            terms["features"] = self.features * parts["features"]
        parts = {name: part.detach() for name, part in parts.items()}
        return summed(terms, parts, scattered(losses_2N[0], has_target_BL))

    def _losses(self, ours: Side, theirs: Side, target_N: Tensor) -> Tensor:
        """`losses_2N`: the cross-entropy and the divergence."""
        x_NV, y_NV = (nn.functional.linear(*side).float() for side in (ours, theirs))
        hard_N = nn.functional.cross_entropy(x_NV, target_N, reduction="none")
        p, q = (z_NV.div(self.temperature).log_softmax(-1) for z_NV in (x_NV, y_NV.detach()))
        if 0 < self.top_k < q.shape[-1]:
            likely_NK = q.topk(self.top_k, dim=-1).indices
            p, q = grouped(p, likely_NK), grouped(q, likely_NK)
        return torch.stack([hard_N, divergence(p, q, self.divergence)])


def grouped(log_NV: Tensor, chosen_NK: Tensor) -> Tensor:
    """The log-probabilities of the chosen tokens and, last, of all others together."""
    others_N = log_NV.scatter(-1, chosen_NK, -torch.inf).logsumexp(-1)
    return torch.cat([log_NV.gather(-1, chosen_NK), others_N[:, None]], dim=-1)


def divergence(p_NV: Tensor, q_NV: Tensor, kind: str) -> Tensor:
    """How far the student's log-probabilities p are from the teacher's q, row by row."""
    if kind == "forward":
        return kl(q_NV, p_NV)
    if kind == "reverse":
        return kl(p_NV, q_NV)
    mean_NV = torch.logaddexp(p_NV, q_NV) - torch.log(p_NV.new_tensor(2.0))
    return (kl(p_NV, mean_NV) + kl(q_NV, mean_NV)) / 2

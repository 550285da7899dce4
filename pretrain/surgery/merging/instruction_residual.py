"""Instruction following for a base model that was trained on: the weights that tuning once added to the old one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from pretrain.core.bounds import AnyNumber
from pretrain.core.method import Ref
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._merge import add_vectors, toward
from pretrain.surgery.merging._instruction import add_rows, keep_manners, open_both, triples


@dataclass(frozen=True)
class InstructionResidual(Surgery):
    """Balancing Continuous Pre-Training and Instruction Fine-Tuning: Optimizing Instruction-Following in LLMs
    (arXiv:2410.10739).

    The `base` model is trained on, not the `instruct` one, which forgets; then its instruction residual is added to
    the checkpoint: θ = θ_checkpoint + scale · (θ_instruct - θ_base), without any instruction data. The paper adds it
    whole. Sums are in float64 and rounded once. Where the checkpoint still has a weight of the base, the result has
    the instruct model's at scale 1, and where the two others agree the checkpoint's: both exactly. Rows of the
    vocabulary that only the checkpoint has stay; those that only `instruct` has are added.
    """

    shares_vocabulary: ClassVar[tuple[str, ...]] = ("base", "instruct")

    base: Ref
    instruct: Ref
    scale: AnyNumber = 1.0

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model with the residual added."""
        base, instruct = open_both(self.name, model, self.base, self.instruct, inputs or Inputs())
        for weight, before, after in triples(model, base, instruct):
            weight.copy_(add_vectors(before.double(), toward(before, after, self.scale), weight.double()))
        add_rows(model, instruct)
        keep_manners(model, instruct)
        return model

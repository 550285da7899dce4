"""An instruction-tuned model of a domain, from one that was tuned and one that was trained on the domain."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from pretrain.core.bounds import AnyNumber
from pretrain.core.method import Ref
from pretrain.surgery import Inputs, Surgery, report
from pretrain.surgery._merge import add_vectors, toward
from pretrain.surgery.merging._instruction import add_rows, keep_manners, open_both, triples


@dataclass(frozen=True)
class InstructionVector(Surgery):
    """The Construction of Instruction-tuned LLMs for Finance without Instruction Data Using Continual Pretraining and
    Model Merging (arXiv:2409.19854).

    With the instruction vector θ_instruct - θ_base and the checkpoint's domain vector θ_checkpoint - θ_base,
    θ = θ_base + instruction · (θ_instruct - θ_base) + domain · (θ_checkpoint - θ_base). The paper finds the two vectors
    nearly independent, which is why they can be added; their cosine is among the stage's metrics. Sums are in float64
    and rounded once; with both factors 1, where one vector is 0 the result is exactly the other model's weight. Rows
    of the vocabulary that only the checkpoint has stay; those that only `instruct` has are added.
    """

    shares_vocabulary: ClassVar[tuple[str, ...]] = ("base", "instruct")

    base: Ref
    instruct: Ref
    instruction: AnyNumber = 1.0
    domain: AnyNumber = 1.0

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model, merged."""
        base, instruct = open_both(self.name, model, self.base, self.instruct, inputs or Inputs())
        product = tuned = trained = 0.0
        for weight, before, after in triples(model, base, instruct):
            instruction, domain = after.double() - before.double(), weight.double() - before.double()
            product += float((instruction * domain).sum())
            tuned, trained = tuned + float(instruction.square().sum()), trained + float(domain.square().sum())
            end, start = toward(before, after, self.instruction), toward(before, weight, self.domain)
            weight.copy_(add_vectors(before.double(), end, start))
        add_rows(model, instruct)
        keep_manners(model, instruct)
        if tuned and trained:
            report(inputs, **{"instruction_vector/cosine": product / math.sqrt(tuned * trained)})
        return model

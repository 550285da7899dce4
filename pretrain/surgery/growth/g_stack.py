"""Depthwise stacking: a deeper model from copies of a small one's blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import blocks, family
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._growth import with_blocks


@dataclass(frozen=True)
class GStack(Surgery):
    """Stacking Your Transformers: A Closer Look at Model Growth for Efficient LLM Pre-Training (arXiv:2405.15319).

    The operator that the paper finds best: the whole stack of a small, briefly trained model's blocks is copied
    `growth` times, M∘M∘…∘M, and training goes on. Embeddings, final norm and head are kept. The paper's guideline is a
    growth of 4, after about 10 billion tokens for models of billions of weights. Surgeries that the model has been
    through are repeated on the new blocks.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert")

    growth: Count = 4

    @property
    def growth_of_blocks(self) -> float:
        """As many times as there are copies."""
        return float(self.growth)

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """A model of `growth` times as many blocks, block i a copy of block i mod n."""
        entry = family(model)
        if entry.name not in self.families:
            raise PretrainError(f"g_stack: family {entry.name!r}: accepted: {', '.join(self.families)}")
        return with_blocks(model, list(range(len(blocks(model)))) * self.growth, self.name)

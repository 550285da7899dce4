"""Tables of the tokens' own values, mixed into the values of some blocks.

Shape letters: B rows, L positions, V vocabulary, C width of the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.core.bounds import Positive, Share, Whole
from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import blocks, embeddings, set_module
from pretrain.core.models.layers import Linear, like
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._passing import Values, inform, value_projections
from pretrain.surgery._random import generator


class EmbeddedValues(Values):
    """a V + b T[tokens], a, b and the table T trained."""

    def __init__(self, linear: Linear, width: int, mix: float, vocabulary: int) -> None:
        super().__init__(linear, width, 1 - mix, mix)
        self.table = nn.Embedding(vocabulary, width, **like(linear.weight))

    def mixed(self, values_BLC: Tensor) -> Tensor:
        """With the tokens' own values."""
        return self.share[0] * values_BLC + self.share[1] * self.table(self.reads().tokens_BL)


@dataclass(frozen=True)
class ValueEmbeddings(Surgery):
    """Value Residual Learning (arXiv:2410.17897).

    As the speed-run records have it: what a block attends to are its values and, beside them, values that depend on the
    token alone, looked up in a table of V × C of the block: V ← (1 - mix) V + mix T[token]. That is a large part of a
    small model's weights and next to none of its FLOPs. The two numbers are trained, a pair for each block; at a `mix`
    of 0 nothing is changed at first. `layers` (where none are named the last block and every second one before it) have
    a table each, normal with standard deviation `std` / √E. nanochat alternates so, modded-nanogpt mixes half and half.
    Surgeries that change the vocabulary come before.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")
    keeps_vocabulary: ClassVar[bool] = True

    layers: tuple[Whole, ...] = ()
    mix: Share = 0.5
    std: Positive = 1.0

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with other projections to values, changed in place."""
        model, source = self.restore(model), generator(self.name, inputs)
        std = self.std * embeddings(model).embedding_dim ** -0.5
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, EmbeddedValues):
                    table_VC = module.table.weight
                    table_VC.copy_(torch.empty(table_VC.shape).normal_(0, std, generator=source))
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Put in the tables, not drawn, and the mixing at its start."""
        inform(model, self.name)
        depth, vocabulary = len(blocks(model)), len(embeddings(model).weight)
        chosen = self.layers or tuple(range((depth - 1) % 2, depth, 2))
        if not all(0 <= number < depth for number in chosen):
            raise PretrainError(f"{self.name}: layers {list(chosen)}: accepted: 0 to {depth - 1}")
        every = value_projections(model, self.name)
        for attention, path, layer, width in (every[number] for number in chosen):
            made = EmbeddedValues(layer, width, self.mix, vocabulary)
            set_module(attention, path, made.train(model.training))
        return model

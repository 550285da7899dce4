"""A start without spikes: small sub-layers, and embeddings that are large beside them.

Shape letters: B rows, L positions, E width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.core.checkpoint import forget, record
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import at, blocks, embeddings, family, linears
from pretrain.core.models.layers import like
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._random import generator


class ScaledEmbedding(nn.Embedding):
    """√E times the token's row. The output layer, where it is tied, still sees the row itself."""

    def forward(self, input_ids_BL: Tensor) -> Tensor:
        """Rows of the table, scaled."""
        return super().forward(input_ids_BL) * math.sqrt(self.embedding_dim)


class NormedEmbedding(nn.Embedding):
    """The layer norm of the token's row."""

    def __init__(self, rows: int, width: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(rows, width, dtype=dtype, device=device)
        self.norm = nn.LayerNorm(self.embedding_dim, dtype=self.weight.dtype, device=self.weight.device)

    def forward(self, input_ids_BL: Tensor) -> Tensor:
        """Rows of the table, normalised."""
        return self.norm(super().forward(input_ids_BL))


@dataclass(frozen=True)
class SpikeNoMore(Surgery):
    """Spike No More: Stabilizing the Pre-training of Large Language Models (arXiv:2312.16903).

    Gradients stay bounded where sub-layers are small and the shortcut beside them is large. Small sub-layers: all
    matrices and embeddings are drawn anew with standard deviation √(2 / 5E), the last ones of attention and
    feed-forward with that divided by √(2N), N blocks. Large shortcut: embeddings are multiplied by √E (`scaled`, a
    deviation of √(2/5)), or go through a layer norm (`layer_norm`, a deviation of 1); with `none` they are as small as
    the matrices, which is the paper's "vanilla". For a model about to be trained. `merge: true`, after training, puts
    the factor or norm into the table and unties it from the output layer: a plain model of equal logits.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")

    embedding: Literal["scaled", "layer_norm", "none"] = "scaled"
    merge: bool = False

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model drawn anew, its embedding changed; or, with `merge`, a plain model of the same function."""
        if self.merge:
            return self._merged(model)
        self._check(model)
        self._draw(model, generator(self.name, inputs))
        if self.embedding != "none":
            model = self.restore(model)
            record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Put in the embedding, with the table that is there."""
        old = embeddings(model)
        kind = ScaledEmbedding if self.embedding == "scaled" else NormedEmbedding
        made = kind(*old.weight.shape, **like(old.weight))
        made.padding_idx = old.padding_idx
        made.weight = old.weight  # the same parameter, which a tied output layer shares
        model.set_input_embeddings(made.train(model.training))
        return model

    def _check(self, model: PreTrainedModel) -> None:
        entry = family(model)
        if entry.name not in self.families:
            raise PretrainError(f"spike_no_more: family {entry.name!r}: accepted: {', '.join(self.families)}")
        if type(embeddings(model)) is not nn.Embedding:
            kind = type(embeddings(model)).__name__
            raise PretrainError(f"spike_no_more: the embedding is a {kind}: accepted: a plain nn.Embedding")
        for name, layer in linears(model).items():
            if not isinstance(getattr(layer, "weight", None), nn.Parameter):
                raise PretrainError(
                    f"spike_no_more: {name} is a {type(layer).__name__}: accepted: layers with a weight; "
                    "draw first, then factorise"
                )

    @torch.no_grad()
    def _draw(self, model: PreTrainedModel, source: torch.Generator) -> None:
        """New numbers in all matrices and embeddings, zeros in the biases; norms stay."""
        entry, depth = family(model), len(blocks(model))
        table = embeddings(model)
        small = math.sqrt(2 / (5 * table.embedding_dim))
        last = {
            id(at(at(block, part), name))
            for block in blocks(model)
            for part, name in ((entry.attention, entry.output), (entry.feed_forward, entry.down))
        }
        tables = [table] + ([at(model.base_model, entry.positions)] if entry.positions else [])
        head: nn.Linear | None = model.get_output_embeddings()
        layers: list[nn.Module] = [*tables, *linears(model).values()]
        if head is not None and head.weight is not table.weight:
            layers.append(head)
        for layer in layers:
            std = small / math.sqrt(2 * depth) if id(layer) in last else small
            weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
            weight.copy_(torch.empty(weight.shape).normal_(0, std, generator=source))
            if bias is not None:
                bias.zero_()
        if table.padding_idx is not None:
            table.weight[table.padding_idx].zero_()

    @torch.no_grad()
    def _merged(self, model: PreTrainedModel) -> PreTrainedModel:
        old, head = embeddings(model), model.get_output_embeddings()
        if not isinstance(old, ScaledEmbedding | NormedEmbedding):
            raise PretrainError(
                "spike_no_more: merge True: accepted: a model of spike_no_more with a changed embedding"
            )
        table_VE = old(torch.arange(old.num_embeddings, device=old.weight.device))
        made = nn.Embedding.from_pretrained(table_VE, freeze=False, padding_idx=old.padding_idx)
        model.set_input_embeddings(made.train(model.training))
        if head is not None and head.weight is old.weight:
            head.weight = nn.Parameter(old.weight.detach().clone())
            model.config.tie_word_embeddings = False
        forget(model, self.name)
        return model

"""The last block asks by its position: its queries are a table's, its keys and values the states below.

Shape letters: B rows, L positions, P positions of the table, E width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pretrain.core.bounds import NonNegative, Whole
from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import at, blocks, embeddings, family, positions_of, set_module
from pretrain.core.models.layers import Attention, like
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._random import generator


class PositionQueries(nn.Module):
    """A projection to queries that reads the table at each position, and not what it is given."""

    position_BL: Tensor | None = None  # of the pass that the block is in

    def __init__(self, linear: nn.Module, positions: int, width: int, weight: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.table = nn.Embedding(positions, width, **like(weight))

    def forward(self, x_BLE: Tensor) -> Tensor:
        """The queries of all positions, `q_BLE`; those beyond the table ask as its last."""
        assert self.position_BL is not None, "called outside its block"
        position_BL = self.position_BL.clamp(max=self.table.num_embeddings - 1)
        return self.linear(self.table(position_BL)).expand(*x_BLE.shape[:-1], -1)


class FusedPositionQueries(PositionQueries):
    """The same where one layer makes queries, keys and values: it is split in two."""

    def __init__(self, fused: Conv1D, positions: int, width: int) -> None:
        parts = []
        for start, end in ((0, width), (width, 3 * width)):
            part = Conv1D(end - start, width).to(**like(fused.weight))
            part.weight.data.copy_(fused.weight.data[:, start:end])
            part.bias.data.copy_(fused.bias.data[start:end])
            parts.append(part)
        super().__init__(parts[0], positions, width, fused.weight)
        self.keys_values = parts[1]

    def forward(self, x_BLE: Tensor) -> Tensor:
        """Queries, keys and values side by side."""
        return torch.cat([super().forward(x_BLE), self.keys_values(x_BLE)], -1)


class _Asking(nn.Module):
    """A block that tells its queries the positions: mixed into the block's own class."""

    queries_path: str

    def forward(self, x_BLE: Tensor, *args: object, position_ids: Tensor, **more: object) -> object:
        """The block's output."""
        queries = at(self, self.queries_path)
        queries.position_BL = position_ids
        try:
            return super().forward(x_BLE, *args, position_ids=position_ids, **more)
        finally:
            queries.position_BL = None


_KINDS: dict[type[nn.Module], type[nn.Module]] = {}  # one class for all blocks of a kind


def _asking(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _KINDS:
        _KINDS[kind] = type(kind.__name__, (_Asking, kind), {"__module__": kind.__module__})
    return _KINDS[kind]


@dataclass(frozen=True)
class QueryLayer(Surgery):
    """PanGu-α: Large-scale Autoregressive Pretrained Chinese Language Models with Auto-parallel Computation
    (arXiv:2104.12369).

    A query layer on top of the stack says what is to come next: a block like the others, but attention's query at
    position n is not made of the state there, it is a trained vector p[n]: scores p[n] W_q (H W_k)ᵀ over the states H
    below, then the residual and the feed-forward as ever. It takes the place of the last block, as in the authors'
    code, where it is one of the layers that are counted: to have it on top of N blocks, make a model of N + 1. The
    table has `positions` rows (0: as many as the model has positions), normal with standard deviation `std` (0: the
    configuration's, as of the other embeddings); later positions take the last row. Where positions are rotary, p[n]
    is turned like any query. Made for training from scratch: the queries that a trained block had are lost.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")

    positions: Whole = 0
    std: NonNegative = 0.0

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with another last block, changed in place."""
        model, source = self.restore(model), generator(self.name, inputs)
        std = self.std or getattr(model.config, "initializer_range", 0.02)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, PositionQueries):
                    weight_PE = module.table.weight
                    weight_PE.copy_(torch.empty(weight_PE.shape).normal_(0, std, generator=source))
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Put in the table, not drawn."""
        entry = family(model)
        if entry.name not in self.families:
            raise PretrainError(f"{self.name}: family {entry.name!r}: accepted: {', '.join(self.families)}")
        block, width = blocks(model)[-1], embeddings(model).embedding_dim
        if hasattr(block, "crossattention"):
            raise PretrainError(f"{self.name}: the model has cross-attention: accepted: a model of text alone")
        positions = self.positions or positions_of(model)
        if positions is None:
            raise PretrainError(f"{self.name}: positions 0 of a model without a limit: accepted: 1 or more")
        attention: Attention = at(block, entry.attention)
        layer = at(attention, entry.queries[0])
        made: PositionQueries | None = None
        if len(entry.queries) == 1 and isinstance(layer, Conv1D):
            made = FusedPositionQueries(layer, positions, width)
        elif len(entry.queries) > 1 and isinstance(layer, nn.Linear):
            made = PositionQueries(layer, positions, width, layer.weight)
        if made is None:
            kind = "a query layer already" if isinstance(layer, PositionQueries) else type(layer).__name__
            raise PretrainError(f"{self.name}: {entry.queries[0]} is {kind}: accepted: a linear layer")
        set_module(attention, entry.queries[0], made.train(model.training))
        block.__class__ = _asking(type(block))
        vars(block)["queries_path"] = f"{entry.attention}.{entry.queries[0]}"
        return model

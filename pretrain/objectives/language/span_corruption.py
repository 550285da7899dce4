"""Span corruption: an encoder reads text with spans cut out, a decoder writes the spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pretrain.core.batch import Batch, Context, Row, padded_length, spread
from pretrain.core.bounds import Ge, OpenShare
from pretrain.core.errors import PretrainError
from pretrain.core.models.cross_entropy import IGNORE, linear_cross_entropy
from pretrain.core.models.families import encode_decode, head
from pretrain.objectives import Loss, Objective
from pretrain.objectives._masking import choose_spans, corrupt

Pair = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class SpanCorruption(Objective):
    """Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (arXiv:1910.10683).

    `rate` of each document's tokens are hidden in spans of `mean_span` on average. The encoder reads the text with each
    span replaced by a sentinel; the decoder writes sentinel, span, sentinel, span, … . The loss is the mean of
    -log p(target token) over the targets. Documents packed in a row stay apart on both sides. One that would need more
    sentinels than there are has as many spans as it can, and longer ones.
    """

    version: ClassVar[int] = 3  # as many spans as there are sentinels
    families: ClassVar[tuple[str, ...]] = ("seq2seq",)
    task: ClassVar[str] = "seq2seq"

    rate: OpenShare = 0.15
    mean_span: Annotated[float, Ge(1)] = 3.0

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """Inputs `tokens_BL` and targets `target_BM` with the documents that each position belongs to."""
        sentinels = context.vocabulary.sentinels
        if len(sentinels) < 2:
            raise PretrainError("span_corruption: no sentinels; accepted: a tokenizer made with sentinels: 100")

        def pair(tokens_L: NDArray[np.int64]) -> Pair:
            hidden_L = choose_spans(len(tokens_L), self.rate, self.mean_span, context.rng, len(sentinels) - 1)
            return corrupt(tokens_L, hidden_L, sentinels)

        return pairs_to_batch([[pair(p.astype(np.int64)) for p in row.pieces()] for row in rows], context)

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean loss over the targets."""
        return pairs_loss(model, batch)


def pairs_to_batch(rows: Sequence[Sequence[Pair]], context: Context) -> Batch:
    """Pack (input, target) pairs; both sides a little longer than the longest row, the decoder's input shifted by one.

    That is by `padded_length`, for a handful of shapes.
    """
    pad = context.vocabulary.pad
    longest = [max(sum(len(pair[side]) for pair in row) for row in rows) for side in (0, 1)]
    inputs, targets = (padded_length(tokens, context.length) for tokens in longest)
    source_BL, document_BL = (np.full((len(rows), inputs), fill) for fill in (pad, 0))
    decoder_BM, owner_BM = (np.full((len(rows), targets), fill) for fill in (pad, 0))
    target_BM = np.full((len(rows), targets), IGNORE)
    for b, row in enumerate(rows):
        i = j = 0
        for number, (source, target) in enumerate(row, 1):
            source_BL[b, i : i + len(source)], document_BL[b, i : i + len(source)] = source, number
            target_BM[b, j : j + len(target)], owner_BM[b, j : j + len(target)] = target, number
            decoder_BM[b, j + 1 : j + len(target)] = target[:-1]  # the first input of each is the start token, `pad`
            i, j = i + len(source), j + len(target)
    arrays = {
        "tokens_BL": source_BL, "document_BL": document_BL, "decoder_BM": decoder_BM, "owner_BM": owner_BM,
        "target_BM": target_BM,
    }  # fmt: skip
    sizes_3 = torch.tensor((*spread(document_BL), spread(owner_BM)[1]))
    tensors = {k: torch.from_numpy(v) for k, v in arrays.items()}
    return tensors | {"sizes_3": sizes_3, "weight": torch.tensor((target_BM != IGNORE).sum())}


def pairs_loss(model: nn.Module, batch: Batch) -> Loss:
    """The loss of an encoder-decoder on packed pairs."""
    states_BME = encode_decode(
        model, batch["tokens_BL"], batch["decoder_BM"], batch["document_BL"], batch["owner_BM"], batch.get("sizes_3")
    )
    weight_VE, bias_V = head(model)
    value, nll_BM = linear_cross_entropy(
        states_BME, weight_VE, batch["target_BM"], bias_V=bias_V, targets=int(batch["weight"])
    )
    return Loss(value, {}, nll_BM)

"""Prefix language modelling: read the first part of a document from both sides, write the rest from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from pretrain.core.batch import Batch, Context, Row, rows_to_tensors
from pretrain.core.bounds import Share
from pretrain.core.errors import PretrainError
from pretrain.core.models.cross_entropy import IGNORE
from pretrain.objectives import Loss, Objective
from pretrain.objectives._token_loss import token_loss
from pretrain.objectives.language.causal_lm import next_tokens


@dataclass(frozen=True)
class PrefixLM(Objective):
    """Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (arXiv:1910.10683).

    The paper's prefix LM for one stack: each document's first p tokens see one another from both sides, the rest see
    the prefix and what came before them, and the loss is the mean of -log p(x_t | x_<t) over the rest alone. p is drawn
    for each packed document, uniformly from 1 to all but one of its n tokens; `shortest` and `longest` hold it between
    those shares of n - 1. A prefix of one token is causal language modelling.
    """

    families: ClassVar[tuple[str, ...]] = ("causal",)
    token_weights: ClassVar[bool] = True

    shortest: Share = 0.0
    longest: Share = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shortest > self.longest:
            given = f"shortest {self.shortest}, longest {self.longest}"
            raise PretrainError(f"prefix_lm: {given}: accepted: shortest <= longest")

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """As causal LM's, with `prefix_BL`: True on each document's prefix, whose tokens are no targets."""
        batch = rows_to_tensors(rows, context.length, context.vocabulary.pad)
        prefix_BL = torch.zeros(batch["tokens_BL"].shape, dtype=torch.bool)
        for b, row in enumerate(rows):
            sizes_D = np.diff(np.append(row.starts_D, len(row.tokens_L)))
            for start, size in zip(row.starts_D.tolist(), sizes_D.tolist(), strict=True):
                low, high = (max(1, round(share * (size - 1))) for share in (self.shortest, self.longest))
                prefix_BL[b, start : start + int(context.rng.integers(low, high + 1))] = True
        target_BL = next_tokens(batch["tokens_BL"], batch["document_BL"])
        target_BL[:, :-1].masked_fill_(prefix_BL[:, 1:], IGNORE)  # where the next token is of the prefix
        batch |= {"prefix_BL": prefix_BL, "target_BL": target_BL, "weight": (target_BL != IGNORE).sum()}
        return batch

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean loss over the tokens after the prefixes, and each one's own."""
        return token_loss(model, batch, causal=True)

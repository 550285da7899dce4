"""Causal language modelling: predict each token from those before it in its document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch, Context, Row, rows_to_tensors
from pretrain.core.models.cross_entropy import IGNORE
from pretrain.objectives import Loss, Objective
from pretrain.objectives._token_loss import token_loss


@dataclass(frozen=True)
class CausalLM(Objective):
    """Language Models are Few-Shot Learners (arXiv:2005.14165).

    The loss is the mean of -log p(x_t | x_<t) over all tokens of the batch that have a predecessor in their own
    document; packed documents do not see one another.
    """

    families: ClassVar[tuple[str, ...]] = ("causal",)
    token_weights: ClassVar[bool] = True

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """`tokens_BL`, `document_BL`, `position_BL`, and `target_BL`: the next token of the same document or -100."""
        batch = rows_to_tensors(rows, context.length, context.vocabulary.pad)
        batch["target_BL"] = next_tokens(batch["tokens_BL"], batch["document_BL"])
        batch["weight"] = (batch["target_BL"] != IGNORE).sum()
        return batch

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean loss over the batch's targets, and each target's own."""
        return token_loss(model, batch, causal=True)


def next_tokens(tokens_BL: Tensor, document_BL: Tensor) -> Tensor:
    """The token that follows each position inside its document, -100 where none does."""
    target_BL = torch.full_like(tokens_BL, IGNORE)
    follows = (document_BL[:, 1:] == document_BL[:, :-1]) & (document_BL[:, 1:] != 0)
    target_BL[:, :-1] = torch.where(follows, tokens_BL[:, 1:], IGNORE)
    return target_BL

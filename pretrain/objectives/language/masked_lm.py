"""Masked language modelling: predict the tokens that were hidden, from both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from pretrain.core.batch import Batch, Context, Row, rows_to_tensors
from pretrain.core.bounds import PositiveShare, Share
from pretrain.core.errors import PretrainError
from pretrain.core.models.cross_entropy import IGNORE
from pretrain.objectives import Loss, Objective
from pretrain.objectives._masking import check_shares, hide
from pretrain.objectives._token_loss import token_loss


@dataclass(frozen=True)
class MaskedLM(Objective):
    """BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding (arXiv:1810.04805).

    `rate` of the tokens are chosen, as whole words if `whole_words`; of these `masked` become the mask token, `random`
    another token, and the rest stay. The loss is the mean of -log p(original) over the chosen. The rate goes in a
    straight line to `final_rate` over training (None: it stays), the schedule of *Dynamic Masking Rate Schedules*
    (arXiv:2305.15096).
    """

    version: ClassVar[int] = 2  # whole words fill the rate
    families: ClassVar[tuple[str, ...]] = ("masked",)
    task: ClassVar[str] = "masked"
    token_weights: ClassVar[bool] = True

    rate: PositiveShare = 0.15
    final_rate: Share | None = None
    masked: Share = 0.8
    random: Share = 0.1
    whole_words: bool = False

    def __post_init__(self) -> None:
        """Refuse shares of the chosen tokens of more than all."""
        super().__post_init__()
        check_shares(self.name, self.masked, self.random)

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """`tokens_BL` with tokens hidden, and `target_BL`: the original where one was chosen, else -100."""
        vocabulary, rng = context.vocabulary, context.rng
        if vocabulary.mask is None:
            raise PretrainError("masked_lm: no mask token; accepted: a tokenizer made with mask: true")
        final = self.rate if self.final_rate is None else self.final_rate
        rate = self.rate + (final - self.rate) * context.progress
        batch = rows_to_tensors(rows, context.length, vocabulary.pad)
        tokens_BL, target_BL = batch["tokens_BL"].numpy(), np.full(batch["tokens_BL"].shape, IGNORE)
        for b, row in enumerate(rows):
            n = len(row.tokens_L)
            tokens_BL[b, :n], target_BL[b, :n] = hide(
                tokens_BL[b, :n], rate, self.masked, self.random, vocabulary, rng, self.whole_words
            )
        batch["target_BL"] = torch.from_numpy(target_BL)
        batch["weight"] = (batch["target_BL"] != IGNORE).sum()
        return batch

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean loss over the chosen tokens."""
        return token_loss(model, batch, causal=False)

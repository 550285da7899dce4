"""Bag-of-words prediction: the [CLS] vector of a document tells which words it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from pretrain.core.batch import Batch, Context, Row
from pretrain.core.bounds import NonNegative, OpenShare
from pretrain.core.models.families import head
from pretrain.objectives import Loss, Objective, summed
from pretrain.objectives.retrieval._passages import bag_loss, encode, masked_loss, masked_passages, pieces, to_head


@dataclass(frozen=True)
class BagOfWords(Objective):
    """Drop your Decoder: Pre-training with Bag-of-Word Prediction for Dense Passage Retrieval (arXiv:2401.11248).

    Masked language modelling, and from each document's [CLS] state, through the same head, its set S of words:

        L = L_mlm - λ · mean over documents of 1/|S| Σ_{w ∈ S} log softmax(head(h_[CLS]))_w

    λ falls from `weight` to `final_weight` along a half cosine; the loss that is logged, of training and held-out text
    alike, has the first λ all along, so that the curves say the same quantity from end to end. There are no parameters
    besides the encoder's. Where packing cuts a document, each piece is one, with a [CLS] in place of its first token.
    """

    version: ClassVar[int] = 3  # whole words fill the rate
    families: ClassVar[tuple[str, ...]] = ("bert", "modernbert")
    task: ClassVar[str] = "masked"
    token_weights: ClassVar[bool] = True

    rate: OpenShare = 0.3
    whole_words: bool = True
    weight: NonNegative = 1.0
    final_weight: NonNegative = 0.1

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """What `masked_lm` prepares, the originals in `original_BL`, `word_BL`, and λ at this point as `bag_weight`."""
        batch = masked_passages("bag_of_words", self.rate, self.whole_words, rows, context)
        fall = (1 + math.cos(math.pi * min(context.progress, 1.0))) / 2
        batch["bag_weight"] = torch.tensor(self.final_weight + (self.weight - self.final_weight) * fall)
        return batch

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """Both losses; parts `masked_lm` and `bag_of_words`."""
        ready_BLE = to_head(model, encode(model, batch))
        masked, nll_BL = masked_loss(model, ready_BLE, batch)
        first_BL, _ = pieces(batch)
        weight_VE, bias_V = head(model)
        bag = bag_loss(nn.functional.linear(ready_BLE[first_BL], weight_VE, bias_V), batch, per_token=False)
        parts = {"masked_lm": masked.detach(), "bag_of_words": bag.detach()}
        terms = {"masked_lm": masked, "bag_of_words": batch["bag_weight"] * bag}
        return summed(terms, parts, nll_BL, {"masked_lm": masked, "bag_of_words": self.weight * bag})

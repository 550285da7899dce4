"""Passages: a row's pieces, each with a [CLS] whose state stands for it, and the bag of words of each.

Shape letters: B rows, L positions, P pieces of all rows, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch, Context, Row
from pretrain.core.errors import PretrainError
from pretrain.core.models.attention import attend
from pretrain.core.models.cross_entropy import IGNORE, linear_cross_entropy
from pretrain.core.models.families import at, base, family, head
from pretrain.objectives.language.masked_lm import MaskedLM


def masked_passages(method: str, rate: float, whole_words: bool, rows: Sequence[Row], context: Context) -> Batch:
    """What `masked_lm` prepares at `rate`, with a [CLS] at the beginning of each piece.

    A piece that goes on a document cut by packing has none: its first token gives way to one, so that rows and
    positions stay as they are. Besides: `original_BL`, the tokens before any was hidden, and `word_BL`, True on words,
    which are what is neither special nor padding; and `weight_bag_of_words`, the number of pieces.
    """
    vocabulary = context.vocabulary
    if vocabulary.mask is None:
        raise PretrainError(f"{method}: no mask token; accepted: a tokenizer made with mask: true")
    if vocabulary.bos is None:
        raise PretrainError(f"{method}: no token that begins a document; accepted: a tokenizer made with cls: true")
    begun = []
    for row in rows:
        tokens_L = np.array(row.tokens_L)
        tokens_L[row.starts_D] = vocabulary.bos
        begun.append(replace(row, tokens_L=tokens_L))
    batch = MaskedLM(rate=rate, whole_words=whole_words).prepare(begun, context)
    batch["original_BL"] = torch.where(batch["target_BL"] != IGNORE, batch["target_BL"], batch["tokens_BL"])
    special_V = torch.from_numpy(vocabulary.special_V)
    batch["word_BL"] = (batch["document_BL"] > 0) & (batch["position_BL"] > 0) & ~special_V[batch["original_BL"]]
    batch["weight_bag_of_words"] = ((batch["position_BL"] == 0) & (batch["document_BL"] > 0)).sum()
    return batch


def encode(model: nn.Module, batch: Batch) -> Tensor:
    """The encoder's last states `states_BLE`; pieces do not see one another."""
    return base(model)(input_ids=batch["tokens_BL"], **attend(model, batch, causal=False)).last_hidden_state


def to_head(model: nn.Module, states: Tensor) -> Tensor:
    """States as the linear layer of the masked-language-model head takes them."""
    path = family(model).head_transform
    return states if path is None else at(model, path)(states)


def masked_loss(model: nn.Module, ready_BLE: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss of `masked_lm`: the mean over the hidden tokens, and each one's own. `ready_BLE` is from `to_head`."""
    weight_VE, bias_V = head(model)
    return linear_cross_entropy(
        ready_BLE, weight_VE, batch["target_BL"], bias_V=bias_V, weight_BL=batch.get("token_weight_BL"),
        targets=int(batch["weight"]),
    )  # fmt: skip


def pieces(batch: Batch) -> tuple[Tensor, Tensor]:
    """`first_BL`, True on each piece's [CLS], and `piece_BL`, to which of the batch's pieces a token belongs."""
    first_BL = (batch["position_BL"] == 0) & (batch["document_BL"] > 0)
    return first_BL, first_BL.flatten().cumsum(0).view_as(first_BL) - 1


def bag_loss(logits_PV: Tensor, batch: Batch, *, per_token: bool) -> Tensor:
    """The mean over pieces of -Σ log softmax(logits)[w] over the piece's words w, each counted once.

    The sum is divided by the number of different words or, `per_token`, of all words. Pieces without words count 0.
    Where a policy has written `token_weight_BL`, a piece weighs as its tokens do on average.
    """
    (_, piece_BL), word_BL = pieces(batch), batch["word_BL"]
    bag_PV = torch.zeros(logits_PV.shape, device=logits_PV.device)
    piece_N, word_N = piece_BL[word_BL], batch["original_BL"][word_BL]
    bag_PV[piece_N, word_N] = 1.0
    count_P = torch.bincount(piece_N, minlength=len(bag_PV)) if per_token else bag_PV.sum(-1)
    nll_P = -(bag_PV * logits_PV.float().log_softmax(-1)).sum(-1)
    mean_P = nll_P / count_P.clamp(min=1)
    if "token_weight_BL" in batch:
        present_BL, sums_2P = batch["document_BL"] > 0, torch.zeros(2, len(mean_P), device=mean_P.device)
        weight_N = batch["token_weight_BL"][present_BL].to(sums_2P.dtype)
        sums_2P.index_add_(1, piece_BL[present_BL], torch.stack([weight_N, torch.ones_like(weight_N)]))
        mean_P = mean_P * sums_2P[0] / sums_2P[1]
    return mean_P.mean()

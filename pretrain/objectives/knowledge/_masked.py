"""Masked language modelling of whole documents, beside which something else is learnt.

Shape letters: B examples, L tokens, E width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch, Context
from pretrain.core.errors import PretrainError
from pretrain.core.models.cross_entropy import IGNORE, linear_cross_entropy
from pretrain.core.models.families import at, base, family, head
from pretrain.objectives._fine_tuning import segments
from pretrain.objectives._masking import hide


def hidden(batch: Batch, rate: float, masked: float, random: float, context: Context, name: str) -> Batch:
    """`tokens_BL` with tokens hidden, as in `masked_lm`, `target_BL` and their number, `weight`."""
    if context.vocabulary.mask is None:
        raise PretrainError(f"{name}: no mask token; accepted: a tokenizer made with mask: true")
    tokens_BL = batch["tokens_BL"].numpy().copy()
    target_BL = np.full(tokens_BL.shape, IGNORE)
    for b, length in enumerate(batch["mask_BL"].sum(-1).tolist()):
        tokens_BL[b, :length], target_BL[b, :length] = hide(
            tokens_BL[b, :length], rate, masked, random, context.vocabulary, context.rng
        )
    weight = torch.tensor(int((target_BL != IGNORE).sum()))
    return {"tokens_BL": torch.from_numpy(tokens_BL), "target_BL": torch.from_numpy(target_BL), "weight": weight}


def encoded(model: nn.Module, batch: Batch, **inputs: Tensor) -> Tensor:
    """The last states `states_BLE`, of the batch's tokens or of `inputs_embeds`."""
    given = inputs or {"input_ids": batch["tokens_BL"]}
    states_BLE: Tensor = base(model)(
        attention_mask=batch["mask_BL"], **given, **segments(at(model, "config"), batch)
    ).last_hidden_state
    return states_BLE


def masked_loss(model: nn.Module, states_BLE: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The mean over the hidden tokens, and each one's own."""
    path, (weight_VE, bias_V) = family(model).head_transform, head(model)
    ready_BLE = states_BLE if path is None else at(model, path)(states_BLE)
    return linear_cross_entropy(
        ready_BLE, weight_VE, batch["target_BL"], bias_V=bias_V, targets=int(batch["weight"])
    )  # fmt: skip


def new_layer(model: nn.Module, outputs: int) -> nn.Linear:
    """A layer on the states, drawn as the model's own are."""
    config = at(model, "config")
    layer = nn.Linear(config.hidden_size, outputs)
    nn.init.normal_(layer.weight, std=config.initializer_range)
    nn.init.zeros_(layer.bias)
    return layer


def new_pooled(model: nn.Module, outputs: int) -> nn.Sequential:
    """`W tanh(V h + b) + c`, for the first state of each example."""
    return nn.Sequential(new_layer(model, at(model, "config").hidden_size), nn.Tanh(), new_layer(model, outputs))

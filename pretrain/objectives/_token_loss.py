"""The loss of a model with one stack: cross-entropy at the positions that have a target."""

from __future__ import annotations

from torch import nn

from pretrain.core.batch import Batch
from pretrain.core.models.attention import attend
from pretrain.core.models.cross_entropy import linear_cross_entropy
from pretrain.core.models.families import head, hidden, softcap
from pretrain.objectives import Loss


def token_loss(model: nn.Module, batch: Batch, *, causal: bool) -> Loss:
    """The mean over the targets of `target_BL`, weighted by `token_weight_BL` where a policy has written it.

    A batch with `weight` says by it how many targets there are.

    A batch with `prefix_BL` lets its whole document see those tokens.
    """
    states_BLE = hidden(model, input_ids=batch["tokens_BL"], **attend(model, batch, causal=causal))
    weight_VE, bias_V = head(model, capped=True)
    value, nll_BL = linear_cross_entropy(
        states_BLE, weight_VE, batch["target_BL"], bias_V=bias_V, weight_BL=batch.get("token_weight_BL"),
        targets=int(batch["weight"]) if "weight" in batch else None, softcap=softcap(model),
    )  # fmt: skip
    return Loss(value, {}, nll_BL)

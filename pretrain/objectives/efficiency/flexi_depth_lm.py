"""Causal language modelling that pays for each block a token takes: for models that `flexi_depth` has changed.

Shape letters: B rows, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from pretrain.core.batch import Batch, Context, Row
from pretrain.core.bounds import NonNegative
from pretrain.core.errors import PretrainError
from pretrain.core.models.cross_entropy import IGNORE
from pretrain.objectives import Loss, Objective
from pretrain.objectives._token_loss import token_loss
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.surgery.architecture.flexi_depth import routed


@dataclass(frozen=True)
class FlexiDepthLM(Objective):
    """Adaptive Layer-skipping in Pre-trained LLMs (arXiv:2503.23798).

    The loss of causal language modelling plus `alpha` times the mean over tokens of (Σ_l g_l)², g_l the gate of a
    token at each block with a router. By the square a block costs a token more the more others it takes. The mean is
    over the tokens that have a target. Parts: `lm`, `penalty`, and `skipped`, the mean number of blocks that a token
    passes by.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")
    token_weights: ClassVar[bool] = True

    alpha: NonNegative = 1e-3

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """As causal language modelling does."""
        return CausalLM().prepare(rows, context)

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The loss of the tokens and the penalty; each target's own loss is without it."""
        skippable = routed(model)
        if not skippable:
            raise PretrainError(
                "flexi_depth_lm: the model has no routers: accepted: one that the surgery flexi_depth made"
            )
        plain = token_loss(model, batch, causal=True)
        has_target_BL = batch["target_BL"] != IGNORE
        tokens = has_target_BL.sum().clamp(min=1)
        gates_BLK = torch.stack([block.gate_BL for block in skippable], -1)
        counts_BL = has_target_BL * batch.get("token_weight_BL", 1)
        penalty = (gates_BLK.sum(-1).square() * counts_BL).sum() / tokens
        passed_BL = torch.stack([block.gate_BL <= block.threshold for block in skippable]).sum(0)
        parts = {"lm": plain.value.detach(), "penalty": penalty.detach()}
        parts["skipped"] = (passed_BL * has_target_BL).sum() / tokens
        return Loss(plain.value + self.alpha * penalty, parts, plain.nll_BL)

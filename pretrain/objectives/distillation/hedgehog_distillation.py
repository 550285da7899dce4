"""Attention-weight distillation: linear attention learns the weights of the softmax attention that it replaces.

Shape letters: B rows, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from pretrain.core.batch import Batch, Context, Row, document_mask, rows_to_tensors
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import attention_inputs, hidden
from pretrain.objectives import Loss, Objective
from pretrain.surgery.architecture.hedgehog import attentions, distilling


@dataclass(frozen=True)
class HedgehogDistillation(Objective):
    """The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry (arXiv:2402.04347).

    For a model after the surgery `hedgehog`. With p the softmax attention's weights and a the linear attention's, of
    the same queries and keys,

        L = mean over layers, heads and positions i of -Σ_j p_ij log a_ij

    Only the feature maps are trained. Each layer hands on what softmax attention puts out, so that all are taught at
    once and none by another's errors. The part `kl` is L without the entropy of p: 0 where the weights are the same.
    The authors' code takes AdamW with lr 0.01 and no weight decay.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")

    def parts(self) -> tuple[str, ...]:
        """The attention is the surgery's."""
        return ("hedgehog",)

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """`tokens_BL`, `document_BL`, `position_BL`; every token is a target."""
        batch = rows_to_tensors(rows, context.length, context.vocabulary.pad)
        batch["weight"] = (batch["document_BL"] != 0).sum()
        return batch

    def modules(self, model: nn.Module) -> None:
        """None; all of the model but its feature maps is frozen."""
        layers = attentions(model)
        if not layers:
            raise PretrainError("hedgehog_distillation: a model without linear attention: accepted: one after hedgehog")
        model.requires_grad_(False)
        for layer in layers:
            layer.feature_q.requires_grad_(True)
            layer.feature_k.requires_grad_(True)

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The cross-entropy; part `kl`."""
        if any(hasattr(module, "unshard") for module in model.modules()):
            raise PretrainError("hedgehog_distillation: strategy fsdp: accepted: ddp")
        mask_B1LL = document_mask(batch["document_BL"], causal=True)
        inputs = attention_inputs(model, mask_B1LL, batch["position_BL"])
        with distilling(model) as comparison, torch.no_grad():
            hidden(model, input_ids=batch["tokens_BL"], **inputs)
        cross_BL, entropy_BL = (torch.stack(layers).mean(0) for layers in zip(*comparison.layers, strict=True))
        inside_BL = batch["document_BL"] != 0
        value = (cross_BL * inside_BL).sum() / inside_BL.sum().clamp(min=1)
        kl = ((cross_BL.detach() - entropy_BL.detach()) * inside_BL).sum() / inside_BL.sum().clamp(min=1)
        return Loss(value, {"kl": kl}, cross_BL.detach() * inside_BL)

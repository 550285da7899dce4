"""Cut a trained DyLoRA to one of its ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from pretrain.core.bounds import Count
from pretrain.core.checkpoint import forget
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import at, set_module
from pretrain.dial.tuned import Layers, Tuning
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery.adapters._adapters import adapters_of
from pretrain.surgery.adapters.dylora import DynamicLowRank
from pretrain.surgery.adapters.peft_adapter import PeftAdapter


@dataclass(frozen=True)
class DyLoRATruncate(Surgery):
    """DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation
    (arXiv:2210.07558).

    The first `rank` components of what the surgery `dylora` trained, without training again: an ordinary LoRA,
    W + (alpha / b) · B[:, :b] A[:b], of `peft`'s layers, that may be trained on, merged, or opened by `peft` from the
    checkpoint's folder `adapter`.
    """

    adapts: ClassVar[bool] = True

    rank: Count

    def tuning(self, layers: Layers, before: Tuning | None) -> Tuning | None:
        """Of what there was the share that the rank is of its rank."""
        if before is None or not before.rank:
            return before
        share = self.rank / before.rank
        return replace(before, trained=before.trained * share, flops=before.flops * share, rank=self.rank)

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with the smaller adapter."""
        trained = adapters_of(model, DynamicLowRank)
        if not trained:
            raise PretrainError("dylora_truncate: the model has no DyLoRA: accepted: one that dylora adapted")
        lowest, highest, _ = next(iter(trained.values())).range
        if not lowest <= self.rank <= highest:
            raise PretrainError(
                f"dylora_truncate: rank {self.rank}: accepted: the trained ranks, {lowest} to {highest}"
            )
        for name, module in trained.items():
            set_module(model, name, module.layer)
        forget(model, "dylora")
        alpha = next(iter(trained.values())).alpha
        config = {"r": self.rank, "lora_alpha": alpha, "lora_dropout": 0.0, "target_modules": sorted(trained)}
        model = PeftAdapter("LORA", config)(model, inputs)
        with torch.no_grad():
            for name, module in trained.items():
                layer = at(model, name)
                layer.lora_A["default"].weight.copy_(module.A[: self.rank])
                layer.lora_B["default"].weight.copy_(module.B[:, : self.rank])
        return model

"""Fold adapters into the weights they adapt: a plain checkpoint again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from pretrain.core.checkpoint import forget, recorded, surgery_of
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import set_module
from pretrain.dial.tuned import Layers, Tuning
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery.adapters._adapters import adapters


@dataclass(frozen=True)
class MergeAdapters(Surgery):
    """LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685).

    W + ΔW in the place of each adapted layer, for every adapter here that changes weights and for those of `peft`:
    the same function with no more work than the model without its adapter, and a checkpoint that opens anywhere.
    """

    def tuning(self, layers: Layers, before: Tuning | None) -> Tuning | None:
        """All weights again."""
        return None

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The plain model. Raises `PretrainError` where there is nothing to merge, or what cannot be merged."""
        merged = _merge_ours(model) + _merge_peft(model)
        left = [entry["method"] for entry in surgery_of(model) if recorded(entry).adapts]
        for method in left:
            forget(model, method)
        if not merged or not left:
            raise PretrainError("merge_adapters: the model has no adapter in its weights: accepted: an adapted model")
        return model.requires_grad_(True)


def _merge_ours(model: PreTrainedModel) -> int:
    ours = adapters(model)
    for name, module in ours.items():
        set_module(model, name, module.merged())
    return len(ours)


def _merge_peft(model: PreTrainedModel) -> int:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    with torch.no_grad():
        for name, module in layers.items():
            module.merge()
            set_module(model, name, module.get_base_layer())
    for mark in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(mark, None)
    return len(layers)

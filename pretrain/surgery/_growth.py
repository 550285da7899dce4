"""What the surgeries that make a larger model share: a fresh model of a larger configuration."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pretrain.core.checkpoint import record, recorded, surgery_of
from pretrain.core.errors import PretrainError


def config_with_blocks(model: PreTrainedModel, order: Sequence[int]) -> PreTrainedConfig:
    """A copy of the model's configuration in which block i is of the kind of block `order[i]`."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(order)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in order]
    return config


def fresh(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the same class and of the same recorded surgeries, with another configuration and random weights."""
    with torch.random.fork_rng(devices=[]):
        made = type(model)(config)
        for entry in surgery_of(model):
            surgery = recorded(entry)
            try:
                made = surgery.restore(made)
            except Exception as error:  # whatever a surgery makes of a model of another shape
                reason = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
                raise PretrainError(
                    f"the surgery {entry['method']!r} that the model has been through cannot be repeated on the grown "
                    f"model ({reason}); accepted: grow first, then operate"
                ) from error
            record(made, surgery)
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    cast(nn.Module, made).to(model.device, model.dtype)  # transformers' stub of `to` takes no device
    return made.train(model.training)

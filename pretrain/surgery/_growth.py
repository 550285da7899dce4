"""What the surgeries that make a larger model share: a fresh model of a larger configuration."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pretrain.core.checkpoint import record, recorded, surgery_of
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import family


def config_with_blocks(model: PreTrainedModel, order: Sequence[int]) -> PreTrainedConfig:
    """A copy of the model's configuration in which block i is of the kind of block `order[i]`."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(order)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in order]
    if hasattr(config, "mlp_only_layers"):  # which blocks of Qwen's mixtures have no experts
        step, without = config.decoder_sparse_step, config.mlp_only_layers or ()
        dense = [i in without or (i + 1) % step != 0 for i in range(model.config.num_hidden_layers)]
        config.mlp_only_layers = [new for new, i in enumerate(order) if dense[i]]
        config.decoder_sparse_step = 1
    return config


def with_blocks(model: PreTrainedModel, order: Sequence[int], name: str) -> PreTrainedModel:
    """A model whose block i is a copy of block `order[i]`, with all else as it was; `name` is the surgery's."""
    grown = fresh(model, config_with_blocks(model, order))
    weights = model.state_dict()
    inside = re.compile(rf"(^|.*\.){re.escape(family(model).blocks)}\.(\d+)\.")
    for place, value in grown.state_dict().items():
        match = inside.match(place)
        source = place
        if match:
            begin, end = match.span(2)
            source = f"{place[:begin]}{order[int(match[2])]}{place[end:]}"
        if source not in weights or weights[source].shape != value.shape:
            kind = ", ".join(e["method"] for e in surgery_of(model)) or "none recorded"
            raise PretrainError(
                f"{name}: no weight {source} of shape {tuple(value.shape)} in the model (surgeries: {kind}); "
                "accepted: a model that is the same in each block; grow first, then operate"
            )
        value.copy_(weights[source])
    return grown


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

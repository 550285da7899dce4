"""Mixtures of experts: where they are in a model, and a model with other experts. X stands for experts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from pretrain.surgery._growth import fresh


def with_experts(
    model: PreTrainedModel, experts: int, top_k: int, places: Sequence[str], change: Callable[[str, Tensor], Tensor]
) -> PreTrainedModel:
    """A model of so many experts in each mixture, of which a token sees `top_k`.

    `change(name, tensor)` gives what the modules at `places`, routers and experts, hold from the tensor of that
    qualified name; the first axis is X.
    """
    config = copy.deepcopy(model.config)
    for field in ("num_experts", "num_local_experts"):
        if hasattr(config, field):
            setattr(config, field, experts)
    config.num_experts_per_tok = top_k
    made, weights = fresh(model, config), model.state_dict()
    inside = tuple(f"{place}." for place in places)
    for name, value in made.state_dict().items():
        value.copy_(change(name, weights[name]) if name.startswith(inside) else weights[name])
    return made

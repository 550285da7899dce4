"""Mixtures of experts: where they are in a model, and a model with other experts.

Shape letters: X experts, H a router's inputs, N tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from pretrain.core.checkpoint import surgery_of
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import family
from pretrain.surgery._growth import fresh

_ROUTERS = ("gate", "router")  # beside a module `experts`


def mixtures(model: PreTrainedModel, name: str, families: Sequence[str]) -> dict[str, str]:
    """The routers' qualified names by those of their experts, whose weights are `gate_up_proj` and `down_proj`.

    Raises `PretrainError` for another family, and where a surgery has changed what a layer of experts is made of.
    """
    if not family(model).among(families):
        raise PretrainError(f"{name}: family {family(model).name!r}: accepted: {', '.join(families)}")
    modules = dict(model.named_modules())
    places = [place for place in modules if place.endswith(".experts")]
    kinds = {tuple(key for key, _ in modules[place].named_parameters()) for place in places}
    if kinds != {("gate_up_proj", "down_proj")}:
        done = ", ".join(entry["method"] for entry in surgery_of(model)) or "none recorded"
        raise PretrainError(
            f"{name}: experts of {sorted(kinds)} (surgeries: {done}): accepted: a model with plain experts; change "
            "their number first, then operate"
        )
    routers = {place: [place.removesuffix("experts") + each for each in _ROUTERS] for place in places}
    return {place: next(each for each in names if each in modules) for place, names in routers.items()}


def number_of_experts(model: PreTrainedModel) -> int:
    """How many experts each mixture has, by the configuration."""
    config = model.config
    number: int = config.num_local_experts if hasattr(config, "num_local_experts") else config.num_experts
    return number


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

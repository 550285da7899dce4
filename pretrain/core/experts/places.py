"""Where a model's mixtures of experts are, and what a router is that knows its tokens before its mixture has them.

Shape letters: X experts, K experts of a token, H a router's inputs, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.core.checkpoint import surgery_of
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import family

_ROUTERS = ("gate", "router")  # beside a module `experts`
Routing = tuple[Tensor, Tensor, Tensor]  # logits_NX, weights_NK, index_NK


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


class Ahead(nn.Module):
    """A router of what the mixture before it is given: mixed into a router's class, so that it can be asked early."""

    answer: Routing | None = None  # for the pass that it is in, where it has been asked before its turn

    def route(self, earlier_NH: Tensor) -> Routing:
        """What the router makes of the states that the mixture before it is given."""
        routing: Routing = super().forward(earlier_NH)
        return routing

"""Subnetworks of a BERT-like encoder: ordinary models of its type whose weights are the first entries of its own.

A subnetwork of width w, h heads, l blocks and feed-forwards of i takes the first w entries of the residual stream, the
first i of each feed-forward, the first w / h entries of each of the first h heads, and of L blocks those of number
⌊j L / l⌋. It runs in place, without weights of its own, so that what it learns the large model learns; or it is taken
out. Both are the same modules of `transformers` on the same numbers.

Shape letters: B rows, L positions.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from pretrain.core.checkpoint import surgery_of
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import family

T = TypeVar("T")
KEPT = 64  # subnetworks of a model whose modules are kept, without numbers
_HEADS = (  # the axis that is one of heads, by the end of a weight's name
    (re.compile(r"attention\.self\.(query|key|value)\.(weight|bias)$"), 0),
    (re.compile(r"attention\.output\.dense\.weight$"), 1),
)


class Subnetwork(NamedTuple):
    """The sizes of one, by the names that a configuration has for them."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int

    def flops(self, length: int) -> int:
        """FLOPs of the blocks in a forward pass on a row of `length` tokens, as the meter counts them."""
        w, i = self.hidden_size, self.intermediate_size
        return self.num_hidden_layers * length * (8 * w * w + 4 * w * i + 4 * w * length)


@lru_cache(maxsize=64)
def subspace(
    hidden_size: Sequence[int],
    num_attention_heads: Sequence[int],
    num_hidden_layers: Sequence[int],
    mlp_ratio: Sequence[float],
    head_size: int,
) -> tuple[Subnetwork, ...]:
    """All subnetworks of these choices from the smallest to the largest: first and last of `parameters` too.

    A model of `transformers` has heads of its width over their number. Combinations in which that is no whole number,
    or more than `head_size`, the large model's, are none. A ratio is that of the feed-forward to the width. Empty where
    no combination is one.
    """
    choices = product(hidden_size, num_attention_heads, num_hidden_layers, mlp_ratio)
    made = {Subnetwork(width, layers, int(width * ratio), heads) for width, heads, layers, ratio in choices}
    return tuple(
        sorted(
            each
            for each in made
            if each.hidden_size % each.num_attention_heads == 0
            and each.hidden_size // each.num_attention_heads <= head_size
            and each.intermediate_size > 0
        )
    )


class Sizes(Protocol):
    """The fields of a method that a space is made of, as `subspace` has them."""

    @property
    def hidden_size(self) -> Sequence[int]: ...
    @property
    def num_attention_heads(self) -> Sequence[int]: ...
    @property
    def num_hidden_layers(self) -> Sequence[int]: ...
    @property
    def mlp_ratio(self) -> Sequence[float]: ...
    @property
    def head_size(self) -> int: ...


def space_of(method: Sizes) -> tuple[Subnetwork, ...]:
    """The subnetworks of a method's fields, from the smallest to the largest."""
    sizes = (method.hidden_size, method.num_attention_heads, method.num_hidden_layers, method.mlp_ratio)
    return subspace(*map(tuple, sizes), method.head_size)


def check_space(name: str, space: Sequence[Subnetwork], head_size: int) -> None:
    """An error where no combination is a model."""
    if not space:
        raise PretrainError(
            f"{name}: no hidden_size is a num_attention_heads of heads of at most head_size {head_size}: accepted: a "
            "width that one of num_attention_heads divides",
            place=("num_attention_heads",),
        )


def check_elastic(
    name: str, families: Sequence[str], model: PreTrainedModel, space: Sequence[Subnetwork], head_size: int
) -> None:
    """An error where the model does not hold all subnetworks of the space."""
    entry, config = family(model), model.config
    if not entry.among(families):
        raise PretrainError(f"{name}: family {entry.name!r}: accepted: {', '.join(families)}")
    if surgery_of(model):
        done = ", ".join(each["method"] for each in surgery_of(model))
        raise PretrainError(f"{name}: the model has been through {done}: accepted: a plain {entry.name}")
    theirs = config.hidden_size // config.num_attention_heads
    if head_size != theirs:
        raise PretrainError(f"{name}: head_size {head_size}: accepted: {theirs}, the model's", place=("head_size",))
    for field in Subnetwork._fields:
        most = max(getattr(each, field) for each in space)
        if most > getattr(config, field):
            shown = f"mlp_ratio: {field} {most}" if field == "intermediate_size" else f"{field} {most}"
            raise PretrainError(f"{name}: {shown}: accepted: at most the model's {getattr(config, field)}")


def whole(model: PreTrainedModel) -> Subnetwork:
    """The model itself."""
    return Subnetwork(*(int(getattr(model.config, field)) for field in Subnetwork._fields))


def config_of(model: PreTrainedModel, chosen: Subnetwork) -> PreTrainedConfig:
    """The configuration of a subnetwork."""
    config = copy.deepcopy(model.config)
    for field, value in chosen._asdict().items():
        setattr(config, field, value)
    return config


def kept_blocks(blocks: int, kept: int) -> list[int]:
    """The numbers of the blocks that a subnetwork of `kept` of them has: spread evenly, the first among them."""
    return [number * blocks // kept for number in range(kept)]


def parameters(model: PreTrainedModel, chosen: Subnetwork) -> int:
    """How many weights a subnetwork has, tied ones counted once."""
    return sum(weight.numel() for weight in _modules(model, chosen).parameters())


def weights(model: PreTrainedModel, chosen: Subnetwork) -> dict[str, Tensor]:
    """A subnetwork's weights by its names for them, cut from the model's: gradients go back to these."""
    given = dict(model.named_parameters(remove_duplicate=False))
    order = kept_blocks(model.config.num_hidden_layers, chosen.num_hidden_layers)
    inside = re.compile(rf"((?:^|.*\.){re.escape(family(model).blocks)}\.)(\d+)(\..*)")
    heads = model.config.num_attention_heads, chosen.num_attention_heads
    cut = {}
    for name, weight in _modules(model, chosen).named_parameters():
        match = inside.fullmatch(name)
        source = f"{match[1]}{order[int(match[2])]}{match[3]}" if match else name
        cut[name] = _first(given[source], weight.shape, _head_axis(name), *heads)
    return cut


def _head_axis(name: str) -> int | None:
    return next((axis for pattern, axis in _HEADS if pattern.search(name)), None)


def _first(weight: Tensor, shape: Sequence[int], head_axis: int | None, heads: int, kept: int) -> Tensor:
    """The first entries along each axis; of an axis of heads the first of each of the first heads."""
    for axis, size in enumerate(shape):
        if axis == head_axis:
            each = weight.unflatten(axis, (heads, -1)).narrow(axis, 0, kept).narrow(axis + 1, 0, size // kept)
            weight = each.flatten(axis, axis + 1)
        else:
            weight = weight.narrow(axis, 0, size)
    return weight.contiguous()  # laid out as those of a model of that size, whose products then round alike


class _Called(nn.Module):
    """A module whose forward pass is any function of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[nn.Module], T]) -> T:
        return call(self.model)


def run(model: PreTrainedModel, chosen: Subnetwork, call: Callable[[PreTrainedModel], T]) -> T:
    """What `call` makes of a subnetwork, whose weights are the model's while it runs."""
    made = _modules(model, chosen).train(model.training)
    buffers = dict(model.named_buffers())
    tensors = weights(model, chosen) | {name: buffers[name] for name, _ in made.named_buffers()}
    named = {f"model.{name}": tensor for name, tensor in tensors.items()}
    return cast("T", functional_call(_Called(made), named, (call,)))


_made: WeakKeyDictionary[nn.Module, dict[Subnetwork, PreTrainedModel]] = WeakKeyDictionary()


def _modules(model: PreTrainedModel, chosen: Subnetwork) -> PreTrainedModel:
    """The modules of a subnetwork, on no device."""
    known = _made.setdefault(model, {})
    if chosen not in known:
        if len(known) >= KEPT:
            del known[next(iter(known))]
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            known[chosen] = type(model)(config_of(model, chosen))
    return known[chosen]

"""The layers of a `transformers` cache that has been written to, by their type."""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor
from transformers import Cache


class KeyValues(Protocol):
    """What one layer keeps: keys and values, `_BHKD` each."""

    keys: Tensor
    values: Tensor


def layers_of(cache: Cache) -> list[KeyValues]:
    """The cache's layers, in the order of the blocks."""
    return cast("list[KeyValues]", cache.layers)


def cache_bytes(cache: Cache) -> int:
    """The bytes of a cache's keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers_of(cache))

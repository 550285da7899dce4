"""Choosing documents by a number each: the indices of those that are kept, in the corpus's order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def top(score_N: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The `count` highest; of equals the earlier."""
    return np.sort(np.argsort(-score_N, kind="stable")[:count])


def top_share(score_N: NDArray[np.float64], size_N: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    """The highest that together hold `share` of the size, the one that reaches it included; of equals the earlier."""
    order = np.argsort(-score_N, kind="stable")
    held = np.cumsum(size_N[order])
    count = int(np.searchsorted(held, share * int(size_N.sum()), "left")) + 1
    return np.sort(order[:count])


def weighted(weight_N: NDArray[np.float64], count: int, seed: int) -> NDArray[np.int64]:
    """`count` documents at random: u < factor · weight, with the factor that lets just so many through."""
    uniform_N = np.random.default_rng(seed).random(len(weight_N))
    with np.errstate(divide="ignore"):
        return top(-uniform_N / weight_N, count)

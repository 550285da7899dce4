"""95% intervals by bootstrap over documents.

Shape letters: N documents, K quantities summed over them, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

LEAST = 8  # documents that an interval by drawing from them needs
# What metrics, by name, are made of sums over documents: `sums_RK` to a value for each of the resamples.
Measure: TypeAlias = Callable[[NDArray[np.float64]], Mapping[str, NDArray[np.float64]]]


def resampled_sums(values_NK: NDArray[np.number], resamples: int, seed: int) -> NDArray[np.float64]:
    """`sums_RK` of as many documents drawn with replacement; memory grows with N + R, not with N times R."""
    rng, count = np.random.default_rng(seed), len(values_NK)
    values_NK = np.asarray(values_NK, np.float64)
    sums_RK = np.empty((resamples, values_NK.shape[1]))
    for row in sums_RK:
        row[:] = np.bincount(rng.integers(0, count, count), minlength=count) @ values_NK
    return sums_RK


def bounds(values_R: NDArray[np.number]) -> tuple[float, float]:
    """The 2.5% and 97.5% points."""
    low, high = np.percentile(values_R, (2.5, 97.5))
    return float(low), float(high)


def bounds_by_domain(
    values_NK: NDArray[np.number], domains: Sequence[str], measure: Measure, resamples: int, seed: int
) -> dict[str, dict[str, tuple[float, float]]]:
    """`{DOMAIN: {METRIC: interval}}` of what `measure` makes of each domain's documents; none of fewer than `LEAST`."""
    values_NK, names = np.asarray(values_NK, np.float64), np.array(domains)
    intervals = {}
    for domain in sorted({*domains}):
        mine_NK = values_NK[names == domain]
        if len(mine_NK) >= LEAST:
            made = measure(resampled_sums(mine_NK, resamples, seed)).items()
            intervals[domain] = {name: bounds(value_R) for name, value_R in made}
    return intervals


def bounds_of_means(
    name: str, values_N: NDArray[np.number], domains: Sequence[str], resamples: int, seed: int
) -> dict[str, dict[str, tuple[float, float]]]:
    """The same of a metric that is a mean over documents."""
    values_N2 = np.stack([np.asarray(values_N, np.float64), np.ones(len(values_N))], axis=1)
    return bounds_by_domain(values_N2, domains, lambda sums_R2: {name: sums_R2[:, 0] / sums_R2[:, 1]}, resamples, seed)

"""95% intervals by bootstrap over documents.

Shape letters: N documents, K quantities summed over them, R resamples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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

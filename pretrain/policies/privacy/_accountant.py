"""What the Gaussian noise of many steps, each of a random sample of the examples, guarantees.

Rényi differential privacy of the sampled Gaussian mechanism (arXiv:1908.10530), at integer orders α, and its conversion
to (epsilon, delta) (arXiv:2004.00010):

    ρ(α) = 1/(α - 1) · log Σ_k C(α, k) (1 - q)^(α - k) q^k exp(k (k - 1) / 2σ²),
    epsilon = min over α of steps · ρ(α) + log((α - 1) / α) - (log delta + log α) / (α - 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pretrain.core.errors import PretrainError

Accountant = Callable[[float, float, int, float], float]  # noise multiplier, rate, steps, delta -> epsilon
ORDERS = (*range(2, 65), 72, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512)


def epsilon(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """The smallest epsilon that is proved, infinite without noise. Each example is in a step with chance `rate`."""
    if not steps or not rate:
        return 0.0
    if not noise_multiplier:
        return math.inf
    bounds = [
        steps * divergence(order, noise_multiplier, rate)
        + math.log1p(-1 / order)
        - (math.log(delta) + math.log(order)) / (order - 1)
        for order in ORDERS
    ]
    return max(0.0, min(bounds))


def divergence(order: int, noise_multiplier: float, rate: float) -> float:
    """ρ(α) of one step."""
    if rate == 1:
        return order / (2 * noise_multiplier**2)
    k = np.arange(order + 1)
    log_K: NDArray[np.float64] = (
        np.array([math.lgamma(order + 1) - math.lgamma(i + 1) - math.lgamma(order - i + 1) for i in k])
        + (order - k) * math.log1p(-rate)
        + k * math.log(rate)
        + k * (k - 1) / (2 * noise_multiplier**2)
    )
    top = float(log_K.max())
    return (top + math.log(float(np.exp(log_K - top).sum()))) / (order - 1)


def noise_for(target: float, rate: float, steps: int, delta: float, spent: Accountant = epsilon) -> float:
    """The least noise multiplier, to a thousandth of itself, that keeps to `target` epsilon by an accountant."""
    low, high = 0.0, 1.0
    while spent(high, rate, steps, delta) > target:
        low, high = high, 2 * high
        if high > 1e6:
            raise PretrainError(f"epsilon {target:g}: accepted: one that some noise gives at delta {delta:g}")
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle, rate, steps, delta) <= target else (middle, high)
    return high

"""The Edgeworth accountant (arXiv:2206.04236): what many steps of the sampled Gaussian mechanism come to, estimated.

With L the log-likelihood ratio of one step's outcomes, F and F' the distributions of the sum of the steps' L without
and with the example,

    δ(ε) = 1 - F'(ε) - e^ε · (1 - F(ε)),

where F and F' are Edgeworth expansions of the third order, of the first five cumulants of L. It is an estimate and no
bound: the paper's bounds of the expansion's error are far above the deltas in use once e^ε multiplies them. The first
order, which the authors' code takes, stays further below the exact value: for noise 0.62, rate 2000/67349, 673 steps
and delta 1e-5 epsilon is exactly 15.5; first order 14.2, third 15.6, Rényi's 17.5. For noise 0.6, rate 2000/392702,
1960 steps and delta 1e-6 it is exactly 6.40; first order 4.82, third 5.49, Rényi's 7.63. There the sum's skewness is
0.56: where it is above `SKEWED`, as with very few steps, and where it is the smaller, what Rényi's proves is taken.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pretrain.policies.privacy._accountant import epsilon as proved

Cumulants = tuple[float, float, float, float, float]
SIDE, POINTS = 14.0, 20001  # the grid that moments are integrated on reaches so many deviations beyond both means
LEAST, MOST = 0.1, 500.0  # noise that moments are integrated of, epsilon that is tried: exponentials end beyond
SKEWED = 0.45  # up to here the estimate was within 2% of the exact value, or above it, wherever it was tried


@lru_cache(maxsize=256)
def cumulants(noise_multiplier: float, rate: float) -> tuple[Cumulants, Cumulants]:
    """The first five of L without and with the example."""
    mean = 1 / noise_multiplier
    x, step = np.linspace(-SIDE, SIDE + mean, POINTS, retstep=True)
    shift = mean * x - mean**2 / 2
    ratio = shift if rate == 1 else np.logaddexp(math.log1p(-rate), math.log(rate) + shift)
    without = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return _cumulants(ratio, without * step), _cumulants(ratio, without * np.exp(ratio) * step)


def _cumulants(value: NDArray[np.float64], weight: NDArray[np.float64]) -> Cumulants:
    mean = float(value @ weight)
    second, third, fourth, fifth = (float((value - mean) ** order @ weight) for order in (2, 3, 4, 5))
    return mean, second, third, fourth - 3 * second**2, fifth - 10 * third * second


def beyond(x: float, of_one: Cumulants, steps: int) -> float:
    """The estimated probability that a sum of `steps` terms is above x."""
    mean, second, third, fourth, fifth = (value * steps for value in of_one)
    deviation = math.sqrt(second)
    z = (x - mean) / deviation
    skew, kurtosis, next_ = third / deviation**3, fourth / deviation**4, fifth / deviation**5
    correction = (
        skew / 6 * (z**2 - 1)
        + kurtosis / 24 * (z**3 - 3 * z)
        + skew**2 / 72 * (z**5 - 10 * z**3 + 15 * z)
        + next_ / 120 * (z**4 - 6 * z**2 + 3)
        + skew * kurtosis / 144 * (z**6 - 15 * z**4 + 45 * z**2 - 15)
        + skew**3 / 1296 * (z**8 - 28 * z**6 + 210 * z**4 - 420 * z**2 + 105)
    )
    return math.erfc(z / math.sqrt(2)) / 2 + correction * math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def delta_of(epsilon: float, noise_multiplier: float, rate: float, steps: int) -> float:
    """δ(ε)."""
    without, with_it = cumulants(noise_multiplier, rate)
    return beyond(epsilon, with_it, steps) - math.exp(epsilon) * beyond(epsilon, without, steps)


def estimated_epsilon(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """The ε at which δ(ε) is `delta`, or Rényi's; infinite without noise. An example is in a step by chance `rate`."""
    bound = proved(noise_multiplier, rate, steps, delta)
    if bound in (0.0, math.inf) or noise_multiplier < LEAST:
        return bound
    _, second, third, *_ = cumulants(noise_multiplier, rate)[1]
    if (
        third / second**1.5 / math.sqrt(steps) > SKEWED
        or delta_of(min(bound, MOST), noise_multiplier, rate, steps) > delta
    ):
        return bound
    low, high = 0.0, min(bound, MOST)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle, noise_multiplier, rate, steps) > delta else (low, middle)
    return high

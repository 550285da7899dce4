"""What paired runs say: intervals, a word, and the compute at which one curve reaches the other's end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"
CONFIDENCE = 0.97  # chance then decides less than one comparison in twenty, of noise that is not normal as well

MOST = 16  # seeds that anybody makes for a comparison

Curve = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Verdict:
    """How a side stands to the baseline, over paired seeds.

    `difference` is the mean of method minus baseline, `low` to `high` its 97% interval by Student's t, `bootstrap` the
    one by resampling the pairs. The word is decided only where both intervals lie on one side of zero: with few seeds
    the bootstrap alone would decide far too often.
    """

    difference: float
    low: float
    high: float
    bootstrap: tuple[float, float]
    word: str


def judge(differences: Sequence[float], better: str = "lower") -> Verdict:
    """The verdict on paired differences; `better` says which sign is good, "lower" or "higher"."""
    (begin, end), resampled = interval(differences), bootstrap(differences)
    low, high = min(begin, resampled[0]), max(end, resampled[1])
    return Verdict(statistics.mean(differences), begin, end, resampled, decided(low, high, better))


def seeds_to_decide(differences: Sequence[float], most: int = MOST) -> int | None:
    """How many seeds Student's interval needs to leave zero out, at this mean and spread; None: more than `most`."""
    from scipy.stats import t

    mean, spread = abs(statistics.mean(differences)), statistics.stdev(differences)
    counts = range(2, most + 1)
    return next((n for n in counts if float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * spread < mean * math.sqrt(n)), None)


def decided(low: float, high: float, better: str) -> str:
    """What an interval of method minus baseline says: a word other than undecided where it lies on one side of zero."""
    sign = -1 if low > 0 else 1 if high < 0 else 0  # of the improvement, where lower is better
    return {1: BETTER, -1: WORSE, 0: UNDECIDED}[sign if better == "lower" else -sign]


def bootstrap(differences: Sequence[float], resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The percentile interval of the mean by resampling the pairs."""
    chosen = np.random.default_rng(seed).integers(0, len(differences), (resamples, len(differences)))
    cut = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.asarray(differences, dtype=float)[chosen].mean(-1), [cut, 100 - cut])
    return float(low), float(high)


def reached(curve: Curve, target: float, better: str = "lower") -> float | None:
    """The FLOPs at which a curve first reaches `target`, between its points in a straight line; None: never."""
    sign = 1 if better == "lower" else -1
    before: Sequence[float] | None = None
    for spent, value in curve:
        if sign * value <= sign * target:
            if before is None or before[1] == value:
                return spent
            return before[0] + (spent - before[0]) * (before[1] - target) / (before[1] - value)
        before = (spent, value)
    return None


def smoothed(curve: Curve, better: str = "lower") -> list[tuple[float, float]]:
    """The nearest curve that never gets worse: isotonic regression, by pooling adjacent violators.

    A held-out curve swings from one measurement to the next, and its first dip below a value is no place to have
    reached that value.
    """
    sign = 1 if better == "lower" else -1
    pools: list[tuple[float, int]] = []  # a mean, and of how many points
    for _, value in curve:
        pools.append((value, 1))
        while len(pools) > 1 and sign * pools[-1][0] > sign * pools[-2][0]:
            (a, m), (b, n) = pools[-2:]
            pools[-2:] = [((a * m + b * n) / (m + n), m + n)]
    values = [mean for mean, count in pools for _ in range(count)]
    return [(point[0], value) for point, value in zip(curve, values, strict=True)]


def shares_to_reach(curves: Sequence[Curve], others: Sequence[Curve], better: str = "lower") -> list[float | None]:
    """The share of its own compute at which each curve reaches the other's last value; None where it never does.

    0.5 says that half the compute is enough: a saving of one half. A curve of its end alone tells nothing.
    """
    points = [reached(curve, other[-1][1], better) for curve, other in zip(curves, others, strict=True)]
    return [None if p is None or len(curve) < 2 else p / curve[-1][0] for p, curve in zip(points, curves, strict=True)]


def share_to_reach(curves: Sequence[Curve], others: Sequence[Curve], better: str = "lower") -> float | None:
    """The mean of `shares_to_reach`; None where one curve never reaches the other's end."""
    shares = [share for share in shares_to_reach(curves, others, better) if share is not None]
    return statistics.mean(shares) if len(shares) == len(curves) else None


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's interval of the mean."""
    from scipy.stats import t

    mean, count = statistics.mean(values), len(values)
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return mean - half, mean + half

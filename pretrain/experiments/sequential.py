"""When to stop adding seeds, by a rule fixed beforehand.

Both sides of a claim are run with 3 seeds, then 4, 6 and 8, until the mean of their paired differences d̄ is decided:

    |d̄| > t · √(σ² / n + τ² / D)

σ is the deviation of a paired difference over seeds, pooled over the runs of a base with what these pairs show
themselves; τ that over the D documents that are judged on, where their losses are known. t is Student's, at a level so
strict that the four looks together are wrong of a method that does nothing in less than one case in twenty; a
difference of 1.25 σ is found in more than four cases of five. (Of a method that does nothing but is twice as noisy as
what was pooled, one case in seven is wrong: few seeds cannot tell.)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pretrain.experiments.verdict import UNDECIDED, decided

EQUAL = "equal"
LOOKS = (3, 4, 6, 8)  # seeds after which a verdict is tried
LEVEL = 0.016  # of each look, two-sided
SMALL = 1.25  # deviations: what is surely less is called equal after the last look


@dataclass(frozen=True)
class Noise:
    """The deviation of paired differences that no method causes, and how many degrees of freedom it is known by."""

    deviation: float
    freedom: int

    @staticmethod
    def pooled(groups: Iterable[Sequence[float]]) -> Noise | None:
        """From groups of paired differences, each about a mean of its own; None where no group has two."""
        large = [group for group in groups if len(group) > 1]
        freedom = sum(len(group) - 1 for group in large)
        if not freedom:
            return None
        squares = sum(statistics.variance(group) * (len(group) - 1) for group in large)
        return Noise(math.sqrt(squares / freedom), freedom)

    @staticmethod
    def of_runs(groups: Iterable[Sequence[float]]) -> Noise | None:
        """From groups of single runs that differ in their seed alone: two of them differ by √2 of their deviation."""
        noise = Noise.pooled(groups)
        return noise and Noise(math.sqrt(2) * noise.deviation, noise.freedom)

    def joined(self, differences: Sequence[float]) -> Noise:
        """With what these differences show. Where they are clearly the noisier ones, theirs alone."""
        noise = Noise.pooled([differences])
        if noise is None:
            return self
        if noise.deviation > self.deviation * math.sqrt(_f_quantile(noise.freedom, self.freedom)):
            return noise
        freedom = self.freedom + noise.freedom
        return Noise(
            math.sqrt((self.deviation**2 * self.freedom + noise.deviation**2 * noise.freedom) / freedom), freedom
        )


@dataclass(frozen=True)
class Standing:
    """How the method stands to the baseline after so many seeds."""

    seeds: int
    difference: float  # mean of method minus baseline
    low: float
    high: float
    noise: Noise  # of a paired difference, over seeds
    documents: float  # the deviation of the mean that the choice of documents makes
    word: str
    more: int  # seeds that are still to be run, 0: the rule has ended


def standing(
    differences: Sequence[float],
    better: str = "lower",
    noise: Noise | None = None,
    documents_SD: NDArray[np.float64] | None = None,
    looks: Sequence[int] = LOOKS,
) -> Standing:
    """Judge paired differences (method minus baseline); `better` says which sign is good, "lower" or "higher".

    `documents_SD`: each document's share in each seed's difference, so that its means over documents are `differences`.
    Without `noise` the pairs' own is all there is.
    """
    paired = Noise.pooled([differences])
    joined = noise.joined(differences) if noise else paired
    if joined is None:
        raise ValueError(f"{len(differences)} differences: accepted: two or more, or the noise of earlier runs")
    documents = 0.0
    if documents_SD is not None and documents_SD.shape[1] > 1:
        documents = float(documents_SD.mean(0).std(ddof=1)) / math.sqrt(documents_SD.shape[1])
    mean, count = statistics.mean(differences), len(differences)
    half = _t_quantile(joined.freedom) * math.hypot(joined.deviation / math.sqrt(count), documents)
    low, high = mean - half, mean + half
    word = decided(low, high, better)
    more = 0 if word != UNDECIDED else next((look - count for look in looks if look > count), 0)
    if word == UNDECIDED and not more and max(-low, high) < SMALL * joined.deviation:
        word = EQUAL
    return Standing(count, mean, low, high, joined, documents, word, more)


@cache
def _t_quantile(freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(1 - LEVEL / 2, freedom))


@cache
def _f_quantile(freedom: int, pooled: int) -> float:
    from scipy.stats import f

    return float(f.ppf(0.9, freedom, pooled))

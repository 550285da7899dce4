"""How good a model of a size will be after so much text: a law, fitted to small runs, with an interval.

    L(N, D, V) = E + A / N^α + B (V^γ / D)^β

L is bits per byte of held-out text, N the weights of the blocks, D the bytes trained on, V the entries of the
vocabulary: Chinchilla's form (Training Compute-Optimal Large Language Models, arXiv:2203.15556), fitted as there by a
Huber loss on logarithms, with a vocabulary of which the worth of the text depends (Scaling Laws with Vocabulary,
arXiv:2407.13623): the entries each want text of their own (γ > 0), and say more of it at a time (γ < 0). Text that is
read again counts less (Scaling Data-Constrained Language Models, arXiv:2305.16264): of U unique bytes, read R times
more,

    D = U + U R* (1 - exp(-R / R*)),   R* = 15.4
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.core.errors import PretrainError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

REPEATS = 15.4  # R*: after so many further passes one is worth a third of as much new text
NEARLY_NEW = 4  # passes that are nearly as good as new text
LITTLE = 0.2  # of the worth of new text: below it another pass is worth next to nothing
MOST_PASSES = math.floor(1 - REPEATS * math.log(LITTLE))
HUBER = 3e-2  # of a difference of logarithms: one run of a small model lies 1% to 2% beside any law
LEAST = 0.3  # bits per byte that no model of text or code is expected to come below: small runs cannot tell the floor
NAMES = ("floor", "A", "alpha", "B", "beta", "gamma")
STEEPER = 1.2  # a ladder of 1.15 was off by 0.2%, those of 1.25 to 2.3 by 6% to 15%: too many bits
# What a dozen small runs cannot tell is held near what laws of text have been found to be, each within a deviation:
# the floor's share of the lowest loss (its logarithm), alpha (0.34 in Chinchilla's), beta and gamma (lower for models
# as small as a ladder's). Of 19 runs on Python's library the smallest 10 foretell the others within 3.1% (root mean
# square) so, and within 4.0% without.
USUAL = {"floor": (math.log(0.4), 0.25), "alpha": (0.35, 0.1), "beta": (0.2, 0.06), "gamma": (-0.5, 0.3)}


def worth(passes: float) -> float:
    """What the last of so many passes over the same text is worth, as a share of as much new text: dD / (U dR)."""
    return math.exp(-max(0.0, passes - 1) / REPEATS)


@dataclass(frozen=True)
class Rung:
    """A run that a law is fitted to."""

    body: int  # weights of the blocks
    vocabulary: int
    bytes: float  # trained on
    bits: float  # per byte of held-out text
    flops: float
    width: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """Bits per byte and its 95% interval."""

    bits: float
    low: float
    high: float


@dataclass(frozen=True)
class Law:
    """A fitted law; `covariance` is that of the logarithms and exponents in the order of `NAMES`."""

    floor: float
    A: float
    alpha: float
    B: float
    beta: float
    gamma: float
    bytes_per_token: dict[int, float]  # of the corpus, by vocabulary
    largest: float  # FLOPs of the largest rung
    deviation: float = 0.0  # of a rung about the law, relative
    quantile: float = 2.0  # Student's, of a 95% interval with the rungs' degrees of freedom
    covariance: list[list[float]] = field(default_factory=list)
    rungs: list[Rung] = field(default_factory=list)
    optimizer: str = ""  # that the rungs were trained with
    steeper: float = 1.0  # the fall of one size's loss from the second budget to the last, next to that to the second

    @property
    def doubt(self) -> str:
        """Why the interval does not hold, in words: of the law's form each further FLOP gains less, not more."""
        if self.steeper < STEEPER:
            return ""
        return (
            f"its runs fell {self.steeper:.1f} times as steeply from budget to budget, too short for a law: likely less"
        )

    def bits(self, body: float, vocabulary: float, bytes_: float) -> float:
        """The law's value."""
        return math.exp(_log_bits(self._parameters(), body, vocabulary, bytes_))

    def predict(self, body: float, vocabulary: float, bytes_: float) -> Prediction:
        """With the interval for one new run: by the parameters' covariance and the rungs' own deviation."""
        parameters, step = self._parameters(), 1e-5
        value = _log_bits(parameters, body, vocabulary, bytes_)
        slopes = []
        for place, parameter in enumerate(parameters):
            beside = [*parameters[:place], parameter + step, *parameters[place + 1 :]]
            slopes.append((_log_bits(beside, body, vocabulary, bytes_) - value) / step)
        rows = zip(slopes, self.covariance, strict=False)
        variance = sum(slope * other * cell for slope, row in rows for other, cell in zip(slopes, row, strict=True))
        half = self.quantile * math.sqrt(max(0.0, variance) + self.deviation**2)
        return Prediction(math.exp(value), math.exp(value - half), math.exp(value + half))

    def bytes_of_token(self, vocabulary: float) -> float:
        """Bytes of text in a token, between and beyond the vocabularies that were measured along their logarithm."""
        known = sorted((math.log(size), each) for size, each in self.bytes_per_token.items())
        at = math.log(vocabulary)
        if len(known) == 1:
            return known[0][1]
        place = min(max(bisect([log for log, _ in known], at), 1), len(known) - 1)
        (left, low), (right, high) = known[place - 1], known[place]
        slope = (high - low) / (right - left)
        inside = low + slope * (min(at, right) - left)
        return max(1.0, inside + 0.7 * slope * max(0.0, at - right))  # each doubling adds less than the one before

    def _parameters(self) -> list[float]:
        return [math.log(self.floor), math.log(self.A), self.alpha, math.log(self.B), self.beta, self.gamma]

    def write(self, path: Path) -> None:
        """As JSON."""
        from pretrain.core.files import sealed, write_json

        write_json(path, sealed(asdict(self)))


def unique_worth(seen: float, unique: float | None) -> float:
    """How much new text `seen` bytes are worth of a corpus of `unique` bytes; None: it never ends."""
    if unique is None or seen <= unique:
        return seen
    return unique + unique * REPEATS * (1 - math.exp(-(seen / unique - 1) / REPEATS))


def load(path: Path) -> Law:
    """Read a law; errors name the file."""
    from pretrain.core.files import read_sealed

    try:
        given = read_sealed(path)
        sizes = {int(k): float(v) for k, v in given.pop("bytes_per_token").items()}
        rungs = [Rung(**rung) for rung in given.pop("rungs", [])]
        return Law(bytes_per_token=sizes, rungs=rungs, **given)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PretrainError(f"law {path}: {error}; accepted: a law.json that `pretrain ladder` wrote") from error


def fit(rungs: Sequence[Rung]) -> Law:
    """The law of these runs. With one vocabulary among them gamma is 0, which it cannot tell.

    Fitted twice: the first time tells how far runs lie beside a law, and so what the usual values (`USUAL`) weigh.
    """
    import numpy as np
    from scipy.stats import t

    several = len({rung.vocabulary for rung in rungs}) > 1
    free = 6 if several else 5
    if len(rungs) <= free:
        raise PretrainError(f"{len(rungs)} rungs: accepted: more than the law's {free} parameters")
    freedom, deviation = len(rungs) - free, 0.0
    for _ in range(2):
        parameters, slopes, squares = _solved(rungs, free, deviation)
        deviation = math.sqrt(squares / freedom)
    covariance = np.zeros((6, 6))
    covariance[:free, :free] = deviation**2 * np.linalg.pinv(slopes.T @ slopes, rcond=1e-10)
    floor, a, alpha, b, beta, gamma = [*parameters, *([] if several else [0.0])]
    tokens = {rung.vocabulary: 0.0 for rung in rungs}
    return Law(
        math.exp(floor), math.exp(a), alpha, math.exp(b), beta, gamma, tokens, max(rung.flops for rung in rungs),
        deviation, float(t.ppf(0.975, freedom)), covariance.tolist(), list(rungs), steeper=_steeper(rungs),
    )  # fmt: skip


def _steeper(rungs: Sequence[Rung]) -> float:
    """How much more steeply the loss of a size falls at last than at first, in logarithms; 1 where nothing tells."""
    sizes: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for rung in rungs:
        sizes.setdefault((rung.body, rung.vocabulary), []).append((math.log(rung.flops), math.log(rung.bits)))
    logs = []
    for points in map(sorted, sizes.values()):
        falls = [(a[1] - b[1]) / (b[0] - a[0]) for a, b in pairwise(points) if b[0] > a[0]]
        if len(falls) > 1 and min(falls[0], falls[-1]) > 0:
            logs.append(math.log(falls[-1] / falls[0]))
    return math.exp(math.fsum(logs) / len(logs)) if logs else 1.0


def _solved(rungs: Sequence[Rung], free: int, deviation: float) -> tuple[list[float], NDArray[np.float64], float]:
    """The best of the first `free` parameters for rungs that lie `deviation` beside a law, the slopes, the squares."""
    import numpy as np
    from scipy.optimize import least_squares

    wanted = np.log([rung.bits for rung in rungs])
    lowest = float(wanted.min())

    def residuals(parameters: Sequence[float]) -> NDArray[np.float64]:
        whole = [*parameters, *([0.0] * (6 - free))]
        predicted = [_log_bits(whole, rung.body, rung.vocabulary, rung.bytes) for rung in rungs]
        return np.array(predicted) - wanted

    def with_usual(parameters: Sequence[float]) -> NDArray[np.float64]:
        named = dict(zip(NAMES, parameters, strict=False)) | {"floor": parameters[0] - lowest}
        beside = [(named[name] - usual) / within for name, (usual, within) in USUAL.items() if name in named]
        return np.concatenate([residuals(parameters), deviation * np.array(beside)])

    low = [math.log(LEAST), -5.0, 0.05, -5.0, 0.05, -2.0][:free]
    high = [lowest, 40.0, 1.5, 40.0, 1.5, 2.0][:free]
    tries = []
    for floor in (0.3, 0.6, 0.9):
        for exponent in (0.25, 0.5, 0.8):
            a, b = (math.log(0.5) + exponent * math.log(size) for size in (rungs[0].body, rungs[0].bytes))
            begin = [lowest + math.log(floor), a, exponent, b, exponent, 0.0]
            solved = least_squares(
                with_usual, np.clip(begin[:free], low, high), bounds=(low, high), loss="huber", f_scale=HUBER,
                x_scale=np.maximum(1e-2, np.abs(begin[:free])), max_nfev=4000,
            )  # fmt: skip
            tries.append(solved)
    best = min(tries, key=lambda solved: float(solved.cost))
    return list(map(float, best.x)), best.jac, float(np.square(residuals(best.x)).sum())


def _log_bits(parameters: Sequence[float], body: float, vocabulary: float, bytes_: float) -> float:
    floor, a, alpha, b, beta, gamma = parameters
    terms = (floor, a - alpha * math.log(body), b + beta * (gamma * math.log(vocabulary) - math.log(bytes_)))
    top = max(terms)
    return top + math.log(sum(math.exp(term - top) for term in terms))

"""How a claim is tested: what to run next, from what has been run.

First both sides search the field that is tuned. All values are tried at a third of the budget and judged on the
validation split, ranges widen while a best value lies at an edge, and the best two are run whole with two seeds. Then
the chosen values are run with seeds of their own and judged on the test split, more of them until the rule of
`sequential` ends. Both sides always get the same number of points.

All of this is a function of the outcomes so far, so that a queue may stop and go on at any point, and the protocol be
simulated without a training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

SIDES = ("baseline", "method")
TUNING_SEEDS = (1000, 1001)  # never those that are judged
SHORT = 1 / 3  # of the budget
WHOLE = 2  # values a side that are run whole
WIDEN = 4  # times that a range may grow

Value = float | int | str | bool | None


@dataclass(frozen=True)
class Point:
    """One run of a side: a value of the tuned field, a seed, a share of the budget, and the split it is judged on."""

    side: str
    value: Value
    seed: int
    share: float = 1.0
    split: str = "test"


Scores = Callable[[Point], float | None]  # what a point came to, lower is better; None: not run yet; inf: diverged


@dataclass(frozen=True)
class Search:
    """Where the search stands."""

    missing: tuple[Point, ...]  # to be run before it can go on
    chosen: Mapping[str, Value] | None  # each side's value once it has ended
    tried: Mapping[str, Sequence[Value]]
    edges: Mapping[str, bool]  # whether a side's best is still the first or the last of its values


def search(grids: Mapping[str, Sequence[Value]], score: Scores) -> Search:
    """Go on with a search from what `score` knows; `grids` holds as many values for each side."""
    tried: dict[str, list[Value]] = {side: list(grid) for side, grid in grids.items()}
    inside = dict.fromkeys(tried, False)
    if all(len(values) == 1 for values in tried.values()):
        return Search((), {side: values[0] for side, values in tried.items()}, tried, inside)
    grows = all(_is_scale(values) for values in tried.values())
    whole: dict[str, list[Value]] = {side: [] for side in tried}  # values that are run whole for a reason of their own
    number = min(WHOLE, *map(len, tried.values()))
    for widened in range(WIDEN + 1):
        missing = [p for side in tried for v in tried[side] for p in _shorts(side, v) if score(p) is None]
        if missing:
            return Search(tuple(missing), None, tried, inside)
        ranked = {side: _sorted(tried[side], score, partial(_shorts, side)) for side in tried}
        edges = {side: _edge(tried[side], ranked[side][0]) for side in tried}
        more = grows and widened < WIDEN
        if more and any(edges.values()):
            _widen(tried, edges, {side: values[0] for side, values in ranked.items()})
            continue
        for side in tried:
            whole[side] += [v for v in ranked[side] if v not in whole[side]][: number - len(whole[side])]
        missing = [p for side in tried for v in whole[side] for p in _wholes(side, v) if score(p) is None]
        if missing:
            return Search(tuple(missing), None, tried, inside)
        best = {side: _sorted(whole[side], score, partial(_wholes, side))[0] for side in tried}
        edges = {side: _edge(tried[side], best[side]) for side in tried}
        if not (more and any(edges.values())):
            break
        for side, value in _widen(tried, edges, best).items():  # what lies beyond the best of the whole runs is one too
            whole[side].append(value)
        number += 1
    return Search((), best, tried, {side: bool(edge) for side, edge in edges.items()})


def judged(chosen: Mapping[str, Value], seeds: int) -> list[Point]:
    """The pairs of runs that are judged, each seed's two beside one another."""
    return [Point(side, chosen[side], seed) for seed in range(seeds) for side in SIDES]


def _shorts(side: str, value: Value) -> list[Point]:
    return [Point(side, value, TUNING_SEEDS[0], SHORT, "validation")]


def _wholes(side: str, value: Value) -> list[Point]:
    return [Point(side, value, seed, 1.0, "validation") for seed in TUNING_SEEDS]


def _sorted(values: Sequence[Value], score: Scores, points: Callable[[Value], list[Point]]) -> list[Value]:
    """Values from the best to the worst by their mean score over points that have all been run."""

    def mean(value: Value) -> float:
        scores = [score(point) for point in points(value)]
        return sum(number for number in scores if number is not None) / len(scores)

    return sorted(values, key=mean)


def _is_scale(values: Sequence[Value]) -> bool:
    """Whether the values are numbers above 0 in rising order, two or more: what can be widened by its own steps."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v > 0]
    return len(numbers) == len(values) > 1 and all(a < b for a, b in itertools.pairwise(numbers))


def _edge(values: Sequence[Value], best: Value) -> int:
    """-1 at the lower edge, 1 at the upper one, 0 inside."""
    return -1 if best == values[0] else 1 if best == values[-1] else 0


def _widen(tried: dict[str, list[Value]], edges: Mapping[str, int], best: Mapping[str, Value]) -> dict[str, Value]:
    """Give each side one value more: beyond the edge that its best lies at, else beyond the nearer one."""
    added: dict[str, Value] = {}
    for side, values in tried.items():
        place = values.index(best[side])
        down = edges[side] < 0 or (edges[side] == 0 and place < len(values) - 1 - place)
        last, before = (values[0], values[1]) if down else (values[-1], values[-2])
        assert isinstance(last, int | float) and isinstance(before, int | float)
        new = last * last / before
        added[side] = float(f"{new:.3g}") if isinstance(last, float) or down else math.ceil(new)
        values.insert(0 if down else len(values), added[side])
    return added

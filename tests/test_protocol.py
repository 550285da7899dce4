"""The search that both sides of a claim make, without a training: what a value comes to is a formula."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.experiments.protocol import SIDES, TUNING_SEEDS, WIDEN, Point, judged, search

GRID = [1e-3, 3e-3, 1e-2]


def ran(grids, loss):
    """The search to its end: what came out, and the points that were run, in order."""
    points: dict[Point, float] = {}
    while True:
        found = search(grids, points.get)
        assert len(set(found.missing)) == len(found.missing) and not points.keys() & set(found.missing)
        if not found.missing:
            return found, list(points)
        points |= {point: loss(point) for point in found.missing}


def bowl(**best):
    """A loss whose best value is `best` of each side: the same, or by share of the budget."""

    def loss(point):
        at = best[point.side]
        at = at[point.share < 1] if isinstance(at, tuple) else at
        return math.log(point.value / at) ** 2

    return loss


def test_the_best_two_are_run_whole_with_two_seeds():
    found, points = ran({"baseline": GRID, "method": GRID}, bowl(baseline=3e-3, method=4e-3))
    assert found.chosen == {"baseline": 3e-3, "method": 3e-3} and not any(found.edges.values())
    short = [p for p in points if p.share < 1]
    whole = [p for p in points if p.share == 1]
    assert (
        len(short) == 6 and {p.seed for p in short} == {TUNING_SEEDS[0]} and {p.split for p in points} == {"validation"}
    )
    assert len(whole) == 8 and {p.seed for p in whole} == set(TUNING_SEEDS)
    assert not {p.seed for p in points} & set(range(100))


def test_a_range_widens_while_its_best_is_at_an_edge_and_the_other_side_gets_as_many_points():
    found, points = ran({"baseline": GRID, "method": GRID}, bowl(baseline=3e-3, method=0.1))
    assert found.chosen == {"baseline": 3e-3, "method": pytest.approx(0.11, rel=0.02)}
    assert [len(values) for values in found.tried.values()] == [6, 6] and not any(found.edges.values())
    for share in (True, False):
        count = {side: sum(p.side == side and (p.share < 1) == share for p in points) for side in SIDES}
        assert count["baseline"] == count["method"]


def test_a_range_widens_where_only_the_whole_runs_show_that_its_best_is_at_an_edge():
    found, points = ran({"baseline": GRID, "method": GRID}, bowl(baseline=(1e-4, 3e-3), method=3e-3))
    assert found.chosen["baseline"] < 1e-3 and not found.edges["baseline"]
    whole = {side: {p.value for p in points if p.side == side and p.share == 1} for side in SIDES}
    assert len(whole["baseline"]) == len(whole["method"])


def test_a_best_that_never_leaves_the_edge_is_said_to_be_there():
    found, _ = ran({"baseline": GRID, "method": GRID}, bowl(baseline=3e-3, method=1e9))
    assert found.edges == {"baseline": False, "method": True}
    assert len(found.tried["method"]) == len(GRID) + WIDEN


def test_a_value_that_diverges_is_never_chosen():
    def loss(point):
        return math.inf if point.value > 2e-3 else bowl(baseline=1e-2, method=1e-2)(point)

    found, _ = ran({"baseline": GRID, "method": GRID}, loss)
    assert all(value < 2e-3 for value in found.chosen.values())


def test_one_value_is_taken_as_it_is_and_words_are_not_widened():
    found, points = ran({"baseline": [1], "method": [2]}, bowl())
    assert found.chosen == {"baseline": 1, "method": 2} and not points
    words = {"baseline": ["a", "b"], "method": ["a", "b"]}
    found, _ = ran(words, lambda point: {"a": 1.0, "b": 0.0}[point.value])
    assert found.chosen == {"baseline": "b", "method": "b"} and len(found.tried["method"]) == 2


@given(
    st.lists(st.floats(1e-5, 1.0), min_size=4, max_size=4),
    st.lists(st.integers(0, 2), min_size=60, max_size=60),
)
@settings(max_examples=60)
def test_whatever_the_outcomes_both_sides_try_as_much_and_the_choice_is_the_best_whole_run(best, noise):
    def loss(point):
        return bowl(baseline=tuple(best[:2]), method=tuple(best[2:]))(point) + noise[hash(point) % len(noise)]

    found, points = ran({"baseline": GRID, "method": GRID}, loss)
    for share in (True, False):
        assert len({sum(p.side == side and (p.share < 1) == share for p in points) for side in SIDES}) == 1
    for side in SIDES:
        whole = {p.value for p in points if p.side == side and p.share == 1}
        mean = {v: sum(loss(p) for p in points if p.side == side and p.value == v and p.share == 1) for v in whole}
        assert mean[found.chosen[side]] == min(mean.values())
        assert list(found.tried[side]) == sorted(found.tried[side])


def test_what_is_judged_are_pairs_of_seeds_on_the_test_split():
    points = judged({"baseline": 1, "method": 2}, 3)
    assert [(p.side, p.seed) for p in points] == [(side, seed) for seed in range(3) for side in SIDES]
    assert {p.split for p in points} == {"test"} and {p.share for p in points} == {1.0}

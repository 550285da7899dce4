"""Rates for a comparison: each side's peak rate is searched before its runs are judged.

All rates are tried at a third of the budget with a seed that is never judged, on the metric that is compared; a best
rate at an edge widens the range of every side, so that all get the same number of trials.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pretrain.core.errors import PretrainError
from pretrain.core.models.metrics import Direction
from pretrain.experiments.protocol import SHORT, TUNING_SEEDS, Point, Search, search
from pretrain.experiments.trials import Trial, run_all
from pretrain.recipe import Recipe
from pretrain.stages.train import Train

STEP = 3.0  # between two rates that are tried


@dataclass(frozen=True)
class Rate:
    """A side's peak rate and who has chosen it."""

    lr: float | None  # None: the method has none
    chosen_by: str  # the dial, the recipe, a search, or nobody
    edge: bool = False  # of a search: the best rate is its smallest or its largest

    def __str__(self) -> str:
        return self.chosen_by if self.lr is None else f"{self.lr:.3g} ({self.chosen_by})"


UNTUNED = "the method's default, not tuned"


def rate_of(recipe: Recipe, trained: str) -> Rate:
    """What a recipe's training goes by: of the dial, of the recipe itself, or the default that nobody has chosen."""
    stage = next(stage for stage in recipe.stages if stage.name == trained)
    assert isinstance(stage, Train)
    lr = getattr(stage.optimizer, "lr", None)
    asked, settled = _optimizer(recipe.asked, trained), _optimizer(recipe.raw, trained)
    if "lr" in asked or lr is None:
        return Rate(lr, "the recipe's" if lr is not None else "no rate")
    return Rate(lr, "the dial's" if "lr" in settled else UNTUNED)


def with_rate(trial: Trial, lr: float, usual: float) -> Trial:
    """A trial at another peak rate; other rates of its optimiser keep their proportion to it."""
    recipe = copy.deepcopy(trial.recipe)
    entry = next(row for row in recipe["stages"] if row.get("name", row.get("stage")) == trial.trained)
    method = _method(entry)
    others = {name: value for name, value in method.items() if name.endswith("_lr") and isinstance(value, float)}
    entry["optimizer"] = method | {name: value * lr / usual for name, value in others.items()} | {"lr": lr}
    return replace(trial, recipe=recipe)


def best_rates(
    usual: Mapping[str, float],
    trial: Callable[[str, int], Trial],
    *,
    rates: int,
    jobs: int = 1,
    ray: str | None = None,
    say: Callable[[str], None] = print,
    better: Direction = "lower",
) -> dict[str, Rate]:
    """Each side's best rate around its usual one; `trial` makes a side's whole run with a seed."""
    if rates < 3 or rates % 2 == 0:
        raise PretrainError(f"compare: rates {rates}: accepted: 3, 5, … for each side, around its own rate")
    factors = [STEP ** (number - rates // 2) for number in range(rates)]
    grids = {side: [float(f"{lr * factor:.3g}") for factor in factors] for side, lr in usual.items()}
    scores: dict[tuple[str, float], float] = {}

    def score(point: Point) -> float | None:  # that of the short run stands for the whole one's
        return scores.get((point.side, float(point.value or 0)))

    state = search(grids, score)
    while state.chosen is None:
        wanted = list(dict.fromkeys((point.side, float(point.value or 0)) for point in state.missing))
        trials = [_short(trial(side, TUNING_SEEDS[0]), side, lr, usual[side]) for side, lr in wanted]
        for key, outcome in zip(wanted, run_all(trials, jobs=jobs, ray=ray, say=say), strict=True):
            sign = 1 if better == "lower" else -1
            scores[key] = math.inf if outcome["final"] is None else sign * outcome["final"]
        state = search(grids, score)
    return {side: _rate_of(state, side) for side in usual}


def _rate_of(state: Search, side: str) -> Rate:
    assert state.chosen is not None
    return Rate(float(state.chosen[side] or 0), f"best of {len(state.tried[side])}", state.edges[side])


def _short(trial: Trial, side: str, lr: float, usual: float) -> Trial:
    output = f"{trial.output}-rate-{lr:g}"
    made = with_rate(trial, lr, usual)
    return replace(made, name=f"{side}, rate {lr:g}", amount=trial.amount * SHORT, output=output, curve=None)


def _optimizer(raw: Mapping[str, object], trained: str) -> dict[str, object]:
    rows = raw["stages"]
    assert isinstance(rows, Sequence)
    return _method(next(row for row in rows if row.get("name", row.get("stage")) == trained))


def _method(entry: Mapping[str, object]) -> dict[str, object]:
    """A training's optimiser as its recipe says it, as fields."""
    given = entry.get("optimizer", {})
    return {"method": given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else {}

"""Compare recipes at equal compute: the same metered FLOPs, the same data, the same seeds, an honest verdict.

Each recipe is run once a seed. What its earlier stages spend (a small model that is then grown, a surgery) counts: the
last training stage gets what is left of the budget. The first recipe is the baseline; the others are judged against it
by the paired differences over seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain import engine
from pretrain.core.errors import PretrainError
from pretrain.core.files import write_json
from pretrain.core.hardware import describe
from pretrain.recipe import Recipe, check, load

BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"
# Two-sided 95% points of Student's t by degrees of freedom; beyond the table the normal's.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Verdict:
    """How a recipe stands to the baseline: mean difference of the metric (lower is better), 95% interval, a word."""

    difference: float
    low: float
    high: float
    word: str


def compare(
    recipes: Sequence[Path | str],
    *,
    flops: float,
    seeds: int = 3,
    metric: str = "loss",
    output: Path | str = Path("runs") / "compare",
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run each recipe with each seed for `flops`; writes and returns `comparison.json`.

    `metric` is one of the held-out metrics that training logs; lower is better. Runs that are finished are not run
    again, so a comparison that was interrupted goes on.
    """
    if len(recipes) < 2:
        raise PretrainError(f"compare: {len(recipes)} recipe given; accepted: a baseline and at least one other")
    if seeds < 2:
        raise PretrainError(f"compare: seeds {seeds}: accepted: 2 or more, since one tells nothing of chance")
    names = [Path(path).stem for path in recipes]
    if len(set(names)) < len(names):
        raise PretrainError(
            f"compare: recipes of the same name: {', '.join(names)}; accepted: a name of its own for each"
        )
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in range(seeds):
        for name, path in zip(names, recipes, strict=True):
            recipe = load(path, [*overrides, f"seed={seed}"], Path(output) / f"seed-{seed}")
            result = run_within(recipe, flops, metric)
            results[name].append({"seed": seed} | result)
            say(f"{name}, seed {seed}: {metric} {result['final']:.4f} after {result['flops']:.4g} FLOPs")
    found = summarise(results, flops, metric) | {"environment": describe()}
    write_json(Path(output) / "comparison.json", found)
    return found


def run_within(recipe: Recipe, flops: float, metric: str) -> dict[str, Any]:
    """Run a recipe so that all its stages up to the last training spend `flops`; its curve and its final metric."""
    trainings = [i for i, stage in enumerate(recipe.stages) if stage.stage == "train"]
    if not trainings:
        raise PretrainError(f"{recipe.path}: no train stage; accepted: a recipe that trains")
    raw = dict(recipe.raw) | {"stages": [dict(stage) for stage in recipe.raw["stages"][: trainings[-1] + 1]]}
    spent = 0.0
    if trainings[-1] > 0:
        before = check(raw | {"stages": raw["stages"][:-1]}, recipe.path, output=recipe.output)
        spent = sum(record["flops"] for record in engine.run(before, say=_silent).stages.values())
    if spent >= flops:
        raise PretrainError(
            f"{recipe.path}: the stages before the last training spend {spent:.3g} of {flops:.3g} FLOPs"
        )
    raw["stages"][-1]["budget"] = {"flops": flops - spent}
    final = check(raw, recipe.path, output=recipe.output)
    records = engine.run(final, say=_silent).stages
    last = final.stages[-1].name
    rows = map(json.loads, (recipe.output / last / "log.jsonl").read_text(encoding="utf-8").splitlines())
    curve = [
        (spent + r["flops"], r["metrics"][metric])
        for r in rows
        if r["event"] == "evaluation" and metric in r["metrics"]
    ]
    if not curve:
        known = sorted(records[last]["metrics"])
        raise PretrainError(f"{recipe.path}: no held-out {metric!r} is logged; accepted: {', '.join(known)}")
    total = sum(record["flops"] for record in records.values())
    return {"flops": total, "final": curve[-1][1], "curve": curve}


def _silent(text: str) -> None:
    """The stages' own lines are not shown."""


def summarise(results: dict[str, list[dict[str, Any]]], flops: float, metric: str) -> dict[str, Any]:
    """What `comparison.json` says: runs, and each recipe's mean, spread, verdict and saving against the first."""
    baseline = next(iter(results))
    table = {}
    for name, runs in results.items():
        finals = [run["final"] for run in runs]
        row: dict[str, Any] = {"mean": statistics.mean(finals), "deviation": statistics.stdev(finals)}
        if name != baseline:
            pairs = list(zip(runs, results[baseline], strict=True))
            row["verdict"] = judge([a["final"] - b["final"] for a, b in pairs]).__dict__
            row["saving"] = saving([reached(a["curve"], b["final"]) for a, b in pairs], flops)
        table[name] = row
    return {"metric": metric, "flops": flops, "baseline": baseline, "table": table, "runs": results}


def judge(differences: Sequence[float]) -> Verdict:
    """The verdict on paired differences (negative: below the baseline), by Student's 95% interval of their mean."""
    mean, count = statistics.mean(differences), len(differences)
    point = STUDENT[count - 2] if count - 2 < len(STUDENT) else 1.96
    half = point * statistics.stdev(differences) / math.sqrt(count)
    word = BETTER if mean + half < 0 else WORSE if mean - half > 0 else UNDECIDED
    return Verdict(mean, mean - half, mean + half, word)


def reached(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """The FLOPs at which a falling curve first reaches `target`, between its points in a straight line; None: never."""
    before: tuple[float, float] | None = None
    for spent, value in curve:
        if value <= target:
            if before is None or before[1] == value:
                return spent
            return before[0] + (spent - before[0]) * (before[1] - target) / (before[1] - value)
        before = (spent, value)
    return None


def saving(points: Sequence[float | None], flops: float) -> float | None:
    """The mean share of the baseline's FLOPs saved on the way to its final metric; None where one never did."""
    known = [p for p in points if p is not None]
    return 1 - statistics.mean(known) / flops if len(known) == len(points) else None

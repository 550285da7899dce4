"""Compare recipes at equal compute: the same metered FLOPs, the same data, the same seeds, an honest verdict.

Each recipe is run once a seed. What its earlier stages spend (a small model that is then grown, a surgery) counts: the
last training stage gets what is left of the budget. The first recipe is the baseline; the others are judged against it
by the paired differences over seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.files import write_json, write_text
from pretrain.experiments.drawing import draw
from pretrain.experiments.trials import Outcome, Trial, run_all
from pretrain.experiments.verdict import interval, judge, share_to_reach, shares_to_reach
from pretrain.recipe import load


def compare(
    recipes: Sequence[Path | str],
    *,
    flops: float,
    seeds: int = 3,
    metric: str = "loss",
    output: Path | str = Path("runs") / "compare",
    overrides: Sequence[str] = (),
    jobs: int = 1,
    ray: str | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Run each recipe with each seed for `flops`; writes `comparison.svg`, writes and returns `comparison.json`.

    `metric` is one of the held-out metrics that training logs; lower is better. Runs that are finished are not run
    again, so a comparison that was interrupted goes on. `jobs` processes share the work, or a `ray` cluster does.
    """
    from pretrain.core.hardware import describe

    if len(recipes) < 2:
        raise PretrainError(f"compare: {len(recipes)} recipe given; accepted: a baseline and at least one other")
    if seeds < 2:
        raise PretrainError(f"compare: seeds {seeds}: accepted: 2 or more, since one tells nothing of chance")
    names = [Path(path).stem for path in recipes]
    if len(set(names)) < len(names):
        raise PretrainError(
            f"compare: recipes of the same name: {', '.join(names)}; accepted: a name of its own for each"
        )
    queue = [(name, path, seed) for seed in range(seeds) for name, path in zip(names, recipes, strict=True)]
    trials = [_trial(name, path, seed, flops, metric, Path(output).resolve(), overrides) for name, path, seed in queue]
    outcomes = run_all(trials, jobs=jobs, ray=ray, say=say)
    runs: dict[str, list[Outcome]] = {name: [] for name in names}
    for (name, _, seed), outcome in zip(queue, outcomes, strict=True):
        if outcome["final"] is None:
            raise PretrainError(f"compare: {name}, seed {seed}: {outcome['diverged']}")
        outcome.pop("wall")  # of this call alone
        runs[name].append({"seed": seed} | outcome)
    comparison = summarise(runs, flops, metric) | {"environment": describe()}
    write_json(Path(output) / "comparison.json", comparison)
    curves = {name: [run["curve"] for run in of] for name, of in comparison["runs"].items()}
    write_text(Path(output) / "comparison.svg", draw(curves, metric))
    return comparison


def _trial(
    name: str, path: Path | str, seed: int, flops: float, metric: str, output: Path, overrides: Sequence[str]
) -> Trial:
    """The recipe up to its last training."""
    recipe = load(path, [*overrides, f"seed={seed}"])
    trainings = [number for number, stage in enumerate(recipe.stages) if stage.stage == "train"]
    if not trainings:
        raise PretrainError(f"{path}: no train stage; accepted: a recipe that trains")
    trained = recipe.stages[trainings[-1]].name
    raw = recipe.raw | {"name": name, "stages": recipe.raw["stages"][: trainings[-1] + 1]}
    return Trial(
        name=f"{name}, seed {seed}", recipe=raw, output=str(output / f"seed-{seed}" / name),
        store=str(output / "stages"), trained=trained, unit="flops", amount=flops,
        metric=f"{trained}.{metric}", curve=metric,
    )  # fmt: skip


def summarise(runs: dict[str, list[Outcome]], flops: float, metric: str) -> Outcome:
    """What `comparison.json` says: runs, and each recipe's mean, spread, verdict and saving against the first.

    `compute_to_reach`: the share of its FLOPs at which the recipe reaches the baseline's last value, its 97% interval
    over the seeds, and the share the other way round.
    """
    baseline = next(iter(runs))
    table = {}
    for name, recipe_runs in runs.items():
        finals = [run["final"] for run in recipe_runs]
        row: Outcome = {"mean": statistics.mean(finals), "deviation": statistics.stdev(finals)}
        if name != baseline:
            row["verdict"] = asdict(
                judge([a["final"] - b["final"] for a, b in zip(recipe_runs, runs[baseline], strict=True)])
            )
            mine, theirs = ([run["curve"] for run in side] for side in (recipe_runs, runs[baseline]))
            shares = shares_to_reach(mine, theirs)
            row["compute_to_reach"] = {
                "baseline's end": share_to_reach(mine, theirs),
                "interval": interval([s for s in shares if s is not None]) if None not in shares else None,
                "end by baseline": share_to_reach(theirs, mine),
            }
        table[name] = row
    return {"metric": metric, "flops": flops, "baseline": baseline, "table": table, "runs": runs}

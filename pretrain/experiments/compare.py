"""Compare recipes at equal compute: the same metered FLOPs, the same data, the same seeds, an honest verdict.

Each recipe is run once a seed. What its earlier stages spend (a small model that is then grown, a surgery) counts: the
last training stage gets what is left of the budget, and where it is of `size: auto` it is sized for that budget. The
first recipe is the baseline; the others are judged against it by the paired differences over seeds. Beside the verdict
stands each side's peak rate and who has chosen it: a difference of two recipes may be one of their rates.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import takewhile
from pathlib import Path

from pretrain.core.errors import PretrainError, nearest
from pretrain.core.files import sealed, write_json, write_text
from pretrain.core.quick.quantities import counted, short
from pretrain.experiments.drawing import draw
from pretrain.experiments.rates import UNTUNED, Rate, best_rates, rate_of, with_rate
from pretrain.experiments.trials import Outcome, Trial, run_all
from pretrain.experiments.verdict import interval, judge, share_to_reach, shares_to_reach
from pretrain.forecast import forecast
from pretrain.identity import plan
from pretrain.recipe import Recipe, load
from pretrain.runs.shelf import check_output
from pretrain.stages.train import Train

SURELY = 2.0  # times the budget: estimates of seconds go by a machine that is not busy


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
    rates: int = 1,
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> Outcome:
    """Run each recipe with each seed for `flops`; writes `comparison.svg`, writes and returns `comparison.json`.

    `metric` is one of the held-out metrics that training logs; lower is better. Runs that are finished are not run
    again, so a comparison that was interrupted goes on. `jobs` processes share the work, or a `ray` cluster does. With
    `rates` of 3 or more so many peak rates of each side are tried first, at a third of the budget each.
    `progress` tells on standard error how far each run is, where they run one after another.
    """
    from pretrain.core.hardware import describe

    check_output(Path(output))
    paths = _named(recipes, seeds)
    names = list(paths)
    loaded = {name: _loaded(path, 0, flops, overrides) for name, path in paths.items()}
    for name, (recipe, trained) in loaded.items():
        _check_metric(name, recipe, trained, metric)
        _check_left(name, replace(recipe, output=Path(output) / "seed-0" / name), trained, flops)
    for line in _unlike(loaded, metric):
        say(f"warning: {line}")
    usual = {name: rate_of(*each) for name, each in loaded.items()}

    def trial(name: str, seed: int) -> Trial:
        made = _trial(name, paths[name], seed, flops, metric, Path(output).resolve(), overrides)
        return replace(made, progress=progress and jobs == 1)

    chosen = dict(usual)
    searched = {name: rate.lr for name, rate in usual.items() if rate.lr}
    if rates != 1:
        chosen |= best_rates(searched, trial, rates=rates, jobs=jobs, ray=ray, say=say)
    queue = [(name, seed) for seed in range(seeds) for name in names]
    say(f"{counted(len(queue), 'run')} of {short(flops)} FLOPs each: {', '.join(names)}, {seeds} seeds")
    trials = [_at(trial(name, seed), chosen[name].lr, usual[name].lr) for name, seed in queue]
    outcomes = run_all(trials, jobs=jobs, ray=ray, say=say)
    runs: dict[str, list[Outcome]] = {name: [] for name in names}
    for (name, seed), outcome in zip(queue, outcomes, strict=True):
        if outcome["final"] is None:
            raise PretrainError(f"compare: {name}, seed {seed}: {outcome['diverged']}")
        outcome.pop("wall")  # of this call alone
        runs[name].append({"seed": seed} | outcome)
    comparison = summarise(runs, flops, metric) | {"environment": describe()}
    for name, rate in chosen.items():
        comparison["table"][name]["rate"] = asdict(rate) | {"words": str(rate)}
    comparison["notes"] = _notes(chosen)
    write_json(Path(output) / "comparison.json", sealed(comparison))
    curves = {name: [run["curve"] for run in of] for name, of in comparison["runs"].items()}
    write_text(Path(output) / "comparison.svg", draw(curves, metric))
    return comparison


def _named(recipes: Sequence[Path | str], seeds: int) -> dict[str, Path | str]:
    """The recipes by their names, if they and the seeds are enough to compare."""
    if len(recipes) < 2:
        raise PretrainError(f"compare: {len(recipes)} recipe given; accepted: a baseline and at least one other")
    if seeds < 2:
        raise PretrainError(f"compare: seeds {seeds}: accepted: 2 or more, since one tells nothing of chance")
    names = [Path(path).stem for path in recipes]
    if len(set(names)) < len(names):
        raise PretrainError(
            f"compare: recipes of the same name: {', '.join(names)}; accepted: a name of its own for each"
        )
    return dict(zip(names, recipes, strict=True))


def _unlike(loaded: Mapping[str, tuple[Recipe, str]], metric: str) -> Iterator[str]:
    """What makes two sides differ besides what their recipes do with a text: another text, other tokens."""
    read = {
        name: next(item.reads["inputs"] for item in plan(recipe) if item.stage.name == trained)
        for name, (recipe, trained) in loaded.items()
    }
    first, *others = read
    for name in others:
        corpora, tokenizers = ([read[each].get(kind) for each in (first, name)] for kind in ("corpus", "tokenizer"))
        if corpora[0] != corpora[1]:
            yield f"{name} is trained and measured on other text than {first}: their {metric} does not compare"
        elif tokenizers[0] != tokenizers[1] and metric in ("loss", "perplexity"):
            yield f"{name} has other tokens than {first}: a {metric} does not compare, but bits_per_byte does"


def _notes(rates: Mapping[str, Rate]) -> list[str]:
    """What a reader of the verdict has to know of the rates."""
    untuned = [name for name, rate in rates.items() if rate.chosen_by == UNTUNED]
    edges = [name for name, rate in rates.items() if rate.edge]
    notes = []
    if untuned:
        notes.append(
            f"warning: the rate of {', '.join(untuned)} is the method's default, which nobody has tuned here, so the "
            "verdict may be one of rates; --rates 3 tries three for each side"
        )
    if edges:
        notes.append(f"warning: the best rate of {', '.join(edges)} is the last that was tried; more may be better")
    return notes


def _at(trial: Trial, lr: float | None, usual: float | None) -> Trial:
    """A trial at another rate than its recipe's, if there is another."""
    return trial if lr is None or usual is None or lr == usual else with_rate(trial, lr, usual)


def _loaded(path: Path | str, seed: int, flops: float, overrides: Sequence[str]) -> tuple[Recipe, str]:
    """A recipe, sized for the budget, and its last training."""
    overrides = [*overrides, f"seed={seed}"]
    recipe = load(path, overrides)
    trainings = [stage.name for stage in recipe.stages if stage.stage == "train"]
    if not trainings:
        raise PretrainError(f"{path}: no train stage; accepted: a recipe that trains")
    if any(each.stage == trainings[-1] for each in recipe.sizes):
        recipe = load(path, [*overrides, f"{trainings[-1]}.budget.flops={flops:g}"])
    return recipe, trainings[-1]


def _check_metric(name: str, recipe: Recipe, trained: str, metric: str) -> None:
    """Refuse a metric that the training of a language model does not log; what others log is known once they run."""
    stage = next(stage for stage in recipe.stages if stage.name == trained)
    objective = stage.weighted()[0].method if isinstance(stage, Train) else None
    known = ("loss", "perplexity", "bits_per_byte")
    fixed = objective is not None and objective.task == "causal" and objective.reads != "examples"
    if objective is None or not fixed or objective.own_evaluation:
        return
    what, _, domain = metric.partition("/")
    if what not in known or (domain and what == "perplexity"):
        accepted = f"{', '.join(known)}, or loss/DOMAIN and bits_per_byte/DOMAIN"
        raise PretrainError(
            f"--metric {metric!r}: {name} logs no such one{nearest(metric, known)}; accepted: {accepted}"
        )


def _check_left(name: str, recipe: Recipe, trained: str, flops: float) -> None:
    """Refuse a budget of which the stages before the last training leave nothing, by far, before any is run."""
    before = takewhile(lambda each: each.item.stage.name != trained, forecast(plan(recipe)))
    spent = sum(each.estimate.flops or 0.0 for each in before)
    if spent > SURELY * flops:
        raise PretrainError(
            f"{name}: the stages before {trained!r} spend all {short(flops)} FLOPs, and about {short(spent)} in all; "
            "accepted: a larger budget, or smaller ones of these stages"
        )


def _trial(
    name: str, path: Path | str, seed: int, flops: float, metric: str, output: Path, overrides: Sequence[str]
) -> Trial:
    """The recipe up to its last training."""
    recipe, trained = _loaded(path, seed, flops, overrides)
    last = next(number for number, stage in enumerate(recipe.stages) if stage.name == trained)
    raw = recipe.raw | {"name": name, "stages": recipe.raw["stages"][: last + 1]}
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

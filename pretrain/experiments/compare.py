"""Compare recipes at equal compute: the same metered FLOPs, the same data, the same seeds, an honest verdict.

Each recipe is run once a seed. What its earlier stages spend (a small model that is then grown, a surgery) counts: the
last training stage gets what is left of the budget, and where it is of `size: auto` it is sized for that budget. The
first recipe is the baseline; the others are judged against it by the paired differences over seeds. Beside the verdict
stands each side's peak rate and who has chosen it: a difference of two recipes may be one of their rates.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.files import read_json, sealed, write_json, write_text
from pretrain.core.models.metrics import Direction, better
from pretrain.core.quick.quantities import counted, figure, short
from pretrain.experiments.drawing import draw
from pretrain.experiments.held_out import measured_on, same_tokens, training_of
from pretrain.experiments.rates import UNTUNED, Rate, best_rates, rate_of, with_rate
from pretrain.experiments.trials import Outcome, Trial, run_all
from pretrain.experiments.verdict import (
    UNDECIDED,
    interval,
    judge,
    seeds_to_decide,
    share_to_reach,
    shares_to_reach,
    smoothed,
)
from pretrain.forecast import forecast
from pretrain.identity import plan
from pretrain.recipe import Recipe, load
from pretrain.records import Marks, Metrics
from pretrain.runs.shelf import check_output
from pretrain.stages.train import Train
from pretrain.training.compatible import metric_fault

FEW_STEPS = 1  # of the last training, below which a budget compares nothing
ENOUGH_STEPS = 100  # that a larger budget is said to leave room for
METRICS = {
    "classification": "accuracy",
    "prompt_classification": "accuracy",
    "tagging": "accuracy",
    "regression": "mse",
}  # by which what learns labels is judged


def compare(
    recipes: Sequence[Path | str],
    *,
    flops: float,
    seeds: int = 3,
    metric: str | None = None,
    output: Path | str = Path("runs") / "compare",
    overrides: Sequence[str] = (),
    jobs: int = 1,
    ray: str | None = None,
    rates: int = 1,
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> Outcome:
    """Run each recipe with each seed for `flops`; writes `comparison.svg`, writes and returns `comparison.json`.

    `metric` is one of the held-out metrics that training logs: by default the accuracy of classifiers and taggers, the
    squared error of regressions, the loss of all else (in bits per byte where tokens differ). Runs that are finished
    are not run again, so a comparison that was interrupted goes on. `jobs` processes share the work, or a `ray` cluster
    does. With `rates` of 3 or more so many peak rates of each side are tried first, at a third of the budget each.
    `progress` tells on standard error how far each run is, where they run one after another.
    """
    check_output(Path(output))
    paths = _named(recipes, seeds)
    names = list(paths)
    _check_asked({name: _loaded(path, 0, flops, overrides) for name, path in paths.items()}, Path(output), flops)
    from pretrain.core.hardware import describe  # imports torch: what is wrong with the recipes has been said by now

    loaded = {name: _loaded(path, 0, flops, overrides) for name, path in paths.items()}
    held_out = same_tokens(loaded, flops)
    loaded = {name: (measured_on(side[0], side[1], held_out.get(name)), side[1]) for name, side in loaded.items()}
    metric = metric or _usual_metric(loaded)
    for name, (recipe, trained) in loaded.items():
        _check_metric(name, recipe, trained, metric)
    for line in _unlike(loaded, metric):
        say(f"warning: {line}")
    usual = {name: rate_of(*each) for name, each in loaded.items()}

    def trial(name: str, seed: int) -> Trial:
        made = _trial(name, paths[name], seed, flops, metric, Path(output).resolve(), overrides, held_out.get(name))
        return replace(made, progress=progress and jobs == 1)

    chosen = dict(usual)
    searched = {name: rate.lr for name, rate in usual.items() if rate.lr}
    if rates != 1:
        chosen |= best_rates(searched, trial, rates=rates, jobs=jobs, ray=ray, say=say, better=_direction(metric))
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
    beneath = _beneath(loaded, runs, Path(output), metric)
    comparison["notes"] = [*_notes(chosen), *beneath, *_undecided(comparison["table"], runs)]
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


def _check_asked(sides: Mapping[str, tuple[Recipe, str]], output: Path, flops: float) -> None:
    """Refuse what the recipes and the budget say already."""
    _check_unequal({name: recipe for name, (recipe, _) in sides.items()})
    _check_left(_placed(sides, output), flops)


def _check_unequal(recipes: Mapping[str, Recipe]) -> None:
    """Refuse recipes that say the same, whatever their names: their runs would be the same runs."""
    settings = {
        name: {field: value for field, value in recipe.raw.items() if field not in ("name", "output")}
        for name, recipe in recipes.items()
    }
    names = list(settings)
    for number, name in enumerate(names):
        if twin := next((other for other in names[:number] if settings[other] == settings[name]), None):
            raise PretrainError(
                f"compare: {twin} and {name} say the same: every stage has the same settings, so there is nothing to "
                "compare; accepted: recipes that differ in more than their names"
            )


def _usual_metric(loaded: Mapping[str, tuple[Recipe, str]]) -> str:
    """What recipes are judged by; not by a loss a token where their tokens differ."""
    metric = _metric_of([training_of(*each) for each in loaded.values()])
    return "bits_per_byte" if metric == "loss" and _of_other_tokens(loaded) else metric


def _of_other_tokens(loaded: Mapping[str, tuple[Recipe, str]]) -> bool:
    """Whether sides that all learn text have other tokens than the first: then losses a token do not compare."""
    if not all(_learns_text(training_of(*each)) for each in loaded.values()):
        return False
    first, *others = (read.get("tokenizer") for read in _inputs(loaded).values())
    return any(other != first for other in others)


def _learns_text(training: Train) -> bool:
    """Whether what it logs of held-out text is its likelihood."""
    objective = training.weighted()[0].method
    return objective.task == "causal" and objective.reads != "examples" and not objective.own_evaluation


def _inputs(loaded: Mapping[str, tuple[Recipe, str]]) -> dict[str, Marks]:
    """The addresses of what each side's last training reads, by field."""
    return {
        name: next(item.reads["inputs"] for item in plan(recipe) if item.stage.name == trained)
        for name, (recipe, trained) in loaded.items()
    }


def _unlike(loaded: Mapping[str, tuple[Recipe, str]], metric: str) -> Iterator[str]:
    """What makes two sides differ besides what their recipes do with a text: another text, other tokens."""
    read = _inputs(loaded)
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
    """Refuse a metric that the training does not log, as far as it is known before it runs which it does."""
    objective = training_of(recipe, trained).weighted()[0].method
    if fault := metric_fault(objective, metric):
        raise PretrainError(f"--metric {metric!r}: {name} logs no such one{fault}")


def _metric_of(stages: Sequence[Train]) -> str:
    """What trainings are judged by: the metric of their labels where all have the same, else the loss."""
    objectives = [stage.weighted()[0].method for stage in stages]
    names = [getattr(each, "wrapped", each).name for each in objectives]
    metrics = {METRICS.get(name, "loss") for name in names}
    return metrics.pop() if len(metrics) == 1 else "loss"


def _direction(metric: str) -> Direction:
    """Which way a metric is better; of one that is not known it is lower."""
    try:
        return better(metric)
    except PretrainError:
        return "lower"


def _placed(sides: Mapping[str, tuple[Recipe, str]], output: Path) -> dict[str, tuple[Recipe, str]]:
    """The sides where their first runs lie."""
    return {name: (replace(r, output=output / "seed-0" / name), trained) for name, (r, trained) in sides.items()}


def _check_left(sides: Mapping[str, tuple[Recipe, str]], flops: float) -> None:
    """Refuse, before any is run, a budget that leaves the last training of a side no steps; says which would do."""
    short_of: list[tuple[float, str]] = []
    for name, (recipe, trained) in sides.items():
        made = forecast(plan(recipe))
        place = [each.item.stage.name for each in made].index(trained)
        spent = sum(each.estimate.flops or 0.0 for each in made[:place])
        expected = made[place].estimate.plan
        step = expected.flops / expected.steps if expected and expected.steps else 0.0
        least = max(2 * spent, spent + ENOUGH_STEPS * step)
        if spent >= flops:
            why = f"the stages before {trained!r} spend all {short(flops)} FLOPs, and about {short(spent)} in all"
            short_of.append((least, f"{name}: {why}"))
        elif flops - spent < FEW_STEPS * step:
            why = f"a step of {trained!r} takes about {short(step)} FLOPs, and the budget has {short(flops - spent)}"
            short_of.append((least, f"{name}: {why}"))
    if short_of:
        least = max(least for least, _ in short_of)
        raise PretrainError(
            f"{short_of[0][1]}; accepted: --budget flops={rounded_up(least):.2g} or more, or less in the stages before"
        )


def rounded_up(value: float) -> float:
    """A number with two digits, none smaller."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1) if value > 0 else 1.0
    return math.ceil(value / unit) * unit


def _undecided(table: Mapping[str, Outcome], runs: Mapping[str, Sequence[Outcome]]) -> Iterator[str]:
    """Of each verdict that is open how many seeds would decide it, were the difference to stay what it is."""
    baseline, *others = runs
    for name in others:
        if table[name]["verdict"]["word"] != UNDECIDED:
            continue
        differences = [a["final"] - b["final"] for a, b in zip(runs[name], runs[baseline], strict=True)]
        count, needed = len(differences), seeds_to_decide(differences)
        if needed is None:
            of = figure(abs(statistics.mean(differences)), 2)
            yield (
                f"{name}: undecided, and more seeds will hardly decide it: a difference of {of} is "
                "small beside its chance. A larger --budget may; or take the two as equal"
            )
        else:
            wanted = max(needed, count + 1)
            yield (
                f"{name}: undecided after {count} seeds: about {wanted} would decide it, should the difference stay "
                f"what it is: --seeds {wanted} (what is finished is not run again), or a larger --budget"
            )


def _beneath(
    loaded: Mapping[str, tuple[Recipe, str]], runs: Mapping[str, Sequence[Outcome]], output: Path, metric: str
) -> Iterator[str]:
    """That no side is better than what learns next to nothing: the commonest class, or pairs of tokens."""
    lines, means, way = {}, {}, _direction(metric)
    for name, side in loaded.items():
        if (line := _line(training_of(*side), output / "seed-0" / name, output / "stages", metric)) is not None:
            lines[name], means[name] = line, statistics.mean(run["final"] for run in runs[name])
    bad = [name for name, line in lines.items() if (means[name] >= line if way == "lower" else means[name] <= line)]
    if len(bad) == len(loaded):  # of a single one the verdict says enough
        what = "always answering the commonest class" if metric == "accuracy" else "counting which token follows which"
        each = ", ".join(f"{name} {means[name]:.4g} where that gives {lines[name]:.4g}" for name in bad)
        yield (
            f"warning: none of the recipes is better than {what} ({each}): the verdict is one of models that have "
            "learnt little; a larger --budget may change it"
        )


def _line(training: Train, folder: Path, store: Path, metric: str) -> float | None:
    """What a held-out metric of a training is where next to nothing is learnt; None where that is not known."""
    from pretrain.report.regime import training_line

    try:  # what the runs have left may lie on another machine
        if metric == "accuracy":
            measured: Metrics = read_json(folder / training.name / "stage.json")["metrics"]
            return measured.get("majority")
        text = metric.partition("/")[0] in ("loss", "bits_per_byte") and _learns_text(training)
        return training_line(training, folder, store).get(metric) if text else None
    except (PretrainError, OSError, KeyError, ValueError):
        return None


COLUMNS = (
    "mean ± s.d.: over the seeds; difference: to the first recipe, paired by seed, and where it lies in 97 of 100 "
    "cases; verdict: better or worse where that leaves zero out; FLOPs to the baseline's end: the share of the budget "
    "at which a recipe, its curve smoothed to one that never gets worse, is where the first one ends, and its interval "
    "over the seeds; peak rate: the learning rate, and who chose it. All seeds are measured on the same held-out "
    "documents: the intervals are of training alone, not of which documents were held out"
)


def _trial(
    name: str, path: Path | str, seed: int, flops: float, metric: str, output: Path, overrides: Sequence[str],
    held_out: int | None = None,
) -> Trial:  # fmt: skip
    """The recipe up to its last training, which is measured on so many held-out tokens each time."""
    recipe, trained = _loaded(path, seed, flops, overrides)
    recipe = measured_on(recipe, trained, held_out)
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
    baseline, way = next(iter(runs)), _direction(metric)
    table = {}
    for name, recipe_runs in runs.items():
        finals = [run["final"] for run in recipe_runs]
        row: Outcome = {"mean": statistics.mean(finals), "deviation": statistics.stdev(finals)}
        if name != baseline:
            row["verdict"] = asdict(
                judge([a["final"] - b["final"] for a, b in zip(recipe_runs, runs[baseline], strict=True)], way)
            )
            sides = (recipe_runs, runs[baseline])
            mine, theirs = ([smoothed(run["curve"], way) for run in side] for side in sides)
            shares = shares_to_reach(mine, theirs, way)
            row["compute_to_reach"] = {
                "baseline's end": share_to_reach(mine, theirs, way),
                "interval": interval([s for s in shares if s is not None]) if None not in shares else None,
                "end by baseline": share_to_reach(theirs, mine, way),
            }
        table[name] = row
    return {"metric": metric, "better": way, "flops": flops, "baseline": baseline, "table": table, "runs": runs}


def to_reach(row: Outcome) -> str:
    """A cell of the share of the budget that a recipe needs to be where the baseline ends: nothing where it is not."""
    reached = row.get("compute_to_reach") or {}
    share, ends = reached.get("baseline's end"), reached.get("interval")
    if share is None:
        return ""
    if ends is None or ends[1] >= 1:
        return "within the noise"
    return f"{share:.0%} ({max(0.0, ends[0]):.0%} to {ends[1]:.0%})"

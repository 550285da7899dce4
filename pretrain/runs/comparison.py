"""What `pretrain runs compare` prints: runs side by side, first what came of them, then what they took, then why.

Held-out results stand first, each with its difference to the first run's; a run that has not come to its own evaluation
is said to be so, and what its training has last measured stands for it. Folders that `pretrain compare` wrote are set
side by side by their recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.files import JSONObject, digest, read_json, read_object
from pretrain.core.folders import checkpoint_of, place_of, run_of
from pretrain.core.quick.quantities import counted, duration, figure, short
from pretrain.records import altered
from pretrain.runs.shelf import Run, log_of, open_run, size_of

COMPARISON = "comparison.json"
THEIRS = "other documents: the difference is theirs too"
PER_TOKEN = ("loss", "perplexity")  # of text: means over tokens
OTHER_TOKENS = "other tokens: only bits per byte compare"
RECIPES = (".yaml", ".yml")
CELL, BEFORE = 80, 12  # characters of a value that differs, and of what is shown before its first difference
Rows = list[tuple[str, ...]]


def tables(places: Sequence[Path]) -> list[Rows]:
    """The tables for runs, for recipes that have been run, or for folders of comparisons."""
    experiments = [place for place in places if (place / COMPARISON).exists()]
    if len(experiments) == len(places):
        return [_experiments(experiments)]
    if experiments:
        raise PretrainError(f"{experiments[0]} is a comparison of recipes; accepted: runs alone, or comparisons alone")
    homes = [_run_at(place) for place in places]
    for number, home in enumerate(homes):
        if home in homes[:number] and (other := places[homes.index(home)]) != places[number]:
            raise PretrainError(f"{other} and {places[number]} are of the same run; accepted: runs, not their stages")
    runs = [open_run(home) for home in homes]
    head = ("", *(str(run.folder) for run in runs), *(["difference"] if len(runs) == 2 else []))
    return [[head, *_results(runs), *_spent(runs)], _differing(runs)]


def _run_at(place: Path) -> Path:
    """A run: what was printed of it, or the recipe that it is of."""
    if place.suffix not in RECIPES or not place.is_file():
        return run_of(place)
    from pretrain.recipe import load

    output = load(place).output
    if not (output / "run.json").exists():
        raise PretrainError(f"{place} has not been run in {output}; accepted: a recipe that has, or a run")
    return output


def _results(runs: Sequence[Run]) -> Rows:
    """A row for the runs' states and one for each thing measured, held-out evaluations first."""
    rows: Rows = [("status", *(_status(run) for run in runs))]
    measured, intervals = [_measured(run) for run in runs], [_intervals(run) for run in runs]
    names = dict.fromkeys(name for metrics in measured for name in metrics)
    for name in sorted(names, key=lambda name: not any(_judged(run, name) for run in runs)):
        values = [metrics.get(name) for metrics in measured]
        other = _other_tokens(runs, name)
        rows.append((name, *(_apart_by_tokens(values, other) if any(other) else _with_differences(values, _exact))))
        ends = [each.get(name, ()) for each in intervals]
        if any(ends):
            rows.append(("  95% interval", *(" to ".join(figure(end, 4) for end in pair) for pair in ends)))
    return rows + _measured_on(runs)


def _other_tokens(runs: Sequence[Run], name: str) -> list[bool]:
    """Of each run whether its metric is a mean over tokens of another tokenizer than the first run's: no difference."""
    stage, _, metric = name.partition(": ")
    kind, _, domain = metric.partition("/")
    bits = f"bits_per_byte/{domain}" if domain else "bits_per_byte"
    if kind not in PER_TOKEN or not all(bits in _measured_by(run, stage) for run in runs if stage in run.stages):
        return [False] * len(runs)
    first, *others = [_tokens_of(run, stage) for run in runs]
    return [False, *(first is not None and each is not None and each != first for each in others)]


def _apart_by_tokens(values: Sequence[float | None], other: Sequence[bool]) -> list[str]:
    """Cells of a row of which some do not compare with the first."""
    cells = _with_differences(values, _exact)
    plain = ["" if value is None else _exact(value) for value in values]
    if len(values) == 2:
        return [*plain, OTHER_TOKENS if None not in values else ""]
    return [
        f"{p} ({OTHER_TOKENS})" if apart and p else cell for p, cell, apart in zip(plain, cells, other, strict=True)
    ]


def _tokens_of(run: Run, name: str) -> str | None:
    """The digest of the tokenizer that a stage's tokens are of; None where it is not there."""
    record, folder = run.records.get(name), run.stages.get(name)
    judged = record["inputs"].get("checkpoint") if record else None
    if record is not None and record["stage"] == "evaluate" and isinstance(judged, str):
        folder = run.stages.get(judged, Path(judged))
    try:
        if folder is None:
            return None
        facts = read_object(checkpoint_of(place_of(folder)) / "tokenizer.json")
        return digest([facts.get(part) for part in ("model", "normalizer", "pre_tokenizer")])  # how text is cut
    except (OSError, PretrainError):
        return None


def _measured_on(runs: Sequence[Run]) -> Rows:
    """A row for each evaluation that was of other documents in the one run than in the other."""
    rows: Rows = []
    for name in dict.fromkeys(name for run in runs for name in run.records):
        texts = [frozenset(_digests(_left(run, name, "documents.json"))) for run in runs]
        first = next(filter(None, texts), frozenset())
        if any(text and text != first for text in texts):
            cells = [counted(len(text), "document") if text else "" for text in texts]
            rows.append((f"{name}: measured on", *cells, THEIRS))
        held_out = [_held_out(run, name) for run in runs]
        seen = next(filter(None, held_out), None)
        if any(each and each != seen for each in held_out):
            rows.append((f"{name}: measured on", *(each[0] if each else "" for each in held_out), THEIRS))
    return rows


def _left(run: Run, name: str, file: str) -> JSONObject:
    """What a file of a finished stage holds; nothing where it is not there, or not as the stage has left it."""
    record, path = run.records.get(name), run.stages.get(name, Path()) / file
    return read_object(path) if record and path.is_file() and file not in altered(path.parent, record) else {}


def _held_out(run: Run, name: str) -> tuple[str, ...] | None:
    """What a training is measured on while it runs: in words, then all that it follows from; None of another stage."""
    record = run.records.get(name)
    if record is None or record["stage"] != "train":
        return None
    tokens, corpus = record["config"].get("evaluate_tokens"), str((record.get("inputs") or {}).get("corpus") or "")
    made = run.records.get(corpus)
    of = str(made["address"] if made else corpus), str(record["config"].get("length"))
    if isinstance(tokens, int):
        return f"{tokens:,} validation tokens", *of
    return "as many validation tokens as fit", *of, str(record["config"].get("budget"))


def _digests(evaluations: JSONObject) -> Iterator[str]:
    """The documents that were measured."""
    for documents in evaluations.values():
        yield from (str(row["digest"]) for row in documents if isinstance(row, dict) and "digest" in row)


def _intervals(run: Run) -> dict[str, Sequence[float]]:
    """Where other documents would put what evaluations have measured, by stage and metric."""
    ends: dict[str, Sequence[float]] = {}
    for name in run.records:
        evaluation = _left(run, name, "evaluation.json")
        ends |= {f"{name}: {metric}": pair for metric, pair in (evaluation.get("intervals") or {}).items()}
        for domain, metrics in (evaluation.get("domain_intervals") or {}).items():
            ends |= {f"{name}: {metric}/{domain}": pair for metric, pair in metrics.items()}
    return ends


def _judged(run: Run, name: str) -> bool:
    record = run.records.get(name.partition(": ")[0])
    return record is not None and record["stage"] == "evaluate"


def _status(run: Run) -> str:
    """Whether it is whole; of one that is not, how far it has come."""
    missing = [name for name in run.stages if name not in run.records]
    if not missing:
        return run.status
    judges = [name for name in missing if run.stages[name].name.startswith("evaluate")]
    words = f"{run.status}: {', '.join(missing)} to run"
    return f"{words}; did not finish its own evaluation yet" if judges else words


def _measured(run: Run) -> dict[str, float]:
    """All metrics by stage; of a training that is not finished the last that its log has."""
    values = {
        f"{name}: {metric}": value
        for name, record in run.records.items()
        for metric, value in record["metrics"].items()
        if metric not in ("flops", "seconds") and isinstance(value, int | float)
    }
    for name in run.stages:
        if name not in run.records:
            values |= {f"{name}: {metric}": value for metric, value in _measured_by(run, name).items()}
    return values


def _measured_by(run: Run, name: str) -> dict[str, float]:
    """The metrics of a stage, or the last ones of its log."""
    if name in run.records:
        return run.records[name]["metrics"]
    return _last_measured(run.stages[name]) if name in run.stages else {}


def _last_measured(folder: Path) -> dict[str, float]:
    rows = [row for row in log_of(folder) if row.get("event") == "evaluation"]
    metrics = rows[-1].get("metrics") if rows else None
    return metrics if isinstance(metrics, dict) else {}


def _spent(runs: Sequence[Run]) -> Rows:
    """FLOPs, time and size, of what is under way what it has counted."""
    sizes = [float(size_of(run.folder, *run.stages.values())) for run in runs]
    times = [run.total("seconds") for run in runs]
    return [
        ("FLOPs", *_with_differences([run.total("flops") for run in runs], _flops)),
        ("time", *map(duration, times), *_relative(times)),
        ("size", *(short(size, "B") for size in sizes), *_relative(sizes)),
    ]


def _exact(value: float, sign: str = "") -> str:
    return figure(value, 6, sign)


def _flops(value: float, sign: str = "") -> str:
    return short(value, digits=4, sign=sign)


def _with_differences(values: Sequence[float | None], write: Callable[..., str]) -> list[str]:
    """Cells of a row: of two runs a third one with the difference, of more each with its own to the first."""
    cells = ["" if value is None else write(value) for value in values]
    if len(values) == 2:
        return [*cells, *_relative(values, write)]
    others = [_change(values[0], value, write) for value in values[1:]]
    return [cells[0], *(f"{cell} ({other})" if other else cell for cell, other in zip(cells[1:], others, strict=True))]


def _relative(values: Sequence[float | None], write: Callable[..., str] | None = None) -> list[str]:
    return [_change(values[0], values[1], write)] if len(values) == 2 else []


def _change(first: float | None, other: float | None, write: Callable[..., str] | None) -> str:
    if first is None or other is None:
        return ""
    if first == other:
        return "the same"
    share = f"{other / first - 1:+.1%}" if first else ""
    return share if write is None else f"{write(other - first, sign='+')}, {share}".removesuffix(", ")


def _differing(runs: Sequence[Run]) -> Rows:
    """What the recipes say differently, a field a row."""
    from pretrain.identity import flat
    from pretrain.recipe import read

    recipes = [flat(_by_name(read(run.folder / "recipe.yaml")[0])) for run in runs]
    rows: Rows = []
    for field in dict.fromkeys(name for recipe in recipes for name in recipe):
        values = [recipe.get(field) for recipe in recipes]
        if any(value != values[0] for value in values):
            rows.append((field, *_apart(["" if value is None else str(value) for value in values])))
    if not rows:
        return [("the recipes say the same",)]
    return [("the recipes differ in", *("" for _ in runs)), *rows]


def _apart(texts: Sequence[str]) -> list[str]:
    """Texts that differ, cut to what tells them apart: long ones from a little before their first difference on."""
    if max(map(len, texts)) <= CELL:
        return [*texts]
    same = next((n for n, letters in enumerate(zip(*texts, strict=False)) if len({*letters}) > 1), min(map(len, texts)))
    start = max(0, same - BEFORE) if same > CELL // 2 else 0
    whole = [f"…{text[start + 1 :]}" if start and text else text for text in texts]
    return [text if len(text) <= CELL else f"{text[: CELL - 1]}…" for text in whole]


def _by_name(recipe: JSONObject) -> JSONObject:
    """A recipe with its stages by their names, so that another stage before them moves none."""
    stages = {str(row.get("name", row["stage"])): row for row in recipe.pop("stages")}
    return recipe | {name: {k: v for k, v in row.items() if k != "name"} for name, row in stages.items()}


def _experiments(places: Sequence[Path]) -> Rows:
    """A row for each recipe of the comparisons, with what was measured of it at how many FLOPs."""
    rows: Rows = [("comparison", "recipe", "metric", "mean ± s.d.", "seeds", "FLOPs", "verdict", "peak rate")]
    for place in places:
        comparison = read_json(place / COMPARISON)
        for name, row in comparison["table"].items():
            verdict = row.get("verdict")
            word = f"{verdict['word']} ({verdict['difference']:+.4f})" if verdict else "baseline"
            measured = f"{row['mean']:.4f} ± {row['deviation']:.4f}"
            seeds, flops = str(len(comparison["runs"][name])), short(comparison["flops"])
            rate = row.get("rate", {}).get("words", "")
            rows.append((str(place), name, comparison["metric"], measured, seeds, flops, word, rate))
    return rows

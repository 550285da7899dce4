"""What a report is made of: the files of a run's stages, read, and put together as the page shows them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypeAlias, TypedDict, TypeVar, cast

from pretrain.core.errors import PretrainError
from pretrain.core.files import JSONObject, damage, read_json, read_json_lines, read_object
from pretrain.core.foreign import yaml
from pretrain.core.foreign.weights import header
from pretrain.records import (
    Config,
    CorpusInfo,
    Evaluation,
    Made,
    Marks,
    Metrics,
    Run,
    RunStage,
    altered,
    statuses,
)
from pretrain.report.held_out import Chart, Evaluated, bars
from pretrain.report.numbers import BITS as BITS

if TYPE_CHECKING:
    from pretrain.core.samples import Sample

MAX_POINTS = 1500
RECORDED = ("seconds", "flops", "peak_memory_bytes", "metrics", "environment", "methods", "inputs", "config", "planned")
AXES = ("tokens", "flops", "seconds", "steps")
TIMES = ("elapsed", "preparing", "measuring")  # all seconds; of the steps those that made shapes; held-out measurements
# Objectives that learn what documents are labelled with: what is advised of them is not what is of a language model.
LABELLED = ("classification", "prompt_classification", "regression", "tagging", "seq2seq", "smart")
T = TypeVar("T")
Part: TypeAlias = Literal["step", "evaluation"]  # of a training's log
Columns: TypeAlias = dict[str, list[float | None]]


class StageRow(RunStage):
    """A stage of `run.json`, with what its record has; None where it has not finished."""

    seconds: float | None
    flops: float | None
    peak_memory_bytes: int | None
    metrics: Metrics | None
    environment: dict[str, object] | None
    methods: dict[str, int | str] | None
    inputs: Marks | None
    lineage: JSONObject | None
    config: Config  # as the recipe has it, where the stage has not finished
    writes: str
    family: str  # of the checkpoint it wrote
    weights: int  # how many numbers that holds
    bytes: int
    planned: NotRequired[Made | None]  # of a training: what its budget was to make


class Trained(TypedDict):
    """A training: what it counts, the names of its objectives, and its log."""

    name: str
    unit: str  # what its tokens are
    objective: list[str]
    step: Columns
    evaluation: Columns
    kept: NotRequired[int]  # the place among the evaluations of the weights that were kept, where they are not the last


class Samples(TypedDict):
    """What a stage has left to look at."""

    name: str
    samples: NotRequired[list[Sample]]


class CorpusRow(CorpusInfo):
    """The corpus that a stage has made."""

    name: str


class Curve(TypedDict):
    """A column of a training, as a plot draws it."""

    training: int
    part: Part
    column: str


class Plot(TypedDict):
    """Curves of one unit."""

    unit: str
    curves: list[Curve]


class Page(TypedDict):
    """All that the page shows."""

    run: Run
    stages: list[StageRow]
    trainings: list[Trained]
    evaluations: list[Evaluated]
    samples: list[Samples]
    corpora: list[CorpusRow]
    plots: list[Plot]
    bars: list[Chart]
    recipe: str
    environment: dict[str, object] | None
    folder: NotRequired[str]
    expected: NotRequired[JSONObject]  # by training what the dial expected of it


def collect(folder: Path) -> Page:
    """All that the page shows; stages that left nothing are passed over.

    The bigram line is left to the caller, since it may have to count a corpus.
    """
    run: Run = read_json(folder / "run.json")
    recipe = folder / "recipe.yaml"
    text = yaml.read_text(recipe) if recipe.exists() else ""
    stages: list[StageRow] = []
    trainings: list[Trained] = []
    evaluations: list[Evaluated] = []
    samples: list[Samples] = []
    corpora: list[CorpusRow] = []
    states = statuses(folder, run["stages"])
    for entry in run["stages"]:
        home, record = folder / entry["folder"], _object(folder / entry["folder"] / "stage.json")
        lost = altered(home, record)  # of which the run has told
        lineage = _object(home / "checkpoint" / "pretrain.json").get("lineage")
        name = entry["name"]
        row: Any = {
            **entry,
            "status": states[name],
            **{k: record.get(k) for k in RECORDED},
            "lineage": lineage,
            "writes": _writes(home),
        }
        row |= {"config": record.get("config") or _raw(text, name)} | checkpoint_size(home / "checkpoint")
        if (counted := (row["metrics"] or {}).get("parameters")) and row["weights"]:
            row["weights"] = int(counted)  # a file that packs several in a number has fewer
        stages.append(row)
        if (home / "log.jsonl").exists():
            objective, (steps, held_out) = (
                _objective(row["config"]),
                curves(home / "log.jsonl"),
            )
            unit = str((lineage or {}).get("unit", "tokens"))
            kept = _kept(home / "log.jsonl", (row["metrics"] or {}).get("best_step"))
            training: Trained = {
                "name": name, "unit": unit, "objective": objective, "step": steps, "evaluation": held_out,
            }  # fmt: skip
            trainings.append(training if kept is None else {**training, "kept": kept})
        if (measured := _object(home / "evaluation.json")) and "evaluation.json" not in lost:
            evaluations.append(_evaluated(measured, home, row))
        if (shown := _object(home / "samples.json")) and "samples.json" not in lost:
            samples.append({**shown, "name": name})
        corpus = home / "corpus"
        if (info := _object(corpus / "corpus.json")) and not damage(corpus, lambda name: name == "corpus.json"):
            corpora.append({**info, "name": name})
    return {
        "run": run,
        "stages": stages,
        "trainings": trainings,
        "evaluations": evaluations,
        "samples": samples,
        "corpora": corpora,
        "plots": plots(trainings),
        "bars": bars(evaluations),
        "recipe": text,
        "environment": next((s["environment"] for s in reversed(stages) if s.get("environment")), {}),
        "folder": str(folder),
        "expected": _object(folder / "plan.json").get("expected") or {},
    }


def _evaluated(measured: Evaluation, home: Path, row: StageRow) -> Evaluated:
    """What a stage has measured, with which model and which text that was of."""
    read = {name: (row["inputs"] or {}).get(name) or row["config"].get(name) or "" for name in ("checkpoint", "corpus")}
    return {
        **measured, "sizes": measured.get("sizes") or _sizes_of(home), "name": row["name"],
        "of": str(read["checkpoint"]), "corpus": str(read["corpus"]),
        "split": str(row["config"].get("split") or "test"),
    }  # fmt: skip


def _kept(log: Path, step: float | None) -> int | None:
    """Which evaluation of a log is that of the weights which were kept."""
    rows = [row for row in read_json_lines(log) if row.get("event") == "evaluation"] if step is not None else []
    return next((place for place, row in enumerate(rows) if row.get("step") == step), None)


def end_of(page: Page, training: Trained, column: str) -> float | None:
    """What the weights that a training has left reach: what its stage records, else the end of its curve."""
    row = next((s for s in page["stages"] if s["name"] == training["name"]), None)
    recorded = ((row.get("metrics") if row else None) or {}).get(column)
    values = [v for v in training["evaluation"][column] if v is not None and math.isfinite(v)]
    if not values:
        return None
    return recorded if isinstance(recorded, int | float) and math.isfinite(recorded) else values[-1]


def unit_of_loss(training: Trained, objective: str | None = None) -> str:
    """`loss of classification (nats)`: losses of different objectives never stand beside one another."""
    objective = objective or training["objective"][0]
    nats = training.get("unit", "tokens") == "tokens" and objective not in ("regression", "native")
    return f"loss of {objective}{' (nats)' if nats else ''}"


def with_bigrams(page: Page, folder: Path) -> None:
    """Add to each evaluation in bits the line of the counts of adjacent tokens, and the charts anew.

    It is counted from the run's corpora once and then kept beside the stages; of a run that has lost what it needs
    there is none.
    """
    judged = [e for e in page["evaluations"] if e["of"] and BITS in (e.get("metrics") or {})]
    stored = {s["name"]: s["folder"] for s in page["stages"]}
    if not judged:
        return
    from pretrain.recipe import load, whole
    from pretrain.report.regime import lines_of

    try:
        stages = {stage.name: stage for stage in whole(load(folder / "recipe.yaml", [], folder)).stages}
    except PretrainError:
        return
    for evaluation in judged:
        store = (folder / stored[evaluation["name"]]).resolve().parent
        try:
            given = (stages, folder, store, evaluation["of"], f"{evaluation['name']}.{BITS}")
            lines = lines_of(*given, whole=True)
        except (PretrainError, OSError, KeyError, ValueError):
            continue
        evaluation["bigram"], evaluation["bigram_whole"] = [line["bigram"] for line in lines] or (None, None)
        evaluation["bigram_domains"] = [line.get("domains", {}) for line in lines]
    page["bars"] = bars(page["evaluations"])


def checkpoint_size(folder: Path) -> dict[str, object]:
    """`family`, `weights` and `bytes` of a checkpoint, from the headers of its files alone."""
    weights = size = 0
    for path in folder.glob("*.safetensors"):
        try:
            weights += sum(each.count for each in header(path).values())
            size += path.stat().st_size
        except (OSError, PretrainError):
            continue
    family = str(_object(folder / "config.json").get("model_type") or "")
    return {"family": family, "weights": weights, "bytes": size}


def _writes(home: Path) -> str:
    """What a stage has left for others."""
    return next((name for name in ("checkpoint", "corpus", "tokenizer") if (home / name).is_dir()), "")


def _raw(recipe: str, stage: str) -> Config:
    """What the recipe says of a stage that has not finished."""
    try:
        stages: Any = dict(cast("JSONObject", yaml.loads(recipe, "recipe")[0]))["stages"]
        return next((s for s in stages if s.get("name") == stage), {})
    except (PretrainError, KeyError, TypeError, ValueError, AttributeError):
        return {}


def _objective(config: Config) -> list[str]:
    """The names of the objectives that a train stage is configured with."""
    several = config.get("objectives") or [config.get("objective") or "causal_lm"]
    names = [entry.get("method", entry) if isinstance(entry, dict) else entry for entry in several]
    return [str(entry.get("method", entry) if isinstance(entry, dict) else entry) for entry in names]


def curves(path: Path) -> tuple[Columns, Columns]:
    """A training log as columns, of its steps and of its evaluations; lines that are not whole are passed over."""
    rows: dict[str, list[Config]] = {"step": [], "evaluation": []}
    for row in read_json_lines(path):
        if row.get("event") in ("step", "evaluation"):
            rows[row["event"]].append(row)
    names = (*AXES, "loss", BITS, "lr", "grad_norm", "tokens_per_second", "mfu", *TIMES, "progress")
    steps, held_out = thin(rows["step"]), rows["evaluation"]
    for row in steps:  # a core that was busy while the machine's rate was measured has made that too low
        if isinstance(row.get("mfu"), int | float):
            row["mfu"] = min(1.0, row["mfu"])
        row.setdefault("elapsed", row.get("seconds"))  # a log of before counts the steps alone
    metrics = {name: [(row.get("metrics") or {}).get(name) for row in held_out] for name in ("loss", BITS)}
    return (
        {name: [row.get(name) for row in steps] for name in names},
        {name: [row.get(name) for row in held_out] for name in (*AXES, *TIMES)} | metrics,
    )


def thin(rows: list[T]) -> list[T]:
    """At most about `MAX_POINTS` of the rows, evenly chosen, the last among them."""
    every = -(-len(rows) // MAX_POINTS) or 1
    return rows[::-every][::-1]


def plots(trainings: Sequence[Trained]) -> list[Plot]:
    """The loss curves by unit, since nats of different objectives do not compare: each unit is a plot of its own."""
    curves_by_unit: dict[str, list[Curve]] = {}
    for number, training in enumerate(trainings):
        # While training, the objectives' weighted sum is logged, but only the first one's held-out value.
        names: dict[Part, str] = {"step": " + ".join(training["objective"]), "evaluation": training["objective"][0]}
        bits = {part: any(v is not None for v in training[part][BITS]) for part in names}
        for part, objective in names.items():
            column = BITS if bits[part] and (bits["step"] or part == "evaluation") else "loss"
            if any(v is not None for v in training[part][column]):
                unit = "bits per byte" if column == BITS else unit_of_loss(training, objective)
                curves_by_unit.setdefault(unit, []).append({"training": number, "part": part, "column": column})
    return [{"unit": unit, "curves": curves} for unit, curves in curves_by_unit.items()]


def _sizes_of(home: Path) -> dict[str, dict[str, int]]:
    """The documents and bytes by domain, from the numbers of each document, as evaluations of before have left them."""
    rows = _object(home / "documents.json").get("held_out")
    sizes: dict[str, dict[str, int]] = {}
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and isinstance(size := row.get("bytes"), int | float):
            each = sizes.setdefault(str(row.get("domain")), {"documents": 0, "bytes": 0})
            each["documents"], each["bytes"] = each["documents"] + 1, each["bytes"] + int(size)
    return sizes


def _object(path: Path) -> Any:
    """The JSON object in a file, of whatever type it is; an empty one where there is none."""
    try:
        return read_object(path, halves=True)  # which the page shows as what they are
    except PretrainError:
        return {}

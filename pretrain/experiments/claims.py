"""Claims: a paper's headline as an experiment at equal compute.

A claim is a YAML file: a shared base recipe, what the baseline and the method change in it, a metric, a budget by scale
and the learning rates that both sides search. `run` searches on the validation split, runs the chosen rates with
several seeds, judges the paired differences on the test split and records everything in a JSON file.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pretrain.core.errors import PretrainError, unknown
from pretrain.core.files import digest, read_json, write_json
from pretrain.experiments.trials import Trial, run_all
from pretrain.experiments.verdict import BETTER, UNDECIDED, WORSE, judge, share_to_reach
from pretrain.recipe import parse, put, read

REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
WORDS = {BETTER: REPRODUCED, WORSE: NOT_REPRODUCED, UNDECIDED: UNDECIDED}
SCALES = ("smoke", "cpu", "gpu")
SEEDS = {"smoke": 5, "cpu": 3, "gpu": 3}
TRAINED = "model"  # the stage that gets the budget, by agreement between claims and their bases
TUNING_SEED = 1000  # never one of the seeds that are judged


class Side(BaseModel):
    """What a side changes in the base: `insert` puts stages before a stage, then `set` sets fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    set: dict[str, Any] = {}
    insert: dict[str, list[dict[str, Any]]] = {}


class Tune(BaseModel):
    """The field that both sides search, and each side's values: as many for one as for the other."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    field: str
    baseline: list[Any] = Field(min_length=1)
    method: list[Any] = Field(min_length=1)

    @model_validator(mode="after")
    def _as_many(self) -> Tune:
        if len(self.baseline) != len(self.method):
            raise ValueError(
                f"{len(self.baseline)} values against {len(self.method)}: accepted: as many for both sides"
            )
        return self


class Scale(BaseModel):
    """The budget of a run in the claim's unit, the number of seeds (0: the scale's own), and what is set at this scale:
    by both sides, before anything is inserted, and by one side at the end."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    budget: float = Field(gt=0)
    seeds: int = Field(0, ge=0)
    set: dict[str, Any] = {}
    baseline: dict[str, Any] = {}
    method: dict[str, Any] = {}


class Claim(BaseModel):
    """A claim file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: str
    arxiv: str
    claim: str
    base: str
    metric: str
    better: Literal["lower", "higher"] = "lower"
    also: tuple[str, ...] = ()  # more metrics, recorded and shown beside the one that is judged
    equal: Literal["flops", "tokens", "steps", "none"] = "flops"
    curve: str | None = "loss"
    baseline: Side
    method: Side
    tune: Tune | None = None
    scales: dict[str, Scale]
    path: Path = Path()

    @field_validator("scales", mode="before")
    @classmethod
    def _known_scales(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not value or set(value) - set(SCALES):
            raise ValueError(f"{value!r}: accepted: a budget for one or more of {', '.join(SCALES)}")
        return {k: v if isinstance(v, dict) else {"budget": v} for k, v in value.items()}

    @property
    def name(self) -> str:
        """The claim's name: that of its file."""
        return self.path.stem

    def recipe(self, side: str, scale: str) -> dict[str, Any]:
        """The recipe of one side at a scale; the budget of the trained stage is not in it yet."""
        if scale not in self.scales:
            raise unknown(f"scale of claim {self.name!r}", scale, self.scales)
        raw, _ = read(self.path.parent / "bases" / f"{self.base}-{scale}.yaml")
        chosen: Side = getattr(self, side)
        where = f"{self.path}: {side}"
        _set(raw, self.scales[scale].set, f"{self.path}: scales.{scale}.set")
        for before, stages in chosen.insert.items():
            _insert(raw, before, stages, self.scales[scale].budget, self.equal, where)
        _set(raw, chosen.set, f"{where}.set")
        _set(raw, getattr(self.scales[scale], side), f"{self.path}: scales.{scale}.{side}")
        return raw


def _set(raw: dict[str, Any], given: dict[str, Any], where: str) -> None:
    for name, value in given.items():
        put(raw, name, copy.deepcopy(value), where)


def _names(raw: dict[str, Any]) -> list[str]:
    return [stage.get("name", stage.get("stage", "")) for stage in raw["stages"]]


def _insert(
    raw: dict[str, Any], before: str, stages: list[dict[str, Any]], budget: float, unit: str, where: str
) -> None:
    """Put in stages. `like` copies a stage, `set` changes the copy; a budget may be a share of the run's."""
    for given in stages:
        stage, names = copy.deepcopy(given), _names(raw)
        like, changes = stage.pop("like", None), stage.pop("set", {})
        for name in filter(None, (before, like)):
            if name not in names:
                raise unknown(f"stage in {where}.insert", name, names)
        if like is not None:
            stage = copy.deepcopy(raw["stages"][names.index(like)]) | stage
        label = stage.get("name", stage.get("stage", ""))
        _set({"stages": [stage]}, {f"{label}.{name}": value for name, value in changes.items()}, f"{where}.insert")
        if set(stage.get("budget") or {}) == {"share"}:
            stage["budget"] = {unit if unit != "none" else "steps": stage["budget"]["share"] * budget}
        raw["stages"].insert(names.index(before), stage)


def load_claim(path: Path | str) -> Claim:
    """Read and check a claim file; a mistake is one line that names the file and the field."""
    path = Path(path)
    try:
        raw = parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PretrainError(f"claim {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(raw, dict):
        raise PretrainError(f"{path}: accepted: a mapping with {', '.join(Claim.model_fields)}")
    try:
        return Claim.model_validate(raw | {"path": path})
    except ValidationError as error:
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        place, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            raise PretrainError(f"{path}: {place}: unknown field; accepted: {', '.join(Claim.model_fields)}") from error
        raise PretrainError(f"{path}: {place}: {message}") from error


def claims(folder: Path | str) -> dict[str, Claim]:
    """The claims of a folder by name."""
    return {path.stem: load_claim(path) for path in sorted(Path(folder).glob("*.yaml"))}


def run(
    claim: Claim,
    scale: str,
    *,
    output: Path | str = Path("runs") / "claims",
    results: Path | str | None = None,
    jobs: int = 1,
    ray: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run a claim at a scale and record it; returns what the result file says. What is finished is not run again.

    Both sides search the same number of learning rates (at `smoke` none: the middle one is taken), with a seed that is
    not judged and on the validation split.
    """
    sides = ("baseline", "method")
    raws = {side: claim.recipe(side, scale) for side in sides}
    work = Path(output).resolve() / scale
    seeds = claim.scales[scale].seeds or SEEDS[scale]
    grids = {side: list(getattr(claim.tune, side)) if claim.tune else [None] for side in sides}
    chosen = {side: grid[len(grid) // 2] for side, grid in grids.items()}
    tuned: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    if scale != "smoke" and len(grids["method"]) > 1:
        queue = [(side, value) for side in sides for value in grids[side]]
        trials = [
            _trial(claim, scale, side, raws[side], work, TUNING_SEED, value, "validation") for side, value in queue
        ]
        outcomes = run_all(trials, jobs=jobs, ray=ray, say=say)
        for (side, value), outcome in zip(queue, outcomes, strict=True):
            tuned[side].append({"value": value, "metric": outcome["final"], "flops": outcome["flops"]})
        pick = min if claim.better == "lower" else max
        chosen = {side: pick(tuned[side], key=lambda row: row["metric"])["value"] for side in sides}
    pairs = [(side, seed) for seed in range(seeds) for side in sides]
    trials = [_trial(claim, scale, side, raws[side], work, seed, chosen[side], "test") for side, seed in pairs]
    outcomes = run_all(trials, jobs=jobs, ray=ray, say=say)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for (side, seed), outcome in zip(pairs, outcomes, strict=True):
        runs[side].append({"seed": seed} | outcome)
    _same_budgets(claim, scale, runs)
    _no_leaks(claim, trials[: len(sides)])
    found = _result(claim, scale, runs, tuned, chosen)
    write_json(_result_path(claim, scale, found, Path(results or claim.path.parent / "results")), found)
    return found


def _trial(
    claim: Claim, scale: str, side: str, raw: dict[str, Any], work: Path, seed: int, value: Any, split: str
) -> Trial:
    raw = copy.deepcopy(raw)
    name = f"{claim.name}-{side}-{seed}"
    if claim.tune is not None:
        put(raw, claim.tune.field, value, f"{claim.path}: tune.field")
        name += f"-{value}" if seed == TUNING_SEED else ""
    for stage in raw["stages"]:
        if stage.get("stage") == "evaluate":
            stage["split"] = split
    raw |= {"seed": seed, "name": name}
    return Trial(
        name=name, recipe=raw, output=str(work / name), store=str(work / "stages"), trained=TRAINED, unit=claim.equal,
        amount=claim.scales[scale].budget, metric=claim.metric, also=claim.also, curve=claim.curve,
    )  # fmt: skip


def _same_budgets(claim: Claim, scale: str, runs: dict[str, list[dict[str, Any]]], within: float = 0.01) -> None:
    """Both sides of a pair must have spent the same FLOPs to 1%; at smoke scale a step is more than that."""
    if claim.equal != "flops" or scale == "smoke":
        return
    for a, b in zip(runs["baseline"], runs["method"], strict=True):
        if abs(a["flops"] - b["flops"]) > within * max(a["flops"], b["flops"]):
            raise PretrainError(
                f"claim {claim.name!r}, seed {a['seed']}: {a['flops']:.4g} FLOPs against {b['flops']:.4g}; accepted: "
                f"equal to {within:.0%}: a smaller step or a larger budget"
            )


def _no_leaks(claim: Claim, trials: Sequence[Trial]) -> None:
    """No document that is judged on may stand in what any stage of a side was trained on."""
    from pretrain.core.checkpoint import corpus_of
    from pretrain.corpus.store import Corpus

    for trial in trials:
        stages = {stage.get("name", stage["stage"]): stage for stage in trial.recipe["stages"]}

        def texts(reference: str, split: str, trial: Trial = trial) -> set[str]:
            own = Path(trial.output) / reference
            folder = corpus_of(own if own.exists() else Path(reference).expanduser())
            return {digest(document["text"]) for document in Corpus(folder).documents(split)}

        judge_stage = stages[claim.metric.partition(".")[0]]
        split = judge_stage.get("split", "test") if judge_stage["stage"] == "evaluate" else "validation"
        judged = texts(judge_stage["corpus"], split) if "corpus" in judge_stage else set()
        for reference in {stage["corpus"] for stage in stages.values() if stage["stage"] in ("train", "tokenizer")}:
            leaked = len(judged & texts(reference, "train"))
            if leaked:
                raise PretrainError(
                    f"claim {claim.name!r}: {leaked} documents of {judge_stage['corpus']}/{split} are in the training "
                    f"split of {reference!r}; accepted: none"
                )


def _result(
    claim: Claim, scale: str, runs: dict[str, list[dict[str, Any]]], tuned: dict[str, Any], chosen: dict[str, Any]
) -> dict[str, Any]:
    from pretrain.core.hardware import describe

    finals = {side: [run["final"] for run in runs[side]] for side in runs}
    verdict = judge([m - b for m, b in zip(finals["method"], finals["baseline"], strict=True)], claim.better)
    curves = {side: [run["curve"] for run in runs[side]] for side in runs}
    drawn = claim.curve is not None
    return {
        "name": claim.name,
        "scale": scale,
        "claim": claim.model_dump(mode="json", exclude={"path"}),
        "word": WORDS[verdict.word],
        "verdict": asdict(verdict),
        "mean": {side: statistics.mean(values) for side, values in finals.items()},
        "deviation": {side: statistics.stdev(values) for side, values in finals.items()},
        "also": {
            name: {
                side: [f(run["also"][name] for run in runs[side]) for f in (statistics.mean, statistics.stdev)]
                for side in runs
            }
            for name in claim.also
        },
        "compute_to_reach": {
            "method": share_to_reach(curves["method"], curves["baseline"], claim.better) if drawn else None,
            "baseline": share_to_reach(curves["baseline"], curves["method"], claim.better) if drawn else None,
        },
        "chosen": chosen,
        "tuned": tuned,
        "runs": runs,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": describe(),
    }


def _result_path(claim: Claim, scale: str, found: dict[str, Any], folder: Path) -> Path:
    """A file of its own for each outcome: a rerun that gives the same numbers replaces it, another stands beside it."""
    mark = digest([found["claim"], [[run["final"] for run in runs] for runs in found["runs"].values()]])[:8]
    return folder / f"{claim.name}-{scale}-{mark}.json"


def recorded(folder: Path | str) -> list[dict[str, Any]]:
    """All recorded results, oldest first."""
    return sorted((read_json(path) for path in Path(folder).glob("*.json")), key=lambda result: result["finished"])

"""What stages read, give and leave on disk, as types: `stage.json`, `run.json`, `evaluation.json` and their parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypeAlias, TypedDict, cast

from pretrain.core.errors import PretrainError
from pretrain.core.files import JSONObject, file_digest, read_json, sealed, write_json

Inputs: TypeAlias = dict[str, Path | list[Path]]  # the folders that a stage reads, by place
Marks: TypeAlias = dict[str, str | list[str]]  # addresses, or names, by place
Config: TypeAlias = JSONObject  # what a recipe says of a stage, and what it leaves to defaults
Metrics: TypeAlias = dict[str, float]

OF_RUNS = ("parts.json", "code.json")  # what the engine notes beside a `stage.json`, and may write again


class Reads(TypedDict):
    """What a stage reads: the inputs' addresses by place, and the state of what is outside."""

    inputs: Marks
    outside: object


class Identity(Reads):
    """What `stage.json` keeps of a stage's address."""

    format: int
    generation: int


class Adopted(TypedDict):
    """Where an adopted result is from."""

    source: str
    fingerprint: str
    linked: bool
    state: NotRequired[str]  # of the files that are linked


class Target(TypedDict):
    """Where a path of a recipe led when a stage was run: to which finished result of which run."""

    place: str  # of the field, `init`
    name: str  # the path as the recipe gives it, `runs/base/model`
    folder: str  # what it stood for then, `runs/base/train-abdbb326af1e`
    address: str


class StageResult(TypedDict, total=False):
    """What a stage's run gives."""

    metrics: Metrics
    flops: int
    adopted: Adopted


class Part(TypedDict):
    """What a stage has taken up to where it was interrupted."""

    started: str
    seconds: float
    peak_memory_bytes: int


class StageRecord(StageResult):
    """`stage.json`, which makes a stage a finished one."""

    name: str
    stage: str
    address: str
    seed: int
    config: Config
    methods: dict[str, int | str]  # their versions, which once were digests
    inputs: Marks
    targets: NotRequired[list[Target]]  # of the paths among the inputs that are stages of runs
    identity: NotRequired[Identity]  # not of those of earlier versions
    seconds: float  # of all its parts, where it was interrupted
    peak_memory_bytes: int
    started: str
    finished: str
    environment: dict[str, object]
    files: NotRequired[dict[str, str]]  # those beside it: the digests of what the stage has left for people to read


def write_stage(path: Path, record: StageRecord) -> None:
    """Write a `stage.json` that vouches for itself and for the files beside it."""
    beside = [p for p in sorted(path.parent.iterdir()) if p.is_file() and not p.name.startswith(".")]
    digests = {p.name: file_digest(p) for p in beside if p.name not in (path.name, *OF_RUNS)}
    write_json(path, sealed({**record, "files": digests}))


def read_stage(path: Path, address: str) -> StageRecord:
    """The `stage.json` of the result of an address; anything else is an error that names the file."""
    record = read_json(path)
    if not isinstance(record, dict) or record.get("address") != address:
        raise PretrainError(f"{path} is damaged or was replaced: it is not the record of {address[:12]}")
    return cast("StageRecord", record)


def altered(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """The files beside a `stage.json` that are not as they were when the stage ended, or are gone."""
    names = []
    for name, known in (record.get("files") or {}).items():
        try:
            names += [name] if file_digest(folder / name) != known else []
        except OSError:
            names.append(name)
    return names


class RunStage(TypedDict):
    """A stage as `run.json` names it."""

    name: str
    stage: str
    folder: str  # from the run's
    address: str
    status: str
    targets: NotRequired[list[Target]]


class Run(TypedDict):
    """`run.json`."""

    name: str
    recipe: str
    seed: int
    stages: list[RunStage]
    given: NotRequired[list[str]]  # the options of its command, `--set` and what follows it one after another


class Measurement(TypedDict, total=False):
    """What is measured on documents: over all, and by domain."""

    metrics: Metrics
    domains: dict[str, Metrics]


class Evaluation(Measurement, total=False):
    """`evaluation.json`."""

    intervals: dict[str, tuple[float, float]]
    compressors: dict[str, Measurement]
    documents: int
    confusion: dict[str, dict[str, int]]  # of a classifier: by true class how often each was answered
    no_intervals: str  # why there are none
    seen: str  # that documents were trained on


class PassedOver(TypedDict):
    """What the sources of a corpus have passed over for one reason: how many, and the first names."""

    count: int
    names: list[str]


class CorpusInfo(TypedDict, total=False):
    """What a report asks of `corpus.json`: documents and bytes by split and domain, copies taken out, a digest."""

    domains: dict[str, dict[str, dict[str, int]]]
    removed: dict[str, int]
    fingerprint: str
    passed_over: dict[str, PassedOver]

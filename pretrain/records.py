"""What stages read, give and leave on disk, as types: `stage.json`, `run.json`, `evaluation.json` and their parts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import NotRequired, TypeAlias, TypedDict, cast

from pretrain.core.errors import PretrainError
from pretrain.core.files import SUMS, JSONObject, damage, file_digest, read_json, sealed, seals_in, write_json
from pretrain.core.quick.confusion import Mistake
from pretrain.core.quick.quantities import counted
from pretrain.core.system.portable import held
from pretrain.data._funnel import Passage

Inputs: TypeAlias = dict[str, Path | list[Path]]  # the folders that a stage reads, by place
Marks: TypeAlias = dict[str, str | list[str]]  # addresses, or names, by place
Config: TypeAlias = JSONObject  # what a recipe says of a stage, and what it leaves to defaults
Metrics: TypeAlias = dict[str, float]

KEPT: dict[str, type] = {  # what every record of a stage says
    "name": str, "stage": str, "address": str, "config": dict, "methods": dict, "metrics": dict, "finished": str
}  # fmt: skip
PARTS = "parts.json"  # of a stage that an interrupt has ended: what it has taken so far
OF_RUNS = (PARTS, "code.json")  # what the engine notes beside a `stage.json`, and may write again
FEW_BYTES = 1000  # of a domain's text, below which its bits per byte say nothing and no chart has room for them


class Status(StrEnum):
    """The state of a stage; that of a run is one of the first four."""

    FINISHED = "finished"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    TO_RUN = "to run"


class Reads(TypedDict):
    """What a stage reads: the inputs' addresses by place, and the state of what is outside."""

    inputs: Marks
    outside: object
    code: NotRequired[dict[str, dict[str, str]]]  # that checkpoints bring and the recipe lets run: files by place


def code_changes(then: Reads, now: Reads) -> list[str]:
    """The files of code that are others than those that were consented to for an earlier result."""
    before, after = then.get("code", {}), now.get("code", {})
    rows = [(place, name) for place in after if place in before for name in {**before[place], **after[place]}]
    return [
        f"code of {place} changed: {name}" for place, name in rows if before[place].get(name) != after[place].get(name)
    ]


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


class Made(TypedDict):
    """What a training was planned to make."""

    flops: float
    steps: float
    instead: NotRequired[Suited]  # where it made far fewer FLOPs in its seconds


class Suited(TypedDict):
    """The size that the dial would have chosen for as many FLOPs as a budget of seconds came to."""

    size: str
    changes: dict[str, str]  # of the recipe's fields


class StageResult(TypedDict, total=False):
    """What a stage's run gives."""

    metrics: Metrics
    flops: int
    adopted: Adopted
    planned: Made  # of a training whose plan was known, before it began


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
    folders: NotRequired[dict[str, str]]  # those in it: the seals of their checksums, by which another's is known


def write_stage(path: Path, record: StageRecord) -> None:
    """Write a `stage.json` that vouches for itself, for the files beside it and for whose the folders there are."""
    beside = [p for p in sorted(path.parent.iterdir()) if p.is_file() and not p.name.startswith(".")]
    digests = {p.name: file_digest(p) for p in beside if p.name not in (path.name, *OF_RUNS)}
    write_json(path, sealed({**record, "files": digests, "folders": seals_in(path.parent)}))


def read_stage(path: Path, address: str = "") -> StageRecord:
    """A `stage.json`, of the result of an address where one is given; anything else is an error that names the file."""
    record = read_json(path)
    whole = isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in KEPT.items())
    if not whole or record["address"] != (address or record["address"]):
        whose = address[:12] or "a stage"
        raise PretrainError(f"{path} is damaged or was replaced: it is not the record of {whose}")
    return cast("StageRecord", record)


@lru_cache(2**14)  # each plan looks through a store, which may be that of many runs
def label(path: Path, mtime_ns: int, size: int) -> tuple[str, str]:
    """The name and the end of the stage of a `stage.json` as it is; empty where it is damaged or no record."""
    with suppress(PretrainError):
        record = read_stage(path)
        return record["name"], record["finished"]
    return "", ""


def altered(folder: Path, record: StageRecord) -> list[str]:
    """What beside a `stage.json` is not as it was when the stage ended, or gone: files, and whose the folders are."""
    names = []
    for name in (name for name in record.get("folders") or {} if (folder / name).is_dir()):
        names += [name] if not (folder / name / SUMS).exists() or damage(folder / name, lambda _: False) else []
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
    status: str  # when `run.json` was written: of one that was killed since, `running` (see `statuses`)
    error: NotRequired[str]  # of one that has failed
    targets: NotRequired[list[Target]]


class Run(TypedDict):
    """`run.json`."""

    name: str
    recipe: str
    seed: int
    stages: list[RunStage]
    given: NotRequired[list[str]]  # the options of its command, `--set` and what follows it one after another


def statuses(folder: Path, rows: Iterable[RunStage]) -> dict[str, str]:
    """The state of each stage of the run in `folder` by its name, as its files and locks say: `rows` of `run.json`."""
    active = held(folder / ".lock")
    return {row["name"]: _status(folder / row.get("folder", row["name"]), row, active) for row in rows}


def _status(home: Path, row: RunStage, active: bool) -> str:
    if (home / "stage.json").exists():
        return Status.FINISHED
    status = row.get("status")
    if held(home / ".lock") or (active and status == Status.RUNNING):  # of this run, or of one with the same store
        return Status.RUNNING
    if status == Status.FAILED:
        return Status.FAILED
    begun = status in (Status.RUNNING, Status.INTERRUPTED) or (home / "code.json").exists()
    return Status.INTERRUPTED if begun else Status.TO_RUN


def run_status(folder: Path, stages: Collection[str]) -> str:
    """The state of a run whose stages are in these states."""
    if held(folder / ".lock"):
        return Status.RUNNING
    if all(status == Status.FINISHED for status in stages):
        return Status.FINISHED
    return Status.FAILED if Status.FAILED in stages else Status.INTERRUPTED


class Measurement(TypedDict, total=False):
    """What is measured on documents: over all, and by domain."""

    metrics: Metrics
    domains: dict[str, Metrics]


class Evaluation(Measurement, total=False):
    """`evaluation.json`."""

    intervals: dict[str, tuple[float, float]]
    domain_intervals: dict[str, dict[str, tuple[float, float]]]
    sizes: dict[str, dict[str, int]]  # by domain: `documents`, and the `bytes` of their text
    compressors: dict[str, Measurement]
    documents: int
    confusion: dict[str, dict[str, int]]  # of a classifier: by true class how often each was answered
    mistakes: list[Mistake]  # of a classifier, the most confident first
    yardsticks: dict[str, str]  # what a metric that is no model's is of
    no_intervals: str  # why there are none
    seen: str  # that documents were trained on


class PassedOver(TypedDict):
    """What the sources of a corpus have passed over for one reason: how many, and the first names."""

    group: NotRequired[str]
    count: int
    names: list[str]


class Contradicting(TypedDict):
    """Texts that stand with more than one label: how many, and whether each of these is kept, or the first alone."""

    texts: int
    kept: bool


class Kept(TypedDict):
    """A training document, to look at: the beginning of its text."""

    domain: str
    id: str
    bytes: int
    text: str


class CorpusInfo(TypedDict, total=False):
    """What a report asks of `corpus.json`: documents and bytes by split and domain, what was removed, a digest."""

    domains: dict[str, dict[str, dict[str, int]]]
    read: int  # documents of the sources: those kept and those removed, less what operations have added
    removed: dict[str, int]  # by reason
    copies: dict[str, list[str]]  # by reason, the first names of those removed as copies
    contradicting: dict[str, Contradicting]  # by the column of labels
    added: dict[str, int]  # by operation
    fingerprint: str
    passed_over: dict[str, PassedOver]
    pages: dict[str, int]  # of HTML: `pages`, the `letters` of their text, and those `taken`
    funnel: list[Passage]  # an operation after the other
    lengths: dict[str, dict[str, int]]  # by split how many documents are below each power of two of bytes
    kept: list[Kept]  # some training documents, drawn at random


def contradicting(info: CorpusInfo) -> list[str]:
    """A line for each column of labels: how many texts contradict themselves, and what becomes of them."""
    lines = []
    for column, row in (info.get("contradicting") or {}).items():
        texts = f"{counted(row['texts'], 'text')} {'stands' if row['texts'] == 1 else 'stand'} with more than one"
        became = "all are kept" if row["kept"] else "the first of each is kept, the others are removed as exact copies"
        lines.append(f"{texts} {column!r}: {became}")
    return lines


def of_pages(pages: Mapping[str, int]) -> str:
    """How much of the text of pages of HTML was taken; empty where there were none."""
    if not pages.get("letters"):
        return ""
    return f"{counted(pages['pages'], 'page')} of HTML, {pages['taken'] / pages['letters']:.0%} of their text taken"


def accounted(info: CorpusInfo) -> str:
    """What became of the documents that a corpus has read, in numbers that add up."""
    words, removed = {"exact": "as exact copies", "near": "as near to held-out ones"}, info.get("removed") or {}
    parts = [f"{count:,} removed {words.get(name, f'by {name}')}" for name, count in removed.items() if count]
    if "read" not in info:  # of earlier versions
        return ", ".join(parts) or "none removed"
    added = info.get("added") or {}
    parts += [f"{count:,} added by {name}" for name, count in added.items()]
    kept = info["read"] - sum(removed.values()) + sum(added.values())
    return ", ".join([f"{counted(info['read'], 'document')} read", *parts, f"{kept:,} kept"])

"""What a stage reads, gives and leaves on disk, as types: `stage.json`, and what it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired, TypeAlias, TypedDict

Inputs: TypeAlias = dict[str, Path | list[Path]]  # the folders that a stage reads, by place
Marks: TypeAlias = dict[str, str | list[str]]  # addresses, or names, by place
Config: TypeAlias = dict[str, Any]  # what a recipe says of a stage, and what it leaves to defaults
Metrics: TypeAlias = dict[str, float]


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


class StageResult(TypedDict, total=False):
    """What a stage's run gives."""

    metrics: Metrics
    flops: int
    adopted: Adopted


class StageRecord(StageResult):
    """`stage.json`, which makes a stage a finished one."""

    name: str
    stage: str
    address: str
    seed: int
    config: Config
    methods: dict[str, int | str]  # their versions, which once were digests
    inputs: Marks
    identity: NotRequired[Identity]  # not of those of earlier versions
    seconds: float
    peak_memory_bytes: int
    started: str
    finished: str
    environment: dict[str, object]

"""Stages: the steps of a recipe. Each reads checkpoints and corpora, and writes one folder.

A stage is a file here with a pydantic model: its fields are what a recipe may say, `run(job)` does the work. A field of
type `Ref` names an earlier stage or a path; a field of type `ObjectiveField`, `ScheduleField`, … names a method,
`{method: NAME, …}`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from pretrain.core.errors import PretrainError, nearest
from pretrain.core.method import Method, code_version, info, method_class
from pretrain.data import DataOperation
from pretrain.decoding import Decoding
from pretrain.evaluation import Evaluation
from pretrain.objectives import Objective
from pretrain.optim import Optimizer, Schedule
from pretrain.policies import Policy
from pretrain.surgery import Surgery as SurgeryMethod


class _RefMark:
    """Marks the fields that name an earlier stage or a path."""


REF = _RefMark()
Ref = Annotated[str, REF]


@dataclass
class Job:
    """What a stage is given to run with."""

    folder: Path  # its own, to write into; what an interrupted run left is still there
    inputs: dict[str, Any]  # field -> folder (or list of folders) of what it names
    seed: int = 0
    name: str = ""
    say: Callable[[str], None] = print
    lineage: list[dict[str, Any]] = field(default_factory=list)  # the `stage.json` of what came before


@dataclass(frozen=True)
class Estimate:
    """What a stage is expected to take; None where nothing can be said."""

    flops: float | None = None
    memory_bytes: float | None = None
    seconds: float | None = None


class Stage(BaseModel):
    """Base of the stages."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, frozen=True)

    version: ClassVar[int] = 1  # raised when the same fields come to mean something else
    distributed: ClassVar[bool] = False  # runs on every process of `torchrun`, not only on the first
    neutral: ClassVar[tuple[str, ...]] = ()  # fields that do not change what comes out

    name: str = ""
    stage: str

    def run(self, job: Job) -> dict[str, Any]:
        """Do the work; returns `metrics`, and `flops` where it is metered."""
        raise NotImplementedError

    def estimate(self, inputs: dict[str, Any]) -> Estimate:
        """What `--dry-run` says; `inputs` holds what is there already."""
        return Estimate()

    def outside(self) -> Any:
        """A fingerprint of what the stage reads besides its references."""
        return None

    def references(self) -> dict[str, str | list[str]]:
        """The fields that name stages or paths, with what they name."""
        named = {n: getattr(self, n) for n, f in type(self).model_fields.items() if _is_ref(f)}
        return {n: v for n, v in named.items() if v}

    def methods(self) -> list[str]:
        """The names of the methods that the stage uses."""
        found: list[str] = []
        for value in self.__dict__.values():
            items = value if isinstance(value, list | tuple) else [value]
            candidates: list[Any] = [getattr(item, "method", item) for item in items]
            found += [candidate.name for candidate in candidates if isinstance(candidate, Method)]
        return sorted(set(found))

    def config(self) -> dict[str, Any]:
        """What is hashed: all fields but the name and the neutral ones, and the code of the methods."""
        said = self.model_dump(mode="json", exclude={"name", *self.neutral})
        return said | {"version": self.version, "methods": {name: code_version(name) for name in self.methods()}}


def _is_ref(field_info: Any) -> bool:
    return REF in field_info.metadata or REF in _deep(field_info.annotation)


def _deep(annotation: Any) -> list[Any]:
    found = list(getattr(annotation, "__metadata__", ()))
    for inner in getattr(annotation, "__args__", ()):
        found += _deep(inner)
    return found


@cache
def stage_classes() -> dict[str, type[Stage]]:
    """The stages by name: the files of this folder."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        module = importlib.import_module(f"pretrain.stages.{path.stem}")
        classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Stage) and c is not Stage]
        found[path.stem] = next(c for c in classes if c.__module__ == module.__name__)
    return found


def build_dataclass(cls: Any, given: dict[str, Any], what: str) -> Any:
    """A frozen dataclass from a mapping, its types checked; errors name the field, the value and what is accepted."""
    known = [f.name for f in fields(cls)]
    for name in given:
        if name not in known:
            accepted = ", ".join(known) or "none"
            raise ValueError(f"unknown field {name!r} of {what}{nearest(name, known)}; accepted: {accepted}")
    try:
        return TypeAdapter(cls).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{what}: {where}: {first['input']!r}: {first['msg']}") from error
    except PretrainError as error:
        raise ValueError(f"{what}: {error}") from error


def build_method(value: Any, kind: str) -> Any:
    """A method from a recipe's `NAME` or `{method: NAME, field: value, …}`."""
    if isinstance(value, Method):
        return value
    if isinstance(value, str):
        value = {"method": value}
    if not isinstance(value, dict) or not isinstance(value.get("method"), str):
        raise ValueError(f"{value!r} is no {kind}; accepted: a name, or {{method: NAME, field: value}}")
    try:
        cls = method_class(info(value["method"], kind).name, kind)
    except PretrainError as error:
        raise ValueError(str(error)) from error
    given = {k: v for k, v in value.items() if k != "method"}
    return build_dataclass(cls, given, f"{kind} {value['method']!r}")


def dump(value: Any) -> Any:
    """A method or source as JSON-like data."""
    if isinstance(value, Method):
        return {"method": value.name} | asdict(value)  # type: ignore[call-overload]
    return {"source": type(value).__name__} | asdict(value) if is_dataclass(value) else value  # type: ignore[arg-type]


def _of(kind: str) -> PlainValidator:
    return PlainValidator(lambda value: build_method(value, kind))


# What a recipe's field may hold: a method of a kind.
DataOperationField = Annotated[DataOperation, _of("data operation"), PlainSerializer(dump)]
ObjectiveField = Annotated[Objective, _of("objective"), PlainSerializer(dump)]
OptimizerField = Annotated[Optimizer, _of("optimiser"), PlainSerializer(dump)]
ScheduleField = Annotated[Schedule, _of("schedule"), PlainSerializer(dump)]
PolicyField = Annotated[Policy, _of("policy"), PlainSerializer(dump)]
SurgeryField = Annotated[SurgeryMethod, _of("surgery"), PlainSerializer(dump)]
DecodingField = Annotated[Decoding, _of("decoding"), PlainSerializer(dump)]
EvaluationField = Annotated[Evaluation, _of("evaluation"), PlainSerializer(dump)]


def checkpoint_of(folder: Path) -> Path:
    """The checkpoint in a stage's folder, or the folder itself when it is one."""
    for path in (folder / "checkpoint", folder):
        if (path / "config.json").exists():
            return path
    raise PretrainError(f"no checkpoint at {folder}; accepted: a train or surgery stage, or a folder with config.json")


def corpus_of(folder: Path) -> Path:
    """The corpus in a data stage's folder, or the folder itself."""
    return folder / "corpus" if (folder / "corpus").is_dir() else folder


def tokenizer_of(folder: Path) -> Path:
    """The tokenizer in a tokenizer stage's folder, or the folder itself."""
    return folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder

"""Stages: the steps of a recipe. Each reads checkpoints and corpora, and writes one folder.

A stage is a file here with a pydantic model: its fields are what a recipe may say, `run(job)` does the work. A field of
type `Ref` names an earlier stage or a path; a field of type `ObjectiveField`, `ScheduleField`, … names a method,
`{method: NAME, …}`, which may have fields of type `Ref` itself. While a stage runs, its methods hold the folders.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from pretrain.core.bounds import Ge, Lt
from pretrain.core.errors import PretrainError, steps_of
from pretrain.core.files import JSONObject, digest, read_object
from pretrain.core.folders import checkpoint_of as checkpoint_of
from pretrain.core.folders import corpus_of as corpus_of
from pretrain.core.folders import tokenizer_of as tokenizer_of
from pretrain.core.foreign.code import ALLOWED, Code, codes_in, consent, digests_of, needs_consent
from pretrain.core.method import REF, Method, declared_class, is_method, is_ref, of_default
from pretrain.core.method import Ref as Ref
from pretrain.core.quick.declared import is_type
from pretrain.core.quick.hub import located
from pretrain.core.quick.plan import Plan
from pretrain.core.quick.quantities import as_typed
from pretrain.core.quick.vocabulary import check_references, stored_labels, stored_numbers
from pretrain.core.registry import info
from pretrain.corpus.sources import Source
from pretrain.data import DataOperation
from pretrain.decoding import Decoding
from pretrain.evaluation import Evaluation
from pretrain.objectives import Objective
from pretrain.optim import Optimizer, Schedule
from pretrain.policies import Policy
from pretrain.records import StageResult
from pretrain.stages._estimates import Estimate as Estimate
from pretrain.stages._estimates import Given as Given
from pretrain.stages._fields import Misfit as Misfit
from pretrain.stages._fields import build_dataclass as build_dataclass
from pretrain.stages._fields import first_mistake as first_mistake
from pretrain.surgery import Surgery as SurgeryMethod

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
    from transformers import PreTrainedTokenizerBase

    from pretrain.corpus.shards import Shards
else:
    ModelMetaclass = type(BaseModel)

Record = JSONObject  # JSON: a recipe's fields, a lineage, what a stage answers
CORPORA = {"corpus", "corpora"}  # references that are no checkpoints
ORIGINS = ("init", "checkpoint", "tokenizer", "processor")  # of what a stage writes
Folders = dict[str, Any]  # field -> the folder, or the list of folders, of what it names


@dataclass
class Job:
    """What a stage is given to run with."""

    folder: Path  # its own, to write into; what an interrupted run left is still there
    inputs: Folders  # field -> folder (or list of folders) of what it names
    seed: int = 0
    name: str = ""
    say: Callable[[str], None] = print
    lineage: list[Record] = field(default_factory=list)  # of the stages that this one comes from, in order
    identity: Record = field(default_factory=dict)  # name, kind, address and methods of this one
    bar: bool = False  # whether to draw progress
    refreshed: tuple[str, ...] = ()  # the refreshes that it and those behind it have been through
    plan: Plan | None = None  # what was expected of it, where it trains
    begun: float = field(default_factory=time.perf_counter)
    ray: str = ""  # the address of a cluster that does what can be shared out

    def history(self, result: Record, *sources: Record) -> Record:
        """The stages behind a checkpoint made from checkpoints of such lineages, and the stage that makes it."""
        stages = [s for lineage in sources for s in (*lineage.get("stages", []), lineage.get("made_by")) if s]
        whole: dict[str, Record] = {}
        for stage in (*stages, *self.lineage):  # those of this run say the most
            whole[stage["address"]] = whole.get(stage["address"], {}) | stage
        return {"stages": list(whole.values()), "made_by": self.identity | result}


class _Fielded(ModelMetaclass):
    """The type of the stages: one that is made by hand tells of a mistake as a recipe does, and not as pydantic."""

    def __call__(cls, *args: object, **given: object) -> object:
        try:
            return super().__call__(*args, **given)
        except ValidationError as error:
            place, deeper, message = first_mistake(error, cast("type[BaseModel]", cls))
            dotted = ".".join(map(str, (cls.__name__, *(place or deeper))))
            raise PretrainError(f"{dotted}: {message}", place=(*place, *deeper)) from error


class Stage(BaseModel, metaclass=_Fielded):
    """Base of the stages. A docstring says what a stage does, and below, `field: sentence`, what each field does.

    stage: The kind of stage.
    name: What other stages and `--set` call it.
    seed: Of this stage alone; the recipe's by default.
    trust_remote_code: Whether the code that the checkpoint it names brings may be run; of several references a list of
        those that may, `[init, objective.teacher]`.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, frozen=True)

    version: ClassVar[int] = 1  # raised when the same fields come to mean something else
    distributed: ClassVar[bool] = False  # runs on every process of `torchrun`, not only on the first
    seeded: ClassVar[bool] = True  # what comes out depends on the seed
    neutral: ClassVar[tuple[str, ...]] = ()  # fields that do not change what comes out
    writes: ClassVar[str] = (
        ""  # what it leaves for others, in a folder of that name: corpus, tokenizer, processor, checkpoint
    )
    accepts: ClassVar[dict[str, tuple[str, ...]]] = {  # which stages a field may name, where its name tells it
        "corpus": ("data",),
        "tokenizer": ("tokenizer", "train", "surgery"),
        "processor": ("processor", "tokenizer", "train", "surgery"),
        "checkpoint": ("train", "surgery"),
        "init": ("train", "surgery"),
        "models": ("train", "surgery"),
        "teacher": ("train", "surgery"),
    }

    name: str = ""
    stage: str
    seed: Annotated[int, Ge(0), Lt(1 << 63)] | None = None  # by default the recipe's
    trust_remote_code: bool | list[str] = False

    @model_validator(mode="before")
    @classmethod
    def _quantities(cls, given: object) -> object:
        """`100k` and `30min` are numbers where a field takes numbers; fields without a method are of the default's."""
        if not isinstance(given, dict):
            return given
        known = {name: cls.model_fields[name] for name in given if name in cls.model_fields}
        read = {name: as_typed(given[name], item.annotation) for name, item in known.items()}
        methods = [name for name, item in known.items() if is_method(item.annotation)]
        return given | read | {name: of_default(given[name], known[name].default) for name in methods}

    def run(self, job: Job) -> StageResult:
        """Do the work; returns `metrics`, and `flops` where it is metered."""
        raise NotImplementedError

    def estimate(self, given: Given) -> Estimate:
        """What `--dry-run` says, from what the stages and folders that it names leave, or are expected to."""
        return Estimate()

    def check_inputs(self, earlier: Mapping[str, Stage]) -> None:
        """Refuse what does not go with the stages before this one, by name, or with the folders that it names."""
        for place, split in self.splits().items():
            corpus = earlier.get(str(getattr(self, place, "")))
            if corpus is not None and getattr(corpus, split, None) == 0:
                raise PretrainError(
                    f"{place} {corpus.name!r} has no {split} documents ({split}: 0); accepted: a share above 0 there",
                    place=(place,),
                )
        named = [getattr(self, name, None) for name in ("tokenizer", "processor", "init", "checkpoint")]
        whose = next((str(name) for name in named if name), "")
        if not whose or whose in earlier:
            return
        if any(getattr(method, "new_vocabulary", False) for _, method in self.placed_methods()):
            return  # what its methods share is known when they have run
        for place, method in self.placed_methods():
            if method.vocabularies():
                steps, home = steps_of(place), located(whose)
                numbers, labels = stored_numbers(home), stored_labels(home)
                check_references(method, numbers, whose, steps, tuple(earlier), located, labels)

    def splits(self) -> dict[str, str]:
        """The splits of corpora that must hold documents, by the field that names the corpus."""
        return {}

    def outside(self) -> object:
        """A fingerprint of what the stage reads besides its references."""
        return None

    def references(self) -> dict[str, str | list[str]]:
        """What names stages or paths: the stage's fields (`corpus`), and its methods' (`policies.1.teacher`)."""
        named = {name: getattr(self, name) for name in _ref_fields(type(self))}
        references: dict[str, str | list[str]] = {n: v for n, v in named.items() if v}
        for place, method in self.placed_methods():
            references |= {f"{place}.{name}": value for name, value in method.references().items()}
        return references

    def checkpoints(self) -> dict[str, str]:
        """The references that are no corpora, one by one: `init`, `models.0`, `objective.teacher`."""
        named: dict[str, str] = {}
        for place, value in self.references().items():
            if not {*place.split(".")} & CORPORA:
                rows = enumerate(value) if isinstance(value, list) else [("", value)]
                named |= {f"{place}.{number}".rstrip("."): name for number, name in rows}
        return named

    def trusted(self) -> dict[str, str]:
        """Those references to checkpoints whose code may be run; an error where `trust_remote_code` leaves it open."""
        named, given = self.checkpoints(), self.trust_remote_code
        wanted = [*named] if given is True else given or []
        strange = next((place for place in wanted if place not in named), None)
        if strange is None and (given is not True or len(named) == 1):
            return {place: named[place] for place in wanted}
        words = f"a list of those that may be: {', '.join(named)}" if named else "false, since it names no checkpoint"
        shown = "true" if strange is None else repr(strange)
        raise PretrainError(f"{shown}: accepted: {words}", place=("trust_remote_code",))

    def trusted_code(self, earlier: Collection[str]) -> dict[str, list[Code]]:
        """That code by place, of checkpoints that are no stages before this one: those have theirs from elsewhere."""
        outside = {
            place: codes_in(located(name, place)) for place, name in self.trusted().items() if name not in earlier
        }
        return {place: codes for place, codes in outside.items() if codes}

    def consents(self, folders: Folders, earlier: Collection[str] = (), known: object = None) -> dict[Path, str]:
        """The folders whose code may be run, as `consenting` takes them; refuses other code than is `known` of them."""
        if known is not None and digests_of(self.trusted_code(earlier)) != known:
            raise PretrainError("code of a checkpoint has changed since this run began; accepted: to run again")
        lists = {place: value if isinstance(value, list) else [value] for place, value in folders.items()}
        named = {
            f"{place}.{number}": Path(folder) for place, each in lists.items() for number, folder in enumerate(each)
        }
        chosen = [named.get(place) or named[f"{place}.0"] for place in self.trusted()]
        return {folder: consent(folder) for folder in chosen}

    def check_trusted(self, earlier: Mapping[str, Stage]) -> None:
        """Refuse a checkpoint that nothing but its code opens where nobody consents, and code that cannot be run."""
        trusted = self.trusted()
        for place, name in trusted.items():
            if name not in earlier:
                try:
                    codes_in(located(name, place))
                except PretrainError as error:
                    raise PretrainError(str(error), place=steps_of(place)) from error
        for place, name in self.checkpoints().items():
            if place not in trusted and (words := _code_of(name, place, earlier)):
                raise PretrainError(f"{name}: {words}", place=steps_of(place))

    def pointing_to(self, folders: Folders) -> Self:
        """The stage with its methods' references replaced by folders, as `references` names them."""
        changed: Record = {}
        for place, method in self.placed_methods():
            inside = {k.removeprefix(f"{place}."): str(v) for k, v in folders.items() if k.startswith(f"{place}.")}
            if not inside:
                continue
            name, _, number = place.partition(".")
            value, made = changed.get(name, getattr(self, name)), method.pointing_to(inside)
            if number:
                items = list(value)
                old = items[int(number)]
                items[int(number)] = made if isinstance(old, Method) else old.model_copy(update={"method": made})
                changed[name] = items
            else:
                changed[name] = made
        return self.model_copy(update=changed) if changed else self

    def placed_methods(self) -> list[tuple[str, Method]]:
        """The methods with their places: `objective`, `policies.1`."""
        placed: list[tuple[str, Method]] = []
        for name, value in self.__dict__.items():
            items = enumerate(value) if isinstance(value, list | tuple) else [("", value)]
            for number, item in items:
                method = item if isinstance(item, Method) else getattr(item, "method", None)
                if isinstance(method, Method):
                    placed.append((f"{name}.{number}".rstrip("."), method))
        return placed

    def methods(self) -> list[str]:
        """The names of the methods that the stage uses."""
        return sorted({name for _, method in self.placed_methods() for name in (method.name, *method.parts())})

    def method_classes(self) -> dict[str, type[Method]]:
        """The classes of the methods that the stage uses, by name."""
        placed = {method.name: type(method) for _, method in self.placed_methods()}
        return {name: placed.get(name) or declared_class(name) for name in self.methods()}

    def config(self) -> Record:
        """What is hashed: all fields but name, consent and the neutral ones, and the versions of stage and methods."""
        versions = {name: cls.version for name, cls in self.method_classes().items()}
        fields = self.model_dump(mode="json", exclude={"name", "trust_remote_code", *self.neutral})
        return fields | {"version": self.version, "methods": versions}

    def progress(self, folder: Path) -> str:
        """From what an interrupted run can go on, as `at step 200`; nothing where it begins again."""
        return ""

    def done(self, folder: Path, whole: Estimate) -> float:
        """The share of its work that an interrupted run has done and goes on from; `whole` is of all of it."""
        return 0.0


def _code_of(name: str, field: str, earlier: Mapping[str, Stage]) -> str:
    """What is to be said of a reference that opens by its code alone; empty of any other, and where it is not known."""
    before = earlier.get(name)
    if before is None:
        folder = located(name, field)
        place = next((path for path in (folder / "checkpoint", folder) if (path / "config.json").exists()), None)
        unknown = place is not None and not is_type(read_object(place / "config.json").get("model_type"))
        return needs_consent(place).removeprefix("; ") if place is not None and unknown else ""
    origins = [each for place, each in before.trusted().items() if place in ORIGINS]
    codes = [_code_of(each, "", earlier) if each in earlier else codes_in(located(each)) for each in origins]
    return f"it brings the code of {origins[0]}, which {ALLOWED}" if any(codes) else ""


@cache
def _ref_fields(cls: type[Stage]) -> tuple[str, ...]:
    return tuple(name for name, field_info in cls.model_fields.items() if _is_ref(field_info))


def _is_ref(field_info: FieldInfo) -> bool:
    return REF in field_info.metadata or is_ref(field_info.annotation)


@cache
def stage_classes() -> dict[str, type[Stage]]:
    """The stages by name: the files of this folder."""
    classes_by_name = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        module = importlib.import_module(f"pretrain.stages.{path.stem}")
        classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Stage) and c is not Stage]
        classes_by_name[path.stem] = next(c for c in classes if c.__module__ == module.__name__)
    return classes_by_name


def build_method(value: object, kind: str) -> Any:
    """A method from a recipe's `NAME` or `{method: NAME, field: value, …}`."""
    if isinstance(value, Method):
        return value
    if isinstance(value, str):
        value = {"method": value}
    if not isinstance(value, dict) or not isinstance(value.get("method"), str):
        raise ValueError(f"{value!r} is no {kind}; accepted: a name, or {{method: NAME, field: value}}")
    try:
        cls = declared_class(info(value["method"], kind).name, kind)
    except PretrainError as error:
        raise ValueError(str(error)) from error
    given = {k: v for k, v in value.items() if k != "method"}
    return build_dataclass(cls, given, f"{kind} {value['method']!r}")


def dump(value: object) -> object:
    """A method or source as JSON-like data."""
    if isinstance(value, Method):
        return {"method": value.name} | asdict(value)
    return {"source": type(value).__name__} | asdict(value) if isinstance(value, Source) else value


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


def tokens_of(
    job: Job, tokenizer: PreTrainedTokenizerBase, *, splits: Sequence[str], verify: bool = True
) -> dict[str, Shards]:
    """The job's corpus in tokens by split, made once for each tokenizer and shared by the stages of a run or store.

    A refresh of the stage, or of one behind it, makes them anew, with the code of today.
    """
    from pretrain.corpus.shards import tokenise, tokens_key
    from pretrain.corpus.store import Corpus

    corpus = Corpus(corpus_of(job.inputs["corpus"]))
    key = tokens_key(corpus, tokenizer)
    key += f"-{digest(job.refreshed)[:12]}" if job.refreshed else ""
    return tokenise(corpus, tokenizer, Path(job.folder).parent / ".tokens" / key, splits=splits, verify=verify)

"""What every method is: a frozen dataclass whose fields are the hyperparameters of one idea from one paper.

It lies in a file that bears its name, in a room of the folder of its kind, and its docstring opens with the paper's
title and arXiv number. How methods are found: `core/registry.py`.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import MISSING, Field, dataclass, fields, replace
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, get_args

from pretrain.core.bounds import Fielded, check_fields, check_names, gather_fields, hints
from pretrain.core.errors import PretrainError, Terminated
from pretrain.core.foreign.parsing import out_of_memory
from pretrain.core.quick.outline import outline, torch_imported
from pretrain.core.quick.quantities import as_typed
from pretrain.core.registry import info


class _RefMark:
    """Marks the fields that name an earlier stage or a path; `words` are what an error says of them."""

    words: ClassVar[str] = "the name of an earlier stage, or a path"


REF = _RefMark()
Ref = Annotated[str, REF]


@dataclass(frozen=True)
class Holds:
    """Marks the fields that hold a method of a kind: `NAME`, or `{method: NAME, field: value, …}`."""

    kind: str


InnerObjective = Annotated[Any, Holds("objective")]
InnerEvaluation = Annotated[Any, Holds("evaluation")]


def is_ref(annotation: object) -> bool:
    """Whether a type is `Ref`, or holds it: `Ref | None`, `tuple[Ref, ...]`."""
    return REF in getattr(annotation, "__metadata__", ()) or any(map(is_ref, get_args(annotation)))


class Method(metaclass=Fielded):
    """Base of the kinds. Fields are hyperparameters; `families` are the model families it works on (empty: any)."""

    if TYPE_CHECKING:  # each is a dataclass
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    kind: ClassVar[str]
    version: ClassVar[int] = 1  # raised when the same fields come to mean something else
    families: ClassVar[tuple[str, ...]] = ()
    shares_vocabulary: ClassVar[tuple[str, ...]] = ()  # references to checkpoints that must number tokens as the model

    def __post_init__(self) -> None:
        """Refuse a method that lacks what its kind asks for, and fields outside their bounds.

        A number, or a mapping, in the place of a list is a list of it alone. A method that checks more calls this
        first.
        """
        check_whole(type(self))
        gather_fields(self)
        check_fields(self, self.name)

    @property
    def name(self) -> str:
        """The method's name in recipes: that of its file."""
        return type(self).__module__.rpartition(".")[2]

    def held(self) -> dict[str, Any]:
        """The methods that fields of this one hold, by field."""
        defaults = {item.name: item.default for item in fields(self)}
        return {
            name: nested(of_default(getattr(self, name), defaults[name]), kind)
            for name, kind in _held_fields(type(self)).items()
        }

    def parts(self) -> tuple[str, ...]:
        """The names of the methods that this one is made of: with their code its results change."""
        return tuple(name for method in self.held().values() for name in (method.name, *method.parts()))

    def references(self) -> dict[str, str]:
        """What the fields of type `Ref` name, by field (`teacher`) or field and number (`teachers.0`).

        Those of a method that a field holds too (`objective.teacher`).
        """
        named = {f"{name}.{ref}": to for name, method in self.held().items() for ref, to in method.references().items()}
        for name in _ref_fields(type(self)):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                named |= {f"{name}.{number}": stage for number, stage in enumerate(value) if stage}
            elif value:
                named[name] = value
        return named

    def vocabularies(self) -> dict[str, str]:
        """Those of the references whose checkpoints must number tokens as the model does."""
        inside = {
            f"{name}.{ref}": to for name, method in self.held().items() for ref, to in method.vocabularies().items()
        }
        return inside | {n: to for n, to in self.references().items() if n.partition(".")[0] in self.shares_vocabulary}

    def pointing_to(self, places: dict[str, str]) -> Self:
        """The method with other values for its references, by the names that `references` gives them."""
        changed: dict[str, object] = {}
        for name, method in self.held().items():
            inside = {k.removeprefix(f"{name}."): v for k, v in places.items() if k.startswith(f"{name}.")}
            if inside:
                made = method.pointing_to(inside)
                changed[name] = {"method": made.name} | {item.name: getattr(made, item.name) for item in fields(made)}
        for name in _ref_fields(type(self)):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                changed[name] = tuple(places.get(f"{name}.{number}", stage) for number, stage in enumerate(value))
            elif value:
                changed[name] = places.get(name, value)
        return replace(self, **changed) if changed else self


def is_method(annotation: object) -> bool:
    """Whether a field's type is that of a kind of methods."""
    return isinstance(annotation, type) and issubclass(annotation, Method)


@cache
def _ref_fields(cls: type) -> tuple[str, ...]:
    return tuple(name for name, hint in hints(cls).items() if is_ref(hint))


@cache
def _held_fields(cls: type) -> dict[str, str]:
    marks = {name: getattr(hint, "__metadata__", ()) for name, hint in hints(cls).items()}
    return {name: mark.kind for name, of_it in marks.items() for mark in of_it if isinstance(mark, Holds)}


def method_class(name: str, kind: str | None = None) -> type[Method]:
    """Import one method's class."""
    row = info(name, kind)
    try:
        cls: type[Method] = getattr(importlib.import_module(row.module), row.cls)
        hints(cls)
    except (PretrainError, Terminated):
        raise
    except (Exception, SystemExit) as error:  # a file from outside may fail in any way
        if out_of_memory(error):
            raise
        kind_of = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise PretrainError(f"method {name!r} ({row.path}) cannot be imported: {kind_of}{error}") from error
    return cls


def declared_class(name: str, kind: str | None = None) -> type[Method]:
    """One method's class, to check fields with: before torch is imported its outline, which waits for no import."""
    row = info(name, kind)
    if torch_imported() or row.module in sys.modules:
        return method_class(name, kind)
    try:
        file = outline(row.module, row.path)
        cls = file[row.cls]
        if isinstance(cls, type) and issubclass(cls, Method) and (row.ours or not (file.absent() or file.acts)):
            hints(cls)
            return cls
    except Exception:  # whatever a file from outside does when it is taken to pieces
        pass
    return method_class(name, kind)  # the file as a whole says what is wrong, if anything is


def check_whole(cls: type[Method]) -> None:
    """Refuse a class that leaves out what the base of its kind only declares, with `@abstractmethod`."""
    for name in dir(cls):
        declared = getattr(cls, name)
        if getattr(declared, "__isabstractmethod__", False):
            words = f"def {name}({', '.join(signature(declared).parameters)})"
            file = cls.__module__.rpartition(".")[2]
            raise PretrainError(f"{file}: the {cls.kind} {cls.__name__} has no {name}; accepted: {words}")


def of_default(given: object, default: object) -> object:
    """A mapping of fields alone with the method that is meant: the field's default, where that is a method's name."""
    if isinstance(given, dict) and "method" not in given and isinstance(default, str):
        return {"method": default} | given
    return given


def nested(value: object, kind: str) -> Method:
    """A method that is a field of another: from `NAME` or `{method: NAME, field: value, …}`."""
    if isinstance(value, Method):
        return value
    declared = {"method": value} if isinstance(value, str) else value
    if not isinstance(declared, dict) or not isinstance(declared.get("method"), str):
        raise PretrainError(f"{value!r} is no {kind}; accepted: a name, or {{method: NAME, field: value}}")
    cls = declared_class(declared["method"], kind)
    given = {name: as_typed(value, hints(cls).get(name)) for name, value in declared.items() if name != "method"}
    check_names(cls, (), given, f"{kind} {declared['method']!r}")
    return cls(**given)


def default_of(item: Field[object]) -> str:
    """A field's default as text."""
    if item.default is not MISSING:
        return repr(item.default)
    return "required" if item.default_factory is MISSING else repr(item.default_factory())

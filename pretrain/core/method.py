"""What every method is, and how methods are found.

A method is one idea from one paper: a frozen dataclass whose fields are the paper's hyperparameters, in a file that
bears its name, in the folder of its kind. Its docstring opens with the paper's title and arXiv number. Nothing is
registered by hand: the folders are the registry, and listing them imports nothing.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import MISSING, Field, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

from pretrain.core.errors import PretrainError, unknown
from pretrain.core.files import digest

PACKAGE = Path(__file__).resolve().parent.parent
KINDS = {  # base class -> (kind, folder)
    "DataOperation": ("data operation", "data"),
    "Objective": ("objective", "objectives"),
    "FineTuning": ("objective", "objectives"),
    "Taught": ("objective", "objectives"),
    "Optimizer": ("optimiser", "optim"),
    "Schedule": ("schedule", "optim"),
    "Policy": ("policy", "policies"),
    "Surgery": ("surgery", "surgery"),
    "Decoding": ("decoding", "decoding"),
    "Evaluation": ("evaluation", "evaluation"),
}
_CLASS = re.compile(
    r'^@dataclass\(frozen=True\)\nclass (?P<cls>\w+)\((?P<base>\w+)\):\n    """(?P<doc>.+?)"""(?P<body>.*?)(?=^\S|\Z)',
    re.MULTILINE | re.DOTALL,
)
_TITLE = re.compile(r"(?P<title>.+?) \((?:arXiv:(?P<arxiv>[\w./-]+)|(?P<venue>[^()]+))\)\.?\Z", re.DOTALL)
_FAMILIES = re.compile(r"^    families: ClassVar\[.+?\] = \((?P<names>[^)]*)\)", re.MULTILINE)


class _RefMark:
    """Marks the fields that name an earlier stage or a path."""


REF = _RefMark()
Ref = Annotated[str, REF]


@dataclass(frozen=True)
class Holds:
    """Marks the fields that hold a method of a kind: `NAME`, or `{method: NAME, field: value, …}`."""

    kind: str


InnerObjective = Annotated[Any, Holds("objective")]
InnerEvaluation = Annotated[Any, Holds("evaluation")]


def is_ref(annotation: Any) -> bool:
    """Whether a type is `Ref`, or holds it: `Ref | None`, `tuple[Ref, ...]`."""
    return REF in getattr(annotation, "__metadata__", ()) or any(map(is_ref, get_args(annotation)))


class Method:
    """Base of the kinds. Fields are hyperparameters; `families` are the model families it works on (empty: any)."""

    families: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """The method's name in recipes: that of its file."""
        return type(self).__module__.rpartition(".")[2]

    def held(self) -> dict[str, Any]:
        """The methods that fields of this one hold, by field."""
        return {name: nested(getattr(self, name), kind) for name, kind in _held_fields(self.__class__).items()}  # type: ignore[arg-type]

    def parts(self) -> tuple[str, ...]:
        """The names of the methods that this one is made of: with their code its results change."""
        return tuple(name for method in self.held().values() for name in (method.name, *method.parts()))

    def references(self) -> dict[str, str]:
        """What the fields of type `Ref` name, by field (`teacher`) or field and number (`teachers.0`).

        Those of a method that a field holds too (`objective.teacher`).
        """
        found = {f"{name}.{ref}": to for name, method in self.held().items() for ref, to in method.references().items()}
        for name in _ref_fields(self.__class__):  # type: ignore[arg-type]
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                found |= {f"{name}.{number}": one for number, one in enumerate(value) if one}
            elif value:
                found[name] = value
        return found

    def pointing_to(self, places: dict[str, str]) -> Any:
        """The method with other values for its references, by the names that `references` gives them."""
        changed: dict[str, Any] = {}
        for name, method in self.held().items():
            inside = {k.removeprefix(f"{name}."): v for k, v in places.items() if k.startswith(f"{name}.")}
            if inside:
                made = method.pointing_to(inside)
                changed[name] = {"method": made.name} | {item.name: getattr(made, item.name) for item in fields(made)}
        for name in _ref_fields(self.__class__):  # type: ignore[arg-type]
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                changed[name] = tuple(places.get(f"{name}.{number}", one) for number, one in enumerate(value))
            elif value:
                changed[name] = places.get(name, value)
        return replace(self, **changed) if changed else self  # type: ignore[type-var]


@cache
def _ref_fields(cls: Any) -> tuple[str, ...]:
    hints = get_type_hints(cls, include_extras=True)
    return tuple(item.name for item in fields(cls) if is_ref(hints[item.name]))


@cache
def _held_fields(cls: Any) -> dict[str, str]:
    hints = get_type_hints(cls, include_extras=True)
    marks = {item.name: getattr(hints[item.name], "__metadata__", ()) for item in fields(cls)}
    return {name: mark.kind for name, of_it in marks.items() for mark in of_it if isinstance(mark, Holds)}


@dataclass(frozen=True)
class MethodInfo:
    """A row of the list of methods, read from the source without importing it."""

    name: str
    kind: str
    title: str
    arxiv: str | None
    families: tuple[str, ...]
    module: str
    cls: str
    path: Path

    def row(self) -> dict[str, Any]:
        """What `pretrain methods --json` prints."""
        return {k: getattr(self, k) for k in ("name", "kind", "title", "arxiv", "families")}


def _read(path: Path) -> MethodInfo | None:
    found = [m for m in _CLASS.finditer(path.read_text(encoding="utf-8")) if m["base"] in KINDS]
    if not found:
        return None
    if len(found) > 1:
        raise PretrainError(f"{path} defines {len(found)} methods; accepted: one method a file")
    match = found[0]
    title = _TITLE.match(" ".join(match["doc"].split("\n\n")[0].split()))
    if title is None:
        raise PretrainError(f"{path}: the docstring of {match['cls']} must open with 'Title (arXiv:NUMBER).'")
    families = _FAMILIES.search(match["body"])
    return MethodInfo(
        name=path.stem,
        kind=KINDS[match["base"]][0],
        title=title["title"],
        arxiv=title["arxiv"],
        families=tuple(re.findall(r"[\"']([\w.-]+)[\"']", families["names"])) if families else (),
        module=f"pretrain.{path.parent.name}.{path.stem}",
        cls=match["cls"],
        path=path,
    )


@cache
def methods() -> dict[str, MethodInfo]:
    """All methods by name, in the order of kinds; reads the source files and imports none."""
    found: dict[str, MethodInfo] = {}
    for folder in dict.fromkeys(folder for _, folder in KINDS.values()):
        for path in sorted((PACKAGE / folder).glob("[!_]*.py")):
            info = _read(path)
            if info is None:
                continue
            if info.name in found:
                raise PretrainError(f"two methods are named {info.name!r}: {found[info.name].path} and {path}")
            found[info.name] = info
    return found


def info(name: str, kind: str | None = None) -> MethodInfo:
    """The row of one method; an unknown name, or one of another kind, is an error that lists what is accepted."""
    known = {n: m for n, m in methods().items() if kind is None or m.kind == kind}
    if name not in known:
        if name in methods():
            raise PretrainError(
                f"method {name!r} is of kind {methods()[name].kind!r}, not {kind!r}; accepted: {', '.join(known)}"
            )
        raise unknown(kind or "method", name, known)
    return known[name]


def method_class(name: str, kind: str | None = None) -> type[Method]:
    """Import one method's class."""
    found = info(name, kind)
    return getattr(importlib.import_module(found.module), found.cls)


def nested(value: Any, kind: str) -> Any:
    """A method that is a field of another: from `NAME` or `{method: NAME, field: value, …}`."""
    if isinstance(value, Method):
        return value
    said = {"method": value} if isinstance(value, str) else value
    if not isinstance(said, dict) or not isinstance(said.get("method"), str):
        raise PretrainError(f"{value!r} is no {kind}; accepted: a name, or {{method: NAME, field: value}}")
    cls = method_class(said["method"], kind)
    try:
        return cls(**{name: given for name, given in said.items() if name != "method"})
    except TypeError as error:
        accepted = ", ".join(item.name for item in fields(cls)) or "none"  # type: ignore[arg-type]
        raise PretrainError(f"{kind} {said['method']!r}: {error}; accepted fields: {accepted}") from error


def default_of(item: Field[Any]) -> str:
    """A field's default as text."""
    if item.default is not MISSING:
        return repr(item.default)
    return "required" if item.default_factory is MISSING else repr(item.default_factory())


def code_version(name: str) -> str:
    """A digest of the method's source text and of its folder's helpers: it changes when the method's code does."""
    path = info(name).path
    return digest([p.read_text(encoding="utf-8") for p in (path, *sorted(path.parent.glob("_*.py")))])[:16]

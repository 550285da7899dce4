"""Recipes: a YAML list of stages, checked as a whole before anything runs.

Every mistake is one line that names the file and line, the place, the value and what is accepted.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pretrain.core.errors import PretrainError, nearest
from pretrain.stages import Stage, stage_classes

FIELDS = ("name", "seed", "output", "base", "set", "stages")


class _Loader(yaml.SafeLoader):
    """YAML with `1e6` read as a number, and no key given twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)$|^[-+]?[0-9][0-9_]*\.[0-9_]*$|^[-+]?\.(inf|nan)$"
    ),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe."""

    name: str
    seed: int
    output: Path
    stages: list[Stage]
    raw: dict[str, Any] = field(default_factory=dict)  # as read, with `base` and overrides worked in
    path: Path | None = None


def load(path: Path | str, overrides: Iterable[str] = (), output: Path | str | None = None) -> Recipe:
    """Read and check a recipe; `overrides` are `path.to.field=value`, the path beginning with a stage's name."""
    path = Path(path)
    raw, lines = read(path)
    for override in overrides:
        name, found, value = override.partition("=")
        if not found:
            raise PretrainError(f"--set {override!r}: accepted: path.to.field=value")
        put(raw, name.strip(), parse(value), "--set")
    return check(raw, path, lines, output)


def read(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[tuple[Any, ...], int]]:
    """A recipe's mapping, with its `base` and `set` worked in, and the line of each place."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PretrainError(f"recipe {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        node = yaml.compose(text, Loader=_Loader)
        lines = {} if node is None else _lines(node, (), path)
        raw = _unshared(yaml.load(text, Loader=_Loader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise PretrainError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(raw, dict):
        raise PretrainError(f"{path}: accepted: a mapping with {', '.join(FIELDS)}")
    for key in raw:
        if key not in FIELDS:
            hint = nearest(str(key), FIELDS)
            raise PretrainError(
                f"{path}:{lines.get((key,), 1)}: unknown field {key!r}{hint}; accepted: {', '.join(FIELDS)}"
            )
    if "base" in raw:
        base = (path.parent / str(raw["base"])).resolve()
        if base in seen:
            raise PretrainError(f"{path}:{lines.get(('base',), 1)}: base {raw['base']!r} leads back to itself")
        inherited, inherited_lines = read(base, (*seen, path.resolve()))
        if "stages" in raw:
            inherited["stages"], inherited_lines = raw["stages"], lines
        raw = inherited | {k: v for k, v in raw.items() if k not in ("base", "stages")}
        lines = inherited_lines | {k: v for k, v in lines.items() if k[:1] == ("set",)}
    for name, value in (raw.pop("set", None) or {}).items():
        put(raw, str(name), value, f"{path}:{lines.get(('set', name), 1)}: set")
    return raw, lines


def _unshared(value: Any) -> Any:
    """The value with a copy wherever YAML's aliases share one, so that changing one place changes no other."""
    if isinstance(value, dict):
        return {k: _unshared(v) for k, v in value.items()}
    return [_unshared(v) for v in value] if isinstance(value, list) else value


def _lines(node: yaml.Node, place: tuple[Any, ...], path: Path) -> dict[tuple[Any, ...], int]:
    """The line (from 1) of each place in the document; a key given twice is an error."""
    found = {place: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        names = set()
        for key, value in node.value:
            if key.value in names:
                raise PretrainError(f"{path}:{key.start_mark.line + 1}: {key.value!r} is given twice")
            names.add(key.value)
            found |= _lines(value, (*place, key.value), path)
            found[(*place, key.value)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found |= _lines(value, (*place, index), path)
    return found


def parse(value: str) -> Any:
    """A value as YAML reads it."""
    try:
        return yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise PretrainError(f"value {value!r} is not valid YAML") from error


def put(raw: dict[str, Any], name: str, value: Any, where: str) -> None:
    """Set `name` (`STAGE.field.field`, `stages.STAGE.field`, `stages.0.field`, or a top field) to `value`."""
    steps = name.split(".")
    stages = raw.get("stages") or []
    if steps[0] == "stages":
        steps = steps[1:]
    elif len(steps) == 1:
        if steps[0] not in FIELDS:
            raise PretrainError(f"{where} {name!r}: accepted: one of {', '.join(FIELDS)}, or STAGE.field")
        raw[steps[0]] = value
        return
    names = [s.get("name") or s.get("stage") for s in stages if isinstance(s, dict)]
    if steps[0] in names:
        target: Any = stages[names.index(steps[0])]
    elif steps[0].isdigit() and int(steps[0]) < len(stages):
        target = stages[int(steps[0])]
    else:
        hint = nearest(steps[0], filter(None, names))
        raise PretrainError(
            f"{where} {name!r}: no stage {steps[0]!r}{hint}; accepted: {', '.join(filter(None, names))}"
        )
    for step in steps[1:-1]:
        if isinstance(target, list) and step.isdigit() and int(step) < len(target):
            target = target[int(step)]
            continue
        if isinstance(target.get(step), str):  # `optimizer: adamw` grows into a mapping
            target[step] = {"method": target[step]}
        target = target.setdefault(step, {})
        if not isinstance(target, dict | list):
            raise PretrainError(f"{where} {name!r}: {step!r} is {target!r}, which has no fields")
    if steps[-1] in ("tokens", "steps", "flops", "seconds") and len(steps) > 1 and steps[-2] == "budget":
        target.clear()  # a budget is of one unit
    if isinstance(target, list):
        target[int(steps[-1])] = value
    else:
        target[steps[-1]] = value


def check(
    raw: dict[str, Any],
    path: Path | None = None,
    lines: dict[tuple[Any, ...], int] | None = None,
    output: Path | str | None = None,
) -> Recipe:
    """Check a recipe's mapping and build its stages."""
    where, lines = str(path or "recipe"), lines or {}
    name = raw.get("name") or (path.stem if path else "run")
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
        raise PretrainError(
            f"{where}:{lines.get(('name',), 1)}: name {name!r}: accepted: letters, digits, '.', '_', '-'"
        )
    seed = raw.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise PretrainError(f"{where}:{lines.get(('seed',), 1)}: seed {seed!r}: accepted: a whole number of 0 or more")
    given = raw.get("stages")
    if not isinstance(given, list) or not given:
        raise PretrainError(f"{where}:{lines.get(('stages',), 1)}: stages: accepted: a list of at least one stage")
    stages: list[Stage] = []
    for index, entry in enumerate(given):
        stages.append(_stage(entry, index, where, lines, [stage.name for stage in stages]))
    folder = Path(output) if output is not None else Path(raw.get("output") or Path("runs") / name)
    return Recipe(name, seed, folder, stages, copy.deepcopy(raw), path)


def _stage(entry: Any, index: int, where: str, lines: dict[tuple[Any, ...], int], earlier: list[str]) -> Stage:
    known = stage_classes()
    line = lines.get(("stages", index), 1)
    if not isinstance(entry, dict) or "stage" not in entry:
        raise PretrainError(f"{where}:{line}: stages.{index}: accepted: a mapping with stage: {', '.join(known)}")
    kind = entry["stage"]
    if kind not in known:
        line = lines.get(("stages", index, "stage"), line)
        hint = nearest(str(kind), known)
        raise PretrainError(
            f"{where}:{line}: stages.{index}.stage: unknown stage {kind!r}{hint}; accepted: {', '.join(known)}"
        )
    entry = {"name": kind} | entry
    if not re.fullmatch(r"[\w-]+", str(entry["name"])):
        raise PretrainError(
            f"{where}:{line}: stages.{index}.name {entry['name']!r}: accepted: letters, digits, '_', '-'"
        )
    if entry["name"] in earlier:
        raise PretrainError(
            f"{where}:{line}: two stages are named {entry['name']!r}; accepted: a name of its own for each"
        )
    label = entry["name"]
    try:
        stage = known[kind].model_validate(copy.deepcopy(entry))
    except ValidationError as error:
        raise PretrainError(_explain(error, known[kind], index, label, where, lines)) from error
    except PretrainError as error:
        raise PretrainError(f"{where}:{line}: {label}: {error}") from error
    for name, value in stage.references().items():
        for number, one in enumerate(value if isinstance(value, list) else [value]):
            if one in earlier or Path(one).expanduser().exists():
                continue
            place = ("stages", index, name, number) if isinstance(value, list) else ("stages", index, name)
            accepted = f"an earlier stage ({', '.join(earlier) or 'there is none'}) or a path that exists"
            hint = nearest(one, earlier)
            raise PretrainError(
                f"{where}:{lines.get(place, line)}: {label}.{name}: {one!r}{hint}; accepted: {accepted}"
            )
    return stage


def _explain(
    error: ValidationError, cls: type[BaseModel], index: int, label: str, where: str, lines: dict[tuple[Any, ...], int]
) -> str:
    """The first mistake as one line."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    place = tuple(first["loc"])
    line = 1
    for length in range(len(place), -1, -1):
        if ("stages", index, *place[:length]) in lines:
            line = lines[("stages", index, *place[:length])]
            break
    dotted = ".".join([label, *map(str, place)])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = [name for name in cls.model_fields if name != "version"]
        return f"{where}:{line}: {dotted}: unknown field{nearest(str(place[-1]), known)}; accepted: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{where}:{line}: {dotted}: missing; accepted: a value for this field"
    if first["type"] == "value_error":
        return f"{where}:{line}: {dotted}: {message}"
    value = repr(first["input"])
    return f"{where}:{line}: {dotted}: {value if len(value) < 80 else value[:77] + '...'}: {message}"

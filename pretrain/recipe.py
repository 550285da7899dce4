"""Recipes: a YAML list of stages, checked as a whole before anything runs.

Every mistake is one line that names the file and line, the place, the value and what is accepted.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from pydantic import ValidationError

from pretrain.core.bounds import Seed, fits
from pretrain.core.errors import PretrainError, brief, nearest, steps_of
from pretrain.core.files import JSON, JSONObject
from pretrain.core.folders import stage_kinds
from pretrain.core.foreign import yaml
from pretrain.core.foreign.paths import expanded
from pretrain.core.quick import hub
from pretrain.core.quick.imports import uncollected
from pretrain.core.quick.outline import torch_imported
from pretrain.core.quick.quantities import as_typed
from pretrain.core.registry import use_methods
from pretrain.core.system.shipped import recipe_file
from pretrain.stages import Stage, first_mistake, stage_classes
from pretrain.stages._size import Settled, settle
from pretrain.training.budget import UNITS

FIELDS = ("name", "seed", "output", "base", "set", "methods", "stages")
TAKEN = re.compile(r".*-[0-9a-f]{12}|ladder")  # what else lies in a run's folder, beside the links to its stages
Place = tuple[str | int, ...]  # of a value in a recipe: ("stages", 1, "optimizer", "lr")
Raw: TypeAlias = JSONObject  # a recipe as it is read, with nothing checked
Places = dict[Place, str]  # where each stands: FILE:LINE


@dataclass(frozen=True)
class Recipe:
    """A checked recipe."""

    name: str
    seed: int
    output: Path
    stages: list[Stage]
    raw: Raw = field(default_factory=dict)  # as read, with `base` and overrides worked in
    path: Path | None = None
    places: Places = field(default_factory=dict, repr=False)
    outlined: bool = False  # whether it was checked without torch: its methods are outlines
    sizes: list[Settled] = field(default_factory=list, repr=False)  # what the dial has chosen
    asked: Raw = field(default_factory=dict, repr=False)  # `raw` before it did
    given: tuple[str, ...] = ()  # the options that it was read with, as a command has them

    def at(self, stage: Stage, place: Place = ()) -> str:
        """Where a value of a stage stands, as errors begin: `FILE:LINE: STAGE.field`."""
        where = _blamed(self.places, ("stages", self.stages.index(stage), *place), str(self.path or "recipe"))
        return f"{where}: {'.'.join(map(str, (stage.name, *place)))}"


def load(path: Path | str, overrides: Iterable[str] = (), output: Path | str | None = None) -> Recipe:
    """Read and check a recipe; `overrides` are `path.to.field=value`, the path beginning with a stage's name."""
    if isinstance(overrides, str | Mapping):
        raise PretrainError(f"overrides {brief(overrides)}: accepted: a list of STAGE.field=value, each a text")
    path = recipe_file(path)
    raw, places = read(path)
    given = ["--output", str(output)] if output is not None else []
    for override in overrides:
        given += ["--set", override]
        name, equals, value = override.partition("=")
        if not equals:
            raise PretrainError(f"--set {override!r}: accepted: path.to.field=value")
        try:
            parsed = parse(value)
        except PretrainError as error:
            raise PretrainError(f"--set {override}: {error}") from error
        _move(places, put(raw, name.strip(), parsed, "--set"), f"--set {override}")
    return replace(check(raw, path, places, output), given=tuple(given))


def read(path: Path, seen: tuple[Path, ...] = ()) -> tuple[Raw, Places]:
    """A recipe's mapping, with its `base` and `set` worked in, and where each value stands."""
    raw, places = _read_file(path)
    for key in raw:
        if key not in FIELDS:
            hint = nearest(str(key), FIELDS)
            raise PretrainError(
                f"{_at(places, (key,), path)}: unknown field {key!r}{hint}; accepted: {', '.join(FIELDS)}"
            )
    if isinstance(raw.get("methods"), str):
        raw["methods"] = str((path.parent / expanded(raw["methods"])).resolve())
    if raw.get("base") is not None:
        where = _at(places, ("base",), path)
        base = (path.parent / str(raw["base"])).resolve()
        if base in (*seen, path.resolve()):
            raise PretrainError(f"{where}: base {raw['base']!r} leads back to itself")
        if not base.is_file():
            raise PretrainError(f"{where}: base {raw['base']!r}: there is no {base}; accepted: a recipe's path")
        inherited, inherited_places = read(base, (*seen, path.resolve()))
        replaced = [k for k in raw if k not in ("base", "set")]
        places |= {k: v for k, v in inherited_places.items() if k and k[0] not in replaced}
        raw = inherited | raw
    changes = raw.get("set") or {}
    if not isinstance(changes, dict):
        where = _at(places, ("set",), path)
        raise PretrainError(f"{where}: set {brief(changes)}: accepted: a mapping from STAGE.field to a value")
    raw = {k: v for k, v in raw.items() if k not in ("base", "set")}
    for name, value in changes.items():
        where = _at(places, ("set", name), path)
        _move(places, put(raw, str(name), value, f"{where}: set"), where)
    return raw, places


def _read_file(path: Path) -> tuple[Raw, Places]:
    """One file's mapping as it stands."""
    try:
        text = yaml.read_text(path)
    except PretrainError as error:
        raise PretrainError(f"recipe {error}") from error
    raw, places = yaml.loads(text, str(path))
    if not isinstance(raw, dict):
        shown = "the recipe is empty" if raw is None else brief(raw)
        raise PretrainError(f"{path}: {shown}; accepted: a mapping with stages: a list, and {', '.join(FIELDS[:-1])}")
    return raw, places


def _at(places: Places, place: Place, otherwise: Path | str = "recipe") -> str:
    """Where a value stands, or the nearest thing that holds it."""
    return next((places[place[:n]] for n in range(len(place), -1, -1) if place[:n] in places), str(otherwise))


def _move(places: Places, place: Place, where: str) -> None:
    """Note that the value at a place, and all in it, comes from elsewhere."""
    for old in [known for known in places if known[: len(place)] == place]:
        del places[old]
    places[place] = where


def parse(value: str) -> JSON:
    """A value as YAML reads it."""
    return yaml.loads(value, f"value {brief(value)}")[0]


def put(raw: Raw, name: str, value: JSON, where: str) -> Place:
    """Set `name` (`STAGE.field.field`, `stages.STAGE.field`, `stages.0.field`, or a top field); returns its place."""
    steps = name.split(".")
    stages = raw["stages"] if isinstance(raw.get("stages"), list) else []
    if steps[0] == "stages" and len(steps) > 1:
        steps = steps[1:]
    elif len(steps) == 1:
        accepted = [field for field in FIELDS if field not in ("base", "set")]
        if steps[0] not in accepted:
            raise PretrainError(f"{where} {name!r}: accepted: one of {', '.join(accepted)}, or STAGE.field")
        raw[steps[0]] = value
        return (steps[0],)
    names = [str(s.get("name") or s.get("stage")) if isinstance(s, dict) else "" for s in stages]
    known = ", ".join(filter(None, names))
    if steps[0] in names:
        index = names.index(steps[0])
    elif steps[0].isdecimal() and int(steps[0]) < len(stages):
        index = int(steps[0])
    else:
        of_kind = [names[i] for i, s in enumerate(stages) if isinstance(s, dict) and s.get("stage") == steps[0]]
        hint = f" (did you mean {of_kind[0]!r}?)" if len(of_kind) == 1 else nearest(steps[0], filter(None, names))
        raise PretrainError(f"{where} {name!r}: no stage {steps[0]!r}{hint}; accepted: {known or 'none'}")
    if len(steps) == 1:
        stages[index] = value
        return ("stages", index)
    target, place = stages[index], list[str | int](("stages", index))
    for step in steps[1:-1]:
        key = _key(target, step, name, where)
        if isinstance(target, dict) and isinstance(target.get(step), str):  # `optimizer: adamw` grows into a mapping
            target[step] = {"method": target[step]}
        elif isinstance(target, dict) and target.get(step) is None:
            target[step] = {}
        target = target[key]
        place.append(key)
    key = _key(target, steps[-1], name, where)
    if steps[-1] in UNITS and len(steps) > 2 and steps[-2] == "budget":
        target.clear()  # a budget is of one unit
    target[key] = value
    return (*place, key)


def _key(target: object, step: str, name: str, where: str) -> str | int:
    """A step of an override's path as a key of what it leads into."""
    if isinstance(target, dict):
        return step
    if not isinstance(target, list):
        raise PretrainError(f"{where} {name!r}: {step!r} is asked of {brief(target)}, which has no fields")
    if not step.isdecimal() or int(step) >= len(target):
        accepted = f"a number from 0 to {len(target) - 1}" if target else "another value for the list, which is empty"
        raise PretrainError(f"{where} {name!r}: {step!r} of a list; accepted: {accepted}")
    return int(step)


def check(raw: Raw, path: Path | None = None, places: Places | None = None, output: Path | str | None = None) -> Recipe:
    """Check a recipe's mapping and build its stages."""
    whole, places = str(path or "recipe"), places or {}
    outlined = not torch_imported()

    def wrong(name: str, accepted: str) -> PretrainError:
        shown = "is missing" if raw.get(name) is None else brief(raw[name])
        return PretrainError(f"{_at(places, (name,), whole)}: {name} {shown}: accepted: {accepted}")

    name = raw.get("name")
    name = (path.stem if path else "run") if name is None else name
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]{0,99}", name):
        raise wrong("name", "letters, digits, '.', '_', '-', at most 100 (in quotes if there are digits only)")
    seed = as_typed(raw.get("seed", 0), int)
    if not isinstance(seed, int) or not fits(seed, Seed):
        raise wrong("seed", "a whole number of 0 or more, below 2**63")
    declared_output = raw.get("output")
    if declared_output is not None and (not isinstance(declared_output, str) or not declared_output.strip()):
        raise wrong("output", "a folder's path")
    outside = raw.get("methods")
    if outside is not None and not isinstance(outside, str):
        raise wrong("methods", "the path of a folder of methods, one a file")
    if outside is not None:
        try:
            use_methods(outside)
        except PretrainError as error:
            raise PretrainError(f"{_at(places, ('methods',), whole)}: {error}") from error
    try:
        folder = Path(output) if output is not None else Path(expanded(declared_output or Path("runs") / name))
    except PretrainError as error:
        raise PretrainError(f"{_at(places, ('output',), whole)}: output: {error}") from error
    asked = raw
    try:
        raw, sizes = settle(raw, folder)
    except PretrainError as error:
        raise PretrainError(f"{_blamed(places, error.place, whole)}: {error}") from error
    given = raw.get("stages")
    if not isinstance(given, list) or not given:
        raise wrong("stages", "a list of at least one stage")
    stages: list[Stage] = []
    for index, entry in enumerate(given):
        earlier_kinds = {stage.name: stage.stage for stage in stages}
        stages.append(_stage(entry, index, whole, places, earlier_kinds, _names(given[index + 1 :])))
        try:
            earlier = {stage.name: stage for stage in stages[:-1]}
            stages[-1].check_trusted(earlier)
            stages[-1].check_inputs(earlier)
        except PretrainError as error:
            where = _blamed(places, ("stages", index, *error.place), whole)
            raise PretrainError(f"{where}: {'.'.join(map(str, (stages[-1].name, *error.place)))}: {error}") from error
    return Recipe(name, seed, folder, stages, copy.deepcopy(raw), path, places, outlined, sizes, asked)


def whole(recipe: Recipe) -> Recipe:
    """A recipe to run: one that was checked without torch is checked again, with its methods' own classes."""
    if not recipe.outlined:
        return recipe
    with uncollected():
        import torch  # noqa: F401 - from here on methods are made by their own classes

        raw = recipe.asked if recipe.sizes else recipe.raw  # sizes go by the machine's rate, which is known from now on
        return replace(check(raw, recipe.path, recipe.places, recipe.output), given=recipe.given)


def _names(entries: Sequence[object]) -> set[str]:
    """The names of stages that are not checked yet, as far as they have any."""
    return {str(entry.get("name", entry.get("stage"))) for entry in entries if isinstance(entry, dict)}


def _stage(
    entry: object, index: int, whole: str, places: Places, earlier: dict[str, str], later: Collection[str]
) -> Stage:
    known, where = stage_classes(), _at(places, ("stages", index), whole)
    if not isinstance(entry, dict) or "stage" not in entry:
        raise PretrainError(f"{where}: stages.{index}: accepted: a mapping with stage: {', '.join(known)}")
    kind = entry["stage"]
    if not isinstance(kind, str) or kind not in known:
        where, hint = _at(places, ("stages", index, "stage"), whole), nearest(str(kind), known)
        name = entry.get("name")
        place = name if isinstance(name, str) else f"stages.{index}"
        raise PretrainError(f"{where}: {place}.stage: unknown stage {brief(kind)}{hint}; accepted: {', '.join(known)}")
    entry = {"name": kind} | entry
    if not isinstance(entry["name"], str) or not re.fullmatch(r"[\w-]{1,100}", entry["name"]):
        where = _at(places, ("stages", index, "name"), whole)
        shown = brief(entry["name"])
        raise PretrainError(
            f"{where}: stages.{index}.name {shown}: accepted: letters, digits, '_', '-', at most 100, as text"
        )
    if TAKEN.fullmatch(entry["name"]):
        where = _at(places, ("stages", index, "name"), whole)
        raise PretrainError(
            f"{where}: stages.{index}.name {entry['name']!r}: a run has a folder of such a name; accepted: another "
            "than ladder, without an end of '-' and twelve digits of 0-9 and a-f"
        )
    if entry["name"] in earlier:
        raise PretrainError(f"{where}: two stages are named {entry['name']!r}; accepted: a name of its own for each")
    unnamed = next((key for key in entry if not isinstance(key, str)), None)
    if unnamed is not None:
        where = _at(places, ("stages", index, str(unnamed)), whole)
        raise PretrainError(f"{where}: {entry['name']}: field {unnamed!r}: accepted: a word")
    try:
        stage = known[kind].model_validate(copy.deepcopy(entry))
    except ValidationError as error:
        raise PretrainError(_explain(error, known[kind], index, entry["name"], whole, places)) from error
    except PretrainError as error:
        where = _blamed(places, ("stages", index, *error.place), whole)
        raise PretrainError(f"{where}: {'.'.join(map(str, (entry['name'], *error.place)))}: {error}") from error
    _check_references(stage, index, whole, places, earlier, later)
    return stage


def _check_references(
    stage: Stage, index: int, whole: str, places: Places, earlier: dict[str, str], later: Collection[str]
) -> None:
    """Each reference must name an earlier stage, of a kind that fits the field, or a path that exists."""
    for name, value in stage.references().items():
        steps = steps_of(name)
        for number, target in enumerate(value if isinstance(value, list) else [value]):
            place = ("stages", index, *steps, *((number,) if isinstance(value, list) else ()))
            accepted = stage.accepts.get(name.rpartition(".")[2])
            if target in earlier and (accepted is None or earlier[target] in accepted):
                continue
            if target in earlier:
                fitting = [stage for stage, kind in earlier.items() if kind in (accepted or ())]
                wrong = (
                    f"{target!r} is a {earlier[target]} stage; accepted: a stage of kind {' or '.join(accepted or ())}"
                )
                wrong += f" ({', '.join(fitting)})" if fitting else ""
            elif _is_there(target, _at(places, place, whole), f"{stage.name}.{name}"):
                if not (wrong := _whole_run(target, accepted, name)):
                    continue
            else:
                known = ", ".join(earlier) or "there is none"
                turn, wrong = _out_of_turn(target, stage.name, later), ""
                hint = "" if turn else nearest(target, earlier)
                if accepted is not None and "data" not in accepted and not hint and hub.looks_like(target):
                    try:
                        hub.pin(target)
                        continue
                    except PretrainError as error:
                        wrong = "" if turn else f", and {error}"
                wrong = f"{target!r}{hint}{turn}; accepted: an earlier stage ({known}) or a path that exists{wrong}"
            raise PretrainError(f"{_at(places, place, whole)}: {stage.name}.{name}: {wrong}")


def _out_of_turn(target: str, stage: str, later: Collection[str]) -> str:
    """That what is named is a stage for all that: the one that names it, or one that stands below."""
    if target == stage:
        return " is this stage itself"
    return " is a stage that stands below, and a stage reads those above it" if target in later else ""


def _blamed(places: Places, place: Place, whole: str) -> str:
    """Where a mistake stands: what `--set` has put there, or the line, with what `--set` has changed in it."""
    where = _at(places, place, whole)
    if where.startswith("--set "):
        return where
    inside = [known for known in places if known[: len(place)] == place and len(known) > len(place)]
    values = [known for known in inside if not any(other[:-1] == known for other in inside)]
    if values and all(places[known].startswith("--set ") for known in values):
        return ", ".join(dict.fromkeys(places[known] for known in values))
    if len(place) > 3 and isinstance(place[-1], str):  # of a mapping's field: the mistake may lie in one beside it
        place = place[:-1]
    near = [w for inner, w in places.items() if inner[: len(place)] == place and len(inner) > len(place)]
    changed = list(dict.fromkeys(w for w in near if w.startswith("--set ")))
    return f"{where} with {', '.join(changed)}" if changed else where


def _is_there(target: str, where: str, name: str) -> bool:
    """Whether a reference is a path that exists, or names a result of a run."""
    try:
        return hub.located(target, name).exists()
    except PretrainError as error:
        raise PretrainError(f"{where}: {name}: {error}") from error


def _whole_run(target: str, kinds: Sequence[str] | None, field: str) -> str:
    """What is wrong with a path that is a run and none of its stages; nothing where it is none."""
    run = hub.located(target, field)
    if not (run / "run.json").exists():
        return ""
    fitting = [
        f"{target.rstrip('/')}/{name}" for name, kind in stage_kinds(run).items() if kinds is None or kind in kinds
    ]
    return f"{target!r} is a run; accepted: one of its stages ({', '.join(fitting) or 'it has none that fits'})"


def _explain(error: ValidationError, cls: type[Stage], index: int, label: str, whole: str, places: Places) -> str:
    """The first mistake as one line."""
    place, deeper, message = first_mistake(error, cls)
    where = _blamed(places, ("stages", index, *place, *deeper), whole)
    return f"{where}: {'.'.join([label, *map(str, place or deeper)])}: {message}"

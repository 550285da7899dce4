"""The plan of a run: each stage with its address, its folder and what it reads; and why it would run or not.

An address is a digest of the stage's configuration, of the versions that it and its methods declare, of its seed and of
the addresses of its inputs. The code is no part of it: a comment retrains nothing. A stage that is asked for anew gets
a generation, which is part of its address from then on, so what was there stays until the new result is whole, and an
interrupted one goes on as such.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.core.errors import PretrainError, unknown
from pretrain.core.files import digest, read_json
from pretrain.core.registry import info, methods
from pretrain.identity import Code, changes, code_of
from pretrain.recipe import Recipe
from pretrain.stages import Stage

GENERATIONS = "generations.json"  # in the output: by stage, how often it was asked for anew


@dataclass(frozen=True)
class Planned:
    """A stage with its address and folder."""

    stage: Stage
    address: str
    folder: Path
    inputs: dict[str, Any]
    addresses: dict[str, Any]  # of the inputs
    outside: str  # a digest of what it reads besides
    config: dict[str, Any]
    behind: tuple[str, ...]  # the stages that this one comes from
    seed: int
    generation: int = 0

    @property
    def finished(self) -> bool:
        """Whether it has been run."""
        return (self.folder / "stage.json").exists()

    def code(self) -> Code:
        """The code that this stage runs: its own, its methods', and that of surgeries recorded in its inputs."""
        names = {*self.stage.methods(), *_surgeries(self.inputs.values())} & set(methods())
        return code_of([Path(inspect.getfile(type(self.stage))), *(info(name).path for name in sorted(names))])

    def drift(self) -> list[str]:
        """What has changed in the code since the stage was run, in words; nothing for one from elsewhere."""
        before = read_json(self.folder / "stage.json").get("code")
        return changes(before, self.code()) if before else []


def plan(recipe: Recipe, store: Path | str | None = None, refresh: Collection[str] = ()) -> list[Planned]:
    """Each stage with its address, its folder (in `store`, by default in the recipe's output) and what it reads.

    The stages named in `refresh` get a generation of their own, unless the newest of them is unfinished.
    """
    names = [stage.name for stage in recipe.stages]
    for name in refresh:
        if name not in names:
            raise unknown("stage to refresh", name, names)
    generations = _generations(recipe.output)
    planned: dict[str, Planned] = {}
    for stage in recipe.stages:
        item = _planned(recipe, stage, planned, store, generations.get(stage.name, 0))
        if stage.name in refresh and item.finished:
            item = _planned(recipe, stage, planned, store, item.generation + 1)
        planned[stage.name] = item
    return list(planned.values())


def _planned(
    recipe: Recipe, stage: Stage, planned: dict[str, Planned], store: Path | str | None, generation: int
) -> Planned:
    addresses: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    behind: set[str] = set()
    for name, value in stage.references().items():
        many = value if isinstance(value, list) else [value]
        folders = [planned[ref].folder if ref in planned else Path(ref).expanduser() for ref in many]
        marks = [planned[ref].address if ref in planned else _fingerprint(Path(ref).expanduser()) for ref in many]
        inputs[name], addresses[name] = (folders, marks) if isinstance(value, list) else (folders[0], marks[0])
        behind = behind.union(*({ref, *planned[ref].behind} for ref in many if ref in planned))
    try:
        outside = digest(stage.outside())
    except PretrainError as error:
        raise PretrainError(f"{recipe.at(stage, error.place)}: {error}") from error
    config, seed = stage.config(), recipe.seed if stage.seed is None else stage.seed
    parts = [_without(config, addresses), addresses, outside, seed if stage.seeded else None]
    address = digest(parts + [generation] * (generation > 0))
    folder = Path(recipe.output if store is None else store) / f"{stage.name}-{address[:12]}"
    upstream = tuple(name for name in planned if name in behind)
    return Planned(stage, address, folder, inputs, addresses, outside, config, upstream, seed, generation)


def _generations(output: Path) -> dict[str, int]:
    path = output / GENERATIONS
    return read_json(path) if path.exists() else {}


def _without(config: dict[str, Any], places: Iterable[str]) -> dict[str, Any]:
    """The configuration without the names that references give and without the seed, which are hashed apart."""
    config = copy.deepcopy({k: v for k, v in config.items() if k != "seed"})
    for place in places:
        *steps, last = (int(step) if step.isdigit() else step for step in place.split("."))
        target: Any = config
        for step in steps:
            target = target[step]
        target[last] = None
    return config


def _fingerprint(path: Path) -> str:
    """The state of an outside file or folder: names, sizes and times."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return digest([[str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns] for p in files])


def _surgeries(inputs: Iterable[Any]) -> set[str]:
    """The surgeries that checkpoints among the inputs record, which are repeated when they are opened."""
    found: set[str] = set()
    for folder in (folder for value in inputs for folder in (value if isinstance(value, list) else [value])):
        for path in (folder / "checkpoint" / "pretrain.json", folder / "pretrain.json"):
            if path.is_file():
                found |= {str(entry.get("method")) for entry in read_json(path).get("surgery", [])}
    return found & set(methods())


def why(item: Planned) -> list[str]:
    """Why a stage would run, or why not, in a few words each."""
    if item.finished:
        record = read_json(item.folder / "stage.json")
        words = [f"{'adopted' if record.get('adopted') else 'finished'} {record['finished']}"]
        return words + [f"since then: {change}" for change in item.drift()]
    begun = [f"generation {item.generation}, asked for with --refresh"] if item.generation else []
    if item.folder.is_dir():
        states = sorted((item.folder / "state").glob("step-*"))
        return [*begun, "interrupted" + (f" after step {int(states[-1].name[5:])}: goes on there" if states else "")]
    records = [read_json(path) for path in item.folder.parent.glob(f"{item.stage.name}-*/stage.json")]
    records = [record for record in records if record["stage"] == item.stage.stage]
    if not records:
        return begun or ["never run"]
    newest = max(records, key=lambda record: record["finished"])
    if "addresses" not in newest:
        return [*begun, f"run on {newest['finished']} by an earlier version, whose addresses were others"]
    return begun + _differences(item, newest)


def _differences(item: Planned, record: dict[str, Any]) -> list[str]:
    """How the plan differs from the newest finished stage of the same name."""
    now, before = dict(_flat(_without(item.config, item.addresses))), dict(_flat(record["config"]))
    before = {place: None if place in item.addresses else value for place, value in before.items()}
    words = [
        f"{place} {before.get(place, 'unset')!r} -> {now.get(place, 'unset')!r}"
        for place in sorted(now.keys() | before.keys())
        if now.get(place, ...) != before.get(place, ...) and place != "seed"
    ]
    old = record["addresses"]
    words += [f"its input {name} changed" for name, mark in item.addresses.items() if old.get(name) != mark]
    words += ["what it reads changed"] * (record["outside"] != item.outside)
    words += [f"seed {record['seed']} -> {item.seed}"] * (item.stage.seeded and record["seed"] != item.seed)
    return words or ["what was finished is of another generation"]


def _flat(value: Any, place: str = "") -> Iterable[tuple[str, Any]]:
    """Each leaf of JSON-like data with its place, `optimizer.lr`."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{place}.{key}".lstrip("."))
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{place}.{number}")
    else:
        yield place, value

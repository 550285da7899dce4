"""Identity of a stage: its address, the code that made it, and why it would run or not.

The address is a digest of what a recipe says of the stage (without its name and what changes nothing), of the addresses
of its inputs, and of the versions that the stage and its methods give themselves. Code is no part of it: beside the
result, `code.json` keeps a fingerprint of the code that ran, and where that differs from today's the run says so and
goes on with what is there.

A stage that is to run again though it is finished (`--refresh`) gets a new generation: the number is part of its
address, so that it has a folder of its own and all that depends on it follows. The numbers lie in `generations.json`
beside the folders and are written before anything runs: an interrupted refresh goes on as one, and what was there
before is shown by the run until the new is whole, and kept after.

Folders and generations go by the address alone, never by the name: stages that say the same, under two names, in one
recipe or in two that share a store, are one stage, run once and refreshed together.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pretrain import closure
from pretrain.closure import Code, Home
from pretrain.core.errors import PretrainError, nearest, steps_of
from pretrain.core.exchange.opening import origin
from pretrain.core.files import JSON, SEAL, digest, locked, read_json, sealed, write_json
from pretrain.core.folders import files_below
from pretrain.core.foreign.code import digests_of
from pretrain.core.quick import hub
from pretrain.core.quick.outline import source_of
from pretrain.core.registry import info
from pretrain.core.system.portable import held, link_target
from pretrain.recipe import Recipe
from pretrain.records import Config, Identity, Inputs, Marks, Reads, StageRecord, code_changes, label, read_stage
from pretrain.stages import Stage

RECORD, CODE, GENERATIONS = "stage.json", "code.json", "generations.json"
NOTED = ".noted"  # in the folder of an adoption: that `generations.json` knows of it
FORMAT = 2  # of addresses; those of 1, which no record names, were made of the text of the methods' files too


@dataclass(frozen=True)
class Planned:
    """A stage with its address and folder."""

    stage: Stage
    address: str
    folder: Path
    inputs: Inputs
    config: Config
    behind: tuple[str, ...]  # the stages that this one comes from
    seed: int
    reads: Reads = field(default_factory=lambda: Reads(inputs={}, outside=None))
    first: str = ""  # the address before any refresh
    generation: int = 0  # how often it has been refreshed
    asked: bool = False  # whether this plan asks for a refresh
    refreshed: tuple[str, ...] = ()  # the refreshes that it and those behind it have been through

    @property
    def finished(self) -> bool:
        """Whether it has been run."""
        return (self.folder / RECORD).exists()

    @property
    def running(self) -> bool:
        """Whether a process is at it now: of this run, or of one with the same store."""
        return not self.finished and held(self.folder / ".lock")

    @property
    def begun(self) -> bool:
        """Whether a run was interrupted at it."""
        return (self.folder / CODE).exists() and not self.finished

    @property
    def key(self) -> str:
        """Its name in `generations.json`."""
        return f"{self.stage.stage}{_end(self.first)}"

    def at(self, generation: int) -> Planned:
        """The stage refreshed so many times."""
        address = digest([self.first, generation]) if generation else self.first
        folder = _folder(self.folder.parent, self.stage, address)
        return replace(self, address=address, folder=folder, generation=generation)

    def afresh(self) -> Planned:
        """The stage in the first generation from this one on of which nothing is there."""
        item = self
        while item.finished or item.begun:
            item = item.at(item.generation + 1)
        return item

    def code(self) -> Code:
        """The fingerprint of the code that runs it."""
        return _code(self)

    def identity(self) -> Identity:
        """What `stage.json` keeps of it, beside the configuration and the methods' versions."""
        return {"format": FORMAT, "generation": self.generation, **self.reads}


def _end(address: str) -> str:
    """How the names of a stage's folder and of its generation end."""
    return f"-{address[:12]}"


def _folder(home: Path, stage: Stage, address: str) -> Path:
    """Where a stage lies: in `KIND-ADDRESS`, or where it was finished or begun when folders bore the stages' names."""
    folders = [path for path in sorted(home.glob(f"*{_end(address)}")) if link_target(path) is None]
    finished = [path for path in folders if _address(path) == address]
    begun = [path for path in folders if (path / CODE).exists() and not (path / RECORD).exists()]
    return [*finished, *begun, home / f"{stage.stage}{_end(address)}"][0]


def _address(folder: Path) -> str | None:
    """The address that a finished folder records."""
    with suppress(PretrainError, AttributeError):
        return read_json(folder / RECORD).get("address") if (folder / RECORD).exists() else None
    return None


def plan(recipe: Recipe, store: Path | str | None = None, refresh: Iterable[str] = ()) -> list[Planned]:
    """Each stage with its address, its folder (in `store`, by default in the recipe's output) and what it reads.

    Those named in `refresh`, and those that say the same under another name, get a new generation, unless they are
    unfinished and were begun with the code of today.
    """
    home = Path(recipe.output if store is None else store)
    wanted, names = list(refresh), [stage.name for stage in recipe.stages]
    for name in wanted:
        if name not in names:
            raise PretrainError(f"--refresh {name!r}{nearest(name, names)}; accepted: {', '.join(names)}")
    known, planned = _generations(home), dict[str, Planned]()
    for stage in recipe.stages:
        item = _placed(recipe, stage, planned, home)
        item = item.at(_times(known, item))
        if stage.name in wanted and (item.finished or (item.begun and drift(item))):
            item = replace(item.afresh(), asked=True)
        elif stage.name not in wanted:
            _check_noted(item)
        marks = {mark for name in item.behind for mark in planned[name].refreshed}
        marks |= {f"{item.key} {item.generation}"} if item.generation else set()
        planned[stage.name] = replace(item, refreshed=tuple(sorted(marks)))
    asked = {item.first for item in planned.values() if item.asked}
    twins = [name for name, item in planned.items() if item.first in asked and not item.asked]
    return plan(recipe, store, [*wanted, *twins]) if twins else list(planned.values())


def _placed(recipe: Recipe, stage: Stage, planned: dict[str, Planned], home: Path) -> Planned:
    """A stage in its first generation, after those that stand before it."""
    marks: Marks = {}
    inputs: Inputs = {}
    behind: set[str] = set()
    for place, value in stage.references().items():
        names = value if isinstance(value, list) else [value]
        folders = [planned[name].folder if name in planned else hub.located(name, place) for name in names]
        states = [planned[name].address if name in planned else state_of(hub.located(name, place)) for name in names]
        inputs[place], marks[place] = (folders, states) if isinstance(value, list) else (folders[0], states[0])
        behind = behind.union(*({name, *planned[name].behind} for name in names if name in planned))
    try:
        outside = stage.outside()
    except PretrainError as error:
        raise PretrainError(f"{recipe.at(stage, error.place)}: {error}") from error
    config, seed = stage.config(), recipe.seed if stage.seed is None else stage.seed
    code = digests_of(stage.trusted_code(planned))
    parts = [_without(config, marks), marks, outside, seed if stage.seeded else None, *([code] if code else [])]
    address = digest(parts)
    upstream = tuple(name for name in planned if name in behind)
    reads: Reads = {"inputs": marks, "outside": outside}
    if code:
        reads["code"] = code
    return Planned(stage, address, _folder(home, stage, address), inputs, config, upstream, seed, reads, address)


def _without(config: Config, places: Iterable[str]) -> Config:
    """The configuration without the names that references give and without the seed, which are hashed apart."""
    config = copy.deepcopy({k: v for k, v in config.items() if k != "seed"})
    for place in places:
        *steps, last = steps_of(place)
        target: Any = config
        for step in steps:
            target = target[step]
        target[last] = None
    return config


def state_of(path: Path) -> str:
    """The state of a file or folder: names, sizes and times; of what the hub gave its revision, of GGUF its digest."""
    if pinned := hub.state(path) or origin(path):
        return pinned
    files = sorted(files_below(path)) if path.is_dir() else [path]
    return digest([[str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns] for p in files])


def _generations(home: Path) -> dict[str, int]:
    counts = read_json(path) if (path := home / GENERATIONS).exists() else {}
    seal = isinstance(counts, dict) and counts.pop(SEAL, None)
    if seal is False or not all(type(n) is int and n >= 0 for n in counts.values()):
        raise PretrainError(f"{path}: accepted: a mapping from folders to how often each was refreshed, 0 or more")
    return counts


def _times(known: dict[str, int], item: Planned) -> int:
    """How often a stage was refreshed, under whatever name."""
    return max((number for key, number in known.items() if key.endswith(_end(item.first))), default=0)


def _check_noted(item: Planned) -> None:
    """Refuse where a later refresh is there than is known: it is written down before it runs, an adoption after."""
    for later in (item.at(item.generation + times) for times in (1, 2, 3)):
        if (later.folder / NOTED).exists() or _codes(later.folder):
            raise PretrainError(
                f"{later.folder.parent / GENERATIONS} is lost or of before: {later.folder.name} is a later refresh of "
                f"{item.stage.name!r}; accepted: the file as it was, or --refresh {item.stage.name}"
            )


def keep_generations(planned: Iterable[Planned]) -> None:
    """Write down what was asked to be refreshed, so that later runs, and those that share the store, follow."""
    for item in planned:
        home = item.folder.parent
        if item.generation <= _times(_generations(home), item):
            continue
        with locked(home / f".{GENERATIONS}.lock"):
            known = _generations(home)
            write_json(home / GENERATIONS, sealed(known | {item.key: max(item.generation, known.get(item.key, 0))}))


# The code that runs


def _code(item: Planned) -> Code:
    """Of the modules of the stage, of its methods, and of the surgeries that its inputs' checkpoints repeat."""
    classes = [type(item.stage), *item.stage.method_classes().values()]
    used = [home for cls in classes for home in _home(cls)]
    for value in item.inputs.values():
        for folder in value if isinstance(value, list) else [value]:
            used += _recorded(Path(folder))
    return closure.fingerprint(used)


def _home(cls: type) -> list[Home]:
    """The module of a class and its file; what was typed at a prompt has none."""
    path = source_of(cls)
    return [(cls.__module__, path)] if path else []


def _recorded(folder: Path) -> Iterator[Home]:
    """The modules of the surgeries that a checkpoint names; what is no checkpoint names none."""
    for path in (folder / "checkpoint" / "pretrain.json", folder / "pretrain.json"):
        with suppress(PretrainError, OSError, TypeError, KeyError, AttributeError):
            for entry in read_json(path).get("surgery", []):
                row = info(entry["method"])
                yield row.module, str(row.path)


def _codes(folder: Path) -> list[Code] | None:
    """Of all runs that worked on a stage's folder, the newest last; `None` where that is not recorded."""
    with suppress(PretrainError, TypeError, KeyError, AttributeError):
        codes = [closure.stored(row) for row in read_json(folder / CODE)]
        return [code for code in codes if code is not None] if None not in codes else None
    return None


def drift(item: Planned, verb: str = "made") -> str:
    """How the code of today differs from what has worked on the stage's folder: `made with other code: …`, or nothing.

    A stage that was adopted was made with no code of ours; where its files are linked, they may have changed.
    """
    adopted = record_of(item).get("adopted") if item.finished else None
    if adopted and adopted["linked"] and adopted["state"] != state_of(item.folder / item.stage.writes):
        return f"{adopted['source']}, where its files are linked from, has changed since"
    codes, now = _codes(item.folder), item.code()
    if codes is None:
        return f"{verb} with code that is not recorded"
    phrases = list(dict.fromkeys(phrase for then in codes for phrase in closure.differences(then, now)))
    return f"{verb} with other code: {shortened(phrases)}" if phrases else ""


def begin(item: Planned) -> str:
    """Note the code that works on a stage from here on; says how it differs from what began it, if that goes on."""
    goes_on = bool(item.stage.progress(item.folder))
    before = (_codes(item.folder) or []) if goes_on else []
    other, code = drift(item, "begun") if goes_on else "", item.code()
    if code not in before:
        write_json(item.folder / CODE, [row.as_json() for row in (*before, code)])
    return other


def shortened(phrases: list[str], most: int = 4) -> str:
    """A few of them, and how many more there are."""
    more = f", and {len(phrases) - most} more" if len(phrases) > most else ""
    return ", ".join(phrases[:most]) + more


# Why


def why(item: Planned) -> str:
    """Why the stage would run, or why not."""
    if item.finished:
        try:
            record = record_of(item)
        except PretrainError as error:
            return str(error)
        adopted = record.get("adopted")
        made = f"adopted from {adopted['source']}" if adopted else "finished"
        return "; ".join(filter(None, (f"{made} on {_when(record)}, same address", drift(item))))
    if item.running:
        return "running now: it is in use by another run"
    if item.begun:
        where = item.stage.progress(item.folder)
        text = f"interrupted {where}: will resume" if where else "interrupted: begins again"
        again = "it is a refresh" if item.generation else ""
        return "; ".join(filter(None, (text, drift(item, "begun") if where else "", again)))
    if item.asked:
        return "asked by --refresh"
    if item.generation:
        return "asked by an earlier --refresh, or adopted and gone since"
    last = newest(item)
    if last is None:
        return "never run"
    folder, record = last
    return f"{shortened(_changes(record, item))} (compared with {folder.name}, finished on {_when(record)})"


def record_of(item: Planned) -> StageRecord:
    """`stage.json` of a finished stage; where it is damaged the error says how to have the stage again."""
    try:
        return read_stage(item.folder / RECORD, item.address)
    except PretrainError as error:
        raise PretrainError(f"{error}; accepted: `--refresh {item.stage.name}`, which runs the stage again") from error


def _when(record: StageRecord) -> str:
    return f"{record['finished'][:16].replace('T', ' ')} UTC"


def newest(item: Planned) -> tuple[Path, StageRecord] | None:
    """The newest finished folder of a stage of this name, and its record."""
    rows = []
    for path in item.folder.parent.glob(f"*-*/{RECORD}"):
        with suppress(OSError):  # of what is gone meanwhile
            status = path.stat()
            name, finished = label(path, status.st_mtime_ns, status.st_size)
            if name == item.stage.name and link_target(path.parent) is None:
                rows.append(((finished, status.st_mtime), path))
    for _, path in sorted(rows, key=lambda row: row[0], reverse=True):
        with suppress(PretrainError):
            return path.parent, read_stage(path)
    return None


def _changes(record: StageRecord, item: Planned) -> list[str]:
    """What makes the stage's address another than that of a finished one."""
    then, now, kind = record.get("identity"), json.loads(json.dumps(item.reads, default=str)), item.stage.stage
    if not isinstance(then, dict) or then.get("format") != FORMAT:
        return ["made by an earlier version: address differs"]
    if record["stage"] != kind:
        return [f"stage changed from {record['stage']} to {kind}"]
    config = {name: value for name, value in item.config.items() if name != "methods"}
    asked = json.loads(json.dumps(_without(config, now["inputs"]), default=str))
    before, after = flat(_without(record["config"], then["inputs"])), flat(asked)
    versions, methods = (before.pop("version", None), after.pop("version", None)), item.config["methods"]
    changes = [f"stage {kind}: version {versions[0]} → {versions[1]}"] if versions[0] != versions[1] else []
    for name, version in record["methods"].items():
        if methods.get(name, version) != version:
            changes.append(f"method {name}: version {version} → {methods[name]}")
    changes += field_changes(before, after)
    if item.stage.seeded and record["seed"] != item.seed:
        changes.append(f"seed changed from {record['seed']} to {item.seed}")
    changes += code_changes(then, item.reads)
    changes += _input_changes(then["inputs"], now["inputs"], record["inputs"] | item.stage.references())
    if then["outside"] != now["outside"]:
        changes.append("what it reads from outside changed")
    return changes or ["its address differs"]


def flat(value: JSON, place: str = "") -> dict[str, JSON]:
    """A tree's leaves by their dotted places; a list of plain values is a leaf."""
    if isinstance(value, dict) and value:
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        items = [(str(number), inner) for number, inner in enumerate(value)]
    else:
        return {place: value}
    return {k: v for key, inner in items for k, v in flat(inner, f"{place}.{key}" if place else key).items()}


def field_changes(before: dict[str, JSON], after: dict[str, JSON]) -> list[str]:
    """The fields that are others; one that was null before it was filled is told by what fills it."""
    changes, both = [], before | after
    for name in both:
        then, now = before.get(name), after.get(name)
        if name in before and name in after:
            changes += [f"{name} changed from {_shown(then)} to {_shown(now)}"] if then != now else []
        elif both[name] is not None or not any(other.startswith(f"{name}.") for other in both):
            changes.append(f"{name} is {'gone' if name in before else 'new'} ({_shown(both[name])})")
    return changes


def _shown(value: JSON) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _input_changes(then: Marks, now: Marks, names: Marks) -> list[str]:
    """The inputs that are others, each by its place and the name that the recipe gives it."""
    changes = []
    for place in then | now:
        if then.get(place) != now.get(place):
            name = ", ".join(names[place]) if isinstance(names[place], list) else names[place]
            word = "is new" if place not in then else "is gone" if place not in now else "changed"
            changes.append(f"its input `{place}`{'' if name == place else f' ({name})'} {word}")
    return changes

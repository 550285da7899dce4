"""The engine: runs a recipe's stages in order, none of them twice.

A stage's folder is named after its address, a digest of its configuration, of the code of its methods and of the
addresses of its inputs. A folder with a `stage.json` is finished. Changing a stage changes the addresses from there on;
what came before stays. A stage that was interrupted finds its folder as it left it.

The folders lie in the output, or in a store that many runs share: what one has finished is finished for all, and of two
that come to the same stage at once the second waits.
"""

from __future__ import annotations

import copy
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from pretrain.core.errors import PretrainError
from pretrain.core.files import digest, locked, read_json, write_json, write_text
from pretrain.recipe import Recipe, load
from pretrain.stages import Job, Stage

CACHED, TO_RUN, DONE = "cached", "to run", "done"


@dataclass(frozen=True)
class Planned:
    """A stage with its address and folder."""

    stage: Stage
    address: str
    folder: Path
    inputs: dict[str, Any]
    config: dict[str, Any]
    behind: tuple[str, ...]  # the stages that this one comes from
    seed: int

    @property
    def finished(self) -> bool:
        """Whether it has been run."""
        return (self.folder / "stage.json").exists()


@dataclass(frozen=True)
class Result:
    """What `run` returns: where it is, each stage's `stage.json` by name, and the report."""

    folder: Path
    stages: dict[str, dict[str, Any]]
    report: Path | None


def plan(recipe: Recipe, store: Path | str | None = None) -> list[Planned]:
    """Each stage with its address, its folder (in `store`, by default in the recipe's output) and what it reads."""
    planned: dict[str, Planned] = {}
    for stage in recipe.stages:
        addresses: dict[str, Any] = {}
        inputs: dict[str, Any] = {}
        behind: set[str] = set()
        for name, value in stage.references().items():
            many = value if isinstance(value, list) else [value]
            found = [planned[one].folder if one in planned else Path(one).expanduser() for one in many]
            marks = [planned[one].address if one in planned else _fingerprint(Path(one).expanduser()) for one in many]
            inputs[name], addresses[name] = (found, marks) if isinstance(value, list) else (found[0], marks[0])
            behind = behind.union(*({one, *planned[one].behind} for one in many if one in planned))
        try:
            outside = stage.outside()
        except PretrainError as error:
            raise PretrainError(f"{recipe.at(stage, error.place)}: {error}") from error
        config, seed = stage.config(), recipe.seed if stage.seed is None else stage.seed
        address = digest([_without(config, addresses), addresses, outside, seed if stage.seeded else None])
        folder = Path(recipe.output if store is None else store) / f"{stage.name}-{address[:12]}"
        upstream = tuple(name for name in planned if name in behind)
        planned[stage.name] = Planned(stage, address, folder, inputs, config, upstream, seed)
    return list(planned.values())


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


def run(
    recipe: Recipe | Path | str,
    *,
    overrides: Iterable[str] = (),
    output: Path | str | None = None,
    store: Path | str | None = None,
    report: bool = True,
    say: Callable[[str], None] | None = None,
) -> Result:
    """Run a recipe, or what is left of it; finished stages are not run again.

    `overrides` are `STAGE.field=value`. `store` is where the stages' folders lie, by default in the output; runs with
    the same store share them. `say` gets a line as each stage begins and ends; `silent` says nothing and draws no
    progress. Under `torchrun` every process calls this; training runs on all of them, the rest on the first.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe, overrides, output)
    main, wait = _processes()
    say = (say or (lambda text: print(text, file=sys.stderr))) if main else silent
    records: dict[str, dict[str, Any]] = {}
    planned = plan(recipe, store)
    with _only_one(recipe.output, main):
        if main:
            _refuse_foreign(recipe, planned)
            if store is not None:  # so that no source and no backup takes the store's folders for documents
                write_text(Path(store) / "CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n")
            write_text(recipe.output / "recipe.yaml", yaml.safe_dump(recipe.raw, sort_keys=False, allow_unicode=True))
            _write_run(recipe, planned, {})
        wait()
        for item in planned:
            finished = _run_once(item, records, say, main, wait)
            records[item.stage.name] = read_json(item.folder / "stage.json")
            if main:
                _point(recipe.output / item.stage.name, item.folder)
                took = _time(records[item.stage.name]["seconds"])
                say(f"[{item.stage.name}] {'already done' if finished else f'done in {took}'}")
                _write_run(recipe, planned, {item.stage.name: CACHED if finished else DONE})
        written = _report(recipe.output) if main and report else None
    return Result(recipe.output, records, written)


def silent(text: str) -> None:
    """Says nothing."""


def _run_once(
    item: Planned, records: dict[str, dict[str, Any]], say: Callable[[str], None], main: bool, wait: Callable[[], None]
) -> bool:
    """Run a stage unless it is finished, which is what this tells; where another run is at it, wait for that."""
    busy = partial(say, f"[{item.stage.name}] another run is at this stage: waiting for it")
    with locked(item.folder / ".lock", busy) if main and not item.finished else nullcontext():
        wait()  # the first process holds the lock, so that all see the same
        finished = item.finished
        wait()  # all have looked before the first one writes
        if not finished:
            _run_stage(item, records, say, main, wait)
    return finished


def _run_stage(
    item: Planned, records: dict[str, dict[str, Any]], say: Callable[[str], None], main: bool, wait: Callable[[], None]
) -> None:
    stage, name = item.stage, item.stage.name
    say(f"[{name}] {stage.stage}")
    started, clock = datetime.now(UTC), time.perf_counter()
    result: dict[str, Any] = {}
    if main or stage.distributed:
        lineage = [_brief(records[one]) for one in item.behind]
        own = {"name": name, "stage": stage.stage, "address": item.address, "methods": item.config["methods"]}
        job = Job(
            item.folder, item.inputs, item.seed, name, lambda text: say(f"[{name}] {text}"), lineage, own,
            bar=say is not silent,
        )  # fmt: skip
        try:
            result = stage.pointing_to(item.inputs).run(job)
        except OSError as error:
            reason = error.strerror or str(error)
            raise PretrainError(
                f"stage {name!r}: {reason} ({error.filename or item.folder}); run again to go on"
            ) from error
        except PretrainError as error:
            raise PretrainError(f"stage {name!r}: {error}") from error
    wait()
    if main:
        from pretrain.core.hardware import describe
        from pretrain.core.meter import peak_memory

        write_json(item.folder / "stage.json", {
            "name": name, "stage": stage.stage, "address": item.address, "seed": item.seed,
            "config": {k: v for k, v in item.config.items() if k != "methods"}, "methods": item.config["methods"],
            "inputs": item.stage.references(),
            "metrics": result.get("metrics", {}), "flops": result.get("flops", 0),
            "seconds": time.perf_counter() - clock, "peak_memory_bytes": peak_memory(),
            "started": started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"), "environment": describe(),
        })  # fmt: skip
    wait()


def _brief(record: dict[str, Any]) -> dict[str, Any]:
    """What lineage keeps of a stage."""
    return {k: record[k] for k in ("name", "stage", "address", "methods", "metrics", "flops", "seconds", "finished")}


def _write_run(recipe: Recipe, planned: list[Planned], now: dict[str, str]) -> None:
    path = recipe.output / "run.json"
    before = {s["name"]: s["status"] for s in read_json(path)["stages"]} if path.exists() and now else {}
    stages = []
    for item in planned:
        name = item.stage.name
        status = now.get(name) or before.get(name) or (CACHED if item.finished else TO_RUN)
        folder = _relative(item.folder, recipe.output)
        row = {"name": name, "stage": item.stage.stage, "folder": folder, "address": item.address, "status": status}
        stages.append(row)
    write_json(path, {"name": recipe.name, "recipe": str(recipe.path or ""), "seed": recipe.seed, "stages": stages})


def _refuse_foreign(recipe: Recipe, planned: list[Planned]) -> None:
    """Never touch what is not of a run: neither a folder that bears a stage's name nor the recipe itself."""
    for item in planned:
        link = recipe.output / item.stage.name
        if link.exists() and not link.is_symlink():
            raise PretrainError(f"{link} exists and is no stage of a run; accepted: another --output or stage name")
    own = recipe.output / "recipe.yaml"
    if recipe.path is not None and own.exists() and own.resolve() == recipe.path.resolve():
        raise PretrainError(f"output {recipe.output} holds the recipe itself as {own.name}; accepted: another --output")


def _relative(folder: Path, output: Path) -> str:
    """The way from the output to a stage's folder, so that both can be moved together."""
    return os.path.relpath(folder.resolve(), output.resolve())


def _point(link: Path, folder: Path) -> None:
    """Make the symbolic link `OUTPUT/STAGE` show to the current folder."""
    target = _relative(folder, link.parent)
    if link.is_symlink() and os.readlink(link) == target:
        return
    fresh = link.with_name(f".tmp-{link.name}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    os.replace(fresh, link)


@contextmanager
def _only_one(output: Path, main: bool) -> Iterator[None]:
    """Hold the run folder: a second run in it is an error."""
    if not main:
        yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("w")
    except OSError as error:
        raise PretrainError(f"output {output}: {error.strerror}; accepted: a folder that can be written") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PretrainError(
                f"{output} is in use by another run; accepted: wait for it, or --output elsewhere"
            ) from error
        yield


def _processes() -> tuple[bool, Callable[[], None]]:
    """Whether this is the first process, and how to wait for all."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True, lambda: None
    from pretrain.core.hardware import pick_device
    from pretrain.training.distributed import join

    world = join(pick_device())
    return world.main, world.wait


def _report(folder: Path) -> Path:
    from pretrain.report import write

    return write(folder)


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.1f} min"

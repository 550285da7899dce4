"""The engine: runs a recipe's stages in order, none of them twice.

A stage's folder is named after its address, a digest of its configuration, of the code of its methods and of the
addresses of its inputs. A folder with a `stage.json` is finished. Changing a stage changes the addresses from there on;
what came before stays. A stage that was interrupted finds its folder as it left it.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from pretrain.core.errors import PretrainError
from pretrain.core.files import digest, read_json, write_json, write_text
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


def plan(recipe: Recipe) -> list[Planned]:
    """Each stage with its address, its folder and the folders it reads."""
    planned: dict[str, Planned] = {}
    for stage in recipe.stages:
        addresses: dict[str, Any] = {}
        inputs: dict[str, Any] = {}
        for name, value in stage.references().items():
            many = value if isinstance(value, list) else [value]
            found = [planned[one].folder if one in planned else Path(one).expanduser() for one in many]
            marks = [planned[one].address if one in planned else _fingerprint(Path(one).expanduser()) for one in many]
            inputs[name], addresses[name] = (found, marks) if isinstance(value, list) else (found[0], marks[0])
        config = {k: v for k, v in stage.config().items() if k not in addresses}
        address = digest([config, addresses, stage.outside(), recipe.seed])
        planned[stage.name] = Planned(stage, address, recipe.output / f"{stage.name}-{address[:8]}", inputs)
    return list(planned.values())


def _fingerprint(path: Path) -> str:
    """The state of an outside file or folder: names, sizes and times."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return digest([[str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns] for p in files])


def run(
    recipe: Recipe | Path | str,
    *,
    overrides: Iterable[str] = (),
    output: Path | str | None = None,
    say: Callable[[str], None] | None = None,
) -> Result:
    """Run a recipe, or what is left of it; finished stages are not run again.

    `overrides` are `STAGE.field=value`. Under `torchrun` every process calls this; training runs on all of them, the
    rest on the first.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe, overrides, output)
    main, wait = _processes()
    say = (say or (lambda text: print(text, file=sys.stderr))) if main else (lambda text: None)
    records: dict[str, dict[str, Any]] = {}
    planned = plan(recipe)
    with _only_one(recipe.output, main):
        if main:
            _refuse_foreign(recipe, planned)
            write_text(recipe.output / "recipe.yaml", yaml.safe_dump(recipe.raw, sort_keys=False, allow_unicode=True))
            _write_run(recipe, planned, {})
        wait()
        for item in planned:
            finished = item.finished
            wait()  # all processes have looked before the first one writes
            if not finished:
                _run_stage(item, recipe, records, say, main, wait)
            records[item.stage.name] = read_json(item.folder / "stage.json")
            if main:
                _point(recipe.output / item.stage.name, item.folder)
                took = _time(records[item.stage.name]["seconds"])
                say(f"[{item.stage.name}] {'already done' if finished else f'done in {took}'}")
                _write_run(recipe, planned, {item.stage.name: CACHED if finished else DONE})
        report = _report(recipe.output) if main else None
    return Result(recipe.output, records, report)


def _run_stage(
    item: Planned, recipe: Recipe, records: dict[str, dict[str, Any]], say: Callable[[str], None], main: bool, wait: Any
) -> None:
    stage, name = item.stage, item.stage.name
    if main:
        item.folder.mkdir(parents=True, exist_ok=True)
        say(f"[{name}] {stage.stage}")
    wait()
    started, clock = datetime.now(UTC), time.perf_counter()
    result: dict[str, Any] = {}
    if main or stage.distributed:
        lineage = [_brief(record) for record in records.values()]
        job = Job(item.folder, item.inputs, recipe.seed, name, lambda text: say(f"[{name}] {text}"), lineage)
        try:
            result = stage.run(job)
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

        config = stage.config()
        write_json(item.folder / "stage.json", {
            "name": name, "stage": stage.stage, "address": item.address, "seed": recipe.seed,
            "config": {k: v for k, v in config.items() if k != "methods"}, "methods": config["methods"],
            "inputs": {k: [str(p) for p in v] if isinstance(v, list) else str(v) for k, v in item.inputs.items()},
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
    stages = [
        {
            "name": item.stage.name, "stage": item.stage.stage, "folder": item.folder.name, "address": item.address,
            "status": now.get(item.stage.name) or before.get(item.stage.name) or (CACHED if item.finished else TO_RUN),
        }
        for item in planned
    ]  # fmt: skip
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


def _point(link: Path, folder: Path) -> None:
    """Make the symbolic link `OUTPUT/STAGE` show to the current folder."""
    if link.is_symlink() and os.readlink(link) == folder.name:
        return
    fresh = link.with_name(f".tmp-{link.name}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder.name)
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

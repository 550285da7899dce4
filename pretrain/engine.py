"""The engine: runs a recipe's stages in order, none of them twice.

A stage's folder is named after its address (`identity.py`). A folder with a `stage.json` is finished. Changing a stage
changes the addresses from there on; what came before stays. A stage that was interrupted finds its folder as it was.

The folders lie in the output, or in a store that many runs share: what one has finished is finished for all, and of two
that come to the same stage at once the second waits.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import cast

import yaml

from pretrain.core.errors import PretrainError
from pretrain.core.files import locked, read_json, sealed, sweep, write_json, write_text
from pretrain.core.folders import corpus_of, in_use, verify
from pretrain.core.foreign.code import consenting
from pretrain.core.foreign.parsing import NOT_ENOUGH, out_of_memory, reason, wanted_for
from pretrain.core.foreign.reading import open_append
from pretrain.core.quick import hub
from pretrain.core.quick.plan import Plan
from pretrain.core.quick.quantities import counted, duration
from pretrain.core.system.extras import extras_named
from pretrain.core.system.portable import link, link_target, take
from pretrain.forecast import check_documents, check_ends, check_fits, forecast, plan_of, shortfall, warnings
from pretrain.identity import RECORD, Planned, begin, drift, keep_generations, record_of, state_of
from pretrain.identity import plan as plan
from pretrain.recipe import Recipe, load, whole
from pretrain.records import PARTS, Part, RunStage, StageRecord, StageResult, Status, altered, write_stage
from pretrain.report.page import write as write_report
from pretrain.runs.parts import earlier, noted, part_of
from pretrain.runs.shelf import check_output, join_store
from pretrain.runs.targets import repointed, targets
from pretrain.stages import Estimate, Job
from pretrain.stages._size import known
from pretrain.stages._size import tell as tell_sizes
from pretrain.stages._size import write as write_sizes


@dataclass(frozen=True)
class Result:
    """What `run` returns: where it is, each stage's `stage.json` by name, and the report."""

    folder: Path
    stages: dict[str, StageRecord]
    report: Path | None


def run(
    recipe: Recipe | Path | str,
    *,
    overrides: Iterable[str] = (),
    output: Path | str | None = None,
    store: Path | str | None = None,
    report: bool = True,
    refresh: Iterable[str] = (),
    ray: str = "",
    say: Callable[[str], None] | None = None,
) -> Result:
    """Run a recipe, or what is left of it; finished stages are not run again, but for those that `refresh` names.

    `overrides` are `STAGE.field=value`. `store` is where the stages' folders lie, by default in the output; runs with
    the same store share them. `say` gets a line as each stage begins and ends; `silent` says nothing and draws no
    progress. `ray` is the address of a cluster whose cores share the operations of data stages; nothing that is written
    depends on it. Under `torchrun` every process calls this; training runs on all of them, the rest on the first.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe, overrides, output)
    planned = plan(recipe, store, refresh)
    if not all(item.finished for item in planned):  # else nothing needs what takes seconds to import
        recipe = whole(recipe)
        planned = plan(recipe, store, refresh)
    main, wait = _processes()
    say = (say or (lambda text: print(text, file=sys.stderr))) if main else silent
    records: dict[str, StageRecord] = {}
    estimates: dict[str, Estimate] = {}
    as_told = _as_told(recipe, planned)
    if main:
        for item in planned:
            item.code()  # read now: what is edited while stages run is not what this process has imported
        _refuse_foreign(recipe, planned)
    with _only_one(recipe.output, main):
        if main:
            estimates = _begin(recipe, planned, store, say)
        wait()
        for item in planned:
            with _ending(recipe, planned, item) if main else nullcontext():
                _refuse_empty_splits(recipe, planned)
                finished = _run_once(item, records, plan_of(item.stage.name, recipe, estimates), say, main, wait, ray)
            records[item.stage.name] = record = record_of(item)
            if main:
                _say_end(item, record, finished, _point(recipe.output / item.stage.name, item.folder), estimates, say)
                _write_run(recipe, planned)
        page = recipe.output / "report.html"
        written = (page if as_told else write_report(recipe.output)) if main and report else None
    return Result(recipe.output, records, written)


def _begin(
    recipe: Recipe, planned: list[Planned], store: Path | str | None, say: Callable[[str], None]
) -> dict[str, Estimate]:
    """Refuse what cannot end, say what is odd or new, write what a run's folder has from its beginning on.

    What is returned is the estimates of the stages that are to run.
    """
    sweep(recipe.output)
    odd = check_documents(recipe, planned)
    expected = forecast(planned)
    check_fits(expected)
    check_ends(recipe, expected)
    for line in warnings(expected, note=True):
        say(f"note: {line}")
    for line in [*odd, *warnings(expected)]:
        say(f"warning: {line}")
    if store is not None:  # so that no source and no backup takes the store's folders for documents
        write_text(Path(store) / "CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n")
        join_store(Path(store), recipe.output)
    write_text(recipe.output / "recipe.yaml", yaml.safe_dump(recipe.raw, sort_keys=False, allow_unicode=True))
    for item in planned:
        for line in repointed(item):
            say(f"[{item.stage.name}] {line}")
    keep_generations(planned)
    _write_run(recipe, planned)
    for folder in _weights(planned):
        hub.fetch_weights(folder, say)
    if recipe.sizes:
        write_sizes(recipe.sizes, recipe.output)
    fresh = {each.item.stage.name: each.estimate for each in expected if each.to_run and not each.done}
    made = {each.item.stage.name for each in expected if not each.to_run}
    tell_sizes(known(recipe.sizes, made), fresh, say)
    return {each.item.stage.name: each.estimate for each in expected if each.to_run}


def _say_end(
    item: Planned, record: StageRecord, finished: bool, moved: str, estimates: Mapping[str, Estimate],
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Say that a stage is done or was already, and what is odd about it; `moved`: that its name shows another now."""
    name = item.stage.name
    again, left = f"--refresh {name} makes it again", item.stage.writes
    for file in altered(item.folder, record):
        say(f"warning: {item.folder / file} is not as the stage has left it: damaged or replaced; {again}")
    if left and not any((item.folder / file).exists() for file in (left, f"{left}.json")):  # as it lay in older runs
        say(f"warning: {item.folder / left} is gone; {again}")
    took = duration(record["seconds"])
    say(f"[{name}] {_finished(item) if finished else f'done in {took}'}")
    if not finished and (line := shortfall(item.stage, record, estimates)):
        say(f"[{name}] {line}")
    if moved:
        say(f"[{name}] {moved}")


def _finished(item: Planned) -> str:
    """That a stage is done, or that other code than today's has done it."""
    other, name = drift(item), item.stage.name
    return f"{other}; going on with what is there (--refresh {name} runs it again)" if other else "already done"


def silent(text: str) -> None:
    """Says nothing."""


def _run_once(
    item: Planned, records: dict[str, StageRecord], expected: Plan | None, say: Callable[[str], None], main: bool,
    wait: Callable[[], None], ray: str,
) -> bool:  # fmt: skip
    """Run a stage unless it is finished, which is what this tells; where another run is at it, wait for that."""
    busy = partial(say, f"[{item.stage.name}] another run is at this stage: waiting for it")
    with locked(item.folder / ".lock", busy) if main and not item.finished else nullcontext():
        wait()  # the first process holds the lock, so that all see the same
        finished = item.finished
        wait()  # all have looked before the first one writes
        if not finished:
            _run_stage(item, records, expected, say, main, wait, ray)
    return finished


def _run_stage(
    item: Planned, records: dict[str, StageRecord], expected: Plan | None, say: Callable[[str], None], main: bool,
    wait: Callable[[], None], ray: str,
) -> None:  # fmt: skip
    stage, name = item.stage, item.stage.name
    say(f"[{name}] {stage.stage}")
    if main:
        sweep(item.folder)
    if main and (other := begin(item)):
        say(f"[{name}] {other}; going on from there (--refresh {name} begins again)")
    parts = earlier(item) if main else []
    started, clock = datetime.now(UTC), time.perf_counter()
    result: StageResult = {}
    if main or stage.distributed:
        lineage = [_brief(records[before]) for before in item.behind]
        made_by = {"name": name, "stage": stage.stage, "address": item.address, "methods": item.config["methods"]}
        made_by |= {"code": item.reads["code"]} if "code" in item.reads else {}
        job = Job(
            item.folder, item.inputs, item.seed, name, lambda text: say(f"[{name}] {text}"), lineage, made_by,
            bar=say is not silent, refreshed=item.refreshed, plan=expected, begun=clock, ray=ray,
        )  # fmt: skip
        try:
            consents = stage.consents(item.inputs, item.behind, item.reads.get("code", {}))
            with noted(item, parts, main), extras_named(), consenting(consents):
                result = stage.pointing_to(item.inputs).run(job)
        except Exception as error:
            if (named := _of_stage(item, error)) is None:
                raise
            raise named from error
    wait()
    if main:
        for what in _changed(item):
            say(f"warning: {what} has changed since this run began: the next run makes {name!r} again")
        write_record(item, result, started, time.perf_counter() - clock, parts)
        (item.folder / PARTS).unlink(missing_ok=True)
    wait()


def _changed(item: Planned) -> list[str]:
    """What a stage reads from outside of its recipe that is no longer what it was when the run was planned."""
    names: list[str] = []
    for place, folders in item.inputs.items():
        before = item.reads["inputs"][place]
        rows = zip(folders, before, strict=False) if isinstance(folders, list) else [(folders, before)]
        outside = [(folder, state) for folder, state in rows if folder.exists() and not (folder / RECORD).exists()]
        names += [str(folder) for folder, state in outside if state_of(folder) != state]
    with suppress(PretrainError):
        names += ["what it reads from outside"] if item.stage.outside() != item.reads["outside"] else []
    return names


def _of_stage(item: Planned, error: Exception) -> PretrainError | None:
    """An error of a stage, its files or the machine as one that names the stage; None of any other."""
    named = f"stage {item.stage.name!r}: "
    if out_of_memory(error):
        return PretrainError(
            f"{named}{NOT_ENOUGH}{wanted_for(error)}; accepted: a smaller model, fewer micro_rows, or less text"
        )
    if isinstance(error, PretrainError):  # a divergence stays one
        return type(error)(f"{named}{str(error).removeprefix(named)}")
    if isinstance(error, OSError):
        return PretrainError(f"{named}{error.strerror or error} ({error.filename or item.folder}); run again to go on")
    if item.stage.trust_remote_code:
        return PretrainError(f"{named}{reason(error)}; the code of its checkpoint may be at fault")
    return None


def write_record(
    item: Planned, result: StageResult, started: datetime, seconds: float, parts: Sequence[Part] = ()
) -> None:
    """Write `stage.json`, which makes the stage a finished one. Its time is that of all its parts.

    A part that was killed has left no note of its time; of a training what its state has counted is then the least.
    """
    from pretrain.core.hardware import describe

    metrics = result.get("metrics", {})
    last = part_of(started, seconds)
    every = [*parts, last]
    seconds = max(sum(part["seconds"] for part in every), metrics.get("seconds", 0.0))
    record: StageRecord = {
        "name": item.stage.name, "stage": item.stage.stage, "address": item.address, "seed": item.seed,
        "config": {k: v for k, v in item.config.items() if k != "methods"}, "methods": item.config["methods"],
        "inputs": item.stage.references(), "identity": item.identity(), "targets": targets(item),
        "metrics": metrics, "flops": result.get("flops", 0),
        "seconds": seconds, "peak_memory_bytes": max(part["peak_memory_bytes"] for part in every),
        "started": every[0]["started"],
        "finished": datetime.now(UTC).isoformat(timespec="seconds"), "environment": describe(),
    }  # fmt: skip
    kept = {name: value for name, value in result.items() if name in ("adopted", "planned")}
    write_stage(item.folder / RECORD, cast("StageRecord", record | kept))


def _brief(record: StageRecord) -> dict[str, object]:
    """What lineage keeps of a stage."""
    kept = ("name", "stage", "address", "methods", "metrics", "flops", "seconds", "finished", "adopted")
    return {name: value for name, value in record.items() if name in kept}


@contextmanager
def _ending(recipe: Recipe, planned: list[Planned], item: Planned) -> Iterator[None]:
    """Note in `run.json` that a stage is running, and of one that does not come to its end how it has ended."""
    try:
        if not item.finished:
            _write_run(recipe, planned, item, Status.RUNNING)
        yield
    except BaseException as error:
        with suppress(PretrainError, OSError):
            status, text = (Status.FAILED, str(error)) if isinstance(error, Exception) else (Status.INTERRUPTED, "")
            _write_run(recipe, planned, item, status, text)
        raise


def _as_told(recipe: Recipe, planned: list[Planned]) -> bool:
    """Whether the report that is there is of these very stages, all of which were finished before it was written."""
    try:
        shown = [(row["name"], row["folder"], row["status"]) for row in read_json(recipe.output / "run.json")["stages"]]
        written = (recipe.output / "report.html").stat().st_mtime_ns
        ended = [(item.folder / RECORD).stat().st_mtime_ns for item in planned]
    except (OSError, PretrainError, KeyError, TypeError):
        return False
    now = [(item.stage.name, _relative(item.folder, recipe.output), Status.FINISHED) for item in planned]
    return shown == now and all(item.finished for item in planned) and max(ended) <= written


def _write_run(
    recipe: Recipe, planned: list[Planned], at: Planned | None = None, status: str = "", error: str = ""
) -> None:
    """Write `run.json`: the stages' states, of the stage `at` the given one."""
    stages = []
    for item in planned:
        name, folder = item.stage.name, _relative(item.folder, recipe.output)
        now = status if item is at else Status.FINISHED if item.finished else Status.TO_RUN
        row: RunStage = {
            "name": name, "stage": item.stage.stage, "folder": folder, "address": item.address, "status": now
        }  # fmt: skip
        if error and item is at:
            row["error"] = error
        if taken := targets(item):
            row["targets"] = taken
        stages.append(row)
    facts = {"name": recipe.name, "recipe": str(recipe.path or ""), "seed": recipe.seed, "stages": stages}
    given = {"given": list(recipe.given)} if recipe.given else {}
    write_json(recipe.output / "run.json", sealed(facts | given))


def _refuse_foreign(recipe: Recipe, planned: list[Planned]) -> None:
    """Never touch what is not of a run: neither a folder that bears a stage's name nor the recipe itself."""
    for item in planned:
        shown = recipe.output / item.stage.name
        if shown.exists() and link_target(shown) is None:
            raise PretrainError(f"{shown} exists and is no stage of a run; accepted: another --output or stage name")
    written = recipe.output / "recipe.yaml"
    if recipe.path is not None and written.exists() and written.resolve() == recipe.path.resolve():
        raise PretrainError(
            f"output {recipe.output} holds the recipe itself as {written.name}; accepted: another --output"
        )
    check_output(recipe.output)


def _weights(planned: list[Planned]) -> Iterator[Path]:
    """The folders that stages which are to run read models from."""
    for item in planned:
        for place, value in item.inputs.items():
            if not item.finished and place.rpartition(".")[2] not in ("tokenizer", "processor", "corpus"):
                yield from value if isinstance(value, list) else [value]


def _refuse_empty_splits(recipe: Recipe, planned: list[Planned]) -> None:
    """Say of a corpus, as soon as it is there, that a split which a later stage needs holds no documents."""
    for item in planned:
        for place, split in item.stage.splits().items():
            folder = item.inputs.get(place)
            info = corpus_of(folder) / "corpus.json" if isinstance(folder, Path) else None
            if item.finished or info is None or not info.exists():
                continue
            verify(info.parent, lambda name: name == "corpus.json")
            counts = read_json(info)["documents"]
            if not counts.get(split):
                corpus = item.stage.references()[place]
                raise PretrainError(
                    f"{recipe.at(item.stage)}: the corpus {corpus!r} has no {split} documents, which this stage needs "
                    f"({counted(sum(counts.values()), 'document')} in all); accepted: more documents, pieces of them "
                    f"(a source's pieces: 5000), or a larger share ({split}: 0.3)"
                )


def _relative(folder: Path, output: Path) -> str:
    """The way from the output to a stage's folder, so that both can be moved together."""
    return os.path.relpath(folder.resolve(), output.resolve())


def _point(shown: Path, folder: Path) -> str:
    """Make the link `OUTPUT/STAGE` show the current folder; says so where it showed another that is still there."""
    target, before = _relative(folder, shown.parent), link_target(shown)
    if before != target:
        link(shown, target)
    if before in (None, target) or not (shown.parent / str(before) / RECORD).exists():
        return ""
    return f"{shown} shows {Path(target).name} now; {Path(str(before)).name}, which it showed, is kept"


@contextmanager
def _only_one(output: Path, main: bool) -> Iterator[None]:
    """Hold the run folder: a second run in it is an error."""
    if not main:
        yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = open_append(output / ".lock")
    except OSError as error:
        raise PretrainError(f"output {output}: {error.strerror}; accepted: a folder that can be written") from error
    with lock:
        if not take(lock):
            raise in_use(output)
        yield


def _processes() -> tuple[bool, Callable[[], None]]:
    """Whether this is the first process, and how to wait for all."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True, lambda: None
    from pretrain.core.hardware import pick_device
    from pretrain.training.distributed import join

    world = join(pick_device())
    return world.main, world.wait

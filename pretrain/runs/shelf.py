"""The runs of a folder, what each holds and takes on the disk, and what no run needs any more.

All is read from `run.json`, `stage.json` and the logs of what is under way; no model is opened.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Literal

from pretrain.core.errors import PretrainError
from pretrain.core.files import JSONObject, read_json, read_json_lines, read_sealed, sealed
from pretrain.core.folders import stage_folders
from pretrain.core.foreign import json as foreign
from pretrain.core.foreign.reading import open_append, read_bytes
from pretrain.core.system.portable import held, link_target, take
from pretrain.records import PARTS, StageRecord, read_stage, run_status, statuses

RUNS, USERS, REMOVED = Path("runs"), ".runs", ".tmp-removed-"
RESULT = re.compile(r"[\w-]+-[0-9a-f]{12}")  # KIND-ADDRESS, or NAME-ADDRESS of earlier versions
WRITTEN = re.compile(  # what a run or a comparison that was stopped early has left, and what systems leave in folders
    r"\..*lock|\.runs|\.tmp.*|\.DS_Store|recipe\.yaml|(generations|plan)\.json|CACHEDIR\.TAG|ladder|stages|seed-\d+|"
    r"comparison\..*"
)
FOLDERS = 5_000  # that are no runs, among which runs are looked for
SHOWN = 3  # names of such files that an error gives
ADDRESS = re.compile(r"@([0-9a-f]{1,64})|-([0-9a-f]{12})\b")  # as recipes name a result


@dataclass(frozen=True)
class Run:
    """A run: its folder, the folders of its stages in order, their states, and the records of those finished."""

    folder: Path
    stages: dict[str, Path]
    statuses: dict[str, str]
    records: dict[str, StageRecord]

    @property
    def status(self) -> str:
        """`finished`, `running`, `interrupted` or `failed`."""
        return run_status(self.folder, self.statuses.values())

    @property
    def homes(self) -> set[Path]:
        """Where its stages' folders lie: itself, or a store."""
        return {self.folder, *(folder.parent for folder in self.stages.values())}

    @property
    def finished(self) -> str:
        """When its last stage was finished, empty where none is."""
        return max((record["finished"] for record in self.records.values()), default="")

    def spent(self, name: str) -> dict[str, float]:
        """What a stage has taken, `flops` and `seconds`; of a training that has begun `step` and `tokens` too."""
        if name in self.records:
            return {"flops": float(self.records[name]["flops"]), "seconds": float(self.records[name]["seconds"])}
        return spent_so_far(self.stages[name])

    def total(self, field: Literal["flops", "seconds"]) -> float:
        """Of its stages' `flops` or `seconds`, those that have begun with what they have counted."""
        return sum(self.spent(name).get(field, 0.0) for name in self.stages)

    @property
    def metrics(self) -> dict[str, float]:
        """Those of the last stage that says how good a model is; where none does, of the last that has any."""
        return self.judged["metrics"] if self.judged else {}

    @property
    def judged(self) -> StageRecord | None:
        """The record of that stage."""
        measured = [record for record in self.records.values() if record["metrics"]]
        judged = [record for record in measured if record["stage"] in ("train", "surgery", "evaluate")]
        return next(reversed(judged or measured), None)


def measured_on(record: StageRecord) -> str:
    """The split that a stage's held-out numbers are of; empty of a stage that measures nothing."""
    if record["stage"] == "train":
        return "validation"
    return str(record["config"].get("split") or "test") if record["stage"] == "evaluate" else ""


def open_run(folder: Path) -> Run:
    """Read a run's folder; raises `PretrainError` where it is none or damaged."""
    stages = stage_folders(folder)
    finished = {name: path / "stage.json" for name, path in stages.items() if (path / "stage.json").exists()}
    records = {name: read_stage(path) for name, path in finished.items()}
    return Run(folder, stages, statuses(folder, read_json(folder / "run.json")["stages"]), records)


def log_of(folder: Path) -> list[JSONObject]:
    """The lines of a training's log; none where there is none."""
    path = folder / "log.jsonl"
    return list(read_json_lines(path)) if path.exists() else []


def spent_so_far(folder: Path) -> dict[str, float]:
    """What a stage that is not finished has counted: up to its log's last line, over all its parts; empty if nothing.

    The seconds are those of all that it has done, as those of a finished stage are; older logs have the steps' alone.
    Of a stage without a log they are those that its interrupted parts have noted.
    """
    row = next((row for row in reversed(log_of(folder)) if row.get("event") == "step"), {})
    spent: dict[str, float] = {key: float(row[key]) for key in ("step", "tokens", "flops", "seconds") if key in row}
    if "elapsed" in row:
        spent["seconds"] = float(row["elapsed"])
    parts = folder / PARTS
    with suppress(PretrainError, OSError, KeyError, TypeError):  # of a note that is damaged nothing is known
        noted = sum(float(part["seconds"]) for part in read_sealed(parts)["parts"]) if parts.exists() else 0.0
        spent |= {"seconds": max(noted, spent.get("seconds", 0.0))} if noted or spent else {}
    return spent


def check_place(folder: Path, name: str = "output") -> None:
    """Refuse a folder that cannot be made, or written in: a plan says it before a run does."""
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        if not place.is_dir():
            what = "is no folder" if place == folder else f"cannot be made: {place} is no folder"
        elif place == folder:
            what = "" if os.access(folder, os.W_OK | os.X_OK) else "cannot be written in"
        else:  # the system's own folders say of themselves that they can be written in
            Path(mkdtemp(prefix=REMOVED, dir=place)).rmdir()
            what = ""
    except OSError as error:
        what = f"cannot be made in {place}: {error.strerror}"
    if what:
        raise PretrainError(f"{name} {folder} {what}; accepted: a folder that can be written")


def check_output(folder: Path) -> None:
    """Refuse a folder to write a run or a comparison in that holds what none has written: nothing is mixed with it."""
    check_place(folder)
    if not folder.is_dir() or any((folder / mark).exists() for mark in ("run.json", "comparison.json")):
        return
    names = sorted(path.name for path in folder.iterdir())
    strange = [name for name in names if not (RESULT.fullmatch(name) or WRITTEN.fullmatch(name))]
    if strange:
        more = f" and {len(strange) - SHOWN} more" if len(strange) > SHOWN else ""
        raise PretrainError(
            f"output {folder} is no run and not empty: it holds {', '.join(strange[:SHOWN])}{more}; accepted: a new or "
            "an empty folder, or a run's"
        )


def find_runs(root: Path, damaged: Callable[[PretrainError], None] | None = None) -> list[Run]:
    """The runs in a folder, however deep, the newest last; what lies in a run is not searched.

    One that is damaged is handed to `damaged`, where that is given, and left out; else it is an error. So is a tree of
    more than `FOLDERS` folders that are no runs.
    """
    runs: list[Run] = []
    for number, (where, folders, files) in enumerate(os.walk(root)):
        if number - len(runs) > FOLDERS:
            raise PretrainError(
                f"{root} holds more than {FOLDERS:,} folders that are no runs; accepted: a folder of runs"
            )
        if "run.json" in files and not (Path(where) / "stage.json").exists():
            try:
                runs.append(open_run(Path(where)))
            except PretrainError as error:
                if damaged is None:
                    raise
                damaged(error)
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not RESULT.fullmatch(name))
    return sorted(runs, key=lambda run: (run.finished, str(run.folder)))


def size_of(*folders: Path) -> int:
    """Bytes that folders take on the disk; a file with two names in them counts once."""
    sizes: dict[tuple[int, int], int] = {}
    for folder in folders:
        for where, _, files in os.walk(folder):
            for name in files:
                state = os.lstat(os.path.join(where, name))
                sizes[state.st_dev, state.st_ino] = state.st_size
    return sum(sizes.values())


def stored(home: Path) -> list[Path]:
    """The results of a run or store, finished or begun: folders that bear an address."""
    marks = ("stage.json", "code.json")
    folders = [path for path in sorted(home.iterdir()) if RESULT.fullmatch(path.name) and link_target(path) is None]
    return [path for path in folders if any((path / mark).exists() for mark in marks)]


def join_store(store: Path, output: Path) -> None:
    """Note in a store that a run uses it, so that no cleaning takes what that run shows."""
    entry = os.path.relpath(output.resolve(), store.resolve())
    if entry not in _users(store):
        with open_append(store / USERS) as users:
            users.write(json.dumps(sealed({"run": entry})).encode() + b"\n")


def _users(store: Path) -> list[str]:
    """The runs that use a store; a line that is damaged is an error, since the results of its run would be taken."""
    path, entries = store / USERS, []
    text = read_bytes(path, foreign.MOST).decode("utf-8", "replace") if path.exists() else ""
    for line in text.splitlines():
        row = {"run": line}  # of before
        if line.startswith("{"):
            try:
                row = foreign.loads(line)
                whole = sealed({"run": row["run"]}) == row
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                raise PretrainError(f"{path} is damaged; accepted: no such file, once all runs of the store ran again")
        entries.append(row["run"])
    return entries


def unused(home: Path, roots: Iterable[Path]) -> tuple[list[Path], dict[Path, str], list[Run]]:
    """What can go from a run or a store, why what else it holds stays, and the runs that were asked.

    They are those in `roots`, those that noted that they use the store, and `home` itself. Kept is what a run shows,
    what a result that is shown was made of, what a recipe names by its address, and what a process is at.
    """
    home = home.resolve()
    users = [home / line for line in _users(home)]
    places = dict.fromkeys(run.resolve() for run in [home, *users] if (run / "run.json").exists())
    runs = {place: open_run(place) for place in places}
    for root in roots:
        runs |= {run.folder.resolve(): open_run(run.folder.resolve()) for run in find_runs(root)}
    candidates = stored(home)
    kept: dict[Path, str] = {}
    for run in runs.values():
        for name, folder in run.stages.items():
            kept.setdefault(folder, f"{_from(home, run.folder)}/{name} shows it" if run.folder != home else f"{name}")
    for shown in home.iterdir():
        if (target := link_target(shown)) is not None:
            kept.setdefault(Path(os.path.normpath(home / target)), shown.name)
    addresses = _addresses(candidates)
    for run in runs.values():
        for name, address in _sources(run):
            if address in addresses:
                kept.setdefault(addresses[address], f"{_from(home, run.folder)}/{name} is made of it")
    for recipe in _recipes(runs.values(), roots):
        for folder in _named(recipe, candidates):
            kept.setdefault(folder, f"{_from(home, recipe)} names it")
    for folder in candidates:
        if held(folder / ".lock"):
            kept.setdefault(folder, "a run is at it")
    reasons = {folder: kept[folder] for folder in candidates if folder in kept}
    return [folder for folder in candidates if folder not in kept], reasons, list(runs.values())


def _from(home: Path, path: Path) -> str:
    return os.path.relpath(path, home.parent)


def _addresses(folders: Iterable[Path]) -> dict[str, Path]:
    return {f.name.rpartition("-")[2]: f for f in folders}


def _sources(run: Run) -> Iterator[tuple[str, str]]:
    """The stages of a run with how the addresses begin of what each is made of; a stage that waits has its paths."""
    for row in read_json(run.folder / "run.json")["stages"]:
        yield from ((row["name"], target["address"][:12]) for target in row.get("targets", []))
    for name, record in run.records.items():
        marks = [*record.get("identity", {}).get("inputs", {}).values()]
        flat = [mark for value in marks for mark in (value if isinstance(value, list) else [value])]
        flat += [target["address"] for target in record.get("targets", [])]
        if record.get("adopted", {}).get("linked"):
            files = [path.resolve() for path in run.stages[name].rglob("*") if path.is_symlink()]
            flat += [folder.name.rpartition("-")[2] for path in files for folder in path.parents]
        yield from ((name, mark[:12]) for mark in flat)


def _recipes(runs: Iterable[Run], roots: Iterable[Path]) -> Iterator[Path]:
    """The recipes of the runs, as they were run and as they are, and those that lie beside the folders of runs."""
    paths = []
    for run in runs:
        paths += [run.folder / "recipe.yaml", Path(read_json(run.folder / "run.json").get("recipe") or "")]
    for root in roots:
        paths += [*root.parent.glob("*.yaml"), *root.parent.glob("recipes/**/*.yaml")]
    yield from dict.fromkeys(path.resolve() for path in paths if path.is_file())


def _named(recipe: Path, candidates: list[Path]) -> Iterator[Path]:
    """The results that a recipe names by their addresses; what is no text is no recipe."""
    try:
        text = recipe.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    for match in ADDRESS.finditer(text):
        begins = (match[1] or match[2])[:12]
        yield from (folder for folder in candidates if folder.name.rpartition("-")[2].startswith(begins))


@contextmanager
def hold(runs: Iterable[Run], home: Path) -> Iterator[None]:
    """Keep runs from being gone on with meanwhile; raises `PretrainError` where one is running."""
    with ExitStack() as stack:
        for folder in {home.resolve(), *(run.folder for run in runs if home.resolve() in run.homes)}:
            lock = stack.enter_context(open_append(folder / ".lock"))
            if not take(lock):
                raise PretrainError(f"{folder} is in use by a run; accepted: to clean when it is done")
        yield


def remove(home: Path, folders: Iterable[Path] = ()) -> None:
    """Delete results of a run or store, each first out of sight, and what an interrupted removal has left."""
    for left in home.glob(f"{REMOVED}*"):
        shutil.rmtree(left)
    for folder in folders:
        aside = folder.with_name(REMOVED + folder.name)
        os.replace(folder, aside)
        shutil.rmtree(aside)

"""What lies where: in a stage's folder (a folder that is the thing itself is taken as well), and in the cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pretrain.core.errors import PretrainError, nearest, warn
from pretrain.core.exchange.opening import opened
from pretrain.core.files import SUMS, JSONObject, damage, damage_of, read_json, read_object
from pretrain.core.foreign.paths import expanded
from pretrain.core.foreign.reading import open_append
from pretrain.core.system.portable import link_target, take
from pretrain.core.system.shipped import shipped_file

WRITERS = ("train", "surgery")  # stages that write checkpoints
MANY = 20_000  # files of a folder that a recipe names


def place_of(name: Path | str) -> Path:
    """The path that a name stands for, whatever is changed later: the links of runs are followed.

    `runs/NAME/STAGE@ADDRESS` is the result of a run whose address begins so, whatever the stage's link shows now;
    `recipes/…` and `claims/…`, where they are not there, are those of the package. What is no such name is the path as
    it is. Raises `PretrainError` for an address that no result has, or more than one.
    """
    path = shipped_file(name)
    place = Path(path.anchor)
    for step in path.relative_to(path.anchor).parts:
        here, place = place, place / step
        target = link_target(place) if (here / "run.json").exists() else None
        if target is not None:
            place = Path(os.path.normpath(here / target))
        elif "@" in step and (here / "run.json").exists() and not place.exists():
            place = _result(here, *step.rsplit("@", 1))
    return place


def _result(run: Path, stage: str, address: str) -> Path:
    """The folder in which a run has a result of an address that begins so."""
    homes = {run, *(stage_folder.parent for stage_folder in stage_folders(run).values())}
    paths = [path.parent for home in homes for path in home.glob("*-*/stage.json")]
    every = sorted(path for path in paths if link_target(path) is None)
    fitting = [path for path in every if path.name.rpartition("-")[2].startswith(address[:12]) and address]
    if len(fitting) == 1:
        return fitting[0]
    known = [path for path in every if (made := stage_at(path)) and made[1].get("name") == stage]
    names = ", ".join(f"{stage}@{path.name.rpartition('-')[2]}" for path in fitting or known)
    number = f"{len(fitting)} results begin so" if fitting else "no such result"
    raise PretrainError(f"{run / stage}@{address}: {number}; accepted: {names or 'none, since none is finished'}")


def stage_folders(run: Path) -> dict[str, Path]:
    """The folders that a run shows now, by the stages' names; whether they are there or not."""
    with _written(run):
        rows = read_json(run / "run.json")["stages"]
        return {row["name"]: Path(os.path.normpath(run / row.get("folder", row["name"]))) for row in rows}


def stage_kinds(run: Path) -> dict[str, str]:
    """What the stages that a run shows are (`train`, `data`, …), by their names; empty where it is not said."""
    with _written(run):
        return {row["name"]: str(row.get("stage", "")) for row in read_json(run / "run.json")["stages"]}


@contextmanager
def _written(run: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise PretrainError(f"{run / 'run.json'} is not what `pretrain run` writes") from error


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, in linked folders too; one with more than `MANY` is no result of a stage."""
    count, within = 0, {folder: {os.path.realpath(folder)}}  # of a folder those that it lies in: no link leads back
    for here, folders, names in os.walk(folder, followlinks=True):
        above = within.pop(Path(here))
        real = {name: os.path.realpath(Path(here, name)) for name in folders}
        folders[:] = [name for name in folders if real[name] not in above]
        within |= {Path(here, name): above | {real[name]} for name in folders}
        count += len(folders) + len(names)
        if count > MANY:
            raise PretrainError(
                f"{folder} holds more than {MANY:,} files; accepted: the folder of a corpus, a tokenizer, a checkpoint "
                "or a stage"
            )
        yield from (path for path in (Path(here, name) for name in names) if os.path.isfile(path))


def stage_at(path: Path) -> tuple[Path, JSONObject] | None:
    """The finished stage that a path is, or lies in: its folder and `stage.json`."""
    for folder in (path, *list(path.parents)[:2]):
        if (folder / "stage.json").is_file():
            with suppress(PretrainError):
                return folder, read_object(folder / "stage.json")
    return None


def verify(folder: Path, wanted: Callable[[str], bool] = lambda _: True) -> None:
    """Raise `PretrainError` where a file of the folder is not as it was written, with the way to have it again.

    `wanted` tells of a name whether the file is looked at.
    """
    if finding := damage(folder, wanted):
        _refuse(folder, finding)


def _refuse(folder: Path, finding: str) -> None:
    other, again = " was replaced: " in finding, remedy(folder) or "a whole copy"
    raise PretrainError(
        f"{finding}; accepted: {again}" + ("" if other else f", or no {SUMS} beside what was changed on purpose")
    )


def verify_file(path: Path | str) -> None:
    """Raise `PretrainError` where a file is not as `checksums.json` beside it, or in the folder above, has it."""
    folder, finding = damage_of(path)
    if finding:
        _refuse(folder, finding)


def remedy(folder: Path, *kinds: str) -> str:
    """How to have again what a finished stage, of one of these kinds, has left; empty of what lies in none."""
    made = stage_at(Path(folder))
    fits = made and (not kinds or made[1].get("stage") in kinds)
    return f"`--refresh {made[1].get('name')}` makes it again" if made and fits else ""


def run_of(place: Path | str) -> Path:
    """The run of what has been printed of it: its folder, its report, a stage in it or a checkpoint of one."""
    path = expanded(place)
    for folder in (path, *list(path.parents)[:2]):
        if (folder / "run.json").is_file():
            return folder
    what = "is not a run (no run.json)" if path.exists() else f"does not exist{near(path)}"
    raise PretrainError(f"{place} {what}; accepted: the folder that `pretrain run` wrote")


def near(path: Path) -> str:
    """` (did you mean 'runs/mine'?)`: what a path that is not there may be meant for, beside it or among the runs."""
    by_name: dict[str, Path] = {}
    with suppress(OSError):
        by_name |= {run.parent.name: run.parent for run in Path("runs").glob("*/run.json")}
        by_name |= {each.name: each for each in path.parent.glob("*") if not each.name.startswith(".")}
    if path.name in by_name:  # in another folder
        return f" (did you mean {str(by_name[path.name])!r}?)"
    guess = nearest(path.name, by_name)
    return next((f" (did you mean {str(by_name[name])!r}?)" for name in by_name if f"{name!r}?" in guess), "")


def checkpoint_of(folder: Path) -> Path:
    """The checkpoint in a stage's folder, or the folder itself when it is one; of a GGUF file the one made of it."""
    place = place_of(folder)
    exported = place / "export"  # of a stage that exports, where that is a GGUF file
    folder = opened(exported if (place / "stage.json").exists() and exported.is_dir() else place, cache_folder())
    for path in (folder / "checkpoint", folder):
        if (path / "config.json").exists():
            return path
    if again := remedy(folder, "train", "surgery"):
        raise PretrainError(f"no checkpoint at {folder}; accepted: {again}")
    guess = "" if folder.exists() else near(folder)
    raise PretrainError(
        f"no checkpoint at {folder}{guess}; accepted: a train or surgery stage, a folder with config.json, an "
        "adapter's folder of peft, or a GGUF file"
    )


def newest_checkpoint(place: Path | str) -> Path:
    """The checkpoint of what a run, a stage or a checkpoint has printed: of a run, or its report, the last one.

    Where the last stage that is to write one is not finished as the run is set now, the newest that it has finished
    with other settings is taken, and a warning says so; it warns too where such a stage has never been finished.
    """
    place = place_of(place)
    place = place.parent if place.name == "report.html" else place
    if not (place / "run.json").exists():
        return checkpoint_of(place)
    stages = stage_folders(place)
    made = [name for name, stage in stages.items() if (stage / "checkpoint" / "config.json").exists()]
    kinds = stage_kinds(place)
    if exported := [name for name, stage in stages.items() if not made and any((stage / "export").glob("*.gguf"))]:
        return checkpoint_of(stages[exported[-1]])
    later = list(stages)[list(stages).index(made[-1]) + 1 :] if made else list(stages)
    missing = [name for name in later if kinds[name] in WRITERS]
    earlier = _earlier(place, stages, missing)
    if there := [(name, folder) for name, folder in earlier if folder.parent == place]:  # none of another run's
        name, folder = max(reversed(there), key=lambda each: missing.index(each[0]))  # of the last stage the newest
        called = f"{place / name}@{folder.name.rpartition('-')[2]}"
        warn(f"{place}: {name!r} is not finished as it is set now; {called}, of other settings, is taken")
        return folder / "checkpoint"
    names = ", ".join(f"{place / name}@{folder.name.rpartition('-')[2]}" for name, folder in reversed(earlier[-3:]))
    more = f"; of other settings there are {names}" if names else ""
    if not made:
        now = "as it is set now, has written a checkpoint"
        raise PretrainError(f"no stage of the run {place}, {now}{more}; accepted: a finished model")
    if missing:
        warn(f"{place}: {missing[-1]!r} is not finished; the newest checkpoint is that of {made[-1]!r}{more}")
    return stages[made[-1]] / "checkpoint"


def _earlier(run: Path, stages: Mapping[str, Path], names: Sequence[str]) -> list[tuple[str, Path]]:
    """Which of these stages have finished a checkpoint with other settings, and their folders, the newest of each last.

    A store of many runs has those of others too.
    """
    shown = {folder.name for folder in stages.values()}
    homes = dict.fromkeys((run, *(folder.parent for folder in stages.values())))
    records = sorted((path for home in homes for path in home.glob("*-*/stage.json")), key=lambda p: p.stat().st_mtime)
    folders = [
        path.parent for path in records
        if path.parent.name not in shown and (path.parent / "checkpoint" / "config.json").exists()
        and link_target(path.parent) is None
    ]  # fmt: skip
    named = [(str((stage_at(folder) or (folder, {}))[1].get("name")), folder) for folder in folders]
    return [(name, folder) for name, folder in named if name in names]


def check_unused(output: Path) -> None:
    """Refuse a run's folder that another process holds."""
    lock = output / ".lock"
    if not lock.exists():
        return
    try:
        with open_append(lock) as held:
            if take(held):
                return
    except OSError:  # the run itself will say what is wrong with it
        return
    raise in_use(output)


def in_use(output: Path) -> PretrainError:
    """The error of a run's folder that another process holds."""
    return PretrainError(f"{output} is in use by another run; accepted: wait for it, or --output elsewhere")


def corpus_of(folder: Path) -> Path:
    """The corpus in a data stage's folder, or the folder itself."""
    folder = place_of(folder)
    return folder / "corpus" if (folder / "corpus").is_dir() else folder


def corpus_at(place: Path | str, of: Path | None = None) -> Path | None:
    """The corpus at a place; None where there is none, since it may be a glob.

    Of a run the one that the checkpoint `of` was made with, if the run shows it, else the last.
    """
    path = place_of(place)
    shown = stage_folders(path) if (path / "run.json").exists() else {"": path}
    places = {name: corpus_of(folder) for name, folder in shown.items()}
    corpora = {name: corpus for name, corpus in places.items() if (corpus / "corpus.json").exists()}
    named = ""
    with suppress(PretrainError, AttributeError, KeyError, TypeError):
        named = read_json(of.parent / "stage.json")["inputs"].get("corpus", "") if of else ""
    return corpora.get(named, [*corpora.values()][-1] if corpora else None)


def corpus_in(output: Path, reference: object) -> Path:
    """The corpus of a run that a stage names: another stage's, or a folder's."""
    inside = output / str(reference)
    return corpus_of(inside if inside.exists() else Path(str(reference)))


def tokenizer_of(folder: Path) -> Path:
    """The tokenizer in a stage's folder, alone or in its checkpoint, or the folder itself."""
    folder = place_of(folder)
    return next((folder / name for name in ("tokenizer", "checkpoint") if (folder / name).is_dir()), folder)


def cache_folder() -> Path:
    """What can be made again is kept here: `$PRETRAIN_CACHE`, or `pretrain` in the user's folder for caches."""
    named, base = os.environ.get("PRETRAIN_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(named) if named else Path(base) / "pretrain").expanduser().absolute()


def has_chat_template(checkpoint: Path) -> bool:
    """Whether a checkpoint's tokenizer has a chat template."""
    settings, others = checkpoint / "tokenizer_config.json", ("chat_template.jinja", "chat_template.json")
    return any((checkpoint / name).exists() for name in others) or (
        settings.exists() and bool(read_object(settings).get("chat_template"))
    )

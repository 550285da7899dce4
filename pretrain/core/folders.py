"""What lies where: in a stage's folder (a folder that is the thing itself is taken as well), and in the cache."""

from __future__ import annotations

import os
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.files import read_json


def checkpoint_of(folder: Path) -> Path:
    """The checkpoint in a stage's folder, or the folder itself when it is one."""
    folder = Path(folder)
    for path in (folder / "checkpoint", folder):
        if (path / "config.json").exists():
            return path
    raise PretrainError(f"no checkpoint at {folder}; accepted: a train or surgery stage, or a folder with config.json")


def newest_checkpoint(place: Path | str) -> Path:
    """The checkpoint of what a run, a stage or a checkpoint has printed: of a run, or its report, the last one."""
    place = Path(place).expanduser()
    place = place.parent if place.name == "report.html" else place
    if not (place / "run.json").exists():
        return checkpoint_of(place)
    stages = [place / stage["name"] for stage in read_json(place / "run.json")["stages"]]
    made = [stage / "checkpoint" for stage in stages if (stage / "checkpoint" / "config.json").exists()]
    if not made:
        raise PretrainError(
            f"no stage of the run {place} has written a checkpoint; accepted: a run with a trained model"
        )
    return made[-1]


def corpus_of(folder: Path) -> Path:
    """The corpus in a data stage's folder, or the folder itself."""
    folder = Path(folder)
    return folder / "corpus" if (folder / "corpus").is_dir() else folder


def corpus_in(output: Path, reference: object) -> Path:
    """The corpus of a run that a stage names: another stage's, or a folder's."""
    inside = output / str(reference)
    return corpus_of(inside if inside.exists() else Path(str(reference)).expanduser())


def tokenizer_of(folder: Path) -> Path:
    """The tokenizer in a stage's folder, alone or in its checkpoint, or the folder itself."""
    folder = Path(folder)
    return next((folder / name for name in ("tokenizer", "checkpoint") if (folder / name).is_dir()), folder)


def cache_folder() -> Path:
    """What can be made again is kept here: `$PRETRAIN_CACHE`, or `pretrain` in the user's folder for caches."""
    named, base = os.environ.get("PRETRAIN_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(named) if named else Path(base) / "pretrain").expanduser().absolute()

"""What lies where in a stage's folder; a folder that is the thing itself is taken as well."""

from __future__ import annotations

from pathlib import Path

from pretrain.core.errors import PretrainError


def checkpoint_of(folder: Path) -> Path:
    """The checkpoint in a stage's folder, or the folder itself when it is one."""
    folder = Path(folder)
    for path in (folder / "checkpoint", folder):
        if (path / "config.json").exists():
            return path
    raise PretrainError(f"no checkpoint at {folder}; accepted: a train or surgery stage, or a folder with config.json")


def corpus_of(folder: Path) -> Path:
    """The corpus in a data stage's folder, or the folder itself."""
    folder = Path(folder)
    return folder / "corpus" if (folder / "corpus").is_dir() else folder


def tokenizer_of(folder: Path) -> Path:
    """The tokenizer in a stage's folder, alone or in its checkpoint, or the folder itself."""
    folder = Path(folder)
    return next((folder / name for name in ("tokenizer", "checkpoint") if (folder / name).is_dir()), folder)

"""Paths that others have written: only what can be a path at all is asked of the system, and links lead nowhere else.

Whoever made a checkpoint's folder chose where its links lead: to a key in the home of whoever opens it, perhaps. What
is read through them becomes part of what is made of the checkpoint, and travels with it. So no text beside a model is
taken from outside; weights may lie wherever their user wants them.
"""

from __future__ import annotations

import os
from pathlib import Path

from pretrain.core.errors import PretrainError, warn

TEMPLATES = ("chat_template.jinja", "chat_template.json")  # that a tokenizer is written with
MORE_TEMPLATES = "additional_chat_templates"
HUB = "snapshots"  # in the hub's cache: KIND--NAME/snapshots/REVISION/FILE is a link to KIND--NAME/blobs/DIGEST
READ = (  # of a model's configuration and of its processor
    "config.json", "generation_config.json", "pretrain.json", "tokenizer_config.json", "tokenizer.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "added_tokens.json", "special_tokens_map.json",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
PART, WHOLE = 255, 4000  # bytes of a name, and of a path, that systems take


def expanded(path: Path | str) -> Path:
    """The path with `~` replaced; an error where there is no such user, and for what no file can be named."""
    text = str(path)
    try:
        parts = [os.fsencode(part) for part in Path(text).parts]
    except UnicodeEncodeError:
        raise PretrainError(f"path {text[:80]!r}: half of a character; accepted: a path") from None
    if "\0" in text:
        raise PretrainError(f"path {text[:80]!r}: a zero character; accepted: a path")
    if sum(map(len, parts)) + len(parts) > WHOLE or any(len(part) > PART for part in parts):
        raise PretrainError(f"path '{text[:40]}…{text[-20:]}' is too long; accepted: names of at most {PART} bytes")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise PretrainError(f"path {text!r}: there is no such user; accepted: a path") from None


def inside(path: Path, folder: Path) -> bool:
    """Whether a file really lies in a checkpoint's folder, or where the hub's cache keeps those of its repository."""
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(home):
        return True
    return home.parent.name == HUB and "--" in home.parents[1].name and real.parent == home.parents[1] / "blobs"


def travels(path: Path, folder: Path) -> bool:
    """Whether a file beside a model goes into what is made of it; one that lies elsewhere does not, and is named."""
    if inside(path, folder):
        return True
    warn(f"{path} is a link to {os.path.realpath(path)}, outside of the checkpoint: it is left out")
    return False


def strays(folder: Path) -> set[str]:
    """The templates of a folder that lie elsewhere, by their ways from it.

    Of configurations and tokenizers that do, a warning says that what is made of the checkpoint will hold them.
    """
    paths = [folder / name for name in TEMPLATES]
    paths += sorted((folder / MORE_TEMPLATES).glob("*")) if (folder / MORE_TEMPLATES).is_dir() else []
    others = [folder / name for name in READ]
    if outside := [path.name for path in others if path.is_symlink() and path.is_file() and not inside(path, folder)]:
        warn(f"{folder}: {', '.join(outside)}: links out of it; what is made of the checkpoint holds what they lead to")
    return {path.relative_to(folder).as_posix() for path in paths if path.is_file() and not travels(path, folder)}

"""Paths that others have written: only what can be a path at all is asked of the system."""

from __future__ import annotations

import os
from pathlib import Path

from pretrain.core.errors import PretrainError

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

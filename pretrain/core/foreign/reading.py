"""Opening files that others have made: regular ones alone, and no more of them than is asked for.

A named pipe would be waited for without end, `/dev/zero` is read without end, and a link leads to either. So a file is
looked at before it is opened, and once more when it is open. What is refused is an `OSError` like any other that
opening raises, so that each reader says it in its own words.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from pretrain.core.errors import PretrainError

KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}  # fmt: skip
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class Irregular(OSError):
    """What a path names is there and is no regular file."""


def irregular(path: Path | str) -> str:
    """What a path names that is there and no regular file (`a named pipe`); empty for a file, and where nothing is."""
    try:
        mode = stat.S_IFMT(os.stat(path).st_mode)
    except (OSError, ValueError):
        return ""
    return KINDS.get(mode, "something else") if mode != stat.S_IFREG else ""


def open_file(path: Path | str) -> BinaryIO:
    """A regular file, open for reading bytes; `OSError` where there is none."""
    _refuse(path, os.stat(path).st_mode)
    descriptor = os.open(path, _FLAGS)
    try:
        _refuse(path, os.fstat(descriptor).st_mode)  # another may have come to the name meanwhile
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def open_append(path: Path | str) -> BinaryIO:
    """A regular file, made where there is none, open for bytes at its end: a lock, or a log that grows.

    Raises `PretrainError` for what is there and no regular file, where opening would wait or write elsewhere, and
    `OSError` as opening does.
    """
    descriptor = -1
    if not (kind := irregular(path)):
        descriptor = os.open(path, _FLAGS | os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        mode = stat.S_IFMT(os.fstat(descriptor).st_mode)  # another may have come to the name meanwhile
        kind = "" if mode == stat.S_IFREG else KINDS.get(mode, "something else")
    if kind:
        if descriptor >= 0:
            os.close(descriptor)
        raise PretrainError(f"{path} is {kind}; accepted: a regular file, or nothing")
    return os.fdopen(descriptor, "a+b")


def _refuse(path: Path | str, mode: int) -> None:
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if kind != stat.S_IFREG:
        words = KINDS.get(kind, "something else")
        raise Irregular(errno.EINVAL, f"it is {words}, which may never end; accepted: a regular file", str(path))


def read_bytes(path: Path | str, most: int) -> bytes:
    """A regular file's bytes; one that holds more than `most` is refused, whatever its size was said to be."""
    with open_file(path) as file:
        data = b"" if os.fstat(file.fileno()).st_size > most else file.read(most + 1)
        if (not data and os.fstat(file.fileno()).st_size > most) or len(data) > most:
            raise PretrainError(f"{path} is too large; accepted: a file of at most {in_bytes(most)}")
        return data


def in_bytes(count: int) -> str:
    """A bound as messages have it: `64 MiB`."""
    units = ((30, "GiB"), (20, "MiB"), (10, "KiB"), (0, "bytes"))
    return next((f"{count >> bits} {unit}" for bits, unit in units if count >> bits), "nothing")

"""Locks, links, flushing and memory as Linux, macOS and Windows each have them; nothing else asks which system it is.

Windows lets few users make symbolic links, so a link may be a small file there that names its target, and knows no
flushing of folders. Two folders trade names in one step on Linux and macOS alone.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

LINK = "pretrain link: "  # how a file that stands for a link begins
WAIT = 0.5  # seconds between two looks at a lock, where the system cannot wait for it itself


def take(lock: IO[Any], wait: bool = False) -> bool:
    """Lock an open file until it is closed or the process dies; False where another holds it and we do not wait."""
    if sys.platform == "win32":
        import msvcrt

        while True:
            try:
                lock.seek(0)
                msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
                return True
            except OSError:
                if not wait:
                    return False
                time.sleep(WAIT)
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def hold(path: Path, wait: bool = False) -> int:
    """A handle by which a folder or a file is locked until it is closed or the process dies.

    -1 where another holds it and we do not `wait`, and where the system has no locks of folders.
    """
    if sys.platform == "win32":
        return -1
    import fcntl

    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return -1
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return -1
    return handle


def let_be(handle: int) -> None:
    """Give back what `hold` gave."""
    if handle >= 0:
        os.close(handle)


def held(path: Path) -> bool:
    """Whether a process holds a lock file; nothing is written. Of one that may not be opened it is not known: False."""
    try:
        with path.open("r+") as lock:
            return not take(lock)
    except OSError:
        return False


def fsync(path: Path) -> None:
    """Flush a file or the entries of a folder to the disk; Windows does the latter itself."""
    if sys.platform == "win32" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(folder: Path, other: Path) -> bool:
    """Let two folders trade names in one step; False where the system or the disk cannot."""
    if sys.platform == "win32":
        return False
    library, swap = ctypes.CDLL(None), 2  # RENAME_EXCHANGE, RENAME_SWAP
    name, here = ("renameatx_np", -2) if sys.platform == "darwin" else ("renameat2", -100)  # AT_FDCWD
    call = getattr(library, name, None)
    return call is not None and call(here, os.fsencode(folder), here, os.fsencode(other), swap) == 0


def peak_resident() -> int:
    """Bytes of memory of this process at its peak, since it began or since `restart_peak`."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # of bytes, of KiB


def restart_peak() -> None:
    """Count the peak from here on, after giving back what is not in use; where the system cannot, it stays as it is."""
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory_limits() -> dict[str, int]:
    """Bytes of memory that this process may use, by what bounds them: `ulimit -v` (addresses), `ulimit -d` (data)."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    limits = {"ulimit -v": resource.RLIMIT_AS, "ulimit -d": resource.RLIMIT_DATA}
    allowed = {name: resource.getrlimit(limit)[0] for name, limit in limits.items()}
    return {name: count for name, count in allowed.items() if count != resource.RLIM_INFINITY}


def link(place: Path, target: str) -> None:
    """Let `place` show `target`, a way from its folder, in one step; a link that was there is replaced."""
    fresh = place.with_name(f".tmp-{place.name}")
    fresh.unlink(missing_ok=True)
    try:
        os.symlink(target, fresh, target_is_directory=True)
    except (OSError, NotImplementedError):
        fresh.write_text(LINK + Path(target).as_posix() + "\n", encoding="utf-8")
    os.replace(fresh, place)


def link_target(place: Path) -> str | None:
    """What a link shows, as it was given; None for what is none."""
    if place.is_symlink():
        return os.readlink(place)
    if place.is_file() and place.stat().st_size < 4096:
        text = place.read_bytes()
        if text.startswith(LINK.encode()):
            return text.decode("utf-8").removeprefix(LINK).strip()
    return None

"""What is known of this machine without torch: its name, its cores, the matrix rate that a run has measured."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.files import locked, read_json, write_json
from pretrain.core.folders import cache_folder
from pretrain.core.system.portable import allowed_memory


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def cores() -> int:
    """How many cores this process may use, or threads where that is said."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return min(usable, int(threads)) if threads.isdecimal() and int(threads) else usable


def likely_device() -> str:
    """`cuda` where a driver shows a device to this process, else `cpu`: what torch would say, without it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return "cuda" if Path("/dev/nvidiactl").exists() and not hidden else "cpu"


def memory() -> int:
    """Bytes of memory that this machine has, or that this process may use where that is less (`ulimit -v`)."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = allowed_memory()
    return there if allowed is None else min(there, allowed)


def efficiency(width: int) -> float:
    """The share of the machine's rate for large products that training at a width reaches, on CPUs.

    Measured on one thread with 4 blocks, 8 rows of 256 and 4,096 entries: 0.51 at 64, 0.65 at 128, 0.70 at 256.
    """
    return 0.78 * width / (width + 32)


def remembered_rate(device: str) -> float | None:
    """FLOP/s of a large matrix product on `cpu` or `cuda`, as a run here has measured it; `None` where none has."""
    with suppress(PretrainError, OSError):
        rate = read_json(_file()).get(_key(device))
        return float(rate) if isinstance(rate, int | float) and rate > 0 else None
    return None


def remember_rate(device: str, rate: float) -> None:
    """Keep a measured rate for the plans to come; of two the better, since a busy machine only looks slower."""
    if rate <= (remembered_rate(device) or 0.0):
        return
    with suppress(PretrainError, OSError), locked(_file().with_name(".rates.lock")):
        known = read_json(_file()) if _file().exists() else {}
        write_json(_file(), known | {_key(device): rate})


def _file() -> Path:
    return cache_folder() / "rates.json"


def _key(device: str) -> str:
    return f"{device}, {cpu_name()}, {cores()} cores"

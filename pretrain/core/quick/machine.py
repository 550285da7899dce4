"""What is known of this machine without torch: its name, its cores, the matrix rate that a run has measured."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.core.errors import PretrainError, warn
from pretrain.core.files import JSONObject, locked, read_sealed, sealed, write_json
from pretrain.core.folders import cache_folder
from pretrain.core.quick.quantities import counted
from pretrain.core.system.portable import memory_limits
from pretrain.core.system.processes import usable_cores

WAITING = "OMP_WAIT_POLICY"
IDLE, LOOKED = 0.5, 0.1  # cores that others may want on an idle machine; seconds that are looked at
USUAL = {"cpu": 5e10, "cuda": 5e13}  # FLOP/s of a core or a card, as long as none is measured


@dataclass(frozen=True)
class Beside:
    """Seconds of a training step beside its large products: as here where no run has measured them."""

    block: float = 4e-3  # of each block: the many small operations forwards, backwards and of the optimiser
    logit: float = 2e-9  # of each logit: it is written, read and exponentiated

    def seconds(self, blocks: float, logits: float) -> float:
        """Of a step with so many blocks and logits."""
        return self.block * blocks + self.logit * logits


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


def share_cores() -> None:
    """Before torch is imported: have its threads sleep where they wait for one another, if cores are wanted by others.

    OpenMP's threads meet after every product, and spin until all are there: while one has no core, the others keep it
    from one. At a load of 6 on 2 cores a step took 4.6 times as long so as with sleeping threads, which are 1.5 to 2
    times slower where nothing else runs. The numbers that are computed are the same. What is set by hand stands.
    """
    if any(name in os.environ for name in (WAITING, "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        return
    there = os.cpu_count() or 1
    if not hasattr(os, "getloadavg") or os.getloadavg()[0] < IDLE:
        return
    import psutil

    if psutil.cpu_percent(interval=LOOKED) * there / 100 > IDLE:  # wanted now; the load is of the last minute
        os.environ[WAITING] = "passive"


def others_at_work() -> str:
    """That other programs want this machine's cores, now or when its rate was measured; nothing where none do."""
    there, load = os.cpu_count() or 1, _load()
    then = _known().get(_at_load(likely_device()))
    before = max(0.0, then) if isinstance(then, float) else 0.0
    measured = f"this machine's rate was measured while others wanted its cores (load {before:.1f})"
    if load <= there:
        return f"{measured}: times may be shorter, and the next run measures anew" if before > there else ""
    others = f"others want {counted(there, 'core')} too (load {load:.1f})"
    if before > there and load <= 1.5 * before:
        return f"{others}, and {measured}: times are of a machine that is as busy, and alone it would be quicker"
    times = (load + there) / (there + (before if before > there else 0.0))
    slower = f"{others}: what is said to take a minute may take {times:.0f}"
    rest = "a budget of time makes as much less; one of flops or tokens makes all of it"
    return f"{slower}, and {rest}" + (f"; {measured}" if before > there else "")


def _load() -> float:
    """How many processes want a core, a mean over the last minute; 0 where nothing tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def crowding(threads: int) -> str:
    """Words to add to what is slow, where torch's `threads` outnumber the cores that are free for them; else nothing.

    OpenMP's threads meet after every product: while one of them has no core all wait, 10 to 50 times as long, unless
    `share_cores` has them sleep.
    """
    there = os.cpu_count() or 1
    usable = usable_cores()
    load = _load()
    others = max(0.0, load - threads)  # that want a core beside this process's threads
    free = max(1, min(usable, round(there - others)))
    if threads <= free:
        return ""
    if os.environ.get(WAITING, "").lower() == "passive":
        return f"; others want the cores too (load {load:.1f})"
    return (
        f"; torch has {threads} threads, and {counted(free, 'core')} of {there} {'is' if free == 1 else 'are'} free "
        f"for them (load {load:.1f}): OMP_NUM_THREADS={free} is often many times quicker there"
    )


def likely_device() -> str:
    """`cuda` where a driver shows a device to this process, else `cpu`: what torch would say, without it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return "cuda" if Path("/dev/nvidiactl").exists() and not hidden else "cpu"


def memory() -> int:
    """Bytes of memory that this machine has, or that this process may use where that is less (`ulimit`)."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(there, *memory_limits().values()) if memory_limits() else there


def efficiency(width: int) -> float:
    """The share of the machine's rate for large products that training at a width reaches, on CPUs.

    Measured on one thread with 4 blocks, 8 rows of 256 and 4,096 entries: 0.51 at 64, 0.65 at 128, 0.70 at 256.
    """
    return 0.78 * width / (width + 32)


def remembered_rate(device: str) -> float | None:
    """FLOP/s of a large matrix product on `cpu` or `cuda`, as a run here has measured it; `None` where none has."""
    rate = _known().get(described(device))
    return float(rate) if isinstance(rate, int | float) and rate > 0 else None


def likely_rate() -> float:
    """FLOP/s of this machine's large products, as all plans take it: the remembered rate, else the usual one."""
    device = likely_device()
    return remembered_rate(device) or USUAL[device] * (cores() if device == "cpu" else 1)


def remember_rate(device: str, rate: float) -> None:
    """Keep a measured rate for the plans to come, and the load of then; of two the better: a busy machine is slower."""
    if rate <= (remembered_rate(device) or 0.0):
        return
    with suppress(PretrainError, OSError), locked(_file().with_name(".rates.lock")):
        write_json(_file(), sealed(_known() | {described(device): rate, _at_load(device): _load()}))


def remembered_beside(device: str) -> Beside | None:
    """What a step takes beside its products on `cpu` or `cuda`, as measured here; `None` where nothing was."""
    kept = _known().get(_beside(device))
    if not isinstance(kept, dict) or not all(isinstance(kept.get(name), float) for name in asdict(Beside())):
        return None
    return Beside(**{name: kept[name] for name in asdict(Beside())})


def likely_beside() -> Beside:
    """What a step takes beside its products, as all plans take it: as remembered, else the usual."""
    return remembered_beside(likely_device()) or Beside()


def remember_beside(device: str, measured: Beside, seconds: float) -> Beside:
    """Keep what was measured for the plans to come, unless what is kept was measured in fewer `seconds`: returns that.

    A busy machine only looks slower.
    """
    before, known = remembered_beside(device), _known().get(_beside(device))
    best = known.get("seconds") if isinstance(known, dict) else None
    if before is not None and isinstance(best, float) and best <= seconds:
        return before
    with suppress(PretrainError, OSError), locked(_file().with_name(".rates.lock")):
        write_json(_file(), sealed(_known() | {_beside(device): asdict(measured) | {"seconds": seconds}}))
    return measured


def _beside(device: str) -> str:
    return f"{described(device)}: beside"


def _at_load(device: str) -> str:
    return f"{described(device)}: load"


def _known() -> JSONObject:
    """The rates that are kept; of a damaged file none, with a warning: they are measured again."""
    try:
        return read_sealed(_file()) if _file().exists() else {}
    except PretrainError as error:
        warn(f"{error}: the rate of this machine is measured again")
        return {}


def _file() -> Path:
    return cache_folder() / "rates.json"


def described(device: str) -> str:
    """A device as its rates are kept: two machines that do as much have one name."""
    return f"{device}, {cpu_name()}, {cores()} cores"

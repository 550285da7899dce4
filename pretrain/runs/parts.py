"""What a stage has taken in parts, each of which an interrupt has ended: they are part of what it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from pretrain.core.errors import PretrainError, warn
from pretrain.core.files import read_json, sealed, write_json
from pretrain.core.system.portable import restart_peak
from pretrain.identity import Planned
from pretrain.records import PARTS, Part


@contextmanager
def noted(item: Planned, parts: list[Part], main: bool) -> Iterator[None]:
    """Count a stage's memory by itself, and note what was spent where it does not come to its end.

    What parts have taken is part of what the stage takes.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    restart_peak()
    try:
        yield
    except BaseException:
        if main:
            with suppress(PretrainError, OSError):  # of a full disk the error is told by what ends the stage
                every = [*parts, part_of(started, time.perf_counter() - clock)]
                write_json(item.folder / PARTS, sealed({"parts": every}))
        raise


def part_of(started: datetime, seconds: float) -> Part:
    """What a part of a stage has taken, which an interrupt has ended."""
    from pretrain.core.meter import peak_memory

    began = started.isoformat(timespec="seconds")
    return {"started": began, "seconds": seconds, "peak_memory_bytes": peak_memory()}


def earlier(item: Planned) -> list[Part]:
    """The parts of a stage that is gone on with; of one that begins again none."""
    path = item.folder / PARTS
    if path.exists() and not item.stage.progress(item.folder):
        path.unlink()
    with suppress(KeyError, TypeError, PretrainError):  # of a damaged note: what the parts took is not known then
        rows = read_json(path) if path.exists() else []
        rows = rows["parts"] if isinstance(rows, dict) else rows  # of before
        return [
            Part(started=str(r["started"]), seconds=r["seconds"] + 0.0, peak_memory_bytes=r["peak_memory_bytes"] + 0)
            for r in rows
        ]
    warn(f"{path} is damaged: what the parts of this stage before have taken is not counted")
    return []

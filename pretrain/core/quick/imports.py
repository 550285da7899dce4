"""Importing large libraries in less time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.foreign.code import consenting_to
from pretrain.core.foreign.reading import in_bytes
from pretrain.core.system.portable import memory_limits

LEAST = {"ulimit -v": 1 << 30, "ulimit -d": 512 << 20}  # bytes


@contextmanager
def opening(checkpoint: Path, trust_remote_code: bool = False) -> Iterator[None]:
    """Open a checkpoint for answers: a line says which before anything large is imported.

    `trust_remote_code` consents to the code that it brings.
    """
    with uncollected(opens=checkpoint), consenting_to(checkpoint, trust_remote_code):
        yield


@contextmanager
def uncollected(opens: Path | None = None) -> Iterator[None]:
    """Import, or load, without the garbage collector, and let it pass over what that has made from then on.

    torch and transformers make some millions of objects that all stay. To look through them again and again while they
    come, and once more as the process ends, takes a third of the time of both imports. A line says which checkpoint is
    opened, or else, on a terminal, what is waited for.
    """
    for name, count in memory_limits().items():
        if count < LEAST[name] and "torch" not in sys.modules:  # they would end the process without a word
            raise PretrainError(
                f"{name} allows {in_bytes(count)} of memory; accepted: at least {in_bytes(LEAST[name])}, which "
                "torch and the other libraries take"
            )
    if opens is not None:
        print(f"opening {opens} …", file=sys.stderr, flush=True)
    elif "torch" not in sys.modules and sys.stderr.isatty():
        print("loading torch and transformers …", file=sys.stderr, flush=True)
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()

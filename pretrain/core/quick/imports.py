"""Importing large libraries in less time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Import, or load, without the garbage collector, and let it pass over what that has made from then on.

    torch and transformers make some millions of objects that all stay. To look through them again and again while they
    come, and once more as the process ends, takes a third of the time of both imports. On a terminal a line says what
    is waited for.
    """
    if "torch" not in sys.modules and sys.stderr.isatty():
        print("loading torch and transformers …", file=sys.stderr, flush=True)
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()

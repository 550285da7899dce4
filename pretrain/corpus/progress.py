"""What is said while many things are gone through: a line every half minute, wherever the output goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

EVERY = 30.0  # seconds between two lines
Item = TypeVar("Item")


def reported(items: Iterable[Item], say: Callable[[str], None], what: str) -> Iterator[Item]:
    """The items; meanwhile `say` is told how many there have been."""
    last = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            say(f"{number:,} {what}")
        yield item


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep `datasets` from drawing bars: one for each split and part would bury what the stage itself says."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()

"""What is said while many things are gone through: a line every half minute, wherever the output goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
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

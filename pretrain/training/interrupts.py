"""Signals that ask a training to save and stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from signal import _HANDLER


class Interrupts:
    """While open, SIGINT and SIGTERM ask the loop to save and stop after its step; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.asked = False  # of this process
        self.agreed = False  # of any process, as all of them know
        self._before: dict[int, _HANDLER] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

"""Signals that ask a training to save and stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from pretrain.core.errors import Terminated
from pretrain.core.system.signals import ending, let_go

if TYPE_CHECKING:
    from signal import _HANDLER

    from pretrain.training.distributed import World


class LeftOff(KeyboardInterrupt):
    """A signal has ended what is done again when the training goes on."""


class Interrupts:
    """While open, SIGINT, SIGTERM and SIGHUP ask the loop to save and stop after its step; a second SIGINT stops at
    once.

    `words` says what happens now, at the moment of the first signal. A signal that was ignored stays so.
    """

    def __init__(self, words: Callable[[], str] = str) -> None:
        self.words = words
        self._at_once = False
        self.asked = False  # of this process
        self.number = 0  # the first signal
        self.agreed = False  # of any process, as all of them know
        self._before: dict[int, _HANDLER] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self.number = True, number
            let_go()
            tell(self.words())
        if self._at_once:
            self._at_once = False
            raise LeftOff

    def left(self, words: str) -> BaseException:
        """What to raise when all is saved: what the first signal would have raised outside of a training."""
        if self.number in (0, signal.SIGINT):
            return KeyboardInterrupt(words)
        return Terminated(128 + self.number)

    def agree(self, world: World) -> None:
        """Let all processes know whether one was asked; every process must call it."""
        self.agreed = world.sum([float(self.asked)])[0] > 0

    @contextmanager
    def at_once(self, alone: bool) -> Iterator[None]:
        """While open, in a process that is `alone`, the first signal ends what is being done, by `LeftOff`."""
        if alone and self.asked:
            raise LeftOff
        self._at_once = alone
        try:
            yield
        finally:
            self._at_once = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, *ending())}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def tell(words: str) -> None:
    """A line on stderr; of a signal that came within another write, past Python's own buffers."""
    if not words:
        return
    try:
        print(words, file=sys.stderr, flush=True)
    except (RuntimeError, OSError):
        with suppress(OSError):  # of a terminal that is gone
            os.write(2, f"{words}\n".encode())

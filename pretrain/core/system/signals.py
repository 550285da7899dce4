"""Signals that ask a command to end, and terminals that are closed while it runs.

SIGHUP is what the closing of a terminal, or of a connection, sends. It is taken as SIGTERM is, unless it was ignored
when the process began, as `nohup` has it.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

STOPPED = {  # words by exit status
    130: "interrupted",
    128 + signal.SIGTERM: "terminated",
    128 + getattr(signal, "SIGHUP", 1): "terminated: the terminal was closed",
}


def ending() -> list[int]:
    """The signals that end what goes on at a terminal's closing or at a machine's: those of them not ignored."""
    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def let_go() -> None:
    """Of a terminal that is gone, let what is yet written to it go nowhere, in place of an error at every line."""
    try:
        import termios
    except ImportError:  # Windows
        return
    for number in (1, 2):
        try:
            termios.tcgetattr(number)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)


class Unwritten(OSError):
    """What was written to standard output is not all there: a disk that is full, most often."""


class _Lasting:
    """A stream to which nothing is written any more once that fails: of a terminal that is gone, on a full disk.

    So the work goes on for which it was only the words; what it has cost is `failed`.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.failed: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._gone(error)
            return len(text)

    def flush(self) -> None:
        """Flush."""
        try:
            self._stream.flush()
        except OSError as error:
            self._gone(error)

    def _gone(self, error: OSError) -> None:
        if error.errno == errno.EPIPE:  # who reads wants no more
            raise error
        if error.errno == errno.EIO and _terminal(self._stream):
            let_go()
            return
        self.failed = self.failed or error
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextmanager
def lasting() -> Iterator[None]:
    """While open, what cannot be written to standard output and error ends nothing.

    Raises `Unwritten` in place of success where some of the output was lost, but for a terminal that was closed.
    """
    before = sys.stdout, sys.stderr
    out, error = (None if stream is None else _Lasting(stream) for stream in before)
    sys.stdout, sys.stderr = out, error  # type: ignore[assignment]
    try:
        yield
        _settle(out)
    except SystemExit as leaving:
        if not leaving.code:
            _settle(out)
        raise
    finally:
        sys.stdout, sys.stderr = before


def _settle(out: _Lasting | None) -> None:
    if out is not None:
        out.flush()
        if out.failed is not None:
            raise Unwritten(out.failed.errno, out.failed.strerror)


def _terminal(stream: IO[str] | None) -> bool:
    with suppress(AttributeError, ValueError):  # of what is closed
        return stream is not None and stream.isatty()
    return False

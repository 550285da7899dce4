"""How a command speaks: a warning or an error is one line, a signal says that what is done is kept."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from pretrain.core.errors import PretrainError, PretrainWarning
from pretrain.core.foreign.parsing import NOT_ENOUGH, out_of_memory, wanted_for
from pretrain.core.system.extras import extras_named

STOPPED = {130: "interrupted", 128 + signal.SIGTERM: "terminated"}  # by exit status

KEPT = "what is done is kept: run the same again to go on"
KEEPING = {"run", "compare", "ladder"}  # commands that go on where they were stopped; `claim run` is one of them


def _keeps() -> bool:
    """Whether the command that is being run goes on where it was stopped."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    return not KEEPING.isdisjoint(words[:2])


def _terminate(number: int, _: FrameType | None) -> None:
    """Leave as an interrupt does, so that temporary files are removed and locks given back."""
    raise SystemExit(128 + number)


class App(typer.Typer):
    """Typer, with the project's errors as one line and an exit status."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        try:
            with _listening(), extras_named():
                return super().__call__(*args, **kwargs)
        except Exception as error:
            words = _words(error)
            if not words or os.environ.get("PRETRAIN_DEBUG"):
                raise
            typer.secho(f"error: {words}", fg="red", err=True)
            sys.exit(1)
        except SystemExit as error:  # typer's own way to pass on an interrupt
            if error.code in STOPPED:
                kept = f"; {KEPT}" if _keeps() else ""
                typer.secho(f"{STOPPED[error.code]}{kept}", fg="yellow", err=True)
            raise


def _words(error: Exception) -> str:
    """The one line of an error of ours, of the machine or of its files, which no reader has named; else nothing."""
    if out_of_memory(error) and NOT_ENOUGH not in str(error):
        return f"{NOT_ENOUGH}{wanted_for(error)}; accepted: a smaller model, batch or corpus, or a machine with more"
    if isinstance(error, PretrainError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return str(PretrainError(f"{error.filename}: {error.strerror}" + (f"; {KEPT}" if _keeps() else "")))
    return ""


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """One line of a warning of ours; those of libraries as Python shows them."""
    if issubclass(category, PretrainWarning):
        return f"warning: {message}\n"
    return _format_plain(message, category, filename, lineno, line)


_format_plain = warnings.formatwarning


@contextmanager
def _listening() -> Iterator[None]:
    """While open, warnings are lines and SIGTERM ends the command as an interrupt does."""
    warnings.formatwarning, main = _format_warning, threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if main else None
    try:
        yield
    finally:
        warnings.formatwarning = _format_plain
        if main:
            signal.signal(signal.SIGTERM, before)

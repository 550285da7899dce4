"""How a command speaks: a warning or an error is one line, a signal says that what is done is kept."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

import typer

from pretrain.core.errors import PretrainError, PretrainWarning, Terminated
from pretrain.core.foreign.parsing import NOT_ENOUGH, gave_up, out_of_memory, wanted_for
from pretrain.core.system.extras import extras_named
from pretrain.core.system.signals import STOPPED, Unwritten, ending, lasting, let_go
from pretrain.core.system.usage import within
from pretrain.core.system.watched import watched

F = TypeVar("F", bound=Callable[..., object])
KEPT = "what is done is kept: run the same again to go on"
KEEPING = {"run", "compare", "ladder"}  # commands that go on where they were stopped; `claim run` is one of them


def _keeps() -> bool:
    """Whether the command that is being run goes on where it was stopped."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    return not KEEPING.isdisjoint(words[:2])


def _terminate(number: int, _: FrameType | None) -> None:
    """Leave as an interrupt does, so that temporary files are removed and locks given back."""
    let_go()
    if hasattr(signal, "SIGHUP"):  # which a shell and the system both send: what is removed now is removed whole
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise Terminated(128 + number)


class App(typer.Typer):
    """Typer, with the project's errors as one line and an exit status, and options with the bounds of fields."""

    def command(self, name: str | None = None, **more: object) -> Callable[[F], F]:
        """As typer's; a value beyond the bounds of its type is refused before the command begins."""
        typed: Callable[..., Callable[[Callable[..., object]], object]] = super().command
        register, group = typed(name, **more), self.info.name
        start = f"{group} " if isinstance(group, str) and group != "pretrain" else ""

        def bounded(function: F) -> F:
            register(within(function, start + (name or function.__name__.replace("_", "-"))))
            return function

        return bounded

    def __call__(self, *args: object, **kwargs: object) -> object:
        try:
            watched()
            with lasting(), _listening(), extras_named():
                return super().__call__(*args, **kwargs)
        except BaseException as error:
            if not isinstance(error, Exception) and not gave_up(error):
                _explain(error)
                raise
            if (status := _stopped_by(error)) is not None:
                _explain(SystemExit(status))
                sys.exit(status)
            words = _words(error)
            if not words or os.environ.get("PRETRAIN_DEBUG"):
                raise
            with suppress(OSError):  # nor is there a place for an error
                typer.secho(f"error: {words}", fg="red", err=True)
            sys.exit(1)


def _stopped_by(error: BaseException) -> int | None:
    """The status of the signal of which a library has made this error; None where none has come of one."""
    met: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in met:
        if type(each) is KeyboardInterrupt:
            return 130
        if isinstance(each, Terminated) and isinstance(each.code, int):
            return each.code
        met.append(each)
        each = each.__cause__ or each.__context__
    return None


def _explain(error: BaseException) -> None:
    """Say that a command was stopped, where a status does: typer's own way to pass on an interrupt."""
    if isinstance(error, SystemExit) and error.code in STOPPED:
        kept = f"; {KEPT}" if _keeps() else ""
        typer.secho(f"{STOPPED[error.code]}{kept}", fg="yellow", err=True)


def _words(error: BaseException) -> str:
    """The one line of an error of ours, of the machine or of its files, which no reader has named; else nothing."""
    if out_of_memory(error) and NOT_ENOUGH not in str(error):
        return f"{NOT_ENOUGH}{wanted_for(error)}; accepted: a smaller model, batch or corpus, or a machine with more"
    if isinstance(error, PretrainError):
        return str(error)
    if isinstance(error, Unwritten):
        return f"standard output cannot be written: {error.strerror}; accepted: a place with room for it"
    if isinstance(error, OSError) and error.filename is not None:
        return str(PretrainError(f"{error.filename}: {error.strerror}" + (f"; {KEPT}" if _keeps() else "")))
    return str(PretrainError(f"a library gave up: {error}")) if gave_up(error) else ""


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
    """While open, warnings are lines and SIGTERM and SIGHUP end the command as an interrupt does."""
    warnings.formatwarning, main = _format_warning, threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, _terminate) for number in ending()} if main else {}
    try:
        yield
    finally:
        warnings.formatwarning = _format_plain
        for number, handler in before.items():
            signal.signal(number, handler)

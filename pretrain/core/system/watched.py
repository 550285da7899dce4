"""A command under a limit of memory (`ulimit`) runs in a child: a library that gets none may abort its whole process.

Python says `MemoryError`, torch raises, but what is written in Rust or C++ ends the process where it stands, of which
no handler inside could say a word. The parent waits, hands on the signals that were meant for the command, and says it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from contextlib import suppress

from pretrain.core.errors import PretrainError
from pretrain.core.foreign.parsing import NOT_ENOUGH
from pretrain.core.system.portable import memory_limits
from pretrain.core.system.signals import ending


def watched() -> None:
    """Go on in a child where the memory is limited, and leave, as it leaves, in the parent; elsewhere nothing happens.

    Raises `PretrainError` in the parent where the child was ended from within, which under such a limit is the memory.
    """
    if not memory_limits() or not hasattr(signal, "sigwaitinfo") or threading.active_count() > 1:
        return
    handed_on = {signal.SIGINT, *ending()}
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, a child leaves nothing to wait for
    before = signal.pthread_sigmask(signal.SIG_BLOCK, handed_on | {signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        _end_with_the_parent()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    while True:
        came = signal.sigwaitinfo(handed_on | {signal.SIGCHLD})
        if came.si_signo != signal.SIGCHLD:
            if came.si_pid:  # what a terminal sends the child has got, too
                with suppress(ProcessLookupError):
                    os.kill(child, came.si_signo)
            continue
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if by in (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS):
        limits = " and ".join(memory_limits())
        raise PretrainError(
            f"{NOT_ENOUGH}: a library ended the process under {limits}; "
            "accepted: a smaller model, batch or corpus, or a higher limit"
        )
    if by:
        with suppress(OSError):  # SIGKILL has no other
            signal.signal(by, signal.SIG_DFL)
        os.kill(os.getpid(), by)
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(os.WEXITSTATUS(status))


def _end_with_the_parent() -> None:
    """Let the child end as the parent is killed, so that it holds no locks that nobody knows of (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

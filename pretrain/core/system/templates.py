"""Templates that others have written, filled in within a bound of time, of memory and of what they write.

A template is a program: it is filled in by a process of its own, a copy of this one that is ended beyond its bounds.
"""

from __future__ import annotations

import os
import select
import signal
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pretrain.core.errors import PretrainError
from pretrain.core.foreign.parsing import reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 1  # of the processor, or a little more
WAITED = 30.0  # seconds of the clock, on a machine that has other work
MEMORY = 512 << 20  # bytes beyond those that the process has
MOST = 4 << 20  # bytes of what is written
LENGTH = 8  # bytes that say how many the copy writes
KEPT = 1024  # texts that are not filled in again
ACCEPTED = "another template"


class Beyond(PretrainError):
    """A template is beyond a bound."""


_filled: dict[str, str | PretrainError] = {}
_beyond: dict[str, Beyond] = {}  # by template: one that has been beyond a bound is not tried again


def filled(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, answering: bool) -> str:
    """The text of messages in a tokenizer's chat template; `answering`: up to where the answer begins.

    Raises `PretrainError` for a template that cannot be filled in within the bounds.
    """
    known = repr((tokenizer.chat_template, tokenizer.special_tokens_map, list(messages), answering))
    template = repr(tokenizer.chat_template)
    if template not in _beyond and known not in _filled:
        if len(_filled) >= KEPT:
            _filled.clear()
        try:
            _filled[known] = bounded(
                lambda: str(
                    tokenizer.apply_chat_template(
                        [dict(each) for each in messages], tokenize=False, add_generation_prompt=answering
                    )
                ),
                "the chat template",
            )
        except Beyond as error:
            _beyond[template] = error
        except PretrainError as error:
            _filled[known] = error
    if template in _beyond:
        raise Beyond(str(_beyond[template]))
    text = _filled[known]
    if isinstance(text, PretrainError):
        raise PretrainError(str(text)) from text
    return text


def bounded(fill: Callable[[], str], what: str) -> str:
    """What `fill` makes of a template, in a process of its own; whatever goes wrong is an error that names `what`."""
    if not hasattr(os, "fork"):
        return _here(fill, what)
    out, into = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, none of which the copy has or waits for
        child = os.fork()
    if not child:
        try:
            os.close(out)
            _write(into, _limited(fill))
        finally:
            os._exit(0)
    os.close(into)
    try:
        data, late = _read(out)
    finally:
        os.close(out)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    if data is None:
        ended = late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL))
        raise Beyond(_wrong(what, f"it takes more than {SECONDS} second" if ended else "it ends the process"))
    text = data[1:].decode(errors="replace")
    if data[:1] != b"+":
        raise (PretrainError if data[:1] == b"-" else Beyond)(_wrong(what, text))
    return text


def _wrong(what: str, why: str) -> str:
    return f"{what} cannot be filled in ({why}); accepted: {ACCEPTED}"


def _here(fill: Callable[[], str], what: str) -> str:
    try:
        return fill()
    except Exception as error:  # whatever a template raises
        raise PretrainError(_wrong(what, reason(error))) from error


def _limited(fill: Callable[[], str]) -> bytes:
    """In the copy: what is made, after `+`, or what is wrong, after `-`, of what is beyond a bound after `!`."""
    import resource

    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGXCPU):
        signal.signal(each, signal.SIG_DFL)
    spent = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    limits = {resource.RLIMIT_CPU: int(spent) + 1 + SECONDS, resource.RLIMIT_CORE: 0}
    if (held := _address_space()) is not None:
        limits[resource.RLIMIT_AS] = held + MEMORY
    for name, most in limits.items():
        hard = resource.getrlimit(name)[1]
        resource.setrlimit(name, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        made = fill().encode(errors="replace")
        return b"+" + made if len(made) <= MOST else f"!it writes more than {MOST >> 20} MiB".encode()
    except MemoryError:
        return f"!it takes more than {MEMORY >> 20} MiB".encode()
    except BaseException as error:  # whatever a template raises
        return f"-{reason(error)}".encode(errors="replace")


def _address_space() -> int | None:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _write(into: int, data: bytes) -> None:
    left = memoryview(len(data).to_bytes(LENGTH, "big") + data)
    while left:
        left = left[os.write(into, left) :]


def _read(out: int) -> tuple[bytes | None, bool]:
    """What the copy writes, None where it ended before it had written it all; and whether it was waited for in vain."""
    data, end = bytearray(), time.monotonic() + WAITED
    while select.select([out], [], [], max(0.0, end - time.monotonic()))[0]:
        piece = os.read(out, 1 << 16)
        data += piece
        if len(data) >= LENGTH and len(data) == LENGTH + int.from_bytes(data[:LENGTH], "big"):
            return bytes(data[LENGTH:]), False
        if not piece:
            return None, False
    return None, True

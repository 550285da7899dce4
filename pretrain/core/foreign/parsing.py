"""The boundary of errors: whatever a parser raises of foreign data becomes one line that names the thing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pretrain.core.errors import PretrainError

SHOWN = 200  # characters that a message has of a parser's own words
NOT_ENOUGH = "there is not enough memory"
NO_MEMORY = (  # of libraries, threads and the system
    "can't allocate memory", "annot allocate memory", "not enough memory", "out of memory",
    "bad_alloc", "failed to map segment", "can't start new thread", "failed to spawn thread",
    "ailed to launch worker thread",
)  # fmt: skip


@contextmanager
def parsing(what: str, accepted: str) -> Iterator[None]:
    """While open, every error is `WHAT: REASON; accepted: ACCEPTED`; one that is ours or of memory stays as it is."""
    try:
        yield
    except PretrainError:
        raise
    except Exception as error:
        raise_memory(error, what)
        raise PretrainError(f"{what}: {reason(error)}; accepted: {accepted}") from error
    except BaseException as error:
        if not gave_up(error):
            raise
        raise PretrainError(f"{what}: {reason(error)}; accepted: {accepted}") from error


def gave_up(error: BaseException) -> bool:
    """Whether an error is how a library in Rust says that it gave up, which Python's libraries have no class for."""
    return type(error).__name__ == "PanicException"


def reason(error: BaseException) -> str:
    """What an error says, in at most `SHOWN` characters of one line."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = " ".join(str(error).split())
    plain = words and (isinstance(error, ValueError | OSError | RuntimeError) or type(error) is Exception)
    plain = plain or gave_up(error)
    text = words if plain else f"{type(error).__name__} {words}".strip()
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it was raised from; some are raised from themselves."""
    met: set[int] = set()
    while error is not None and id(error) not in met:
        met.add(id(error))
        yield error
        error = error.__cause__


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is one of the ways to say that there is no more memory."""
    for each in _causes(error):
        quotes = isinstance(each, PretrainError | ValueError)  # a file, in its words
        if isinstance(each, MemoryError) or (not quotes and any(phrase in str(each) for phrase in NO_MEMORY)):
            return True
    return False


class OutOfMemory(MemoryError):
    """There is no more memory, and what it was wanted for."""


def raise_memory(error: BaseException, what: object) -> None:
    """Raise `OutOfMemory` where an error is of memory, in whatever words: it says nothing of what was being read.

    What concludes from an error that a file is damaged, and passes it over or makes it anew, calls this first.
    """
    if out_of_memory(error):
        raise OutOfMemory(f" for {what}") from error


def wanted_for(error: BaseException | None) -> str:
    """` for WHAT` where an error of memory, or what it was raised from, says what the memory was wanted for."""
    return next((str(each) for each in _causes(error) if isinstance(each, OutOfMemory)), "")

"""The boundary of errors: whatever a parser raises of foreign data becomes one line that names the thing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pretrain.core.errors import PretrainError

SHOWN = 200  # characters that a message has of a parser's own words


@contextmanager
def parsing(what: str, accepted: str) -> Iterator[None]:
    """While open, every error is `WHAT: REASON; accepted: ACCEPTED`; one that is ours already stays as it is."""
    try:
        yield
    except PretrainError:
        raise
    except Exception as error:
        raise PretrainError(f"{what}: {reason(error)}; accepted: {accepted}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # how a library in Rust says that it gave up
            raise
        raise PretrainError(f"{what}: {reason(error)}; accepted: {accepted}") from error


def reason(error: BaseException) -> str:
    """What an error says, in at most `SHOWN` characters of one line."""
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = " ".join(str(error).split())
    plain = isinstance(error, ValueError | OSError | RuntimeError) and words
    text = words if plain else f"{type(error).__name__} {words}".strip()
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of the ways in which Python and libraries say that there is no more memory."""
    phrases = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "failed to map segment")
    worded = any(phrase in str(error) for phrase in phrases)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError | OSError | ImportError) and worded)

"""The one error type that users see."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Sequence

LONGEST = 4000  # characters of a message
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
LISTED = 24  # words that an error names at most


class PretrainError(Exception):
    """A mistake that the user can mend: the message names the thing, its value and what is accepted.

    `place` says where in a stage of a recipe it is, where that is known: `("sources", 1)`.
    """

    def __init__(self, message: str = "", *, place: tuple[str | int, ...] = ()) -> None:
        super().__init__(_one_line(message))
        self.place = place


def _one_line(message: str) -> str:
    """A message that any terminal takes, whatever foreign text it names: one line, and no halves of characters."""
    text = message if message.isprintable() else _UNPRINTABLE.sub(_escaped, message)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


def _escaped(match: re.Match[str]) -> str:
    return " " if match[0].isspace() else match[0].encode("unicode_escape").decode("ascii")


def steps_of(place: str) -> tuple[str | int, ...]:
    """The steps of a place that is written with dots: `policies.1.teacher`."""
    return tuple(int(step) if step.isdigit() else step for step in place.split("."))


class PretrainWarning(UserWarning):
    """What the user should know, though work goes on; the command line prints it as one line."""


def warn(message: str) -> None:
    """Say that something was damaged, or passed over, and what is done instead."""
    warnings.warn(message, PretrainWarning, stacklevel=3)


class Diverged(PretrainError):
    """A training whose loss or gradient is no number any more, step after step."""


def nearest(word: str, accepted: Iterable[str], cutoff: float = 0.6) -> str:
    """`" (did you mean 'x'?)"` when one accepted word is spelled much like `word`, else an empty string."""
    words = {plain(each): each for each in reversed(list(accepted))}
    close = difflib.get_close_matches(plain(str(word)), words, n=1, cutoff=cutoff)
    return f" (did you mean {words[close[0]]!r}?)" if close else ""


def plain(word: str) -> str:
    """A word whatever its case and blanks."""
    return " ".join(word.casefold().split())


def unknown(kind: str, word: str, accepted: Iterable[str]) -> PretrainError:
    """The error for a word that is not among those accepted."""
    words = sorted(accepted)
    return PretrainError(f"unknown {kind} {word!r}{nearest(word, words)}; accepted: {listed(words, word)}")


def listed(words: Sequence[str], word: str) -> str:
    """The accepted words; of very many those that are spelled most like `word`, and how many there are."""
    if len(words) <= LISTED:
        return ", ".join(words) or "none"
    like = difflib.get_close_matches(word, words, n=LISTED // 2, cutoff=0.0)
    return f"{', '.join(like)}, … ({len(words)} in all)"

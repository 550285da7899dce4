"""Numbers as people write and read them: `100k`, `2M`, `1B`, and, for seconds, `30min`, `2h`, `1h30min`.

They are read by what a field is to hold: a word stays a word where the field takes text, and becomes a number only
where it takes numbers and no text. Beyond that nothing becomes something else: `"2"` in quotes is no number, as `true`
is none, and neither `"true"` nor 1 is `true`. A float that is whole, `1e6`, is a whole number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

SCALES = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
TIMES = {
    "s": 1, "sec": 1, "secs": 1, "second": 1, "seconds": 1, "m": 60, "min": 60, "mins": 60, "minute": 60, "minutes": 60,
    "h": 3600, "hr": 3600, "hrs": 3600, "hour": 3600, "hours": 3600, "d": 86400, "day": 86400, "days": 86400,
}  # fmt: skip
_NUMBER = r"[0-9][0-9_]*(?:\.[0-9]+)?"
_NUMERAL = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?(?:inf|infinity|nan)", re.IGNORECASE
)
_SWITCHES = ("0", "1", "f", "false", "n", "no", "off", "on", "t", "true", "y", "yes")
_COUNT = re.compile(rf"([-+]?{_NUMBER})\s?([{''.join(SCALES)}])")
_TIME = re.compile(rf"({_NUMBER})\s?([a-z]+)\s?")
_WHOLE_TIME = re.compile(rf"(?:{_TIME.pattern})+")


@dataclass(frozen=True)
class Duration:
    """Beside a field's type: it holds seconds."""


def quantity(word: str, *, duration: bool = False) -> float | None:
    """The number that a word says, a whole one as `int`; None where it says none."""
    if duration and (seconds := time_in(word)) is not None:
        return seconds
    match = _COUNT.fullmatch(word)
    return _whole(float(match[1].replace("_", "")) * SCALES[match[2]]) if match else None


def time_in(word: str) -> float | None:
    """The seconds of a time with its units, `30min`, `1h 30min`; None where a word says no time."""
    if not _WHOLE_TIME.fullmatch(word):
        return None
    parts = [(float(number.replace("_", "")), unit) for number, unit in _TIME.findall(word)]
    known = all(unit in TIMES for _, unit in parts)
    return _whole(sum(number * TIMES[unit] for number, unit in parts)) if known else None


def _whole(value: float) -> float:
    near = round(value)
    return near if abs(value - near) <= 1e-9 * abs(value) else value


class Misplaced:
    """A value of another type than its field takes, which would else be taken for one: refused wherever it stands."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


def as_typed(value: object, hint: object) -> object:
    """The value with quantities read wherever the type asks for numbers and not for text."""
    numbers, texts, durations = _kinds(hint)
    switch = takes(hint, bool)
    if isinstance(value, str):
        if texts or value in _literals(hint):
            return value
        read = quantity(value.strip(), duration=durations) if numbers else None
        taken = (numbers and _NUMERAL.fullmatch(value.strip())) or (switch and value.strip().lower() in _SWITCHES)
        return read if read is not None else Misplaced(value) if taken else value
    if isinstance(value, bool) and numbers and not texts and not switch:
        return str(value).lower()  # else it would be taken for 1 or 0; as a text it is refused where it stands
    if isinstance(value, int | float) and not isinstance(value, bool) and switch and not numbers and not texts:
        return value if value in _literals(hint) else Misplaced(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 63:
        return int(value) if takes(hint, int) and not takes(hint, float) else value
    part = element(hint)
    if part is not None and isinstance(value, list | tuple):
        return type(value)(as_typed(item, part) for item in value)
    if part is not None and isinstance(value, dict):
        return {key: as_typed(item, part) for key, item in value.items()}
    return value


def takes(hint: object, kind: type) -> bool:
    """Whether a value of a kind may stand there itself, not only inside a list or a mapping."""
    if get_origin(hint) is Annotated:
        return takes(get_args(hint)[0], kind)
    if get_origin(hint) in (Union, UnionType):
        return any(takes(part, kind) for part in get_args(hint))
    return hint is kind


def _literals(hint: object) -> tuple[object, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    inner = get_args(hint) if get_origin(hint) in (Annotated, Union, UnionType) else ()
    return tuple(value for part in inner for value in _literals(part))


def _kinds(hint: object) -> tuple[bool, bool, bool]:
    """Whether a type has room for numbers, for any text, and says that the numbers are seconds."""
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        numbers, texts, durations = _kinds(inner)
        return numbers, texts, durations or any(isinstance(mark, Duration) for mark in marks)
    if get_origin(hint) in (Union, UnionType):
        kinds = [_kinds(part) for part in get_args(hint) if part is not NoneType]
        return any(k[0] for k in kinds), any(k[1] for k in kinds), any(k[2] for k in kinds)
    return hint in (int, float), hint is str or hint is Any, False


def element(hint: object) -> object | None:
    """The type of the elements of a list, or of the values of a mapping; None of what holds none."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated or origin in (Union, UnionType):
        return next((inner for part in parts if (inner := element(part)) is not None), None)
    if origin in (list, tuple) and parts:
        return parts[0]
    return parts[1] if origin is dict and len(parts) == 2 else None


def bare(value: object) -> object:
    """A mapping of fields whose types are not known here, with its quantities read: `vocab_size: 32k`."""
    if isinstance(value, str):
        read = quantity(value)
        return value if read is None else read
    return {key: bare(item) for key, item in value.items()} if isinstance(value, dict) else value


PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def figure(value: float, digits: int = 4, sign: str = "") -> str:
    """A number as a reader takes it in, without an exponent: `16,384`, `0.4213`, `12,300`, `9.86 T`; `sign` may be `+`.

    A whole number keeps its digits, any other has `digits` of them. From 10 million on there is a prefix; below a
    millionth, where zeros would have to be counted, a power of ten is written after all.
    """
    if not math.isfinite(value):
        return f"{value:{sign}}"
    rounded = float(f"{value:.{digits}g}")
    if abs(rounded) >= 1e7:
        return short(value, digits=digits, sign=sign)
    if value == round(value):
        return f"{value:{sign},.0f}"
    return _plain(rounded, digits, sign)


def short(value: float, unit: str = "", *, digits: int = 3, sign: str = "") -> str:
    """A number with a prefix before its unit: `9.86 T`, `3.01 MB`, `999 k`, `12 B`."""
    if not math.isfinite(value):
        return f"{value:{sign}} {unit}".rstrip()
    rounded = float(f"{value:.{digits}g}")  # first, since 999,999 is 1 M
    power, letter = next(((power, letter) for power, letter in PREFIXES if abs(rounded) >= power), (1.0, ""))
    return f"{_plain(rounded / power, digits, sign)} {letter}{unit}".rstrip()


def _plain(rounded: float, digits: int, sign: str) -> str:
    """A number that has been rounded to `digits`; where they end before the point, zeros stand for the others."""
    if 1e-6 <= abs(rounded) < 1e-4:
        return f"{rounded:{sign}.{digits + 5}f}".rstrip("0")
    return f"{rounded:{sign},.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:{sign}.{digits}g}"


def duration(seconds: float) -> str:
    """A time: `0.8 s`, `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 59.5 or not math.isfinite(seconds):
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s"))
    first = next(number for number, (count, _) in enumerate(parts) if count)
    return " ".join(f"{count:,} {unit}" for count, unit in parts[first : first + 2] if count)


def counted(number: int, what: str) -> str:
    """`1 run`, `2 runs`, `1,000 runs`."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


FEWEST, WIDE = 20, 2.0  # numbers that tell how far they reach, and powers of ten from which on logarithms are advised


def decades(numbers: Sequence[float]) -> float:
    """How many powers of ten numbers span, but for the hundredth part at each end; 0 where some are not above 0."""
    if len(numbers) < FEWEST or min(numbers) <= 0:
        return 0.0
    ends = len(numbers) // 100
    inner = sorted(numbers)[ends : len(numbers) - ends]
    return math.log10(inner[-1] / inner[0])

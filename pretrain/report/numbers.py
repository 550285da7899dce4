"""Numbers of a report: curves and their ends, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Sequence


def course(values: Sequence[float | None]) -> tuple[float, float]:
    """How much of itself a curve changed by in its last fifth, and how far its end lies above its lowest."""
    points = known(values)
    if len(points) < 5 or min(points) <= 0:
        return 0.0, 0.0
    late = points[-1 - max(1, len(points) // 5)]
    return points[-1] / late - 1, 1 - min(points) / points[-1]


def known(values: Sequence[float | None]) -> list[float]:
    """Those that are numbers."""
    return [v for v in values if v is not None and math.isfinite(v)]


def last(values: Sequence[float | None]) -> float:
    """The last that is a number; 0 where there is none."""
    return (known(values)[-1:] or [0.0])[0]


def article(word: str) -> str:
    """`a`, or `an` before a vowel."""
    return "an" if word[:1].lower() in "aeiou" else "a"


def short(value: float) -> str:
    """A number with three digits and a unit prefix."""
    for power, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.3g} {letter}"
    return f"{value:.3g}"


def clock(seconds: float) -> str:
    """A time in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"

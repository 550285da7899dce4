"""Numbers of a report: curves and their ends."""

from __future__ import annotations

import math
from collections.abc import Sequence

BITS = "bits_per_byte"


def course(values: Sequence[float | None]) -> tuple[float, float]:
    """How much of itself a curve changed by in its last fifth, and how far its end lies above its lowest."""
    points = known(values)
    if len(points) < 5 or min(points) <= 0:
        return 0.0, 0.0
    late = points[-1 - max(1, len(points) // 5)]
    return points[-1] / late - 1, 1 - min(points) / points[-1]


def swing(values: Sequence[float | None]) -> float:
    """By how much of itself a curve usually lies beside the middle of its neighbours; 0 of few points."""
    points = known(values)
    if len(points) < 5 or min(points) <= 0:
        return 0.0
    aside = sorted(abs(b - (a + c) / 2) / b for a, b, c in zip(points, points[1:], points[2:], strict=False))
    return aside[len(aside) // 2]


def known(values: Sequence[float | None]) -> list[float]:
    """Those that are numbers."""
    return [v for v in values if v is not None and math.isfinite(v)]


def last(values: Sequence[float | None]) -> float:
    """The last that is a number; 0 where there is none."""
    return (known(values)[-1:] or [0.0])[0]


def article(word: str) -> str:
    """`a`, or `an` before a vowel."""
    return "an" if word[:1].lower() in "aeiou" else "a"

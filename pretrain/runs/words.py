"""Numbers of runs as a reader has them: times, sizes, counts."""

from __future__ import annotations


def seconds_in_words(number: float) -> str:
    """`90 s`, `12 min`, `3.1 h`."""
    if number >= 7200:
        return f"{number / 3600:.1f} h"
    return f"{number:.0f} s" if number < 120 else f"{number / 60:.0f} min"


def bytes_in_words(number: float) -> str:
    """`3.01 MB`."""
    for power, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= power:
            return f"{number / power:.3g} {unit}"
    return f"{number:.0f} B"


def number_of(value: float) -> str:
    """Of FLOPs: `6e+10`."""
    return f"{value:.3g}"


def counted(number: int, what: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {what}" + ("" if number == 1 else "s")

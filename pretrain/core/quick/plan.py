"""What is expected of a training, for those that say it beforehand and those that compare."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What a training was expected to make before it began, and in which seconds: of its steps, of one measurement."""

    steps: float
    flops: float
    seconds: float
    measurement: float

"""What is expected of a training, for those that say it beforehand and those that compare."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instead:
    """A size that suits the speed that a machine has turned out to have, and what makes the recipe choose it."""

    size: str  # in words
    changes: Mapping[str, str]  # fields of the recipe and what they are to be, as `--set` takes them
    command: str  # that runs the recipe with them


@dataclass(frozen=True)
class Plan:
    """What a training was expected to make before it began, and in which seconds: of its steps, of one measurement.

    `instead` tells, where the size was chosen for a time, which would have been for a share of the speed; None where
    it is the same.
    """

    steps: float
    flops: float
    seconds: float
    measurement: float
    instead: Callable[[float], Instead | None] | None = None


def command(recipe: str, given: Sequence[str], changes: Mapping[str, object] | None = None) -> str:
    """The command that a run was made by, with changes: `--set`s of the same field give way to them.

    `given` are the options that the recipe was read with, each before its value.
    """
    words = ["pretrain", "run", recipe or "RECIPE"]
    for option, value in zip(given[::2], given[1::2], strict=False):
        place = value.partition("=")[0].removeprefix("stages.")
        replaced = any(place == name or _both_budgets(place, name) for name in changes or {})
        words += [] if option == "--set" and replaced else [option, value]
    words += [word for name, value in (changes or {}).items() for word in ("--set", f"{name}={value}")]
    return shlex.join(words)


def _both_budgets(place: str, name: str) -> bool:
    """Whether two fields are the budget of the same stage, in whatever units."""
    sides = [each.split(".") for each in (place, name)]
    return all(side[1:2] == ["budget"] for side in sides) and sides[0][0] == sides[1][0]

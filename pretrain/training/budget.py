"""When training stops: after so many tokens, steps, FLOPs or seconds, or passes over the training split."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from pretrain.core.bounds import Positive, Seconds, check_fields
from pretrain.core.errors import PretrainError
from pretrain.core.files import read_object
from pretrain.core.quick.machine import Beside, likely_rate
from pretrain.core.quick.quantities import short

YEAR = 365 * 86400.0  # seconds
LONGEST = 10 * YEAR  # of a training: what takes longer is a mistake, or another machine's
UNITS = ("tokens", "steps", "flops", "seconds", "epochs")
FAR = 0.6  # of what was planned: what lies below it, or above its inverse, is told
MEASURING = 0.25  # of the steps' seconds, at most, goes to held-out measurements that are asked for by shares
READ = 1 / 3  # of what training on a token takes takes measuring one: a pass forwards and none backwards
MOST_HELD_OUT, LEAST_HELD_OUT = 100_000, 2_000  # tokens of a measurement that `auto` chooses


@dataclass(frozen=True)
class Budget:
    """Exactly one of the five. Training ends with the first step that reaches it; seconds count training steps only.

    `epochs` are passes over the training split. How many steps they make is known once the corpus is packed into rows:
    `resolved` gives the budget in steps, which is what training and its schedule go by.
    """

    tokens: Positive | None = None
    steps: Positive | None = None
    flops: Positive | None = None
    seconds: Seconds | None = None
    epochs: Positive | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if len(given) != 1:
            words = ", ".join(f"{unit} {limit}" for unit, limit in given.items())
            raise PretrainError(f"budget {{{words}}}: accepted: exactly one of {', '.join(UNITS)}")
        check_fields(self, "budget")

    @property
    def unit(self) -> str:
        """Which of the five it is."""
        return next(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @property
    def limit(self) -> float:
        """How much of it."""
        return float(getattr(self, self.unit))

    def resolved(self, rows: int, batch_rows: int) -> Budget:
        """Epochs in steps, for a split of `rows` rows (or examples) of which a step takes `batch_rows`."""
        if self.epochs is None:
            return self
        return Budget(steps=max(1, math.ceil(round(self.epochs * rows / batch_rows, 9))))

    def progress(self, spent: dict[str, float]) -> float:
        """The share that is spent, 0 to 1."""
        return min(1.0, spent[self.unit] / self.limit)

    def total_steps(self, spent: dict[str, float]) -> int:
        """How many steps the whole budget makes, from what the steps so far have spent."""
        if self.unit == "steps":
            return int(self.limit)
        if not spent["steps"] or not spent[self.unit]:
            return 1_000_000_000  # before the first step nothing is known; a warm-up by share begins at its bottom
        return max(1, -int(-self.limit * spent["steps"] // spent[self.unit]))


def spent_before(folder: Path) -> dict[str, float]:
    """What the newest training state in a stage's folder has spent, by unit: steps alone of one that is damaged."""
    numbers = [path.name.removeprefix("step-") for path in folder.glob("state/step-*")]
    state = max((number for number in numbers if number.isdecimal()), key=int, default=None)
    if state is None:
        return {}
    spent = {"steps": float(state)}
    with suppress(PretrainError, OSError, KeyError, TypeError, ValueError):
        counters = read_object(folder / "state" / f"step-{state}" / "training.json")
        spent |= {name: float(counters[name]) for name in ("tokens", "flops", "seconds")}
    return spent


def least_seconds(budget: Budget, batch_rows: int, length: int) -> float:
    """Seconds of training on this machine at least, whatever the model: its products, or what a step takes beside."""
    rows = {"steps": 1.0, "tokens": 1.0 / (batch_rows * length), "epochs": 1.0 / batch_rows}
    least = Beside().block  # of a step with a block
    each = {"seconds": 1.0, "flops": 1 / likely_rate()} | {unit: steps * least for unit, steps in rows.items()}
    return budget.limit * each[budget.unit] / processes()


def endless(budget: Budget, seconds: float) -> PretrainError:
    """The error for a budget that would take so long: what that is in years, and what would end in time."""
    asked, years, most = (
        short(value) if value < 1e18 else f"{value:.3g}"
        for value in (budget.limit, seconds / YEAR, budget.limit / seconds * LONGEST)
    )
    return PretrainError(
        f"budget.{budget.unit} {asked}: about {years} years of training on this machine; "
        f"accepted: what ends within {LONGEST / YEAR:.0f} years here, {budget.unit} of {most} at most",
        place=("budget", budget.unit),
    )


def held_out_tokens(
    asked: int | str, every: float, steps: float | None, step_tokens: float, least: int = LEAST_HELD_OUT
) -> int:
    """Held-out tokens of each measurement in a training of so many steps: those `asked` for, or `auto`.

    That is as many as leave all measurements, which come each `every` steps or share of the budget, `MEASURING` of the
    training's time; a power of two, so that little changes nothing, and not above `MOST_HELD_OUT`. Where only the end
    is measured, and where nobody knows the steps (None), it is that.
    """
    if isinstance(asked, int):
        return asked
    if not every or steps is None:
        return MOST_HELD_OUT
    count = max(1.0, steps / every if every >= 1 else min(steps, 1 / every))
    fits = max(1.0, MEASURING * steps * step_tokens / (READ * count))
    return min(MOST_HELD_OUT, max(least, 2 ** math.floor(math.log2(fits))))


def processes() -> int:
    """How many train together, as `torchrun` says."""
    given = os.environ.get("WORLD_SIZE", "")
    return max(1, int(given)) if given.isdecimal() else 1


def far(share: float) -> bool:
    """Whether so much of what was planned is far less, or far more."""
    return not FAR <= share <= 1 / FAR


def share_made(budget: object, planned: float | None, spent: float | None) -> float | None:
    """The share of its planned FLOPs that a budget of seconds has made, where that is `far` from all of them.

    `budget` is as a stage's record has it. Of budgets in other units, and where little is missing, it is None.
    """
    if not isinstance(budget, dict) or not budget.get("seconds") or not planned or not spent:
        return None
    return spent / planned if far(spent / planned) else None

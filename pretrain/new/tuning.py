"""The budget of a fine-tuning: as many passes over the labelled documents as the time allows.

What a pass takes is told as `--dry-run` tells it: batches are as long as their longest document, every step takes some
time beside its products, held-out documents are read and answered each time that is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pretrain.core.quick.machine import Beside, efficiency
from pretrain.core.quick.quantities import duration as in_words

FEW = 50  # steps, below which a fine-tuning learns little
ROWS = (16, 8, 4, 2)  # of a step: fewer where steps are dear, or documents few
MEASUREMENTS = 20


@dataclass(frozen=True)
class Tuned:
    """A model to be tuned, and the documents for it."""

    width: int
    blocks: int
    sizes: Sequence[float]  # tokens of some documents
    documents: float  # that are trained on
    held_out: float  # that are measured, each time
    length: int  # tokens of a document at most
    rate: float  # FLOP/s
    beside: Beside = field(default_factory=Beside)
    adapted: bool = False  # whether a LoRA is trained: of the other weights no gradient is made

    def step(self, rows: int) -> float:
        """Seconds of a step of so many documents."""
        products = rows * self._longest(rows) * self._token * (2 / 3 if self.adapted else 1.0)
        return products + self.beside.seconds(self.blocks, 0)

    def measuring(self) -> float:
        """Seconds of all measurements: read once for the loss, once for the answers, each a third of a step's work."""
        return MEASUREMENTS * 2 / 3 * self.held_out * self._longest(ROWS[0]) * self._token

    @property
    def _token(self) -> float:
        return 6 * 12 * self.blocks * self.width**2 / (self.rate * efficiency(self.width))

    def _longest(self, rows: int) -> float:
        """Tokens of the longest of so many documents."""
        sizes = sorted(min(float(self.length), size) for size in self.sizes) or [float(self.length)]
        count = len(sizes)
        return sum(size * (((k + 1) / count) ** rows - (k / count) ** rows) for k, size in enumerate(sizes))


@dataclass(frozen=True)
class Plan:
    """What a recipe says of it: rows of a step, the budget, and why."""

    rows: int
    budget: str
    why: str
    steps: int

    @property
    def warning(self) -> str:
        """That the time is too short to learn from, where it is."""
        if self.steps >= FEW:
            return ""
        return f"only about {self.steps} steps of tuning fit in the time: a longer --budget, or a smaller --init"


def plan(tuned: Tuned, seconds: float, epochs: int, duration: str) -> Plan:
    """Up to `epochs` passes; fewer where the time allows no more, and less than one as a budget of time."""
    left = max(seconds / 3, seconds - tuned.measuring())
    steps = {rows: min(left / tuned.step(rows), tuned.documents / rows * epochs) for rows in ROWS}
    rows = next((rows for rows in ROWS if steps[rows] >= FEW), ROWS[-1])
    wanted = tuned.documents / rows * epochs
    fits = left / tuned.step(rows)
    if fits >= wanted:
        time = in_words(wanted * tuned.step(rows) + tuned.measuring())
        return Plan(rows, f"{{epochs: {epochs}}}", f"passes over the documents, about {time}", max(FEW, round(wanted)))
    passes = fits * rows / tuned.documents
    if passes >= 1:
        return Plan(rows, f"{{epochs: {math.floor(passes)}}}", f"{epochs} passes would take longer than there is time",
                    max(FEW, round(fits)))  # fmt: skip
    return Plan(rows, f"{{seconds: {duration}}}", f"{passes:.1g} of a pass, about {max(1, round(fits)):,} steps",
                max(1, round(fits)))  # fmt: skip

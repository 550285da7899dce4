"""Choosing a size: of all shapes and vocabularies the one whose predicted loss is lowest for the budget.

What else follows from the budget: the batch and the rate by the powers of compute of DeepSeek LLM (arXiv:2401.02954),
with constants that go by a handful of small runs; the length of rows by steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from pretrain.core.quick.machine import Beside, efficiency
from pretrain.dial.law import Law, Prediction, unique_worth
from pretrain.dial.shapes import Shape, shape_of, widths

VOCABULARIES = tuple(2**power for power in range(9, 18))
LEAST_ENTRIES = 320  # of a vocabulary for the least text: hardly more than the bytes
BYTES_AN_ENTRY = 100  # of training text at least for each entry of a vocabulary
TRUSTED = 100  # beyond so many times the largest rung a law tells too little: 20 tokens a weight instead
TOKENS_A_WEIGHT = 20.0  # arXiv:2203.15556
YARDSTICK = 1e13  # FLOPs that the constants below are given at
BATCH_TOKENS, BATCH_POWER = 1024, 0.3271  # a step's tokens (at 2e12 FLOPs 1,024 and 2,048 were level), and their growth
NARROW = 64  # the width that rates are given at
# Peak rates by optimiser: of Muon for matrices and, twice as high, for embeddings and head. AdamW's and Muon's were
# measured at several sizes; the others' are what their claims chose at one (width 64, 2e12 FLOPs), from rates a factor
# of about 3 apart, carried over to the yardstick.
RATES = {
    "adamw": {"lr": 6e-3}, "muon": {"lr": 1e-2, "adamw_lr": 2e-2},
    "adafactor": {"lr": 2.5e-2}, "ademamix": {"lr": 4e-3}, "conda": {"lr": 2.5e-2}, "lion": {"lr": 2.7e-3},
    "nadamw": {"lr": 4e-3}, "schedule_free": {"lr": 8e-3}, "soap": {"lr": 8e-3},
}  # fmt: skip
REMEMBERING = ("adamw", "muon")  # whose second moment is given a half-life in tokens
HALF_LIFE, LONGEST = 1e7, 0.999  # tokens; and at the most so slow, since short runs have a thousand steps
SHORT_FIRST = (0.3, 0.5, 0.7)  # shares of the budget at which the rows of a decoder double in length
SPREAD, SHORTEST = 64, 16  # rows among which their pieces are dealt out, and tokens of a piece
RATE_POWER, WIDTH_POWER = -0.125, -0.5  # the latter for Muon from few runs at widths 64 to 192; AdamW's taken over


@dataclass(frozen=True)
class Task:
    """What is given: a budget of one kind, the text there is, and what the user has fixed already."""

    law: Law
    flops: float | None = None
    tokens: float | None = None
    seconds: float | None = None
    rate: float | None = None  # FLOP/s of large matrix products, where the budget is of seconds
    beside: Beside = field(default_factory=Beside)  # and what a step takes beside them
    unique: float | None = None  # bytes of training text; None: more than will be read
    width: int | None = None
    depth: int | None = None
    vocabulary: int | None = None
    length: int | None = None
    gated: bool = True
    tied: bool = True


@dataclass(frozen=True)
class Choice:
    """A size and what is expected of it."""

    shape: Shape
    length: int
    batch_rows: int
    tokens: float
    bytes: float
    flops: float
    seconds: float | None
    prediction: Prediction | None = None  # None: beyond what the law can tell

    @property
    def tokens_per_weight(self) -> float:
        return self.tokens / self.shape.weights


def choose(task: Task) -> Choice:
    """The best choice, with what is expected of it."""
    shapes = list(_candidates(task))
    best = _best(task, shapes, task.flops) if task.tokens is None else _for_tokens(task, shapes)
    if not _within_law(task, best.flops):
        return best
    worth = unique_worth(best.bytes, task.unique)
    return replace(best, prediction=task.law.predict(best.shape.body, best.shape.vocabulary, worth))


def slowed(task: Task, share: float) -> Choice:
    """The choice, by its FLOPs, for what a budget of seconds makes at a share of the speed that it was planned with.

    Its FLOPs are of three digits, as one writes them: with a budget of so many the dial chooses the same.
    """
    seconds, rate = task.seconds, task.rate
    assert seconds is not None and rate is not None, "of a budget of seconds"
    task = replace(task, rate=rate * share, beside=Beside(task.beside.block / share, task.beside.logit / share))
    best = choose(task)
    for _ in range(5):  # the best of as many FLOPs may be another, which takes other seconds
        flops = float(f"{best.flops * seconds / (best.seconds or seconds):.3g}")
        best = choose(replace(task, seconds=None, flops=flops))
    return best


def optimizer_for(method: str, choice: Choice) -> dict[str, float]:
    """What an optimiser is given for a choice: its peak rates, to two digits; nothing where none was measured.

    And the decay of the second moment, which has the same half-life in tokens for any batch (arXiv:2507.07101).
    """
    if method not in RATES:
        return {}
    rates = RATES[method]
    scale = (choice.shape.width / NARROW) ** WIDTH_POWER * (choice.flops / YARDSTICK) ** RATE_POWER
    beta2 = round(min(LONGEST, 0.5 ** (choice.batch_rows * choice.length / HALF_LIFE)), 4)
    chosen = {name: float(f"{rate * scale:.1e}") for name, rate in rates.items()}
    return chosen | ({"beta2": beta2} if method in REMEMBERING else {})


def policies_for(objective: object, length: object) -> list[dict[str, object]]:
    """What a training of plain rows of text begins with: short rows of many texts, if rows are long enough."""
    name = objective.get("method") if isinstance(objective, dict) else objective
    pieces = 2 ** len(SHORT_FIRST)
    if name != "causal_lm" or not isinstance(length, int) or length % pieces or length < SHORTEST * pieces:
        return []
    return [{"method": "sequence_length_warmup", "at": list(SHORT_FIRST), "spread": SPREAD}]


def _candidates(task: Task) -> Iterable[Shape]:
    entries = [task.vocabulary] if task.vocabulary else VOCABULARIES
    if task.unique is not None and not task.vocabulary:
        entries = [size for size in entries if size * BYTES_AN_ENTRY <= task.unique] or [LEAST_ENTRIES]
    for width in [task.width] if task.width else widths():
        for vocabulary in entries:
            yield shape_of(width, vocabulary, depth=task.depth, gated=task.gated, tied=task.tied)


def _best(task: Task, shapes: Iterable[Shape], flops: float | None) -> Choice:
    priced = (_priced(task, shape, flops if flops is not None else _flops_of_seconds(task, shape)) for shape in shapes)
    return min(priced, key=partial(_value, task))


def _for_tokens(task: Task, shapes: list[Shape]) -> Choice:
    """The size for which so many tokens are the best use of compute."""
    assert task.tokens is not None
    low, high = math.log(1e6), math.log(1e26)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _best(task, shapes, math.exp(middle)).tokens < task.tokens else (low, middle)
    shape = _best(task, shapes, math.exp(high)).shape
    return _priced(task, shape, task.tokens * shape.flops(_length(task, math.exp(high))))


def _value(task: Task, choice: Choice) -> float:
    """Lower is better."""
    if _within_law(task, choice.flops):
        if not task.vocabulary and not _seen(task, choice.shape.vocabulary):
            return math.inf  # at 16,384 entries a law that has seen 8,192 was 6% too hopeful
        return task.law.bits(choice.shape.body, choice.shape.vocabulary, unique_worth(choice.bytes, task.unique))
    usual = min(2.0**17, max(256.0, 2.0 ** round(math.log2(5 * choice.shape.body**0.5))))  # 32,000 at 40M weights
    return abs(math.log(choice.tokens_per_weight / TOKENS_A_WEIGHT)) + abs(math.log2(choice.shape.vocabulary / usual))


def _seen(task: Task, vocabulary: int) -> bool:
    """Whether the law has seen such a vocabulary; the text may be too little for any of these."""
    known = task.law.bytes_per_token
    enough = task.unique is None or min(known) * BYTES_AN_ENTRY <= task.unique
    return vocabulary <= max(known) and (vocabulary >= min(known) or not enough)


def _priced(task: Task, shape: Shape, flops: float) -> Choice:
    length = _length(task, flops)
    tokens = flops / shape.flops(length)
    bytes_ = tokens * task.law.bytes_of_token(shape.vocabulary)
    seconds = flops * _seconds(task, shape, length, flops) if task.rate else None
    return Choice(shape, length, _rows(length, flops), tokens, bytes_, flops, seconds)


def _rows(length: int, flops: float) -> int:
    return max(1, round(BATCH_TOKENS * (flops / YARDSTICK) ** BATCH_POWER / length))


def _seconds(task: Task, shape: Shape, length: int, flops: float) -> float:
    """Of a FLOP, in a training of so many: small models are slowed by what every step and every logit takes."""
    assert task.rate is not None
    tokens = _rows(length, flops) * length
    beside = task.beside.seconds(shape.depth, tokens * shape.vocabulary)
    return 1 / (task.rate * efficiency(shape.width)) + beside / (tokens * shape.flops(length))


def _within_law(task: Task, flops: float) -> bool:
    """Whether the law can tell what comes of so many FLOPs."""
    return flops <= TRUSTED * task.law.largest


def _flops_of_seconds(task: Task, shape: Shape) -> float:
    assert task.seconds is not None and task.rate is not None
    flops = task.seconds * task.rate * efficiency(shape.width)
    for _ in range(5):  # how many rows a step has follows from the FLOPs
        flops = task.seconds / _seconds(task, shape, _length(task, flops), flops)
    return flops


def _length(task: Task, flops: float) -> int:
    """Tokens in a row: 256 for minutes of a laptop, up to 2048; 128 where a step would have one row.

    One row is one text's gradient: at 4e11 FLOPs steps of two rows of 128 came to 2.6% fewer bits per byte than those
    of one of 256.
    """
    if task.length:
        return task.length
    usual = 256 if flops < 1e15 else 512 if flops < 1e17 else 1024 if flops < 1e19 else 2048
    return usual if _rows(usual, flops) > 1 else usual // 2

"""What a `train` stage is expected to take, from the fields of the recipe and what the stages before it leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, cast

from pretrain.core.files import JSON
from pretrain.core.quick.machine import efficiency, likely_beside, likely_device, likely_rate, memory
from pretrain.core.quick.plan import Plan
from pretrain.core.quick.quantities import duration
from pretrain.dial.choose import RATES
from pretrain.dial.configs import convolutions, positions_of, reconstructor, shape_from
from pretrain.dial.law import LITTLE, NEARLY_NEW, worth
from pretrain.dial.shapes import FIELDS, Shape
from pretrain.dial.tuned import Tuning
from pretrain.objectives import Objective
from pretrain.optim import Optimizer
from pretrain.policies import Policy
from pretrain.records import Made
from pretrain.stages._estimates import (
    BATCH,
    FLOOR,
    RECORDS,
    WORD,
    Estimate,
    Given,
    Left,
    Odd,
    forward,
    letters,
    operated,
    operating,
    tokenizer_bytes,
    training_seconds,
)
from pretrain.stages._examples import Labelled, Lengths, counter, lengths, stored
from pretrain.surgery import Surgery
from pretrain.training.budget import MEASURING, Budget, held_out_tokens, share_made

FEWER = 1.5  # times the measurements that are made are asked for: from there on it is told that some are left out
LONG, NOTICED = 0.3, 10.0  # of the time of training from which that of measuring is told; and seconds
OTHER_PASSES = 20  # where each hides other tokens, or labels are learnt
FEW_STEPS = 10
FAR_ABOVE = 50  # times a good peak rate: beyond it no model of any size has one
FILLED = 0.995  # of a row: documents are packed into rows of a length, and not each to its end
LOGGED = 1.2e3  # bytes of a logged step
START = 3.0  # seconds before the first step
TEXT_THERE, TEXT_MADE = 6.0, 18.0  # bytes held for each of a corpus: one that is there, and one made in this process
ORDER = 64.0  # bytes that the loader holds for each row of a step
PAIR = 8.0  # bytes of the dense mask, and of what it is made of, for each two positions of a row
TRAINING = 0.1e9  # bytes that the loop's own libraries hold


class Weighted(Protocol):
    """An objective and its weight in the sum."""

    @property
    def method(self) -> Objective:
        """The objective."""


class Asked(Protocol):
    """What of a `train` stage's fields this file reads."""

    init: str | None
    processor: str | None
    model: dict[str, JSON]
    surgeries: list[Surgery]
    length: int
    batch_rows: int
    micro_rows: int
    optimizer: Optimizer
    policies: list[Policy]
    budget: Budget
    evaluate_every: float  # in steps, below 1 a share of the budget
    evaluate_tokens: int | Literal["auto"]
    save_every: int
    keep: int
    log_every: int
    checkpointing: bool

    def weighted(self) -> Sequence[Weighted]:
        """The objectives with their weights."""


@dataclass(frozen=True)
class Work:
    """A training in numbers: of a step its tokens, of a token its FLOPs, of the corpus its tokens."""

    step_tokens: float  # of text
    positions: float  # of a row, that the blocks see
    flops: float
    rate: float  # FLOP/s
    beside: float  # seconds of a step beside its products
    corpus_tokens: float | None
    filled: float = 1.0  # how many positions are computed for each token: labelled documents are filled up

    @property
    def seconds(self) -> float:
        """Of a step: its products, and what it takes beside them."""
        return self.flops * self.step_tokens / self.rate + self.beside

    def tokens(self, budget: Budget) -> float | None:
        """What the budget makes, in whole steps."""
        each: dict[str, float | None] = {
            "tokens": 1.0, "steps": self.step_tokens, "flops": 1 / self.flops,
            "seconds": self.step_tokens / self.seconds, "epochs": self.corpus_tokens,
        }  # fmt: skip
        share = each[budget.unit]
        return (
            None if share is None else math.ceil(round(share * budget.limit / self.step_tokens, 6)) * self.step_tokens
        )


def expect(stage: Asked, given: Given) -> Estimate:
    """FLOPs, memory, seconds, disk and passes over the corpus; what of the budget is odd in `warnings`."""
    model, corpus = described(stage, given), given.get("corpus", Left())
    shape = shape_from(model.config)
    left = replace(model, bytes={}, documents={}, length=stage.length, exact=False)
    if shape is None:
        return Estimate(flops=stage.budget.limit if stage.budget.unit == "flops" else None, left=left)
    shape = shape.with_blocks(model.blocks)
    work = _work(stage, shape, model, given, likely_rate() * efficiency(shape.width))
    tokens, held = work.tokens(stage.budget), _memory(stage, shape, model, given, work)
    much = _much(stage, shape, model, given, work) if held > memory() else ""
    if tokens is None:
        return Estimate(memory_bytes=held, left=left, much=much)
    flops, steps = tokens * work.flops, tokens / work.step_tokens
    every = stage.evaluate_every
    evaluations = 1 + int((steps // every if every >= 1 else 1 / every) if every else 0)
    most = held_out_tokens(stage.evaluate_tokens, every, steps, work.step_tokens)
    operated_on = operating(model, shape, stage.surgeries)
    training, once = steps * work.seconds, _measuring(stage, shape, model, corpus, work, most)
    made = evaluations
    if stage.budget.unit == "seconds":  # of which training makes no more than take this share
        made = min(evaluations, max(1, int(MEASURING * training / max(once, 1e-9))))
    saved = min(stage.keep, 1 + steps // stage.save_every) if stage.save_every else 0
    trained, weights = _trained(shape, model)
    beside = trained if model.tuning else 0.0  # an adapter lies in its checkpoint once more, as `peft` has it
    again = shape.vocabulary * shape.width if shape.tied else 0  # what two names share, a state holds twice
    remembered = 4.0 * trained * sum(policy.remembered for policy in stage.policies)
    started = START + operated_on.seconds + training_seconds(operated_on.flops, shape.width)
    return Estimate(
        flops + operated_on.flops, held, training + made * once + started,
        RECORDS + 4.0 * (weights + beside) + tokenizer_bytes(shape.vocabulary)
        + saved * (4.0 * (weights + again) + 8.0 * trained + remembered) + LOGGED * steps / max(1, stage.log_every)
        + 2.0 * (work.corpus_tokens or 0),
        tokens / work.corpus_tokens if work.corpus_tokens else None, left,
        (*_odd(stage, work, tokens), *_measured_long(stage, training, once, evaluations, made)),
        Plan(steps, flops, training, once), much=much,
    )  # fmt: skip


def planned(plan: Plan, budget: Budget, made: float) -> Made:
    """What was planned, for a record, and the size that suits the FLOPs that were made, where they are far fewer."""
    record: Made = {"flops": plan.flops, "steps": plan.steps}
    share = share_made({budget.unit: budget.limit}, plan.flops, made)
    other = plan.instead(share) if plan.instead is not None and share is not None and share < 1 else None
    if other is not None:
        record["instead"] = {"size": other.size, "changes": dict(other.changes)}
    return record


def described(stage: Asked, given: Given) -> Left:
    """The model that is trained: its configuration, its entries, how much of it is trained."""
    made = given.get("init", Left())
    words = given.get("tokenizer", made)
    entries = words.vocabulary
    if stage.model:
        config = {name: value for name, value in stage.model.items() if name != "family"}
        known = {"vocab_size": entries} if entries else {}
        made = Left(
            config={"model_type": stage.model["family"], **known, **config},
            vocabulary=entries,
            tokenizer=words.tokenizer,
        )
    return operated(made, stage.surgeries)


def _work(stage: Asked, shape: Shape, model: Left, given: Given, rate: float) -> Work:
    objectives = [each.method for each in stage.weighted()]
    length: float = stage.length
    corpus, corpus_tokens = given.get("corpus", Left()), _tokens(given.get("corpus", Left()), "train", model)
    seen = positions_of(model.config, stage.length)  # positions of the blocks in a row
    example = _example(stage, objectives[0], model, given)
    inputs = 1.0 if example is None else example.inputs  # of an example
    attended = math.prod(policy.attended() for policy in stage.policies)
    if objectives[0].reads == "examples" and model.vocabulary:  # whole documents, cut off at `length`
        documents = corpus.documents.get("train")
        if example is not None:
            length, seen = example.real, example.filled
            corpus_tokens = documents * inputs * length if documents else corpus_tokens
        elif documents and corpus_tokens:
            length = seen = min(length, max(2.0, corpus_tokens / documents))
    flops = logits = 0.0
    for objective in objectives:
        predicted = example.learnt / seen if example is not None and example.learnt else objective.predicted
        targets = predicted * (1 - 1 / length if objective.task == "causal" else 1)
        taught, at_once = objective.taught, targets * seen * inputs * (stage.micro_rows or stage.batch_rows)
        if objective.again and at_once > shape.chunk:
            targets, taught = targets * 4 / 3, taught * 2
        logits += targets * seen * inputs * stage.batch_rows * shape.vocabulary
        passes = (2.0 if model.tuning else 3.0) + stage.checkpointing
        each = shape.flops(max(1, round(seen * attended)), targets, passes)
        head = (4.0 if model.tuning else 6.0) * targets * shape.vocabulary * shape.width
        if model.tuning:
            each += _beside(shape, model.tuning, round(seen), targets)
        flops += (each - head) * objective.effort + head
        read = sum(teacher.forward(round(length), taught) for teacher in _teachers(objective, given))
        flops += read * objective.teaching
    flops = flops * seen + convolutions(model.config, stage.length)
    if decoder := reconstructor(model.config):
        flops += decoder[0].flops(round(decoder[1])) * decoder[1]
    step = stage.batch_rows * inputs * length * (FILLED if example is None else 1.0)
    update = stage.optimizer.update_flops(shape.width) * (model.tuning.trained if model.tuning else shape.body)
    if model.tuning:
        update += model.tuning.batch * stage.batch_rows / (stage.micro_rows or stage.batch_rows)
    beside = likely_beside().seconds(shape.depth + shape.decoder, logits)
    each = (flops * inputs * stage.batch_rows + update) / step
    return Work(step, seen, each, rate, beside, corpus_tokens, seen / length)


def _beside(shape: Shape, tuning: Tuning, length: int, targets: float) -> float:
    """FLOPs a token by which tuning differs from a pass through frozen weights in both directions.

    No gradient is made of the head, and none goes back to what stands before the first thing that is trained.
    """
    backward = (10.0 if shape.fused else 8.0) * shape.attending / max(1, shape.depth + 2 * shape.decoder)
    spared = 2.0 * targets * shape.vocabulary * shape.width + 2.0 * tuning.unreached * shape.density
    return tuning.flops + (14.0 * tuning.attending - backward * tuning.blind) * length - spared


def _trained(shape: Shape, model: Left) -> tuple[float, float]:
    """How many weights are trained, and how many there are with what stands beside the model's own."""
    if model.tuning is None:
        return float(shape.weights), float(shape.weights)
    return model.tuning.trained, shape.weights + model.tuning.trained


def _example(stage: Asked, objective: Objective, model: Left, given: Given) -> Lengths | None:
    """How long the corpus's examples are, where a few of them can be looked at."""
    corpus = given.get("corpus", Left())
    objective = getattr(objective, "wrapped", objective)
    if objective.reads != "examples" or not model.vocabulary or not hasattr(objective, "inputs"):
        return None
    rows = corpus.rows or stored(corpus.folder)
    known = given.get("tokenizer", given.get("init", Left())).tokenizer
    if not rows:
        return None
    count = counter(known, model.vocabulary, rows)
    return lengths(cast("Labelled", objective), rows, count, stage.length, stage.micro_rows or stage.batch_rows)


def _measuring(stage: Asked, shape: Shape, model: Left, corpus: Left, work: Work, most: int) -> float:
    """Seconds of a held-out measurement of `most` tokens: reading, and of labelled documents answering too."""
    tokens = min(most, _tokens(corpus, "validation", model) or most)
    objective = stage.weighted()[0].method
    if objective.reads != "examples":
        return forward(shape, tokens, stage.length)[1]
    seconds = forward(shape, 2 * tokens * work.filled, stage.length)[1]  # once for the loss, once for the answers
    documents = min(most // stage.length or 1, corpus.documents.get("validation", 1e9))
    words = float(getattr(objective, "answer", 0))  # of answers that are generated, a word at a time
    return seconds + math.ceil(documents / BATCH) * words * shape.depth * WORD


def _measured_long(stage: Asked, training: float, once: float, evaluations: int, made: int) -> Iterator[Odd]:
    """That measuring takes a large part of the time, which `evaluate_every` does not look like."""
    matters = made == evaluations or evaluations >= FEWER * made  # a few that are left out are no loss
    if evaluations * once > max(LONG * training, NOTICED) and evaluations > 1 and matters:
        fewer = f", so about {made} of them are made" if made < evaluations else ""
        yield Odd(
            "evaluate_every",
            f"evaluate_every {stage.evaluate_every:g}: {evaluations} measurements take about "
            f"{duration(evaluations * once)} beside {duration(training)} of training{fewer}; accepted: fewer of them, "
            "or evaluate_tokens: auto, which fits them in",
        )


def _teachers(objective: Objective, given: Given) -> Iterator[Shape]:
    """The models that an objective only reads."""
    for name in objective.references():
        place = next((field for field in given if field.endswith(f".{name}")), "")
        shape = shape_from(given[place].config) if place else None
        if shape is not None:
            yield shape.with_blocks(given[place].blocks)


def _tokens(corpus: Left, split: str, model: Left) -> float | None:
    """Of a split, where both the corpus and the vocabulary are known."""
    size = corpus.bytes.get(split)
    return size / letters(corpus, model, split) if size and model.vocabulary else None


def _memory(stage: Asked, shape: Shape, model: Left, given: Given, work: Work, rows: int | None = None) -> float:
    """The process, the corpus, the model, those that teach it, and the copies that are written while it trains.

    `rows` are computed at a time; by default as many as the recipe says.
    """
    rows = rows or stage.micro_rows or stage.batch_rows
    tokens = round(work.positions * rows)
    trained, weights = _trained(shape, model)
    remembered = 4.0 * trained * sum(policy.remembered for policy in stage.policies)
    copies = 4.0 * weights + 8.0 * trained + remembered if stage.save_every else 0.0
    beside = 4.0 * (weights - shape.weights + model.tuning.kept) if model.tuning else 0.0
    teachers = sum(4.0 * teacher.weights for each in stage.weighted() for teacher in _teachers(each.method, given))
    corpus = given.get("corpus", Left())
    read = (TEXT_THERE if corpus.exact else TEXT_MADE) * sum(corpus.bytes.values())
    effort = max(each.method.effort for each in stage.weighted())
    return (
        FLOOR
        + TRAINING
        + read
        + ORDER * stage.batch_rows
        + effort * shape.memory(tokens, round(work.positions), trained / shape.weights)
        + beside
        + (PAIR * tokens * work.positions if likely_device() == "cpu" else 0.0)
        + copies
        + remembered
        + teachers
    )


def _much(stage: Asked, shape: Shape, model: Left, given: Given, work: Work) -> str:
    """The field that makes the memory so large: the one that, as small as is usual, would leave the least; what fits.

    Nothing where no field is larger than usual.
    """
    rows, names = stage.micro_rows or stage.batch_rows, FIELDS.get(str(stage.model.get("family")), FIELDS["llama"])
    at_once = "micro_rows" if stage.micro_rows else "batch_rows"
    sizes = {at_once: (rows, 16), "length": (round(work.positions), 512)}
    shapes: dict[str, Callable[[int], Shape]] = {}
    if stage.model:
        width, depth = f"model.{names['width']}", f"model.{names['depth']}"
        inner = f"model.{names.get('intermediate', 'n_inner')}"
        sizes |= {width: (shape.width, 1024), depth: (shape.depth, 24), "vocab_size": (shape.vocabulary, 50_000),
                  inner: (shape.intermediate, 4 * max(64, min(shape.width, 1024)))}  # fmt: skip
        shapes = {width: lambda size: _as_wide(shape, size), depth: lambda size: replace(shape, depth=size),
                  inner: lambda size: replace(shape, intermediate=size),
                  "vocab_size": lambda size: replace(shape, vocabulary=size)}  # fmt: skip

    def need(name: str, size: int) -> float:
        other = shapes[name](size) if name in shapes else shape
        shorter = replace(work, positions=float(size)) if name == "length" else work
        return _memory(stage, other, model, given, shorter, size if name == at_once else None)

    large = {name: need(name, usual) for name, (size, usual) in sizes.items() if size > usual}
    if not large:
        return ""
    name = min(large, key=lambda each: large[each])
    size, most = sizes[name][0], memory()
    low, high = 0, size  # fits, does not
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if need(name, middle) <= most else (low, middle)
    fits = (
        f"accepted: {name} of about {low:,} at most" if low else "accepted: a smaller model, fewer rows and less text"
    )
    if name == "batch_rows" and low:
        fits += f", or micro_rows of as many, which makes a step of {size:,} in parts"
    return f"{name} {size:,} takes the most of it; {fits}"


def _as_wide(shape: Shape, width: int) -> Shape:
    """The shape in another width, with heads to go with it."""
    share = width / shape.width
    return replace(shape, width=width, queries=round(shape.queries * share), keys=round(shape.keys * share))


def _odd(stage: Asked, work: Work, tokens: float) -> Iterator[Odd]:
    """What a user would want to know of the budget before it is spent."""
    yield from _too_fast(stage.optimizer)
    steps, step = tokens / work.step_tokens, f"{work.step_tokens / FILLED:,.0f} tokens"
    if stage.budget.unit == "tokens" and stage.budget.limit < work.step_tokens:
        text = f"budget.tokens {stage.budget.limit:,.0f}: one step takes {step}; accepted: fewer batch_rows"
        yield Odd("batch_rows", text)
    elif steps < FEW_STEPS:
        text = f"the budget makes {steps:,.0f} steps of {step}: few to learn from; accepted: more, or fewer batch_rows"
        yield Odd("batch_rows", text)
    if work.corpus_tokens and work.step_tokens > work.corpus_tokens:
        text = f"batch_rows {stage.batch_rows}: a step takes {step}, the corpus has about {work.corpus_tokens:,.0f}"
        yield Odd("batch_rows", text)
    elif work.corpus_tokens and stage.processor is None:
        yield from _repeated(stage, tokens / work.corpus_tokens)


def _too_fast(optimizer: Optimizer) -> Iterator[Odd]:
    """That a peak rate is far above the one that was best for the optimiser at a small size."""
    usual, rate = RATES.get(optimizer.name, {}).get("lr", math.inf), float(getattr(optimizer, "lr", 0.0) or 0.0)
    if rate > FAR_ABOVE * usual:
        text = f"lr {rate:g}: {rate / usual:,.0f} times {usual:g}, which was good for {optimizer.name} in a small model"
        yield Odd("optimizer.lr", f"{text}: the training will hardly learn; accepted: less")


def _repeated(stage: Asked, passes: float) -> Iterator[Odd]:
    """That the same documents are read too often; of anything but text there is no such rule."""
    objective = stage.weighted()[0].method
    read = f"the corpus is read {passes:.1f} times"
    if objective.reads == "examples" or objective.task != "causal":
        if passes > OTHER_PASSES:
            yield Odd("budget", f"{read}: after {OTHER_PASSES} passes it teaches little; more text does")
    elif passes > NEARLY_NEW:
        value, most = worth(passes), worth(passes) < LITTLE
        text = f"{read}, the last time for {value:.0%} of what as much new text would be worth"
        yield Odd("budget", f"{text}; accepted: more text, or a smaller budget" if most else text, note=not most)

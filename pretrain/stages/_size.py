"""`size: auto` in a recipe: each training that asks for it gets the sizes, the batch and the rate of the dial.

What the user has written stays as it is, and the dial chooses the rest around it. The recipe that comes out says every
number, so it can be run, kept and changed like any other.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pretrain.core.errors import PretrainError, nearest
from pretrain.core.files import read_object
from pretrain.core.quick.machine import (
    Beside,
    likely_beside,
    likely_rate,
    remembered_rate,
)
from pretrain.core.quick.outline import torch_imported
from pretrain.core.quick.plan import Instead, command
from pretrain.core.quick.quantities import bare, counted, duration, figure, short
from pretrain.dial import shapes
from pretrain.dial.choose import (
    BATCH_TOKENS,
    BYTES_AN_ENTRY,
    RATES,
    VOCABULARIES,
    Choice,
    Task,
    choose,
    optimizer_for,
    policies_for,
    slowed,
)
from pretrain.dial.law import Law, load
from pretrain.stages._estimates import Estimate, left_in
from pretrain.stages._fields import unknown_field
from pretrain.stages._preflight import LEAST_TEXT, LIKE_PYTHON, basis_of, not_there, text_of, unique_text
from pretrain.training.budget import Budget, endless, least_seconds

Raw = dict[str, object]  # a recipe as it is read, or a stage of it
LAW = Path(shapes.__file__).parent / "laws" / "python.json"  # of Python's standard library, for corpora without a law
OPTIMIZER, SCHEDULE = "muon", {"method": "linear", "warmup": 0.05}
BYTES_ALONE = 261  # entries of a tokenizer of bytes, with the special ones
OTHER_TEXT = "other text differs: `pretrain ladder` measures yours"
PLAN = "plan.json"  # in a run's folder: the machine's pace that sizes were chosen by
PROMPT = 256  # positions at least, so that there is room for a prompt where rows are short


@dataclass(frozen=True)
class Settled:
    """What the dial has chosen for a training, and what it was given."""

    stage: str
    task: Task
    choice: Choice
    lr: float | None
    optimizer: object
    text: str = LIKE_PYTHON  # what the law's expectation is of
    rows: str = ""  # that they are short at first
    basis: str = ""  # what is not known of the text whose passes are the budget
    corpus: str = ""  # the stage or the folder of that text

    @property
    def certain(self) -> bool:
        """Whether the law's interval holds: not where it was measured on other text, nor of runs too short for one."""
        return self.text != LIKE_PYTHON and not self.task.law.doubt

    def expected(self) -> Raw | None:
        """What a run's folder keeps of the expectation: `bits_per_byte`, of which text, and the interval if it holds.

        None beyond what the law can tell.
        """
        best = self.choice.prediction
        if best is None:
            return None
        within = {"interval": [best.low, best.high]} if self.certain else {}
        return {"bits_per_byte": best.bits, "of": self.text} | within

    @property
    def optimizer_name(self) -> str:
        """The method that makes the steps."""
        return str(self.optimizer.get("method") if isinstance(self.optimizer, dict) else self.optimizer)

    def warnings(self) -> list[str]:
        """What is not known of the text, and that nobody has chosen the rate, where that is so."""
        return [*([f"note: {self.basis}"] if self.basis else []), *self._untuned()]

    def _untuned(self) -> list[str]:
        """That nobody has chosen the rate."""
        if self.lr is not None or self.optimizer_name in RATES:
            return []
        name = self.optimizer_name
        return [
            f"warning: the rate of {name} is not tuned: the dial knows none for it, and the recipe says none, so it "
            "trains at the method's own default; accepted: optimizer.lr; `pretrain compare --rates 3` tries some"
        ]

    def instead(self, share: float, recipe: str = "", given: Sequence[str] = ()) -> Instead | None:
        """What the dial chooses for a share of the speed that a budget of seconds was planned with, and the command.

        None where that is no smaller, and where the budget is none of seconds.
        """
        if self.task.seconds is None or not self.task.rate:
            return None
        other = slowed(self.task, share)
        if other.shape.weights >= self.choice.shape.weights:
            return None
        changes = {f"{self.stage}.budget.flops": f"{other.flops:.3g}"}
        return Instead(sized(other.shape), changes, command(recipe, given, changes))

    def lines(self, estimate: Estimate | None = None) -> list[str]:
        """What was chosen and why, in sentences; what it is to take is for the run's estimate to say."""
        shape, choice = self.choice.shape, self.choice
        read = estimate.passes if estimate is not None else None  # by the corpus's own tokens, not by the law's
        read = choice.bytes / self.task.unique if read is None and self.task.unique else read
        passes = f", {figure(read, 2)} passes" if read else ""
        text = f"{short(choice.tokens)} tokens ({choice.tokens_per_weight:.1f} a weight{passes})"
        lines = [
            f"{sized(shape)}: {short(shape.weights)} weights, {text}",
            f"rows of {choice.length} tokens{self.rows}, {choice.batch_rows} a step; {self.optimizer_name}, peak rate "
            f"{self.lr or 'its own default'}",
            *self.warnings(),
            *self._vocabulary(),
        ]
        memory = shape.memory(choice.batch_rows * choice.length, choice.length)
        takes = [f"{short(memory, 'B')} of weights, states and activations"]
        if estimate is not None and estimate.seconds is not None:
            takes.insert(0, duration(estimate.seconds))
        if estimate is not None and estimate.flops is not None:
            takes.insert(0, f"{short(estimate.flops)} FLOPs")
        lines.append(f"about {', '.join(takes)}")
        if choice.prediction is None:
            lines.append("too far beyond the runs that the law was fitted to for a prediction: 20 tokens a weight")
            return lines
        best = choice.prediction
        fitted = f", by a law of runs with {self.task.law.optimizer}" if self.task.law.optimizer else ""
        if fitted and self.optimizer_name != self.task.law.optimizer:
            fitted += f"; with {self.optimizer_name} it was not measured"
        how = f"({best.low:.2f} to {best.high:.2f})" if self.certain else f"({self.task.law.doubt or OTHER_TEXT})"
        lines.append(f"expected: {best.bits:.2f} bits per byte on {self.text} {how}{fitted}")
        others = [f"{what} {bits:.3f}" for what, bits in self.others()]
        return [*lines, f"the same budget elsewhere: {', '.join(others)}"] if others else lines

    def _vocabulary(self) -> list[str]:
        """Why it is that large, where the dial has chosen it by its law."""
        if self.task.vocabulary is not None or self.choice.prediction is None:
            return []
        known = sorted(self.task.law.bytes_per_token)
        enough = self.task.unique / BYTES_AN_ENTRY if self.task.unique else 0.0
        filled = f", and {BYTES_AN_ENTRY} bytes of text an entry are enough for {enough:,.0f}" if enough else ""
        return [
            f"vocabulary {self.choice.shape.vocabulary:,}: of powers of two the best by the law, whose runs had "
            f"{known[0]:,} to {known[-1]:,} entries; it is asked for no more{filled}"
        ]

    def others(self) -> list[tuple[str, float]]:
        """What other sizes are expected to give."""
        width, vocabulary = self.choice.shape.width, self.choice.shape.vocabulary
        others = {
            "half the width": (width // 2, vocabulary), "twice the width": (width * 2, vocabulary),
            "half the vocabulary": (width, vocabulary // 2), "twice the vocabulary": (width, vocabulary * 2),
        }  # fmt: skip
        flops = None if self.task.seconds is not None else self.choice.flops
        rows = []
        for what, (wide, entries) in others.items():
            other = choose(replace(self.task, width=wide, depth=None, vocabulary=entries, tokens=None, flops=flops))
            unique = self.task.unique or math.inf
            beyond = entries > max(self.task.law.bytes_per_token) or entries * BYTES_AN_ENTRY > unique
            beyond |= wide < shapes.SMALLEST or entries < VOCABULARIES[0]  # none of which `choose` takes
            if other.prediction is not None and not beyond:
                rows.append((what, other.prediction.bits))
        return rows


def sized(shape: shapes.Shape) -> str:
    """A size in words."""
    return f"width {shape.width}, {counted(shape.depth, 'block')}, vocabulary {shape.vocabulary:,}"


def settle(raw: Raw, output: Path | None = None) -> tuple[Raw, list[Settled]]:
    """The recipe with every `size: auto` worked in, and what was chosen; errors have a `place` in the recipe."""
    given = raw.get("stages")
    whole = isinstance(given, list) and all(isinstance(entry, dict) for entry in given)
    stages: list[Raw] = copy.deepcopy(given) if isinstance(given, list) and whole else []
    wanted = [n for n, entry in enumerate(stages) if entry.get("stage") == "train" and entry.get("size") is not None]
    if not wanted:
        return raw, []
    raw = copy.deepcopy(raw) | {"stages": stages}
    settled = []
    for number in wanted:
        try:
            settled.append(_settle_stage(stages, number, output))
        except PretrainError as error:
            whole = error.place[:1] == ("stages",)  # of an earlier stage
            place = error.place if whole else ("stages", number, *(error.place or ("size",)))
            raise PretrainError(str(error), place=place) from error
    return raw, settled


def _settle_stage(stages: list[Raw], number: int, output: Path | None) -> Settled:
    entry = stages[number]
    model, name = entry.get("model"), str(entry.get("name", "train"))
    family = model.get("family") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(family, str) or family not in shapes.CAUSAL:
        accepted, hint = ", ".join(shapes.CAUSAL), nearest(str(family), shapes.CAUSAL)
        raise PretrainError(
            f"size: auto chooses for new decoders{hint}; accepted: model: {{family: one of {accepted}}}",
            place=("model", "family") if isinstance(model, dict) and "family" in model else ("model",) if model else (),
        )
    made = [e for e in stages[:number] if e.get("stage") == "tokenizer"]
    named = [e for e in made if e.get("name", "tokenizer") == entry.get("tokenizer")]
    tokenizer = next(iter(named or [e for e in made if e.get("vocab_size") == "auto"]), None)
    task = _task(entry, family, model, tokenizer, stages[:number], output)
    try:
        choice = choose(task)
    except ArithmeticError as error:  # a budget beyond what can be computed with
        budget = _budget(entry.get("budget"))
        raise endless(budget, least_seconds(budget, 1, BATCH_TOKENS)) from error
    choice = replace(choice, batch_rows=_size(entry, "batch_rows") or choice.batch_rows)
    method = _optimizer(entry, choice)
    lr = method.get("lr") if isinstance(method, dict) else None
    sizes = shapes.fields(choice.shape, family, max(choice.length, PROMPT))
    entry["model"] = {"family": family} | sizes | model
    entry.setdefault("length", choice.length)
    entry.setdefault("batch_rows", choice.batch_rows)
    entry["optimizer"] = method
    given = entry.get("schedule", {})
    entry["schedule"] = SCHEDULE | given if isinstance(given, dict) and "method" not in given else given
    entry.setdefault("surgeries", [{"method": "zero_init"}])
    short = policies_for(entry.get("objective", "causal_lm"), entry["length"])
    if tokenizer is not None and tokenizer.get("vocab_size") == "auto":
        tokenizer["vocab_size"] = choice.shape.vocabulary
    rows = ", at first in pieces" if short and entry.setdefault("policies", short) is short else ""
    basis, text = basis_of(entry, stages[:number], task.unique), text_of(entry, stages[:number])
    return Settled(name, task, choice, lr, method, text, rows, basis, str(entry.get("corpus")))


def _task(entry: Raw, family: str, model: Raw, tokenizer: Raw | None, before: list[Raw], output: Path | None) -> Task:
    """What the dial is given by a training and the stages before it."""
    size = entry["size"]
    where = size.get("law") if isinstance(size, dict) and set(size) == {"law"} else None
    if size != "auto" and not isinstance(where, str):
        raise PretrainError(f"size {size!r}: accepted: auto, or {{law: FILE}} with what `pretrain ladder` wrote")
    budget = _budget(entry.get("budget"), entry)
    names = shapes.FIELDS[family]
    made = BYTES_ALONE if (tokenizer or {}).get("algorithm") == "bytes" else (tokenizer or {}).get("vocab_size", 8192)
    vocabulary = bare(model.get("vocab_size", made))
    at = None if tokenizer is None else before.index(tokenizer)
    chosen = vocabulary == "auto" and tokenizer is not None
    entries = None if chosen else _entries(entry, tokenizer, vocabulary, at)
    law, unique = load(Path(where)) if where else load(LAW), unique_text(entry, before)
    if unique is not None and unique < LEAST_TEXT:
        raise PretrainError(
            f"size {size!r}: about {short(unique, 'B')} of training text, too little to choose a model by; accepted: "
            f"at least {short(LEAST_TEXT, 'B')}, or sizes of your own",
            place=("size",),
        )
    rate, beside = _pace(output, timed=budget.seconds is not None)
    return Task(
        law, flops=budget.flops, tokens=_tokens(budget, entry, unique, law, before), seconds=budget.seconds,
        rate=rate, beside=beside, unique=unique,
        width=_size(model, names["width"], "model"), depth=_size(model, names["depth"], "model"),
        vocabulary=entries,
        length=_size(entry, "length"), gated=family in shapes.GATED, tied=bool(model.get("tie_word_embeddings", True)),
    )  # fmt: skip


def _size(given: Raw, field: str, within: str | None = None) -> int | None:
    """A size that the recipe says itself; None where it says none."""
    value = bare(given.get(field))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        name = f"{within}.{field}" if within else field
        place = (within, field) if within else (field,)
        raise PretrainError(f"{name} {value!r}: accepted: a whole number, 1 or more", place=place)
    return value


def _budget(value: object, entry: Raw | None = None) -> Budget:
    """A budget; where there is none, a field of the entry that is no field is what is wrong: a misspelt one."""
    from pretrain.stages.train import Train, build_budget

    odd = next((name for name in entry or {} if value is None and name not in Train.model_fields), None)
    if odd is not None:
        raise PretrainError(unknown_field(odd, Train), place=(odd,))
    try:
        return build_budget(value)
    except ValueError as error:
        raise PretrainError(str(error), place=("budget", *getattr(error, "place", ()))) from error


def _tokens(
    budget: Budget, entry: Mapping[str, object], unique: float | None, law: Law, before: Sequence[Raw]
) -> float | None:
    """A budget of tokens, or of steps or passes in tokens: about, where rows and vocabulary are still to be chosen."""
    if budget.unit == "steps":
        rows, length = entry.get("batch_rows"), entry.get("length")
        return budget.limit * (rows * length if isinstance(rows, int) and isinstance(length, int) else BATCH_TOKENS)
    if budget.unit == "epochs":
        return budget.limit * (not_there(entry, before) if unique is None else unique) / law.bytes_of_token(2048)
    return budget.tokens


def _entries(entry: Raw, tokenizer: Raw | None, vocabulary: object, at: int | None) -> int:
    """The vocabulary that is there already: as the recipe says it, or as a tokenizer's folder has it."""
    there = left_in(Path(str(entry.get("tokenizer")))).vocabulary if tokenizer is None else None
    if there is not None:
        return there
    if isinstance(vocabulary, bool) or not isinstance(vocabulary, int) or vocabulary < 1:
        written = isinstance(model := entry.get("model"), dict) and "vocab_size" in model
        raise PretrainError(
            f"vocab_size {vocabulary!r}: accepted: a whole number, or auto",
            place=("model", "vocab_size") if written or at is None else ("stages", at, "vocab_size"),
        )
    return vocabulary


def _pace(output: Path | None, *, timed: bool) -> tuple[float, Beside]:
    """FLOP/s of this machine and what a step takes beside its products.

    What this run's sizes were chosen by before, or the best that was measured so far: anew where a budget is `timed`.

    Before torch is there it is not measured: what a core usually does stands for it, until the recipe is run.
    """
    kept = output / PLAN if output is not None else None
    if kept is not None and kept.exists():
        before = read_object(kept)  # another pace would choose other sizes
        rate, beside = before.get("rate"), before.get("beside")
        if isinstance(rate, int | float) and rate > 0:
            seconds = beside if isinstance(beside, dict) else {}
            return float(rate), replace(Beside(), **{k: v for k, v in seconds.items() if isinstance(v, float)})
    if torch_imported():
        _measure(timed)
    return likely_rate(), likely_beside()


@functools.cache
def _measure(timed: bool) -> None:
    """Measure, once in a process, what is not known of this machine; what a `timed` budget goes by in any case."""
    from pretrain.core.hardware import matrix_rate, pick_device
    from pretrain.dial.pace import measure

    device = pick_device()
    if remembered_rate(device.type) is None:
        matrix_rate(device)  # which remembers it
    if timed:
        measure(device)  # which remembers it, if the machine was quieter than before


def _optimizer(entry: Mapping[str, object], choice: Choice) -> object:
    """The optimiser with the dial's rates around what the recipe says of it; one that it does not know as it is."""
    given = entry.get("optimizer", OPTIMIZER)
    method = {"method": given} if isinstance(given, str) else given
    if isinstance(method, dict) and "method" not in method:  # a field of the default one
        given = method = {"method": OPTIMIZER} | method
    if not isinstance(method, dict) or method.get("method") not in RATES:
        return given
    return optimizer_for(method["method"], choice) | method


def known(sizes: Sequence[Settled], made: Collection[str]) -> list[Settled]:
    """What was chosen; of a text whose stage is among those that are `made` nothing is unknown any more."""
    return [replace(each, basis="") if each.corpus in made else each for each in sizes]


def tell(sizes: Sequence[Settled], fresh: Mapping[str, Estimate], say: Callable[[str], None]) -> None:
    """Say what was chosen for the stages that begin; of those that are begun or done it was said before."""
    for chosen in sizes:
        if chosen.stage in fresh:
            for line in chosen.lines(fresh[chosen.stage]):
                say(f"[{chosen.stage}] {line}")


def write(settled: list[Settled], output: Path) -> None:
    """Keep what the sizes were chosen by in a run's folder, and what is expected of them."""
    from pretrain.core.files import sealed, write_json

    task = next((each.task for each in settled if each.task.rate is not None), None)
    by: Raw = {"rate": task.rate, "beside": asdict(task.beside)} if task else {"rate": None}
    if expected := {each.stage: foretold for each in settled if (foretold := each.expected()) is not None}:
        by["expected"] = expected
    write_json(output / PLAN, sealed(by))

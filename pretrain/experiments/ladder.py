"""`pretrain ladder`: small runs of a recipe, and the law of loss that they follow.

Around the size that the dial would take for a 64th, a 24th and an eighth of the budget stand models half as wide to
half as wide again (twice as wide where the dial has nothing narrower), and at the two smaller budgets ones with half
and twice the vocabulary where that is the dial's to choose. All run as the recipe's own first stages, so what they
share is made once, and a ladder that was interrupted goes on. Together they cost about two thirds of the budget's
FLOPs, and of a budget of some minutes more than its seconds: narrow models make fewer FLOPs a second, and each run is
set up and measured anew. What they are expected to take is said before the first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.quick.quantities import counted, duration, short
from pretrain.dial.choose import VOCABULARIES, Choice, choose
from pretrain.dial.law import Law, Rung, fit
from pretrain.dial.shapes import FIELDS, SMALLEST
from pretrain.forecast import forecast
from pretrain.identity import plan
from pretrain.recipe import Raw, Recipe, check
from pretrain.runs.shelf import check_output
from pretrain.stages._size import Settled
from pretrain.training.budget import MOST_HELD_OUT

SHARES = (1 / 64, 1 / 24, 1 / 8)  # of the budget
WIDTHS = (0.5, 1.0, 1.5)  # of the dial's
LAW = "law.json"


@dataclass(frozen=True)
class Step:
    """A run that is to be made."""

    width: int
    vocabulary: int
    flops: float


def steps(settled: Settled) -> Iterator[Step]:
    """The runs of a ladder, from the cheapest."""
    task, target = settled.task, settled.choice.flops
    for share in SHARES:
        flops = target * share
        task_there = replace(task, flops=flops, tokens=None, seconds=None)
        middle = choose(replace(task_there, vocabulary=settled.choice.shape.vocabulary)).shape
        widths = sorted({max(SMALLEST, round(middle.width * factor / 16) * 16) for factor in WIDTHS})
        widths += [2 * middle.width] if len(widths) < len(WIDTHS) else []
        yield from (Step(width, middle.vocabulary, flops) for width in widths)
        if task.vocabulary is None and share < max(SHARES):
            others = {max(VOCABULARIES[0], middle.vocabulary // 2), middle.vocabulary * 2}
            yield from (Step(middle.width, size, flops) for size in sorted(others - {middle.vocabulary}))


def climb(recipe: Recipe, say: Callable[[str], None] = print) -> tuple[Law, Settled]:
    """Run a recipe's ladder in its output and fit the law, which is written to `OUTPUT/ladder/law.json`."""
    from pretrain import engine

    if not recipe.sizes:
        raise PretrainError("ladder: accepted: a recipe with a train stage of size: auto")
    check_output(recipe.output)
    settled = recipe.sizes[0]
    folder = recipe.output / "ladder"
    rungs: list[Rung] = []
    sizes: dict[int, float] = {}
    wanted, unique = [(step, _run(recipe, settled, step, folder)) for step in steps(settled)], settled.task.unique
    say(announcement(settled, [made for _, made in wanted], folder / "stages"))
    for number, (step, made) in enumerate(wanted, 1):
        result = engine.run(made, store=folder / "stages", report=False, say=engine.silent)
        record = result.stages[settled.stage]
        metrics, entry = record["metrics"], made.raw["stages"][-1]
        if not isinstance(metrics.get("bits_per_byte"), float):
            raise PretrainError("ladder: accepted: a training on causal_lm alone, whose loss is told in bits per byte")
        bytes_per_token = metrics["loss"] / math.log(2) / metrics["bits_per_byte"]
        sizes[step.vocabulary] = bytes_per_token
        shape = made.sizes[0].choice.shape
        rungs.append(
            Rung(
                shape.body, step.vocabulary, metrics["tokens"] * bytes_per_token, metrics["bits_per_byte"],
                metrics["flops"], step.width, record["seconds"],
            )
        )  # fmt: skip
        size = f"width {step.width}, vocabulary {step.vocabulary}, {short(step.flops)} FLOPs"
        say(f"{number} of {len(wanted)}: {size}: {rungs[-1].bits:.3f} bits per byte, {duration(record['seconds'])}")
        corpus = result.stages.get(str(entry.get("corpus")))
        unique = corpus["metrics"]["bytes/train"] if corpus is not None else unique
    law = replace(fit(rungs), bytes_per_token=sizes, optimizer=settled.optimizer_name)
    law.write(folder / LAW)
    task = replace(settled.task, law=law, unique=unique)
    return law, replace(settled, choice=choose(task), task=task, text="this corpus", basis="")


def _run(recipe: Recipe, settled: Settled, step: Step, folder: Path) -> Recipe:
    """The recipe of one of the runs."""
    name = f"{step.width}-{step.vocabulary}-{step.flops:.2e}"
    return check(_raw(recipe, settled, step), recipe.path, recipe.places, folder / name)


def announcement(settled: Settled, runs: Sequence[Recipe], store: Path) -> str:
    """What is left of a ladder, before it begins: its runs, their FLOPs beside the budget's, and their time.

    By the plan of each run; what several share, and what lies in `store`, is counted once or not at all.
    """
    ahead = {each.item.folder: each.ahead for made in runs for each in forecast(plan(made, store)) if each.to_run}
    if not ahead:
        return f"{counted(len(runs), 'run')}: all are made"
    flops, seconds = (sum(getattr(each, name) or 0.0 for each in ahead.values()) for name in ("flops", "seconds"))
    budget = f"{flops / settled.choice.flops:.0%} of the budget's"
    whole = settled.task.seconds
    beside = f", {seconds / whole:.1f} times the budget's: narrow models make fewer FLOPs a second" if whole else ""
    slow = beside if whole and seconds > whole else ""
    return f"{counted(len(runs), 'run')}: {short(flops)} FLOPs, {budget}, in about {duration(seconds)}{slow}"


def _raw(recipe: Recipe, settled: Settled, step: Step) -> Raw:
    """The recipe up to its training, in another size."""
    raw = copy.deepcopy(recipe.asked)
    index = next(n for n, stage in enumerate(recipe.stages) if stage.name == settled.stage)
    raw["stages"] = raw["stages"][: index + 1]
    entry = raw["stages"][index]
    entry["budget"] = {"flops": step.flops}
    entry["model"] = entry["model"] | {FIELDS[entry["model"]["family"]]["width"]: step.width}
    entry["evaluate_every"] = 0
    entry.setdefault("length", settled.choice.length)  # losses are compared in windows of one length
    if entry.get("evaluate_tokens") == "auto":  # each once, and all on the same
        entry["evaluate_tokens"] = MOST_HELD_OUT
    for other in raw["stages"]:
        if other.get("stage") == "tokenizer" and other.get("vocab_size") == "auto":
            other["vocab_size"] = step.vocabulary
    return raw


def summary(law: Law, choice: Choice) -> list[str]:
    """What a ladder found, in sentences."""
    formula = (
        f"L = {law.floor:.3f} + {law.A:.3g} / N^{law.alpha:.3f} + {law.B:.3g} · (V^{law.gamma:.2f} / D)^{law.beta:.3f}"
    )
    lines = [formula, f"{counted(len(law.rungs), 'run')}; one lies {law.deviation:.2%} beside it"]
    if choice.prediction is not None:
        best = choice.prediction
        how = law.doubt or f"{best.low:.3f} to {best.high:.3f}"
        lines.append(f"expected of {short(choice.flops)} FLOPs: {best.bits:.3f} ({how})")
    return lines

"""What the report advises: of a model by its tokens and its curve, of one that has learnt labels by its answers."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pretrain.core.quick.confusion import class_rows, never_answered
from pretrain.core.quick.plan import command
from pretrain.core.quick.quantities import figure
from pretrain.dial.law import NEARLY_NEW
from pretrain.records import Status
from pretrain.report import foretold
from pretrain.report.data import BITS, LABELLED, Page, StageRow, Trained
from pretrain.report.held_out import Evaluated
from pretrain.report.numbers import course, known, last, swing
from pretrain.training.budget import MOST_HELD_OUT

TOKENS_A_WEIGHT = 20  # about what is best for a given compute (Hoffmann et al., arXiv:2203.15556)
BYTES_A_TOKEN = 3.5  # about
RISE, FALL = 0.01, 0.005  # of a held-out loss: it has risen again, it still falls
FEW_POINTS = 5  # of a curve say nothing of its course
FEW_TOKENS = 20_000  # held-out ones of a measurement, by which one that swings cannot be told from one that changes
Advice = tuple[str, str]  # the sentence, and the command for it if there is one


def advise(page: Page, model: StageRow | None, evaluation: Evaluated | None, training: Trained | None) -> Advice:
    """What to do next with a finished run's last model; with an unfinished run, to go on."""
    missing = [s for s in page["stages"] if s["status"] != Status.FINISHED]
    if missing:
        return _unfinished(next((s for s in missing if s["status"] == Status.FAILED), missing[0])), run_command(page)
    if model is None and any(s["stage"] in ("decode", "evaluate") for s in page["stages"]):
        return "", ""  # of a checkpoint from elsewhere
    if model is None:
        return "Next: add a train stage.", ""
    if training is None:
        return "" if evaluation else "Next: add an evaluate stage, which measures it on unseen documents.", ""
    if (share := foretold.shortfall(model)) is not None and share < 1:
        words, changes = foretold.again(model)
        return words, run_command(page, changes)
    if labelled(training):
        return _of_labels(page, model, evaluation, training)
    return _of_curve(page, model, training)


def _unfinished(stage: StageRow) -> str:
    """That a run has failed or was interrupted at a stage."""
    if stage["status"] == Status.FAILED:
        error = f": {stage['error'].removesuffix('.')}" if stage.get("error") else ""
        return f"Failed at “{stage['name']}”{error}. When that is mended, to go on:"
    return f"Interrupted at “{stage['name']}”. To go on:"


def labelled(training: Trained | None) -> bool:
    """Whether it has learnt what documents are labelled with."""
    return training is not None and training["objective"][0] in LABELLED


def run_command(page: Page, changes: Mapping[str, object] | None = None) -> str:
    """The command that this run was made by, with changes: `--set`s of the same field give way to them."""
    return command(page["run"].get("recipe") or "", page["run"].get("given") or [], changes)


def _of_curve(page: Page, model: StageRow, training: Trained) -> Advice:
    column = BITS if known(training["evaluation"][BITS]) else "loss"
    points = known(training["evaluation"][column])
    more = "text" if training["unit"] == "tokens" else training["unit"] if training["unit"] == "images" else "data"
    if not points:
        return "Next: hold some documents out (validation: 0.1): nothing says yet whether it is good.", ""
    change, rise = course(training["evaluation"][column])
    if coarse := _coarse(page, model, training["evaluation"][column], max(abs(change), rise)):
        return coarse
    if rise > RISE:
        lower = f"the validation loss was {rise:.0%} lower before it rose again"
        kept = ", and those weights are kept" if training.get("kept") else ""
        return f"Next: more {more}, or a shorter training: {lower}{kept}.", ""
    passes = _passes(page, model, training)
    if passes > NEARLY_NEW and change >= -FALL:
        return f"Next: more text; it has read what there is about {passes:.0f} times.", ""
    chosen = model["name"] in (page.get("expected") or {})  # its size, for the budget, by more than a rule of thumb
    share = _tokens_a_weight(model, training)
    if share < TOKENS_A_WEIGHT and passes <= NEARLY_NEW and not chosen:
        few = f"it has seen {figure(share, 2)} tokens for each weight, and about {TOKENS_A_WEIGHT} are usual."
        return f"Next: train longer; {few}", _longer(page, model)
    if len(points) < FEW_POINTS:
        gained = _gained(page, model)
        return gained if gained is not None else _rarely(page, model, len(points))
    if chosen and change < -FALL:
        return "Next: a larger budget, of which the size is chosen anew.", _longer(page, model)
    if change < -FALL:
        fell = f"the validation loss still fell by {-change:.1%} in the last fifth"
        return f"Next: train longer; {fell}.", _longer(page, model)
    if 0 < passes < 1:  # the curve is flat since the rate has fallen
        return f"Next: train longer; about {1 - passes:.0%} of the text has not been read.", _longer(page, model)
    if model["config"].get("init"):  # at a small rate a curve is flat early, and flat at the end as the rate falls
        return f"Next: a higher rate (optimizer.lr) or other {more}; the validation loss has levelled off.", ""
    return f"Next: a larger model or other {more}; the validation loss has levelled off.", ""


def _gained(page: Page, model: StageRow) -> Advice | None:
    """Of a model that goes on from another, where both are measured on the same text: whether more is to be had.

    None where that is not known.
    """
    init = (model.get("inputs") or {}).get("init")
    value = {e["of"]: (e.get("metrics") or {}).get(BITS) for e in reversed(page["evaluations"])}
    here, before = value.get(model["name"]), value.get(init) if isinstance(init, str) else None
    if here is None or before is None:
        return None
    if here < before:
        return f"Next: train longer; it has gained {1 - here / before:.1%} on what it went on from.", _longer(
            page, model
        )
    optimizer = model["config"].get("optimizer")
    rate = optimizer.get("lr") if isinstance(optimizer, dict) else None
    change = {f"{model['name']}.optimizer.lr": f"{rate / 3:.2g}"} if isinstance(rate, int | float) else {}
    words = "Next: a lower rate (optimizer.lr), or more of its text; it has become no better than what it went on from."
    return words, run_command(page, change) if change else ""


def _rarely(page: Page, model: StageRow, count: int) -> Advice:
    """That a curve has few points: since few were asked for, or since each took too much of the budget's time."""
    config, times = model["config"], "once" if count == 1 else f"{count} times"
    every, tokens = config.get("evaluate_every") or 0, config.get("evaluate_tokens")
    tokens = MOST_HELD_OUT if tokens == "auto" else tokens
    steps = (model.get("metrics") or {}).get("steps") or 0.0
    asked = 1 / every if 0 < every < 1 else steps / every if every else 0.0
    looked = f"validation documents were looked at {times}"
    if asked >= FEW_POINTS and "seconds" in (config.get("budget") or {}) and isinstance(tokens, int):
        return (
            f"Next: measure on fewer tokens; {looked} and not about {asked:.0f} times as the recipe asks, since a "
            f"measurement of {tokens:,} tokens (evaluate_tokens) takes much of the time.",
            run_command(page, {f"{model['name']}.evaluate_tokens": max(1, tokens // 5)}),
        )
    return (
        f"Next: measure more often; {looked}, which says nothing of the course.",
        run_command(page, {f"{model['name']}.evaluate_every": 0.05}),
    )


def _coarse(page: Page, model: StageRow, values: Sequence[float | None], change: float) -> Advice | None:
    """That a held-out curve of few tokens swings by more than it changes, so that its course says nothing."""
    tokens, by = model["config"].get("evaluate_tokens"), swing(values)
    if not isinstance(tokens, int) or tokens >= FEW_TOKENS or by <= FALL or by < change:
        return None
    return (
        f"Next: measure on more validation text; its loss swings by {by:.1%} from one measurement to the next, more "
        f"than it changes, on {tokens:,} tokens each (evaluate_tokens).",
        run_command(page, {f"{model['name']}.evaluate_tokens": 100_000}),
    )


def _of_labels(page: Page, model: StageRow, evaluation: Evaluated | None, training: Trained) -> Advice:
    """Of a classifier, a tagger, a regressor or what gives answers."""
    if evaluation is None:
        return "Next: add an evaluate stage (evaluations: [task]), which measures it on unseen documents.", ""
    change, better = course(training["evaluation"]["loss"]), beats_baseline(evaluation)
    begin = "a pretrained model to begin with (init: NAME, or pretrain new … --init NAME)"
    pretrained = f" or {begin}"
    best = yardstick(evaluation)
    if best is not None and better is not None and better <= 0:
        why = f"{best.words} does no worse" if best.reads else "so far the texts have taught it too little"
        if best.reads and change[1] <= RISE and (longer := _longer(page, model)):
            return f"Next: more passes, {begin}, or more labelled documents: {why}.", longer
        return f"Next: more labelled documents,{pretrained}: {why}.", ""
    missed = never_answered(evaluation.get("confusion") or {})
    if change[0] < -FALL and change[1] <= RISE:
        fell = f"the validation loss still fell by {-change[0]:.1%} in the last fifth"
        return f"Next: train longer; {fell}.", _longer(page, model)
    if missed:
        counts = {row.name: row.count for row in class_rows(evaluation.get("confusion") or {})}
        few = ", ".join(f"“{name}” ({counts[name]} {evaluation.get('split', 'test')} documents)" for name in missed[:3])
        return f"Next: more documents of {few}, which it never answers.", ""
    use = f"pretrain predict {shlex.quote(str(page.get('folder') or 'RUN'))} FILE"
    if change[1] > RISE:
        rose = "its validation loss rose again before the end, so more passes do not help"
        kept = " (the best weights are kept)" if training.get("kept") else ""
        return f"Next: more labelled documents,{pretrained}; {rose}{kept}. To use it as it is:", use
    if not of_classes(evaluation):
        return f"Next: more labelled documents,{pretrained}; its validation loss has levelled off. To use it:", use
    return "Next: see below what it takes for what, and label more of that. To use it:", use


def of_classes(evaluation: Evaluated) -> bool:
    """Whether what is measured answers with classes, and not with numbers or texts."""
    return "accuracy" in (evaluation["metrics"] or {})


@dataclass(frozen=True)
class Yardstick:
    """What a model of labels is held against: an answer that looks at no text, or what counts words alone."""

    metric: str  # the model's
    baseline: str  # the yardstick's
    words: str
    reads: bool  # whether it reads the texts
    higher: bool  # whether more is better

    @property
    def short(self) -> str:
        """What it counts."""
        return "character n-grams" if "character" in self.words else "word counts"


YARDSTICKS = (
    Yardstick("accuracy", "accuracy_of_counts", "the best of models on word counts", True, True),
    Yardstick("accuracy", "naive_bayes", "naive Bayes on word counts", True, True),  # of earlier versions
    Yardstick("accuracy", "majority", "always answering the commonest class", False, True),
    Yardstick("mse", "mse_of_counts", "ridge regression on word counts", True, False),
    Yardstick("mse", "mse_of_mean", "always answering the mean", False, False),
)


def yardstick(evaluation: Evaluated) -> Yardstick | None:
    """The best of those that were measured beside the model, called what the evaluation says that it is."""
    metrics, words = evaluation["metrics"] or {}, evaluation.get("yardsticks") or {}
    known = [each for each in YARDSTICKS if each.metric in metrics and each.baseline in metrics]
    best = max(known, key=lambda each: metrics[each.baseline] * (1 if each.higher else -1), default=None)
    return best and replace(best, words=words.get(best.baseline, best.words))


def beats_baseline(evaluation: Evaluated) -> float | None:
    """1 where it is surely better than the best yardstick, 0.5 where that is not sure, -1 where it is not better.

    None where there is nothing to compare with.
    """
    metrics, best = evaluation["metrics"] or {}, yardstick(evaluation)
    if best is None:
        return None
    value, base = metrics[best.metric], metrics[best.baseline]
    if not (value > base if best.higher else value < base):
        return -1.0
    ends = (evaluation.get("intervals") or {}).get(best.metric)
    if not best.higher:
        return 0.5 if ends and ends[1] >= base else 1.0
    return 1.0 if ends and ends[0] > base else 0.5


def _tokens_a_weight(model: StageRow, training: Trained) -> float:
    """Of what was trained from nothing on text; of all else there is no such rule."""
    tokens = float((model["lineage"] or {}).get("tokens") or 0)
    fresh = training["unit"] == "tokens" and not model["config"].get("init")
    return tokens / model["weights"] if model["weights"] and fresh and tokens else math.inf


def _passes(page: Page, model: StageRow, training: Trained) -> float:
    """How often the training text was read, about; 0 where that is not known."""
    name = (model.get("inputs") or {}).get("corpus") or model["config"].get("corpus")
    corpus = next((each for each in page.get("corpora") or [] if each["name"] == name), None)
    splits = (corpus.get("domains") or {}).get("train", {}) if corpus else {}
    size = sum(counts.get("bytes", 0) for counts in splits.values())
    if not size or training["unit"] != "tokens":
        return 0.0
    return last(training["step"]["tokens"]) * BYTES_A_TOKEN / size


def _longer(page: Page, model: StageRow) -> str:
    unit, limit = budget_of(model)
    return run_command(page, {f"{model['name']}.budget.{unit}": f"{4 * limit:g}"}) if unit else ""


def spent_share(page: Page, stage: str) -> float | None:
    """How much of a train stage's budget its log has spent, 0 to 1; None where the log does not say."""
    training = next((t for t in page["trainings"] if t["name"] == stage), None)
    if training is None:
        return None
    if done := known(training["step"].get("progress", [])):
        return done[-1]
    row = next((s for s in page["stages"] if s["name"] == stage), None)
    unit, limit = budget_of(row) if row else ("", 0.0)  # a log of before
    spent = known(training["step"].get(unit, []))
    return min(1.0, spent[-1] / limit) if spent else None


def budget_of(stage: StageRow) -> tuple[str, float]:
    """The unit and the limit of a train stage's budget; an empty unit where the recipe says none that is a number."""
    budget = stage["config"].get("budget")
    for unit, limit in budget.items() if isinstance(budget, dict) else ():
        if isinstance(limit, int | float) and limit > 0:
            return str(unit), float(limit)
    return "", 0.0

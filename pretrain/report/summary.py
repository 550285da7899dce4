"""The report's first words: what came out of a run, whether it is good, and what to do next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pretrain.report.data import BITS, Evaluated, Page, StageRow, Trained

TOKENS_A_WEIGHT = 20  # about what is best for a given compute (Hoffmann et al., arXiv:2203.15556)
ENDED = ("done", "cached")
RISE, FALL = 0.01, 0.005  # of a held-out loss: it has risen again, it still falls
# Metrics worth a first sentence, with the ones that say what guessing gives.
SCORES = {
    "accuracy": "majority",
    "probe_accuracy": "probe_majority",
    "f1": "",
    "ndcg@10": "",
    "loss": "",
    "label_loss": "",
}


@dataclass(frozen=True)
class Headline:
    """Of the run's last model: what it is, what is measured of it, and its curve."""

    model: StageRow | None
    evaluation: Evaluated | None
    training: Trained | None


@dataclass(frozen=True)
class Summary:
    """Three sentences or so."""

    result: str
    judgement: str
    advice: str
    command: str = ""  # that does what is advised


def headline(page: Page) -> Headline:
    """The last stage that wrote a checkpoint, or that is about to; the last evaluation of it, one in bits if any."""
    logged = {training["name"]: training for training in page["trainings"]}
    models = [s for s in page["stages"] if s["writes"] == "checkpoint" or s["name"] in logged]
    model = models[-1] if models else None
    name = model["name"] if model else ""
    about = [e for e in page["evaluations"] if e["of"] in (name, "") and e.get("metrics")]
    with_bits = [e for e in about if BITS in e["metrics"]]
    return Headline(model, next(reversed(with_bits or about), None), logged.get(name))


def summarise(page: Page, running: str = "") -> Summary:
    """`running` is the stage that is being run at this moment, if one is."""
    about = headline(page)
    judgement = " ".join(filter(None, (_judgement(page, about), _quantised(about))))
    return Summary(_result(page, about), judgement, *_advice(page, about, running))


def _quantised(about: Headline) -> str:
    """How much of the model is held in few bits, and what its files take."""
    metrics = (about.model.get("metrics") if about.model else None) or {}
    if "quantised_share" not in metrics or not metrics.get("disk_bytes_before"):
        return ""
    saved = 1 - metrics["disk_bytes"] / metrics["disk_bytes_before"]
    size = short(metrics["disk_bytes"])
    return (
        f"Quantised are {metrics['quantised_share']:.0%} of its weights; its files take {size}B, "
        f"{abs(saved):.0%} {'less' if saved >= 0 else 'more'} than before."
    )


def _result(page: Page, about: Headline) -> str:
    model = about.model
    if model is None:
        made = [f"{s['name']} ({s['writes']})" for s in page["stages"] if s["writes"]]
        return f"No model has come out yet; there is {', '.join(made)}." if made else "Nothing has come out yet."
    lineage, step = model["lineage"] or {}, about.training["step"] if about.training else {}
    tokens = lineage.get("tokens") or last(step.get("tokens", []))
    unit = str(lineage.get("unit") or (about.training["unit"] if about.training else "tokens"))
    size = f" of {short(model['weights'])} weights" if model["weights"] else ""
    kind = f"{article(model['family'])} {model['family']} model" if model["family"] else "a model"
    subject = f"“{model['name']}”, {kind}{size}" + (f", has seen {short(tokens)} {unit}" if tokens else "")
    if about.evaluation and BITS in about.evaluation["metrics"]:
        bits = about.evaluation["metrics"][BITS]
        return f"{subject} and needs {bits:.2f} bits for each byte of text that it has never seen."
    score = _score(about.evaluation["metrics"]) if about.evaluation else None
    if score:
        return f"{subject} and reaches {score}."
    if held_out := known(about.training["evaluation"][BITS] if about.training else []):
        return f"{subject} and needs {held_out[-1]:.2f} bits for each byte of held-out text."
    if held_out := known(about.training["evaluation"]["loss"] if about.training else []):
        return f"{subject} and has a held-out loss of {held_out[-1]:.3g} nats."
    return f"{subject}."


def _score(metrics: Mapping[str, float]) -> str:
    name = next((n for n in SCORES if n in metrics), "")
    if not name:
        return ""
    guess = metrics.get(SCORES[name])
    return f"{name.replace('_', ' ')} {metrics[name]:.3g}" + (f" (guessing: {guess:.3g})" if guess is not None else "")


def _judgement(page: Page, about: Headline) -> str:
    """Against what costs nothing (counts, compressors) and against the run's other models."""
    evaluation = about.evaluation
    if not evaluation or BITS not in evaluation["metrics"]:
        return _trend(about.training)
    bits, line = evaluation["metrics"][BITS], evaluation.get("bigram")
    tools = {k: (v.get("metrics") or {}).get(BITS) for k, v in (evaluation.get("compressors") or {}).items()}
    rivals = {name: value for name, value in tools.items() if value is not None}
    name, best = min(rivals.items(), key=lambda item: item[1], default=("", math.inf))
    beaten = f"fewer than {name} ({best:.2f})" if bits < best < math.inf else ""
    words = []
    # The line goes by how much has been counted: of a model that has read more it is lower.
    read = (about.model["lineage"] or {}).get("tokens") if about.model else None
    counting = "counting which token follows which" + (f" in the {short(read)} tokens that it has read" if read else "")
    if line is not None and bits >= line:
        words.append(f"That is not good yet: {counting} comes to {line:.2f}.")
    elif line is not None:
        learnt = f"that is {1 - bits / line:.0%} fewer than {counting} ({line:.2f})"
        words.append(f"Good: {learnt}, and {beaten}." if beaten else f"It has learnt something: {learnt}.")
    elif beaten:
        words.append(f"Good: that is {beaten}.")
    if best <= bits:
        words.append(f"{name}, which learns from the text that it packs, still does better ({best:.2f}).")
    before = _before(page, evaluation)
    if before is not None:
        base = before["metrics"][BITS]
        change = (
            f"{abs(1 - bits / base):.0%} {'fewer' if bits < base else 'more'} than" if bits != base else "the same as"
        )
        words.append(f"It is {change} “{before['of']}” ({base:.2f}).")
    return " ".join(words)


def _before(page: Page, evaluation: Evaluated) -> Evaluated | None:
    """The first other model that was measured on as many documents."""
    others = [
        e for e in page["evaluations"]
        if e["of"] not in (evaluation["of"], "") and BITS in (e.get("metrics") or {})
        and e.get("documents") == evaluation.get("documents") and e.get("compressors") == evaluation.get("compressors")
    ]  # fmt: skip
    return others[0] if others else None


def _trend(training: Trained | None) -> str:
    values = known(training["evaluation"]["loss"]) if training else []
    if len(values) < 2 or not values[0]:
        return ""
    change = values[-1] / values[0] - 1
    return f"The held-out loss {'fell' if change < 0 else 'rose'} by {abs(change):.0%} since it was first measured."


def _advice(page: Page, about: Headline, running: str) -> tuple[str, str]:
    """What to do next, and the command for it if there is one."""
    command = f"pretrain run {shlex.quote(page['run'].get('recipe') or 'RECIPE')}"
    if running:
        done = spent_share(page, running)
        return f"Still running: “{running}”" + ("." if done is None else f", {done:.0%} of its budget spent."), ""
    missing = [s["name"] for s in page["stages"] if s["status"] not in ENDED]
    if missing:
        return f"Not finished. To go on with “{missing[0]}”:", command
    model, training = about.model, about.training
    if model is None:
        return "Next: add a train stage.", ""
    if training is None:
        return "" if about.evaluation else "Next: add an evaluate stage, which measures it on unseen text.", ""
    change, rise = course(training["evaluation"][BITS if known(training["evaluation"][BITS]) else "loss"])
    tokens = float((model["lineage"] or {}).get("tokens") or 0)
    share = tokens / model["weights"] if model["weights"] and training["unit"] == "tokens" else math.inf
    unit, limit = _budget(model)
    longer = f"{command} --set {model['name']}.budget.{unit}={4 * limit:g}" if unit else ""
    if rise > RISE:
        return (
            f"Next: more text, or a shorter training: the held-out loss was {rise:.0%} lower before it rose again.",
            "",
        )
    if share < TOKENS_A_WEIGHT:
        few = f"it has seen {share:.2g} tokens for each weight, and about {TOKENS_A_WEIGHT} are usual."
        return f"Next: train longer; {few}", longer
    if change < -FALL:
        return f"Next: train longer; the held-out loss still fell by {-change:.1%} in the last fifth.", longer
    return "Next: a larger model or other text; the held-out loss has levelled off.", ""


def spent_share(page: Page, stage: str) -> float | None:
    """How much of a train stage's budget its log has spent, 0 to 1."""
    training = next((t for t in page["trainings"] if t["name"] == stage), None)
    row = next((s for s in page["stages"] if s["name"] == stage), None)
    unit, limit = _budget(row) if row else ("", 0.0)
    if training is None or not limit:
        return None
    column = training["step"].get(unit, [])
    return min(1.0, last(column) / limit)


def _budget(stage: StageRow) -> tuple[str, float]:
    """The unit and the limit of a train stage's budget; an empty unit where the recipe says none that is a number."""
    budget = stage["config"].get("budget")
    for unit, limit in budget.items() if isinstance(budget, dict) else ():
        if isinstance(limit, int | float) and limit > 0:
            return str(unit), float(limit)
    return "", 0.0


def course(values: Sequence[float | None]) -> tuple[float, float]:
    """How much of itself a curve changed by in its last fifth, and how far its end lies above its lowest."""
    points = known(values)
    if len(points) < 5 or min(points) <= 0:
        return 0.0, 0.0
    late = points[-1 - max(1, len(points) // 5)]
    return points[-1] / late - 1, 1 - min(points) / points[-1]


def known(values: Sequence[float | None]) -> list[float]:
    """Those that are numbers."""
    return [v for v in values if v is not None and math.isfinite(v)]


def last(values: Sequence[float | None]) -> float:
    """The last that is a number; 0 where there is none."""
    return (known(values)[-1:] or [0.0])[0]


def article(word: str) -> str:
    """`a`, or `an` before a vowel."""
    return "an" if word[:1].lower() in "aeiou" else "a"


def short(value: float) -> str:
    """A number with three digits and a unit prefix."""
    for power, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.3g} {letter}"
    return f"{value:.3g}"


def clock(seconds: float) -> str:
    """A time in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"

"""The report's first words: what came out of a run, whether it is good, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.core.quick.confusion import ENOUGH, class_rows, never_answered, worst_class
from pretrain.core.quick.quantities import counted, figure, short
from pretrain.corpus.overlap import distrusted
from pretrain.report import foretold
from pretrain.report.advice import advise, beats_baseline, spent_share, yardstick
from pretrain.report.data import BITS, Page, StageRow, Trained, end_of, unit_of_loss
from pretrain.report.held_out import Evaluated, text_of
from pretrain.report.numbers import article, known, last

# Metrics worth a first sentence: how they are called; where no yardstick is, what says what guessing gives, and is.
SCORES = {
    "f1": ("an F1 of entities of", "", ""),
    "accuracy": ("an accuracy of", "", ""),
    "mse": ("a mean squared error of", "", ""),
    "exact_match": ("the very answer in a share of", "", ""),
    "probe_accuracy": ("a probe accuracy of", "probe_majority", "always answering the commonest class"),
    "ndcg@10": ("an nDCG@10 of", "", ""),
    "label_loss": ("a loss of labels, in nats, of", "", ""),
    "loss": ("a loss of", "", ""),
}

BOLD = 0.1  # by which scores are above the share of right answers, where that is worth a word


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
    learnt = _corpus(page, name)  # what a model has learnt last goes before what it is measured on besides
    of_it = [e for e in with_bits if learnt and _corpus(page, e["name"]) == learnt]
    return Headline(model, next(reversed(of_it or with_bits or about), None), logged.get(name))


def _corpus(page: Page, stage: str) -> str:
    """The corpus that a stage reads, as the recipe names it; empty where that is not known."""
    row = next((s for s in page["stages"] if s["name"] == stage), None)
    return str((row.get("inputs") or {}).get("corpus") or row["config"].get("corpus") or "") if row else ""


def summarise(page: Page, running: str = "") -> Summary:
    """`running` is the stage that is being run at this moment, if one is."""
    about = headline(page)
    if running:
        done = spent_share(page, running)
        advice = f"Still running: “{running}”" + ("." if done is None else f", {done:.0%} of its budget spent."), ""
    else:
        advice = advise(page, about.model, about.evaluation, about.training)
    expectation = foretold.beside(page, about.model, about.evaluation)
    sentences = (
        _judgement(page, about),
        _kept(page, about),
        expectation,
        foretold.made(about.model),
        _quantised(about),
    )
    judgement = " ".join(filter(None, sentences))
    return Summary(_result(page, about), judgement, *advice)


def _quantised(about: Headline) -> str:
    """How much of the model is held in few bits, and what its files take."""
    metrics = (about.model.get("metrics") if about.model else None) or {}
    if "quantised_share" not in metrics or not metrics.get("disk_bytes_before"):
        return ""
    saved = 1 - metrics["disk_bytes"] / metrics["disk_bytes_before"]
    size = short(metrics["disk_bytes"], "B")
    return (
        f"Quantised are {metrics['quantised_share']:.0%} of its weights; its files take {size}, "
        f"{abs(saved):.0%} {'less' if saved >= 0 else 'more'} than before."
    )


def _result(page: Page, about: Headline) -> str:
    model = about.model
    if model is None and (speeds := _speeds(page)):
        return f"Of samples that were written, tokens a second: {', '.join(speeds)}."
    exported = [(s["name"], s["config"].get("to"), s["metrics"]) for s in page["stages"] if s["stage"] == "export"]
    if model is None and exported and (facts := exported[-1][2]):
        name, form, _ = exported[-1]
        return f"“{name}” is the model for other programs, as {form}, of {short(facts['bytes'], 'B')}."
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
    score = _score(about.evaluation) if about.evaluation else None
    if score:
        return f"{subject} and reaches {score}."
    training = about.training
    if training and (likelihood := end_of(page, training, BITS)) is not None:
        return f"{subject} and needs {likelihood:.2f} bits for each byte of validation text."
    if training and (loss := end_of(page, training, "loss")) is not None:
        return f"{subject} and has a validation {unit_of_loss(training)} of {figure(loss, 3)}."
    return f"{subject}."


def _speeds(page: Page) -> list[str]:
    """How fast each stage has decoded, where a run does no more than that."""
    rows = [
        (s["name"], (s.get("metrics") or {}).get("tokens_per_second")) for s in page["stages"] if s["stage"] == "decode"
    ]
    return [f"{name} {figure(speed, 3)}" for name, speed in rows if speed is not None]


def _score(evaluation: Evaluated) -> str:
    """`an accuracy of 0.86 on 64 documents that it has never seen, where always answering the commonest gives 0.55`."""
    metrics = evaluation["metrics"]
    name = next((n for n in SCORES if n in metrics), "")
    if not name:
        return ""
    words, baseline, guessing = SCORES[name]
    if (best := yardstick(evaluation)) is not None and best.metric == name:
        baseline, guessing = best.baseline, best.words
    group = name.partition("_")[0]  # a probe has tested a share of the documents
    count = int(metrics.get(f"{group}_documents") or metrics.get("documents") or evaluation.get("documents") or 0)
    number = f"{count:,} document{'s' if count != 1 else ''}" if count else "documents"
    unseen = "" if evaluation.get("seen") else " that it has never seen"
    guess = metrics.get(baseline)
    where = f", where {guessing} gives {figure(guess, 3)}" if guess is not None else ""
    return f"{words} {figure(metrics[name], 3)} on {number}{unseen}{where}"


def _judgement(page: Page, about: Headline) -> str:
    """Against what costs nothing (counts, compressors) and against the run's other models."""
    evaluation = about.evaluation
    if evaluation and beats_baseline(evaluation) is not None:
        return _of_answers(evaluation)
    if not evaluation or BITS not in evaluation["metrics"]:
        return _trend(page, about.training)
    bits, line = evaluation["metrics"][BITS], evaluation.get("bigram")
    tools = {k: (v.get("metrics") or {}).get(BITS) for k, v in (evaluation.get("compressors") or {}).items()}
    rivals = {name: value for name, value in tools.items() if value is not None}
    name, best = min(rivals.items(), key=lambda item: item[1], default=("", math.inf))
    beaten = f"fewer than {name} ({best:.2f})" if bits < best < math.inf else ""
    words = []
    # The line goes by how much has been counted: of a model that has read more it is lower.
    made = about.model or {"metrics": None, "lineage": None}
    read = (made["metrics"] or {}).get("tokens") or (made["lineage"] or {}).get("tokens")
    has_read = "it went on with" if about.model and about.model["config"].get("init") else "it has read"
    counting = "counting which token follows which" + (f" in the {short(read)} tokens that {has_read}" if read else "")
    if line is not None and bits >= line:
        words.append(f"That is not good yet: {counting} comes to {line:.2f}.")
    elif line is not None and (ends := (evaluation.get("intervals") or {}).get(BITS)) and ends[1] >= line:
        words.append(
            f"Not sure yet: {counting} comes to {line:.2f}, other documents may give {ends[0]:.2f} to {ends[1]:.2f}."
        )
    elif line is not None:
        learnt = f"that is {1 - bits / line:.0%} fewer than {counting} ({line:.2f})"
        words.append(f"Good: {learnt}, and {beaten}." if beaten else f"It has learnt something: {learnt}.")
    elif beaten:
        words.append(f"That is {beaten}, which knows no other text than what it packs.")
    whole = evaluation.get("bigram_whole")
    if line is not None and whole is not None and whole <= bits < line:
        words.append(f"But the same counts of all training text, which it has read a part of, come to {whole:.2f}.")
    if best <= bits:
        words.append(f"{name}, which learns from the text that it packs, still does better ({best:.2f}).")
    before = _before(page, evaluation)
    if before is not None:
        base = before["metrics"][BITS]
        share = f"{abs(1 - bits / base):.0%}"
        near = "as many as" if bits == base else f"less than 1% {'fewer' if bits < base else 'more'} than"
        change = near if share == "0%" else f"{share} {'fewer' if bits < base else 'more'} than"
        words.append(f"It is {change} “{before['of']}” ({base:.2f}).")
    return " ".join(words)


def _of_answers(evaluation: Evaluated) -> str:
    """Against word counts, or an answer that looks at no text; which classes are never answered."""
    verdict, metrics, words = beats_baseline(evaluation), evaluation["metrics"], list[str]()
    best = yardstick(evaluation)
    assert best is not None, "there is something to compare with"
    value, base = (figure(metrics[name], 3) for name in (best.metric, best.baseline))
    ends = (evaluation.get("intervals") or {}).get(best.metric)
    worst = None if not ends else figure(ends[0] if best.higher else ends[1], 3)
    if "seen" in evaluation:
        begins = "Do not trust that number: " if distrusted(evaluation["seen"]) else "Note: "
        words.append(f"{begins}{evaluation['seen']}.")
    if verdict == 1:
        than = f"{best.words} of the same training documents" if best.reads else "an answer that looks at no text"
        words.append(f"Good: it is better than {than}.")
    elif verdict == -1 and best.reads:
        than = "no better" if value == base else "worse"
        chance = ""
        if ends and ends[0] <= metrics[best.baseline] <= ends[1]:
            chance = f", though not surely so: the interval is {figure(ends[0], 3)} to {figure(ends[1], 3)}"
        of = f"{value} where {best.words} of the same training documents has {base}"
        words.append(f"That is not good, it is {than} than {best.short}: {of}{chance}.")
    elif verdict == -1:
        words.append("That is not good: an answer that looks at no text is as good.")
    else:
        reaches = f"the interval reaches {'down' if best.higher else 'up'} to {worst}"
        why = reaches if ends else "there are few documents"
        words.append(f"That is better than {best.short if best.reads else 'guessing'}, but not surely so: {why}.")
    confusion, split = evaluation.get("confusion") or {}, evaluation.get("split", "test")
    if missed := never_answered(confusion):
        counts = {row.name: row.count for row in class_rows(confusion)}
        listed = ", ".join(f"“{name}” ({counts[name]})" for name in missed[:5])
        words.append(f"It never answers {listed}.")
    if (worst_row := worst_class(confusion)) is not None and worst_row.f1 < 1:
        hits = round((worst_row.recall or 0) * worst_row.count)
        words.append(
            f"{_worst_of(confusion, split)} is “{worst_row.name}”: of its {worst_row.count} {split} documents {hits} "
            f"are answered right, and {worst_row.answered} are answered so in all (F1 {worst_row.f1:.2f})."
        )
    sure = metrics.get("confidence")
    if sure is not None and sure - metrics["accuracy"] > BOLD:
        right = f"{sure:.2f} on average, where {metrics['accuracy']:.2f} are right"
        words.append(f"Its scores promise too much: {right}; read them as an order, not as probabilities.")
    if unlearnt := int(metrics.get("unlearnt", 0)):
        words.append(f"Left out: {counted(unlearnt, 'document')} of classes that no training document has.")
    return " ".join(words)


def _kept(page: Page, about: Headline) -> str:
    """Of a model that goes on from another: what it needs for other text than it went on with, beside that other."""
    words, model = [], about.model
    if model is None or not model["config"].get("init"):
        return ""
    for evaluation in page["evaluations"]:
        if evaluation is about.evaluation or evaluation["of"] != model["name"]:
            continue
        before = _before(page, evaluation) if BITS in (evaluation.get("metrics") or {}) else None
        if before is not None:
            now, base = evaluation["metrics"][BITS], before["metrics"][BITS]
            words.append(
                f"On the documents of “{evaluation['name']}” it needs {now:.3f}, and “{before['of']}” {base:.3f} "
                f"({now / base - 1:+.1%})."
            )
    return " ".join(words)


def _worst_of(confusion: Mapping[str, Mapping[str, int]], split: str) -> str:
    """What the worst class is the worst of, where some have too few documents to be judged."""
    few = any(0 < row.count < ENOUGH for row in class_rows(confusion))
    return f"Worst of the classes with {ENOUGH} {split} documents or more" if few else "Worst"


def _before(page: Page, evaluation: Evaluated) -> Evaluated | None:
    """The first other model that was measured on the same text."""
    others = [
        e for e in page["evaluations"]
        if e["of"] not in (evaluation["of"], "") and BITS in (e.get("metrics") or {})
        and text_of(e) == text_of(evaluation)
    ]  # fmt: skip
    return others[0] if others else None


def _trend(page: Page, training: Trained | None) -> str:
    values = known(training["evaluation"]["loss"]) if training else []
    end = end_of(page, training, "loss") if training else None
    if len(values) < 2 or values[0] <= 0 or end is None:
        return ""
    change = end / values[0] - 1
    return f"The validation loss {'fell' if change < 0 else 'rose'} by {abs(change):.0%} since it was first measured."

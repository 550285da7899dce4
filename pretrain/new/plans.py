"""The recipes that `pretrain new` writes: one for each task, sized for the time there is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pretrain.core.folders import tokenizer_of
from pretrain.core.quick.machine import efficiency, likely_beside, likely_rate
from pretrain.core.quick.quantities import WIDE, short
from pretrain.corpus.sources._files import evenly
from pretrain.dial import choose as dial
from pretrain.dial.law import NEARLY_NEW, load, worth
from pretrain.new import stages, start
from pretrain.new.corpora import corpus, lacking
from pretrain.new.look import Look
from pretrain.new.smaller import Sizes, Smaller
from pretrain.new.stages import written
from pretrain.new.start import ENOUGH_PASSES, Start
from pretrain.new.tables import Table
from pretrain.new.texts.prompts import fitting
from pretrain.new.tuning import Plan, Tuned, plan
from pretrain.new.words import commented, contents, quoted
from pretrain.stages._examples import counter

LAW = Path(dial.__file__).parent / "laws" / "python.json"
MINUTES = (1, 2, 5, 10, 20, 30)
EVENING = 60.0 * MINUTES[-1]
ENOUGH = 1.03  # of the loss of an evening's training is as good as it
TOKEN = 3.5  # bytes, about
COUNTED, ALL = 400, 2_000_000  # texts whose tokens are counted, but all where they have no more characters
MEASURED = 0.05  # of a training between two measurements
CONTINUED = "a few passes over the text; longer forgets the rest"
# Of an encoder that has seen these texts alone, which is small: rate, passes and rows a step, in twice of the usual, of
# its classifier, and of taggers.
FRESH, TAGGED = ("4e-3", 12, 2), ("2e-3", 16, 1)
FRAME = 2  # tokens that begin and end a text
PIXEL_FLOPS = 6 * 1.1e6 * 48  # of an image of 64 patches in training


@dataclass(frozen=True)
class Asked:
    """What a recipe is to be of."""

    name: str
    look: Look
    task: str
    init: Start | None = None
    seconds: float | None = None  # all its trainings together
    shares: Mapping[str, float] = field(default_factory=dict)  # of a training between two measurements, where not usual
    passes: int | None = None  # over the text, where there is time for more of them than teach anything

    @property
    def text(self) -> float:
        """Bytes to train on."""
        return max(1.0, (self.look.text or self.look.bytes) * (1 - 2 * self.look.share))

    @cached_property
    def budget(self) -> float:
        """Seconds: those asked for, or as few as come near to what an evening gives."""
        if self.seconds is not None:
            return self.seconds
        law, rate = load(LAW), likely_rate()
        times = [60.0 * minutes for minutes in MINUTES]
        tasks = [dial.Task(law, seconds=t, rate=rate, beside=likely_beside(), unique=self.text) for t in times]
        choices = [dial.choose(task) for task in tasks]
        bits = [choice.prediction.bits if choice.prediction else math.inf for choice in choices]
        if math.inf in bits:  # more than the law can tell of
            return EVENING
        return next(time for time, each in zip(times, bits, strict=True) if each <= ENOUGH * bits[-1])

    @cached_property
    def tokens(self) -> list[float]:
        """Tokens of the table's texts, of some where they are many.

        Counted by the tokenizer there is, or by one like that to be made.
        """
        table, entries = self.look.table, start.vocabulary(self.text)
        few = evenly(table.texts, COUNTED) if table is not None else []
        texts = list(table.texts) if table is not None and sum(map(len, table.texts)) <= ALL else few
        both = 2 if table is not None and table.pair else 1
        made = None if self.init is None else tokenizer_of(Path(self.init.name)) / "tokenizer.json"
        if made is None and entries <= start.BYTES:
            sizes = [float(len(text.encode())) for text in texts]
        elif made is None or made.exists():
            sizes = counter(made, entries, tuple({"text": text} for text in few))(texts)
        else:  # of a hub's, which has not been fetched
            sizes = [len(text.encode()) / TOKEN for text in texts]
        return [FRAME + both * size for size in sizes]

    def length(self, most: int) -> int:
        """Tokens that 95% of the texts fit in, a multiple of 32; at most so many."""
        fits = sorted(self.tokens)[int(0.95 * (len(self.tokens) - 1))] if self.tokens else most
        return max(32, min(most, 32 * math.ceil(fits / 32)))

    def cut(self, length: int) -> str:
        """How many of the texts are longer."""
        longer, count = sum(size > length for size in self.tokens), len(self.tokens)
        table, is_made = self.look.table, self.init is not None or start.vocabulary(self.text) <= start.BYTES
        if table is not None and table.whole and count == len(table.texts) and is_made and not longer:
            return "no text is longer"
        looked = "" if table is not None and table.whole and count == len(table.texts) else " looked at"
        of = f"{'' if is_made else 'about '}{f'{longer:,}' if longer else 'none'} of {count:,} texts{looked}"
        return f"{of} {'is' if longer < 2 else 'are'} longer{', and cut' if longer else ''}"

    def measured(self, stage: str, budget: str = "") -> str:
        """How often is measured while a stage trains, where something is held out: on what fits its time.

        With a `budget`, as the recipe writes it, on all that is held out, where the weights that measure best are kept:
        those of fewer documents would be kept by chance. Of one of seconds a training leaves out what takes too long.
        """
        share = self.shares.get(stage, MEASURED)
        if not self.look.share:
            return ""
        if share == 0:
            return stages.MEASURED_ONCE
        whole = stages.MEASURED_IN_TIME if budget.startswith("{seconds") else stages.MEASURED
        return written(whole if budget else stages.FITTED, share=f"{share:g}", times=f"{1 / share:.0f} times")

    def spent(self, why: str) -> dict[str, str]:
        """The budget of a training on text, and why it is that."""
        if self.passes is not None:
            return {"budget": f"{{epochs: {self.passes}}}", "why": _worth(self.passes)}
        return {"budget": f"{{seconds: {duration(self.budget)}}}", "why": why}

    def tuning(self, width: int, blocks: int, epochs: int, length: int, share: float = 1.0) -> Plan:
        """The budget of tuning a model on labelled documents, in a share of the time."""
        table = self.look.table
        assert table is not None, "there are labels"
        sizes = [len(text) for text in table.texts] or [length]
        documents = max(1.0, self.text / max(1.0, sum(sizes) / len(sizes)))
        adapted, held_out = self.init is not None and self.init.wide, documents * self.look.share
        pace = likely_rate(), likely_beside()
        tuned = Tuned(width, blocks, self.tokens, documents, held_out, length, *pace, adapted)
        return plan(tuned, self.budget * share, epochs, duration(self.budget * share))

    @property
    def fresh(self) -> tuple[str, int, int]:
        """How a model is tuned that begins with no checkpoint."""
        return TAGGED if self.look.table is not None and self.look.table.kind == "tag" else FRESH

    @cached_property
    def tuned(self) -> Plan | None:
        """The budget of the fine-tuning, where the recipe has one."""
        table, init = self.look.table, self.init
        if table is None or self.task not in ("classify", "regress", "chat"):
            return None
        length = self.length(256) if self.task != "chat" else 512 if init is not None and init.wide else 256
        if init is None:
            return self.tuning(*_encoder_size(self), epochs=self.fresh[1], length=length, share=0.5)
        epochs = 3 if init.wide else 8
        return self.tuning(init.width or 768, init.blocks or 12, epochs=epochs, length=init.length(length))


def recipe(asked: Asked) -> str:
    """The recipe's text."""
    makers = {
        "pretrain": _images if asked.look.kind == "images" else _pretrain, "continue": _continue,
        "classify": _classify, "regress": _classify, "chat": _chat, "compress": _compress,
    }  # fmt: skip
    head = [
        f"# Written by `pretrain new` for {commented(f'{asked.look.place}: {contents(asked.look)}')}.",
        "# Change what you like and run it again: only what depends on the change is done anew.",
        f"name: {quoted(asked.name)}",
        "seed: 0",
        "stages:",
    ]
    return "\n".join(head) + "\n" + "\n\n".join(filter(None, makers[asked.task](asked))) + "\n"


def _worth(passes: int) -> str:
    """What so many passes over the text teach, in a comment."""
    last = f"the last teaches {worth(passes):.0%} of what as much new text would"
    return f"passes over the text: {NEARLY_NEW} are nearly as good as new text, {last}"


def duration(seconds: float) -> str:
    """`90s`, `20min`, `2h`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.3g}s" if seconds < 100 else f"{seconds:.0f}s"


def _corpus(asked: Asked, name: str = "corpus", labelled: bool = True) -> str:
    return corpus(asked.look, asked.task, asked.init, name, labelled)


def _evaluation(asked: Asked, checkpoint: str, name: str = "evaluation", more: str = "") -> str:
    if not asked.look.share:
        return ""
    return written(stages.EVALUATION, name=name, checkpoint=quoted(checkpoint), more=more)


def _task(objective: str, more: str = "") -> str:
    return f"    evaluations: [{{method: task, objective: {objective}}}]\n{more}    compressors: false"


def _samples(asked: Asked) -> str:
    prompts = [json.dumps(each, ensure_ascii=False) for each in asked.look.prompts[:3]]
    if not prompts and not asked.look.share:
        prompts = ['"The "']
    more = "    corpus: corpus  # and held-out beginnings, beside how they go on" if asked.look.share else ""
    return written(stages.SAMPLES, checkpoint="model", prompts=f"[{', '.join(prompts)}]", more=more)


def _pretrain(asked: Asked) -> list[str]:
    why = "longer helps little: there is too little text for it" if asked.budget < EVENING else "longer helps"
    why = why if asked.seconds is None else "or tokens: 10M, flops: 1e14, epochs: 4"
    model = written(stages.MODEL, **asked.spent(why), measured=asked.measured("model"))
    return [_corpus(asked), written(stages.TOKENIZER), model, _evaluation(asked, "model"), _samples(asked)]


def _continue(asked: Asked) -> list[str]:
    init = asked.init
    assert init is not None, "the command asks for one"
    model = written(
        stages.CONTINUED, init=quoted(init.name), measured=asked.measured("model"),
        **asked.spent(CONTINUED),
        objective={"masked": "masked_lm", "seq2seq": "span_corruption"}.get(init.kind, "causal_lm"),
        length=init.length(512 if init.wide else 256), rate="1e-4" if init.wide else "5e-4",
    )  # fmt: skip
    before, after = _before_and_after(asked, init, "model")
    known = asked.look.share and init.corpus and after
    kept = written(stages.KEPT, checkpoint="model", corpus=quoted(init.corpus)) if known else ""
    return [_corpus(asked), before, model, after, kept, _samples(asked) if init.kind == "causal" else ""]


def _before_and_after(asked: Asked, init: Start, made: str) -> tuple[str, str]:
    """Evaluations of a checkpoint and of what is made of it, where it says the likelihood of text."""
    if init.kind != "causal" or init.family not in ("llama", "gpt2"):
        return "", ""
    return _evaluation(asked, init.name, "before"), _evaluation(asked, made, "after")


def _objective(table: Table, *, training: bool = False) -> str:
    """The objective of a labelled table, as a recipe says it, to train by or to measure by."""
    method, column = {"tag": ("tagging", "tags"), "regress": ("regression", "label")}.get(
        table.kind, ("classification", "label")
    )
    fields = {"method": method, column: str(table.label)} | ({"pair": table.pair} if table.pair else {})
    more = ", standardise: true" if training and table.kind == "regress" else ""
    more += ", log: true" if table.kind == "regress" and table.decades >= WIDE else ""
    return f"{{{', '.join(f'{name}: {quoted(value)}' for name, value in fields.items())}{more}}}"


def _classify(asked: Asked) -> list[str]:
    table, init = asked.look.table, asked.init
    assert table is not None, "the command asks for one"
    objective, length = _objective(table), asked.length(256)
    every = "texts" if init is None and lacking(table) else "corpus"
    before = [] if init is not None else _encoder(asked, length, every)
    before = [_corpus(asked, every, labelled=False), *before] if every == "texts" else before
    length = length if init is None else init.length(length)
    assert asked.tuned is not None
    name = "classifier" if table.kind == "classify" else "tuned"
    adapted = init is not None and init.wide
    fresh_rate, _, more_rows = asked.fresh
    tuned = written(
        stages.TUNED, name=name, init="encoder" if init is None else quoted(init.name), length=length,
        budget=asked.tuned.budget, why=asked.tuned.why, rows=asked.tuned.rows * (more_rows if init is None else 1),
        adapter=stages.ADAPTER if adapted else "", objective=_objective(table, training=True),
        label=commented(str(table.label)), cut=asked.cut(length),
        rate=fresh_rate if init is None else "5e-4" if adapted else "3e-4",
        measured=asked.measured(name, asked.tuned.budget),
        best="" if not asked.look.share else stages.MOST_RIGHT if table.kind == "classify" else stages.BEST,
    )  # fmt: skip
    return [_corpus(asked), *before, tuned, _evaluation(asked, name, more=_task(objective)), _then(asked, table, name)]


def _then(asked: Asked, table: Table, name: str) -> str:
    """What to do with a model of labels."""
    second = f" --pair {commented(quoted(table.pair))}" if table.pair else ""
    return f"# Then: pretrain predict runs/{asked.name}/{name} FILE --text {commented(quoted(table.text))}{second}"


def _entries(entries: int) -> str:
    return f"vocab_size: {entries}" if entries > start.BYTES else "algorithm: bytes  # too little text for a vocabulary"


def _encoder_size(asked: Asked) -> tuple[int, int]:
    """Width and blocks: for a label of a whole text half of the blocks, since words tell most of it."""
    width, blocks = start.encoder(asked.budget / 2, asked.text / TOKEN, start.vocabulary(asked.text))
    return width, blocks if asked.fresh is TAGGED else max(1, blocks // 2)


def _encoder(asked: Asked, length: int, corpus: str) -> list[str]:
    """An encoder of the table's own texts, from nothing, for half of the time."""
    entries, (width, blocks), length = start.vocabulary(asked.text), _encoder_size(asked), max(64, length)
    weights = 12 * blocks * width**2 + 0.15 * entries * width  # a masked one in seven is predicted
    tokens = asked.budget / 2 * likely_rate() * efficiency(width) / (6 * weights)
    enough, whole = tokens > ENOUGH_PASSES * asked.text / TOKEN, asked.fresh is FRESH
    encoder = written(
        stages.ENCODER, width=width, inner=(2 if whole else 4) * width, blocks=blocks, heads=max(2, width // 32),
        corpus=corpus, positions=max(256, length), range=f"{0.7 / math.sqrt(width):.3f}", length=length,
        measured=asked.measured("encoder"), family="modernbert" if whole else "bert",
        pooled=stages.POOLED if whole else "", rate=FRESH[0] if whole else "1e-3",
        budget=f"{{epochs: {ENOUGH_PASSES}}}" if enough else f"{{seconds: {duration(asked.budget / 2)}}}",
        why="more text teaches more than more time" if enough else "",
    )  # fmt: skip
    return [written(stages.ENCODER_TOKENIZER, corpus=corpus, entries=_entries(entries)), encoder]


def _chat(asked: Asked) -> list[str]:
    init, table = asked.init, asked.look.table
    assert init is not None and table is not None, "the command asks for both"
    assert asked.tuned is not None
    more = f"{{{table.more}}}\n" if table.more else ""
    talk = table.talk and init.kind == "causal"
    prompt = "{text}\n\nassistant: " if table.talk else f"{{text}}\n{more}"
    objective = f"{{method: seq2seq, prompt: {json.dumps(prompt)}, target: {quoted(str(table.label))}, answer: 64}}"
    surgeries = [stages.TEMPLATE] * talk + [stages.LORA] * init.wide
    tuned = written(
        stages.CHAT, name="tuned" if init.wide else "model", init=quoted(init.name),
        objective="{method: chat, answer: 64}" if talk else objective,
        framed=", in the model's chat template, or in one of its own" if talk else ", as plain text",
        adapter=f"    surgeries: [{', '.join(surgeries)}]" if surgeries else "",
        length=init.length(512 if init.wide else 256),
        rate="3e-4" if init.wide else "1e-3",
        measured=asked.measured("tuned" if init.wide else "model", asked.tuned.budget),
        budget=asked.tuned.budget, why=asked.tuned.why, rows=min(8, asked.tuned.rows),
    )  # fmt: skip
    if talk:
        prompts = ['"Hello!"']
    elif table.talk:
        prompts = [json.dumps(prompt.replace("{text}", "user: Hello!"))]
    else:
        starts = [each for each in evenly(table.texts, 24) if fitting(each) == each][:2]
        prompts = [json.dumps(prompt.replace("{text}", each), ensure_ascii=False) for each in starts]
    settings = "    chat: true\n    temperature: 0" if talk else "    temperature: 0"
    samples = written(stages.SAMPLES, checkpoint="model", prompts=f"[{', '.join(prompts)}]", more=settings)
    merged = written(stages.MERGED) if init.wide else ""
    evaluation = _evaluation(
        asked, "model", more=_task("{method: chat, answer: 64}" if talk else objective, "    max_documents: 200\n")
    )
    return [_corpus(asked), tuned, merged, evaluation, samples if prompts and not more else ""]


def _compress(asked: Asked) -> list[str]:
    init = asked.init
    assert init is not None, "the command asks for one"
    smaller = Smaller(init, asked.look, 64 if (init.width or 64) % 64 == 0 else -1)
    sizes, trimmed = smaller.sizes, ""
    whole, expects = quoted(init.name), _expects(init, sizes)
    if smaller.kept:
        entries = {"kept": f"{smaller.kept:,}", "entries": f"{init.config['vocab_size']:,}"}
        trimmed, whole = written(stages.TRIMMED, init=whole, **entries), "trimmed"
    if sizes is not None and sizes.exports:
        name, made = "smaller", written(stages.EIGHT_BITS, init=whole, expects=expects)
    else:
        length, group = init.length(256), smaller.group
        name, made = "quantised", written(stages.QUANTISED, init=whole, group=group, length=length, expects=expects)
    before, after = _before_and_after(asked, init, name)
    return [_corpus(asked), before, trimmed, made, after]


def _expects(init: Start, sizes: Sizes | None) -> str:
    """What is to be saved, in a comment; nothing where nothing is known of the checkpoint."""
    if sizes is None:
        return ""
    best = sizes.eight if sizes.exports and sizes.eight is not None else sizes.four
    blocks = f"; 4 bits for the blocks alone would leave {short(sizes.four, 'B')}" if sizes.exports else ""
    return written(
        stages.EXPECTED, share=f"{init.embedded:.0%}", before=short(sizes.before, "B"), after=short(best, "B"),
        saved=f"{sizes.saved:.0%}", blocks=blocks,
    )  # fmt: skip


def _images(asked: Asked) -> list[str]:
    look = asked.look
    side, patch = (32, 4) if look.side < 64 else (64, 8)
    images = asked.budget * likely_rate() * efficiency(128) / (PIXEL_FLOPS * (side / patch) ** 2)
    budget = "{epochs: 100}" if images > 100 * len(look.files) else f"{{seconds: {duration(asked.budget)}}}"
    model = written(
        stages.IMAGES, side=side, patch=patch, rows=max(4, min(64, len(look.files) // 8)), budget=budget,
        measured=asked.measured("model", budget),
    )  # fmt: skip
    probe = _evaluation(asked, "model", more="    evaluations: [{method: probe, label: label}]") if look.classes else ""
    return [_corpus(asked), written(stages.PIXELS, side=side), model, probe]

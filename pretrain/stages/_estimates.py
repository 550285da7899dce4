"""What stages are expected to take and to leave, known before anything runs and without torch.

Times and memory of the data and of the process were measured on a CPU; of training see `core.quick.machine`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from pretrain.core.errors import PretrainError
from pretrain.core.files import JSON, JSONObject, read_object
from pretrain.core.folders import corpus_of, tokenizer_of, verify
from pretrain.core.method import nested
from pretrain.core.quick.machine import efficiency, likely_rate
from pretrain.core.quick.plan import Plan
from pretrain.dial import effort
from pretrain.dial.choose import BYTES_AN_ENTRY
from pretrain.dial.configs import shape_from
from pretrain.dial.shapes import Shape
from pretrain.dial.tuned import Layers, Tuning
from pretrain.stages._examples import ROOM, Labelled, Texts, counter, lengths, shown, stored

if TYPE_CHECKING:
    from pretrain.evaluation import Evaluation
    from pretrain.surgery import Surgery

FLOOR = 0.5e9  # bytes that torch and transformers hold in a process before there is a model
# Bytes that a kind of stage leaves in the process for the stages after it: libraries, and what the allocator keeps.
# What the corpus and the tokenizer leave is, of a training, in what that is taken to hold for each byte of text.
LEAVES = {"data": 0.09e9, "tokenizer": 0.01e9, "train": 0.055e9, "evaluate": 0.02e9}
COUNTED_FOR = {"train": ("data", "tokenizer")}
DOCUMENT = 8e3  # bytes, where nobody has counted the documents
MEASURING = 0.09e9  # bytes that the libraries of evaluations hold
BATCH = 32  # documents that are answered at a time
OPENING, OPENED = 0.5, 0.8e-8  # seconds to open a checkpoint's tokenizer; a weight, to read or to write it
RECORDS = 1e4  # bytes of what each stage notes of itself: its record and the code that ran
ROW = 150.0  # bytes of a document's numbers, as an evaluation keeps them
FEW_ENTRIES, ENOUGH = 600, 20_000  # of a vocabulary that is not learnt; characters of text to learn one from
WHOLE = 0.95  # of the training text: what is learnt of it is taken to be learnt of all
DRAWN = 200  # sizes of documents
WORD = 1.5e-3  # seconds of a word that is generated, in a block
# Of judging labels, on a CPU: seconds that its libraries take to load, of drawing documents anew for intervals, in all
# and for each of them, and of the counts beside it, for each letter whose words or n-grams are counted.
LOADED, DRAWING, DRAWN_AGAIN = 0.8, 3.5e-3, 3e-6
OF_WORDS, OF_CHARACTERS = 0.5e-6, 1.5e-6
COUNTED, WORDS_READ, CHARACTERS_READ = 20_000, (200, 4e6), (100, 1e6)  # documents; letters of each, and in all


@dataclass(frozen=True)
class Left:
    """What a stage leaves for others, or is expected to; nothing where that is not known."""

    bytes: Mapping[str, float] = field(default_factory=dict)  # of a corpus, by split
    documents: Mapping[str, float] = field(default_factory=dict)
    vocabulary: int | None = None
    config: Mapping[str, JSON] = field(default_factory=dict)  # of a model, with its `model_type`
    blocks: float = 1.0  # how many times the weights of its blocks that its configuration says
    tuning: Tuning | None = None  # what is trained beside its weights, where these are frozen
    length: int | None = None  # that a model was trained at
    exact: bool = False  # whether it is there, and no guess
    rows: Texts = ()  # a few documents of a corpus of examples, as far as its sources show them
    folder: Path | None = None  # of a corpus that is there
    tokenizer: Path | None = None  # the file of one that is there
    sizes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # bytes of some documents of a split
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of a split, or the middles of some of them


class Odd(NamedTuple):
    """What is likely a mistake, and the field that would change it; a `note` says what is good to know."""

    field: str
    text: str
    note: bool = False


@dataclass(frozen=True)
class Estimate:
    """What a stage is expected to take; None where nothing can be said. `passes`: how often it reads its corpus."""

    flops: float | None = None
    memory_bytes: float | None = None
    seconds: float | None = None
    disk_bytes: float | None = None
    passes: float | None = None
    left: Left = Left()
    warnings: tuple[Odd, ...] = ()
    plan: Plan | None = None  # of a training
    basis: str = ""  # of a corpus that is not made yet: what is known of it
    much: str = ""  # which field makes the memory as large as it is, and what of it fits, where it does not


Given = Mapping[str, Left]  # by the fields that name them, as `Stage.references` does


def resident(kind: str, before: Iterable[str]) -> float:
    """Bytes that a stage of a kind finds in its process, by the kinds of those that have run in it before."""
    counted_for = (kind, *COUNTED_FOR.get(kind, ()))
    return sum(LEAVES.get(each, 0.0) for each in dict.fromkeys(before) if each not in counted_for)


def left_in(folder: Path) -> Left:
    """What lies in a stage's folder, or in a corpus, a tokenizer or a checkpoint."""
    left = Left()
    with suppress(PretrainError, OSError, KeyError, TypeError):
        corpus = corpus_of(folder) / "corpus.json"
        if corpus.exists():
            info = _whole(corpus)
            left = Left(info["bytes"], info["documents"], exact=True, folder=folder)
        tokenizer = tokenizer_of(folder) / "tokenizer.json"
        place = next((path for path in (folder / "checkpoint", folder) if (path / "config.json").exists()), None)
        entries = _entries(_whole(tokenizer)) if tokenizer.exists() else None
        config = _whole(place / "config.json") if place else {}
        note = place / "pretrain.json" if place else folder
        kept = _whole(note) if note.is_file() else {}
        length = kept.get("lineage", {}).get("length")
        left = replace(left, vocabulary=entries, config=config, length=length, exact=True)
        left = replace(left, tokenizer=tokenizer if tokenizer.exists() else None)
        left = operated(left, _recorded(kept.get("surgery", [])))
    return left


def _whole(path: Path) -> JSONObject:
    """The JSON object in a file that is as it was written; the stage that opens a damaged one will tell of it."""
    verify(path.parent, lambda name: name == path.name)
    return read_object(path)


def _entries(tokenizer: JSONObject) -> int:
    """Of the vocabulary in a `tokenizer.json`: the model's, and those added to it."""
    vocabulary = tokenizer["model"]["vocab"]
    names = set(vocabulary) if isinstance(vocabulary, dict) else {entry[0] for entry in vocabulary}
    return len(names | {entry["content"] for entry in tokenizer["added_tokens"]})


def operated(made: Left, surgeries: Sequence[Surgery]) -> Left:
    """A model after surgeries, as far as they say what becomes of its size."""
    shape, kind = shape_from(made.config), str(made.config.get("model_type"))
    for surgery in surgeries:
        if shape is not None:
            made = replace(made, tuning=surgery.tuning(Layers(shape.with_blocks(made.blocks), kind), made.tuning))
        made = replace(made, blocks=made.blocks * surgery.growth_of_blocks)
    return made


def operating(
    before: Left, shape: Shape, surgeries: Sequence[Surgery], tokens: float = 0.0, passed: float = 0.0
) -> effort.Work:
    """What surgeries compute on a model of this shape; `passed` FLOPs are those of passing the tokens once."""
    task = effort.Task(Layers(shape, str(before.config.get("model_type"))), tokens, passed)
    return sum((each.work(task) for each in surgeries), effort.Work())


def _recorded(entries: Sequence[JSONObject]) -> list[Surgery]:
    """The surgeries that a checkpoint's `pretrain.json` keeps."""
    return [cast("Surgery", nested({"method": entry["method"]} | entry["config"], "surgery")) for entry in entries]


def bytes_of_token(vocabulary: int) -> float:
    """Bytes of text in a token of a BPE trained on it: one of 256 entries, and with each doubling 0.6 more at most."""
    doublings = max(0.0, math.log2(max(vocabulary, 256) / 256))
    return 1 + 1.16 * doublings**0.524  # of Python's library 2.3 at 600 entries, 4.0 at 16,384


def letters(corpus: Left, model: Left, split: str = "train") -> float:
    """Bytes of a token in a split of a corpus, measured on its documents where there are any to see.

    By the tokenizer that is there; else by one that is learnt of the training texts, which a vocabulary fits better
    than others. Of texts that are only a part of them it is learnt of one half, with no more entries than that fills,
    and measured on the other; with more entries it grows as in Python's library.
    """
    texts, usual = _texts(corpus, split), bytes_of_token(model.vocabulary or 0)
    if not any(texts):
        return usual
    if model.tokenizer is not None:
        return _measured(model.tokenizer, texts)
    train, entries = _texts(corpus, "train"), model.vocabulary or 0
    whole = sum(len(text.encode()) for text in train) >= WHOLE * corpus.bytes.get("train", math.inf)
    learnt = train if whole else train[::2]
    size = sum(map(len, learnt))
    if entries <= FEW_ENTRIES or size < ENOUGH:
        return usual
    made = entries if whole else max(FEW_ENTRIES, min(entries, size // BYTES_AN_ENTRY))
    counted_on = texts if whole or split != "train" else train[1::2] or train
    return _learnt(learnt, counted_on, made) * usual / bytes_of_token(made)


def _texts(corpus: Left, split: str) -> tuple[str, ...]:
    """Texts of a split, or of the training documents where it has none to see."""
    if texts := corpus.texts.get(split) or corpus.texts.get("train", ()):
        return texts
    rows = corpus.rows or stored(corpus.folder, split=split) or stored(corpus.folder)
    return shown([row.get("text", "") for row in rows], ROOM[split]) if rows else ()


@lru_cache(maxsize=8)
def _measured(tokenizer: Path | None, texts: tuple[str, ...]) -> float:
    return sum(len(text.encode()) for text in texts) / max(1.0, sum(counter(tokenizer, 0, ())(texts)))


@lru_cache(maxsize=8)
def _learnt(learnt: tuple[str, ...], texts: tuple[str, ...], entries: int) -> float:
    """Bytes of a token of texts, by a vocabulary that is learnt of others, or of the same."""
    return sum(len(text.encode()) for text in texts) / max(1.0, sum(_vocabulary(learnt, entries)(texts)))


@lru_cache(maxsize=2)
def _vocabulary(learnt: tuple[str, ...], entries: int) -> Callable[[Sequence[str]], list[float]]:
    return counter(None, entries, tuple({"text": text} for text in learnt))


def training_seconds(flops: float, width: int) -> float:
    """Of so many FLOPs at a width, on this machine."""
    return flops / (likely_rate() * efficiency(width))


def forward(shape: Shape, tokens: float, length: int, targets: float = 1.0) -> tuple[float, float]:
    """FLOPs and seconds of reading tokens once, without gradients."""
    flops = tokens * shape.forward(length, targets)
    return flops, training_seconds(flops, shape.width)


def tokenizer_bytes(entries: float) -> float:
    """Of a `tokenizer.json`: an entry for each byte, and of the others also how they are merged."""
    return 3.4e3 + 70.0 * max(0.0, entries - 256)


def reading(
    given: Given, split: str, most: float, evaluations: Sequence[Evaluation], compressors: bool,
    longest: float | None = None,
) -> Estimate:  # fmt: skip
    """Of evaluating a model on at most so many documents of a split, of each at most so many characters."""
    corpus, model = given.get("corpus", Left()), given.get("checkpoint", Left())
    shape = shape_from(model.config)
    size = corpus.bytes.get(split)
    if shape is None or size is None or not model.vocabulary or not all(each.estimated for each in evaluations):
        return Estimate()
    shape, size_of_token = shape.with_blocks(model.blocks), letters(corpus, model, split)
    documents = corpus.documents.get(split) or size / DOCUMENT
    seen = [min(each, longest or math.inf) for each in corpus.sizes.get(split, ())]
    share, sizes = min(1.0, most / documents), seen or _sizes(size / documents, longest)
    flops = seconds = 0.0
    for each in evaluations:
        length = getattr(each, "length", 0) or model.length or 512
        stride = (getattr(each, "stride", 0) or max(1, length // 2)) if each.windowed else length
        most_tokens = length if each.cut else math.inf
        passed = [windowed(min(each_size / size_of_token, most_tokens), length, stride) for each_size in sizes]
        tokens, squares = sum(row[0] for row in passed), sum(row[1] for row in passed)
        predicted = each.predicted * sum(min(each_size / size_of_token, most_tokens) for each_size in sizes) / tokens
        scale = each.passes * share * documents / len(sizes)
        work, took = forward(shape, tokens * scale, round(squares / tokens), predicted)
        flops, seconds = flops + work, seconds + took
    read = share * documents * sum(sizes) / len(sizes)
    squeezed = 2e-6 * read if compressors else 0.0
    return Estimate(
        flops, FLOOR + MEASURING + 4.0 * shape.weights + 10 * read, seconds + squeezed + 1,
        RECORDS + ROW * share * documents, share,
    )  # fmt: skip


def _sizes(mean: float, longest: float | None) -> list[float]:
    """Sizes of documents of a mean, which fall off exponentially as those of files do, cut off at the longest."""
    drawn = [-math.log(1 - (number + 0.5) / DRAWN) for number in range(DRAWN)]
    return [min(mean * size * DRAWN / sum(drawn), longest or math.inf) for size in drawn]


def windowed(tokens: float, length: float, stride: float) -> tuple[float, float]:
    """Positions that are read of a document in windows that advance by `stride`, and the sum of their windows' lengths.

    Each token is predicted once: the first window has `length` of them, and each of the others `stride` more at most.
    """
    if tokens <= length:
        return tokens, tokens**2
    more = math.ceil((tokens - length) / stride)
    last = tokens - length - (more - 1) * stride + length - stride
    return more * length + last, more * length**2 + last**2


def answering(given: Given, objective: Labelled, split: str, most: float, limit: int, resamples: int = 0) -> Estimate:
    """Of evaluating a model on at most so many labelled documents of a split, each of at most `limit` tokens."""
    corpus, model = given.get("corpus", Left()), given.get("checkpoint", Left())
    shape, rows = shape_from(model.config), corpus.rows or stored(corpus.folder)
    if shape is None or not model.vocabulary or not rows:
        return Estimate()
    whole = corpus.documents.get(split, most)
    documents = min(most, whole)
    count = counter(model.tokenizer, model.vocabulary, rows)
    example = lengths(objective, rows, count, limit, BATCH, ordered=max(1.0, documents))
    if example is None:
        return Estimate()
    shape = shape.with_blocks(model.blocks)
    read = example.filled - example.learnt  # what is to be answered is not there yet
    inputs = max(1.0, example.inputs)  # a choice each
    flops, seconds = forward(shape, documents * inputs * read, round(read), 1 / read if example.learnt else 0.0)
    words = float(getattr(objective, "answer", 0)) if example.learnt else 0.0
    if words:  # a batch goes on until its last answer ends, which is seldom before the most that it may have
        flops += documents * words * shape.forward(round(read + words / 2))
        seconds += math.ceil(documents / BATCH) * words * shape.depth * WORD
    seconds += judging(objective, corpus, documents, resamples) + 1
    return Estimate(flops, FLOOR + MEASURING + 4.0 * shape.weights, seconds, RECORDS, documents / max(1.0, whole))


def judging(objective: object, corpus: Left, documents: float, resamples: int) -> float:
    """Seconds of the metrics of so many labels or numbers, and of the counts that learn from the training documents."""
    names, columns = getattr(objective, "metric_names", ()), getattr(objective, "columns", ())
    if not {"macro_f1", "mse"} & {*names}:  # answers and tags have no counts beside them
        return 0.0
    size = corpus.bytes.get("train", 0.0)
    learnt = min(COUNTED, corpus.documents.get("train", size / DOCUMENT))
    each, number = size / max(1.0, corpus.documents.get("train", size / DOCUMENT)), max(1.0, learnt + documents)
    words, characters = (number * min(each, max(least, most / number)) for least, most in (WORDS_READ, CHARACTERS_READ))
    pair = len(columns) > 2  # whose characters are not counted
    drawn = resamples * (DRAWING + DRAWN_AGAIN * documents)
    return LOADED + drawn + OF_WORDS * words + (0.0 if pair else OF_CHARACTERS * characters)

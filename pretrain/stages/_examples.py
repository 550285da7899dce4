"""How long documents are, known before anything runs: from a few of them, read from their sources or corpus.

What a corpus that is not made yet will hold is told by a look at its files: they are read for a moment, and split and
compared as they will be, so that copies are not counted twice and each split has the documents that their hashes put
there. Of more text than there is time for the beginning is read, a least amount of it in any case, and the rest is
taken to be like it.

Examples are not packed into rows as text is: each batch is filled up to its longest, and what is filled is computed
like the rest. So a step costs what the longest of its examples do, several times what its tokens would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

from pretrain.core.errors import PretrainError
from pretrain.core.folders import corpus_of
from pretrain.core.quick.vocabulary import SPLIT
from pretrain.corpus.look.glance import Glance
from pretrain.corpus.parts import GROUP_BYTES
from pretrain.corpus.payload import identity, only_text
from pretrain.corpus.sources import Document, Files, Functions, PythonStdlib, Questions, Skipped, Source, evenly, read
from pretrain.corpus.store import key_of, side
from pretrain.dial.packed import packed

FEW, PATIENCE, MANY = 1000, 0.3, 20_000  # documents that are measured; seconds and documents that are read for them
READ, COMPARED = 0.5, 0.5  # seconds that documents are read, and compared
LISTED = 16  # texts of a list that are counted
SHOWN, LONG = 1000, 1000  # of long texts so many are kept at least, and characters of each
ROOM = {"train": 1_000_000, "validation": 100_000, "test": 100_000}  # characters that are kept of the texts of a split
SIZES = 200  # of documents that are kept, of a split
STEP = 16  # tokens that inputs are filled up to a multiple of
ENDS = 2  # tokens at the ends of an input

Texts = tuple[Mapping[str, str], ...]  # the text columns of a few documents


@dataclass(frozen=True)
class Sampled:
    """A few documents of a source, and how many it has, as far as that was read or can be told from them."""

    rows: Texts = ()
    documents: float = 0.0


class Labelled(Protocol):
    """What of an objective on examples this file reads.

    `inputs`: the columns that go into an input; those of each group are filled up by themselves. `fill` says what a
    batch makes of them: `longest`, inputs as long as the longest; `rows`, full rows, which several share; `apart`, each
    group is an input of its own, and all are as long as the longest.
    """

    fill: Literal["longest", "rows", "apart"]

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """The columns."""


@dataclass(frozen=True)
class Lengths:
    """Of an input, in tokens: those it has, those that are computed, those that are learnt; and inputs an example."""

    real: float
    filled: float
    learnt: float
    inputs: float = 1.0  # below 1 where examples share them


def sampled(source: Source, size: float, rows_alone: bool) -> Sampled:
    """Documents of a source of examples: tables (`rows_alone`), or documented functions; of texts none.

    `size` are the bytes of all its texts.
    """
    if isinstance(source, Questions):  # of which each choice is as long as descriptions are
        asked = sampled(source.functions, size, rows_alone)
        names = [f"choices.{number}" for number in range(source.choices)]
        return Sampled(tuple({**row, **dict.fromkeys(names, row["target"])} for row in asked.rows), asked.documents)
    if not isinstance(source, Functions) and not (isinstance(source, Files) and rows_alone):
        return Sampled()
    rows: list[Mapping[str, str]] = []
    whole, glance = False, Glance(PATIENCE)
    with suppress(PretrainError, OSError, ValueError):  # told when the stage runs
        for document in read(source):
            rows.append(texts_in(document))
            if glance.enough(len(rows[-1].get("text", "").encode())) or len(rows) >= MANY:
                break
        else:
            whole = True
    few = tuple(evenly(rows, FEW)) if rows else ()
    if whole or not (glance.least or len(rows) >= MANY):
        return Sampled(few, float(len(rows)) if whole else 0.0)
    return Sampled(few, max(len(rows), size * len(rows) / max(1.0, glance.bytes)))


def middle(text: str, most: int) -> str:
    """So many characters at most of the middle of a text: it begins with what is alike in many."""
    start = max(0, len(text) - most) // 2
    return text[start : start + most]


def stored(folder: Path | None, most: int = FEW, split: str = "train") -> Texts:
    """Documents of a split of a corpus that is there, so many at most."""
    with suppress(OSError):
        paths = sorted((corpus_of(folder) / split).glob("*.parquet")) if folder is not None else []
        return _first(paths[0], paths[0].stat().st_mtime_ns, most) if paths else ()
    return ()


@lru_cache(maxsize=8)
def _first(path: Path, _: int, most: int) -> Texts:
    """The first rows of a file, as it is at a time."""
    with suppress(OSError, ValueError, ImportError):
        from pyarrow import parquet

        batch = next(parquet.ParquetFile(path).iter_batches(batch_size=most), None)
        documents = batch.to_pylist() if batch is not None else []
        return tuple(map(texts_in, documents))
    return ()


def texts_in(document: Mapping[str, object]) -> Mapping[str, str]:
    """A document's texts by their columns; those of a list by its column and their places, `choices.0`."""
    texts = {name: value for name, value in document.items() if isinstance(value, str)}
    for name, value in document.items():
        if isinstance(value, list | tuple) and len(value) <= LISTED and all(isinstance(each, str) for each in value):
            texts |= {f"{name}.{number}": each for number, each in enumerate(value)}
    return texts


def _inputs(objective: Labelled, rows: Texts) -> tuple[tuple[str, ...], ...]:
    """The groups of columns of its inputs; one for each text of a list that all documents have."""
    groups: list[tuple[str, ...]] = []
    for group in objective.inputs:
        *before, last = group
        texts = [f"{last}.{number}" for number in range(LISTED)]
        common = [name for name in texts if rows and all(name in row for row in rows)]
        groups += [(*before, name) for name in common] if objective.fill == "apart" and common else [group]
    return tuple(groups)


def counter(tokenizer: Path | None, vocabulary: int, rows: Texts) -> Callable[[Sequence[str]], list[float]]:
    """What counts the tokens of texts: a tokenizer that is there, else one of the same size made of the documents."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from pretrain.core.encoding import lengths
    from pretrain.core.encoding.stored import check_stored

    backend = None
    if tokenizer is not None and tokenizer.exists():
        check_stored(tokenizer.parent)
        with suppress(Exception):  # of a tokenizer that this version cannot read
            backend = Tokenizer.from_file(str(tokenizer))
    if backend is None:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
        names = ("id", "domain")
        backend.train_from_iterator((text for row in rows for name, text in row.items() if name not in names), trainer)
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: [float(length) for length in lengths(backend, texts)]


def lengths(
    objective: Labelled,
    rows: Texts,
    count: Callable[[Sequence[str]], list[float]],
    length: int,
    batch: int,
    ordered: float | None = None,
) -> Lengths | None:
    """Of a batch's examples, if the documents have the columns.

    Batches are drawn, or of so many (`ordered`) documents in the order of their lengths.
    """
    groups = _inputs(objective, rows)
    if any(name not in row for group in groups for name in group for row in rows):
        return None
    step = STEP if len(groups) == 1 and objective.fill == "longest" else max(1, min(64, length // 8))
    columns = {name: count([row[name] for row in rows]) for group in groups for name in group}
    if objective.fill == "apart" or (objective.fill == "rows" and ordered is None):
        return _otherwise(objective, groups, columns, length, batch, step)
    real = filled = learnt = 0.0
    most = float(length)
    for number, group in reversed([*enumerate(groups)]):  # targets first: their prompts have the room that is left
        cap = most if number == 0 else length / 2
        sizes = [min(cap, sum(columns[name][n] for name in group) + ENDS) for n in range(len(rows))]
        real += sum(sizes) / len(sizes)
        wide = sorted(min(length, -(-size // step) * step) for size in sizes)
        filled += _longest(wide, batch) if ordered is None else _in_order(wide, batch * len(wide) / ordered)
        if number:
            learnt, most = sum(sizes) / len(sizes), length - max(sizes)
    return Lengths(real, filled, learnt)


def _otherwise(
    objective: Labelled, groups: Sequence[Sequence[str]], columns: Mapping[str, Sequence[float]], length: int,
    batch: int, step: int,
) -> Lengths:  # fmt: skip
    """Of examples that share rows, or are several inputs of one width; what is learnt is what stands last."""
    most = float(length)
    if objective.fill == "apart":
        sizes = [[min(most, sum(columns[name][n] for name in group) + ENDS) for group in groups]
                 for n in range(len(columns[groups[0][0]]))]  # fmt: skip
        wide = sorted(min(most, -(-max(each) // step) * step) for each in sizes)
        learns = getattr(objective, "predicted", 1.0) > 0  # tokens, and not a label
        answers = [min(most, size + 1) * learns for group in groups for size in columns[group[-1]]]
        real = sum(map(sum, sizes)) / len(sizes) / len(groups)
        return Lengths(real, _longest(wide, batch), sum(answers) / len(answers), float(len(groups)))
    names = [name for group in groups for name in group]
    whole = [min(most, sum(each) + ENDS * len(groups)) for each in zip(*(columns[name] for name in names), strict=True)]
    mean = sum(whole) / len(whole)
    learnt = sum(columns[names[-1]]) / len(whole) + 1 if len(groups) > 1 else 0.0
    rows = max(1.0, math.ceil(batch * mean / length))
    width = most if rows > 1 else min(most, -(-batch * mean // step) * step)
    return Lengths(batch * mean / rows, width, batch * learnt / rows, rows / batch)


def _longest(ordered: Sequence[float], batch: int) -> float:
    """The expected longest of so many that are drawn."""
    count = len(ordered)
    return sum(size * (((k + 1) / count) ** batch - (k / count) ** batch) for k, size in enumerate(ordered))


def _in_order(ordered: Sequence[float], batch: float) -> float:
    """The mean, over all, of the longest of the batch that each is in."""
    last = len(ordered) - 1
    return sum(ordered[min(last, int((k // batch + 1) * batch) - 1 if batch >= 1 else k)] for k in range(last + 1)) / (
        last + 1
    )


@dataclass(frozen=True)
class Looked:
    """By split what is left of the documents that were read, in bytes and in number; and some of their texts."""

    whole: bool  # whether all were read
    given: float  # bytes that were read, copies included
    bytes: dict[str, float] = field(default_factory=dict)
    documents: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, tuple[float, ...]] = field(default_factory=dict)  # bytes of some documents
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)  # all of them, or parts of some
    packed: float = 0.0  # bytes that what is left of them takes on the disk
    squares: float = 0.0  # of the bytes of each document, summed
    removed: float = 0.0  # documents that were read and are not left
    enough: bool = True  # whether they can tell of the rest, where they are not all

    @property
    def kept(self) -> float:
        """The share of the bytes that is left."""
        return sum(self.bytes.values()) / self.given if self.given else 1.0

    def spread(self, share: float, total: float) -> float:
        """By how much the text of a split of such a share is off, as a share of all `total` bytes (deviation).

        Each document is in it or is not: sqrt(share (1 - share) Σ size²) / total, of documents like those that were
        read.
        """
        squares = self.squares * total / max(1.0, self.given)
        return math.sqrt(share * (1 - share) * squares) / max(1.0, total)


def looked(
    sources: Sequence[Source], longest: int, shares: tuple[float, float], near: float | None, alike: float | None,
    salt: int = 0, total: float = math.inf,
) -> Looked | None:  # fmt: skip
    """What is left of the sources' text by split; None where they are no plain texts, or cannot be read.

    There are `total` bytes of it, as far as files tell. `shares` are held out for validation and test, drawn by `salt`.
    Training documents that are `near` held-out ones are removed, and of those that are `alike` among themselves all but
    the first: None removes none, 0 exact copies alone.
    """
    if not sources or not all(_plain(source) for source in sources):
        return None
    rows: dict[bytes, Document] = {}
    whole, glance = False, Glance(READ, total)
    with suppress(PretrainError, OSError, ValueError):  # told when the stage runs
        for document in _documents(sources, longest):
            rows.setdefault(identity(document), document)
            if glance.enough(len(document["text"].encode())):
                break
        else:
            whole = True
    if not rows:
        return None
    splits: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
    for document in rows.values():
        splits[side(key_of(document), *shares, salt)].append(document)
    held = [document["text"] for split in ("validation", "test") for document in splits[split] if only_text(document)]
    train = splits["train"]
    left = _left([document["text"] for document in train], held, near, alike)
    sizes = {name: [float(len(document["text"].encode())) for document in some] for name, some in splits.items()}
    bytes_ = {name: sum(some) * (left if name == "train" else 1.0) for name, some in sizes.items()}
    documents = {name: len(some) * (left if name == "train" else 1.0) for name, some in sizes.items()}
    squares = sum(size**2 for some in sizes.values() for size in some)
    texts = {name: shown([document["text"] for document in some], ROOM[name]) for name, some in splits.items()}
    disk = {name: packed(some, GROUP_BYTES) * (left if name == "train" else 1.0) for name, some in splits.items()}
    if not whole and bytes_["train"]:  # a few held-out documents have a file's ends, and so have many: not to multiply
        disk = {"all": disk["train"] * sum(bytes_.values()) / bytes_["train"]}
    return Looked(
        whole, glance.bytes, bytes_, documents, {name: tuple(evenly(some, SIZES)) for name, some in sizes.items()},
        texts, sum(disk.values()), squares, glance.documents - sum(documents.values()), whole or glance.least,
    )  # fmt: skip


def shown(texts: Sequence[str], room: int) -> tuple[str, ...]:
    """The texts, or where they have more characters the middles of some."""
    if sum(map(len, texts)) <= room:
        return tuple(texts)
    mean = sum(map(len, texts)) / len(texts)
    few = evenly(texts, max(SHOWN, int(room / mean)))
    return tuple(middle(text, max(LONG, room // len(few))) for text in few)


def _plain(source: Source) -> bool:
    """Whether its documents are texts that are read at once."""
    return isinstance(source, PythonStdlib) or (isinstance(source, Files) and source.package is None)


def _documents(sources: Sequence[Source], longest: int) -> Iterator[Document]:
    skipped = Skipped(longest)
    for source in sources:
        for document in read(source, skipped):
            if isinstance(document.get("text"), str):
                yield document


def _left(texts: Sequence[str], held: Sequence[str], near: float | None, alike: float | None) -> float:
    """The share of the training texts' bytes that is left once those are removed that are near others.

    Of those that there is no time for it is taken to be the same.
    """
    if not texts or not (near or alike):
        return 1.0
    from pretrain.corpus.copies.minhash import Index, signature

    glance, seen, gone = Glance(COMPARED / 2), 0.0, 0.0
    against, among = Index(near) if near else None, Index(alike) if alike else None
    for text in held:
        if against is None:
            break
        against.add(signature(text))
        if glance.enough(len(text.encode())):
            break
    glance = Glance(COMPARED - glance.spent)
    for text in texts:
        size, minhash = len(text.encode()), signature(text)
        double = (against is not None and against.has_near(minhash)) or (among is not None and among.has_near(minhash))
        seen, gone = seen + size, gone + size * double
        if among is not None and not double:
            among.add(minhash)
        if glance.enough(size):
            break
    return 1 - gone / seen if seen else 1.0

"""How long documents are, known before anything runs: from a few of them, read from their sources or corpus.

Examples are not packed into rows as text is: each batch is filled up to its longest, and what is filled is computed
like the rest. So a step costs what the longest of its examples do, several times what its tokens would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

from pretrain.core.errors import PretrainError
from pretrain.core.folders import corpus_of
from pretrain.core.quick.vocabulary import SPLIT
from pretrain.corpus.look.glance import Glance
from pretrain.corpus.sources import Files, Functions, Questions, Source, evenly, read

FEW, PATIENCE, MANY = 1000, 0.3, 20_000  # documents that are measured; seconds and documents that are read for them
LISTED = 16  # texts of a list that are counted
SHOWN, LONG = 1000, 1000  # of long texts so many are kept at least, and characters of each
ROOM = {"train": 1_000_000, "validation": 100_000, "test": 100_000}  # characters that are kept of the texts of a split
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


def shown(texts: Sequence[str], room: int) -> tuple[str, ...]:
    """The texts, or where they have more characters the middles of some."""
    if sum(map(len, texts)) <= room:
        return tuple(texts)
    mean = sum(map(len, texts)) / len(texts)
    few = evenly(texts, max(SHOWN, int(room / mean)))
    return tuple(middle(text, max(LONG, room // len(few))) for text in few)

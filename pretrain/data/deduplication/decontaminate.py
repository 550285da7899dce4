"""Remove documents that share a passage with held-out ones."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError
from pretrain.core.folders import corpus_of
from pretrain.core.method import Ref
from pretrain.corpus.copies.minhash import UNSPACED
from pretrain.corpus.store import iterate
from pretrain.data import DataOperation
from pretrain.data._work import by_domain, desk

if TYPE_CHECKING:
    from datasets import Dataset

HELD_OUT = ("validation", "test")
WHOLE = ""  # marks the run of all words of a document
_WORD = re.compile(f"[{UNSPACED}]|[^\\W{UNSPACED}]+")  # a character where a script has no spaces between words


@dataclass(frozen=True)
class Decontaminate(DataOperation):
    """Language Models are Few-Shot Learners (arXiv:2005.14165).

    A document is dropped if a run of `length` words (13, in lower case, without punctuation) stands in a document of
    the validation or test split of one of `corpora`. Runs that are in more than `common` documents are boilerplate and
    count for nothing. Copies of held-out documents are dropped, however short. 13 and 10 are as the paper's filter is
    quoted; its appendix was not read for this, and it cuts the passage out, where here a document goes whole.
    """

    computes: ClassVar[bool] = False
    speed: ClassVar[float] = 6.5e6

    corpora: tuple[Ref, ...]
    length: Count = 13
    common: Count = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.corpora:
            raise PretrainError("decontaminate: corpora: accepted: at least one data stage, or the folder of a corpus")

    def __call__(self, corpus: Dataset) -> Dataset:
        """The documents that share no passage with a held-out one; the order is kept."""
        if "text" not in corpus.column_names:
            raise PretrainError(
                f"decontaminate: a corpus with {', '.join(corpus.column_names)}; accepted: one with text"
            )
        sought = {run for name in self.corpora for text in _held_out(name) for run in self._runs(text)}
        places: dict[tuple[str, ...], list[int]] = defaultdict(list)  # of the runs that are found
        for number, text in enumerate(corpus["text"]):
            for run in sought.intersection(self._runs(text)):
                places[run].append(number)
        shared_N = np.zeros(len(corpus))
        copy_N = np.zeros(len(corpus), bool)
        for run, numbers in places.items():
            if run[0] == WHOLE or len(numbers) <= self.common:
                shared_N[numbers] += 1
                copy_N[numbers] |= run[0] == WHOLE
        kept, dropped = np.flatnonzero(shared_N == 0), np.flatnonzero(shared_N)
        reasons = ["held-out document" if copy else "held-out passage" for copy in copy_N[dropped]]
        with desk() as here:
            here.reports.append({"method": self.name, "documents": by_domain(corpus, kept)})
            here.drop(self.name, corpus, dropped, reasons, shared_N[dropped])
        return corpus.select(kept.tolist())

    def _runs(self, text: str) -> Iterator[tuple[str, ...]]:
        """All runs of `length` words, and all the words together; of a text without words nothing."""
        words = _WORD.findall(text.lower())
        if words:
            yield (WHOLE, *words)
        for start in range(len(words) - self.length + 1):
            yield tuple(words[start : start + self.length])


def _held_out(name: str) -> Iterator[str]:
    folder = corpus_of(Path(name))
    if not (folder / "corpus.json").exists():
        raise PretrainError(f"decontaminate: corpora: {name} is not a corpus (no corpus.json); accepted: a data stage")
    for split in HELD_OUT:
        for document in iterate(folder / split, ("text",)):
            yield document.get("text") or ""

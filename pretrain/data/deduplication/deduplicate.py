"""Remove exact and near-duplicate documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pretrain.core.bounds import Share
from pretrain.corpus.payload import belongs, beside, identity, in_payload
from pretrain.data import DataOperation
from pretrain.data._mapped import SHARD
from pretrain.data._work import desk
from pretrain.data._workers import Shard
from pretrain.data.deduplication._near import Signatures, signed

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Deduplicate(DataOperation):
    """Deduplicating Training Data Makes Language Models Better (arXiv:2107.06499).

    The paper's NearDup: documents are sets of word 5-grams, or of characters where a script has no spaces between
    words; of documents whose Jaccard similarity (estimated by MinHash with 128 permutations) is at least `threshold`,
    the first is kept. Exact copies go first. A `threshold` of 0 removes exact copies only. Examples are copies only if
    what belongs to their texts is equal too: `label`, `target`, `answer`, `text_b` and the like, not what is about them
    (`domain`, `url`, …). Of documents without text exact copies are removed.
    """

    computes: ClassVar[bool] = False
    speed: ClassVar[float] = 18e6
    shared: ClassVar[bool] = True
    version: ClassVar[int] = 2  # copies in scripts without spaces, order in short texts, bands by the threshold

    threshold: Share = 0.8

    def __call__(self, corpus: Dataset) -> Dataset:
        """The corpus without later copies; the order is kept."""
        threshold = (self.threshold or None) if "text" in corpus.column_names else None
        kept_N = np.ones(len(corpus), bool)
        with desk() as here, Signatures(threshold) as signatures:
            work = partial(signed, threshold=threshold)
            for _, made in here.workers.each(self.name, work, _compared(corpus), len(corpus)):
                signatures.add(*made)
            later = signatures.copies()
            while some := list(islice(later, SHARD)):
                rows, reasons, measured, first = zip(*some, strict=True)
                kept_N[rows_D := np.array(rows, np.int64)] = False
                here.drop(self.name, corpus, rows_D, reasons, np.array(measured), np.array(first, np.int64))
        return corpus.select(np.flatnonzero(kept_N))


def _compared(corpus: Dataset) -> Iterator[Shard]:
    """Of each document its text and what belongs to it, or, where there are no texts, what copies share."""
    if "text" in corpus.column_names:
        compared = corpus.select_columns(["text", *filter(belongs, corpus.column_names)])
        rows = iter(compared)
        while some := list(islice(rows, SHARD)):
            yield Shard([(row["text"] or "", beside(row)) for row in some])
        return
    stored = corpus.select_columns(in_payload(corpus.column_names)).with_format("arrow")  # files undecoded
    for table in stored.iter(256):
        yield Shard([(identity(row).hex(), "") for row in table.to_pylist()])

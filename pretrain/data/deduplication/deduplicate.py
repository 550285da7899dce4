"""Remove exact and near-duplicate documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pretrain.core.bounds import Share
from pretrain.corpus.minhash import copies
from pretrain.corpus.payload import belongs, beside, identity, in_payload
from pretrain.data import DataOperation
from pretrain.data._work import desk

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
    version: ClassVar[int] = 2  # copies in scripts without spaces, order in short texts, bands by the threshold

    threshold: Share = 0.8

    def __call__(self, corpus: Dataset) -> Dataset:
        """The corpus without later copies; the order is kept."""
        if "text" in corpus.column_names:
            compared = corpus.select_columns(["text", *filter(belongs, corpus.column_names)])
            alike = copies(((row["text"], beside(row)) for row in compared), self.threshold or None)
        else:
            stored = corpus.select_columns(in_payload(corpus.column_names)).with_format("arrow")  # files undecoded
            keys = ((identity(row).hex(), "") for table in stored.iter(256) for row in table.to_pylist())
            alike = copies(keys, None)
        kept, dropped = [], []
        for number, copy in enumerate(alike):
            dropped.append((number, *copy)) if copy else kept.append(number)
        with desk() as here:
            numbers, reasons, measured = zip(*dropped, strict=True) if dropped else ((), (), ())
            here.drop(self.name, corpus, np.array(numbers, np.int64), reasons, np.array(measured))
        return corpus.select(kept)

"""Label noise: some documents are given the label of another class."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pretrain.core.bounds import Share, Whole
from pretrain.core.errors import PretrainError
from pretrain.corpus.payload import content
from pretrain.data import DataOperation
from pretrain.data._work import desk

if TYPE_CHECKING:
    from datasets import Dataset

    Document = dict[str, object]


@dataclass(frozen=True)
class LabelNoise(DataOperation):
    """Understanding and Mitigating the Label Noise in Pre-training on Downstream Tasks (arXiv:2309.17002).

    The paper's noise in supervised pretraining: with probability `rate` a document's `label` becomes one of the other
    labels of the corpus, each as likely. The draw is by the document's content and `seed`, so that copies agree and a
    larger rate flips what a smaller one does, and more. Documents without a label stay so. To see what noise does, and
    what undoes it; held-out documents keep their labels.
    """

    speed: ClassVar[float] = 25e6

    label: str = "label"
    rate: Share = 0.1
    seed: Whole = 0

    def __call__(self, corpus: Dataset) -> Dataset:
        """The corpus with some labels changed."""
        if self.label not in corpus.column_names:
            known = ", ".join(corpus.column_names) or "a corpus with it"
            raise PretrainError(f"label_noise: label {self.label!r} is no column of the corpus; accepted: {known}")
        labels = sorted({value for value in corpus[self.label][:] if value is not None}, key=str)
        if len(corpus) and len(labels) < 2:
            raise PretrainError(f"label_noise: label {self.label!r} has {len(labels)} values; accepted: two or more")

        def flip(document: Document) -> Document:
            value = document[self.label]
            digest = blake2b(content(document), digest_size=8, person=b"label noise").digest()
            rng = np.random.default_rng((self.seed, int.from_bytes(digest)))
            if value is None or rng.random() >= self.rate:
                return {self.label: value}
            others = [other for other in labels if other != value]
            return {self.label: others[int(rng.integers(len(others)))]}

        noisy = corpus.map(flip, features=corpus.features, load_from_cache_file=False)
        changed = sum(a != b for a, b in zip(corpus[self.label][:], noisy[self.label][:], strict=True))
        with desk() as here:
            here.reports.append({"method": self.name, "labels": len(labels), "changed": changed})
        return noisy

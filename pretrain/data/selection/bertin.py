"""Sample documents by their perplexity under an n-gram model: the middling ones more often than both ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from pretrain.core.bounds import Count, Positive, PositiveShare, Whole
from pretrain.core.folders import corpus_of
from pretrain.core.method import Ref
from pretrain.corpus.store import Corpus
from pretrain.data import DataOperation
from pretrain.data._work import desk
from pretrain.data.selection._ngram import NGram
from pretrain.data.selection._scores import report
from pretrain.data.selection._select import weighted

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray


BLOCK = 1024  # documents


@dataclass(frozen=True)
class Bertin(DataOperation):
    """BERTIN: Efficient Pre-Training of a Spanish Language Model using Perplexity Sampling (arXiv:2207.06814).

    A document of perplexity x is kept with a probability proportional to its weight, where Q1, Q2, Q3 are the corpus's
    quartiles: `gaussian` exp(-((x - Q2) / Q2)² / `width`); `stepwise` one over the width of its quartile, Q1, Q2 - Q1,
    Q3 - Q2 or 10 Q3; `random` 1. The paper sets the factor of proportion so that about 50 of 416 million documents are
    left; here it is found, so that exactly the `share` is. The perplexity is that of a Kneser-Ney `order`-gram model
    of the first `words` words of the corpus `reference` (the paper's: Wikipedia), or, without one, of the corpus's
    other half: no document is judged by a model that has seen it.
    """

    share: PositiveShare = 50 / 416
    sampling: Literal["gaussian", "stepwise", "random"] = "gaussian"
    width: Positive = 4.5
    order: Count = 5
    words: Count = 2_000_000
    reference: Ref = ""
    seed: Whole = 0

    def __call__(self, corpus: Dataset) -> Dataset:
        """The documents that were drawn, in their order."""
        random = self.sampling == "random"
        perplexity_N = np.ones(len(corpus)) if random else self.perplexities(corpus)
        count = max(1, round(self.share * len(corpus)))
        kept = weighted(self.weights(perplexity_N), count, self.seed)
        with desk() as here:
            here.reports.append(report(self.name, corpus, kept, perplexity_N))
            return here.keep(self.name, corpus, kept, "not drawn", None if random else perplexity_N)

    def weights(self, perplexity_N: NDArray[np.float64]) -> NDArray[np.float64]:
        """What each document's probability is proportional to."""
        if self.sampling == "random" or not len(perplexity_N):
            return np.ones(len(perplexity_N))
        q1, q2, q3 = np.quantile(perplexity_N, (0.25, 0.5, 0.75))
        if self.sampling == "gaussian":
            return np.exp(-(((perplexity_N - q2) / q2) ** 2) / self.width)
        spans = np.array([q1, q2 - q1, q3 - q2, 10 * q3])
        quartile_N = np.searchsorted([q1, q2, q3], perplexity_N, "left")
        quartile_N[(perplexity_N == q3) & (perplexity_N > q1)] = 3
        return 1 / np.maximum(spans, np.finfo(float).tiny)[quartile_N]

    def perplexities(self, corpus: Dataset) -> NDArray[np.float64]:
        """Each document's perplexity under a model that has not seen it."""
        if self.reference:
            texts = (d["text"] for d in Corpus(corpus_of(Path(self.reference))).documents("train"))
            return _perplexities(NGram(texts, self.order, self.words), corpus)
        half_N = np.random.default_rng([self.seed, 1]).permutation(len(corpus)) % 2
        perplexity_N = np.ones(len(corpus))
        for half in (0, 1):
            mine, other = np.flatnonzero(half_N == half), np.flatnonzero(half_N != half)
            if len(mine):
                model = NGram(_texts(corpus.select(other.tolist())), self.order, self.words)
                perplexity_N[mine] = _perplexities(model, corpus.select(mine.tolist()))
        return perplexity_N


def _texts(corpus: Dataset) -> Iterable[str]:
    for start in range(0, len(corpus), BLOCK):
        yield from corpus[start : start + BLOCK]["text"]


def _perplexities(model: NGram, corpus: Dataset) -> NDArray[np.float64]:
    parts = [model.perplexity(corpus[i : i + BLOCK]["text"]) for i in range(0, len(corpus), BLOCK)]
    return np.concatenate(parts) if parts else np.ones(0)

"""Keep only the best documents of a domain, for a model that goes on with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretrain.core.bounds import Count, PositiveShare
from pretrain.core.errors import PretrainError
from pretrain.core.folders import corpus_of
from pretrain.core.method import Ref
from pretrain.corpus.store import Corpus
from pretrain.data import DataOperation
from pretrain.data._work import desk
from pretrain.data.selection._ngram import NGram
from pretrain.data.selection._scores import report, sizes
from pretrain.data.selection._select import top_share

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

BLOCK = 1024  # documents


@dataclass(frozen=True)
class QualitySubset(DataOperation):
    """Efficient Continual Pre-training by Mitigating the Stability Gap (arXiv:2406.14833).

    The paper's second remedy: continue with the highest-quality part of the new `domain` only. Its documents are
    ranked and the best that hold `share` of its bytes are kept; other domains stay whole. With a `reference`, a corpus
    of text that is known to be good, quality is a low perplexity under a Kneser-Ney `order`-gram model of its first
    `words` words; without one it is the corpus's `column`, the higher the better.
    """

    domain: str
    share: PositiveShare = 0.1
    reference: Ref = ""
    column: str = "quality"
    order: Count = 5
    words: Count = 2_000_000

    def __call__(self, corpus: Dataset) -> Dataset:
        """The corpus with the best of the domain, in its order."""
        domains = np.array(corpus["domain"] if "domain" in corpus.column_names else ["text"] * len(corpus), object)
        mine = np.flatnonzero(domains == self.domain)
        if not len(mine):
            known = ", ".join(sorted(set(domains)))
            raise PretrainError(f"quality_subset: domain {self.domain!r} has no documents; accepted: {known}")
        chosen = corpus.select(mine.tolist())
        score_N = self.scores(chosen)
        best_K = top_share(score_N, sizes(chosen), self.share)
        kept = np.union1d(np.flatnonzero(domains != self.domain), mine[best_K])
        with desk() as here:
            here.reports.append(report(self.name, chosen, best_K, score_N))
            quality_N = np.full(len(corpus), np.nan)
            quality_N[mine] = score_N
            return here.keep(self.name, corpus, kept, "low quality", quality_N)

    def scores(self, documents: Dataset) -> NDArray[np.float64]:
        """Each document's quality."""
        if self.reference:
            texts = (d["text"] for d in Corpus(corpus_of(Path(self.reference))).documents("train"))
            model = NGram(texts, self.order, self.words)
            blocks = [documents[i : i + BLOCK]["text"] for i in range(0, len(documents), BLOCK)]
            return -np.concatenate([model.perplexity(block) for block in blocks])
        if self.column not in documents.column_names:
            known = ", ".join(documents.column_names)
            raise PretrainError(
                f"quality_subset: no column {self.column!r} and no reference; accepted: a corpus of good text as "
                f"reference, or a column of {known}"
            )
        values = documents[self.column]
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
            raise PretrainError(f"quality_subset: column {self.column!r} is not all numbers; accepted: a number each")
        return np.array(values, dtype=np.float64)

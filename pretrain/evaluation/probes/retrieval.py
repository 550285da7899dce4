"""Retrieval of a document's second half by its first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from pretrain.core.batch import Vocabulary
from pretrain.core.bounds import Count, Whole
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.core.models.features import Framing, text_features
from pretrain.evaluation import Evaluation, Measured
from pretrain.evaluation._intervals import bounds, resampled_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document


@dataclass(frozen=True)
class Retrieval(Evaluation):
    """BEIR: A Heterogenous Benchmark for Zero-shot Evaluation of Information Retrieval Models (arXiv:2104.08663).

    The paper's dense retrieval and its measures, on any corpus: a document's tokens are halved, the first half is a
    query, the second its only relevant passage among those of all documents, each its first `length` tokens. Passages
    are ranked by the cosine of pooled states with the query's. With the relevant passage at rank r: `ndcg@10` is the
    mean of 1 / log2(1 + r), `mrr@10` of 1 / r, both 0 beyond rank 10; `recall@k` the share with r <= k. A passage that
    scores the same as the relevant one counts as above it. Documents with fewer than `shortest` tokens a half are
    skipped: `retrieval_documents` and `retrieval_skipped` count both kinds. Intervals: bootstrap over the queries.
    """

    cut: ClassVar[bool] = True

    pooling: Literal["cls", "mean"] = "mean"
    length: Count = 128
    shortest: Count = 8
    resamples: Count = 1000
    seed: Whole = 0

    @property
    def passes(self) -> float:
        """Both halves of a document, each of at most `length` tokens."""
        return 2.0

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The metrics on documents with `text`."""
        framing = Framing(model, Vocabulary.of(tokenizer), self.length)
        halves = [
            (ids[: len(ids) // 2][: framing.length], ids[len(ids) // 2 :][: framing.length])
            for ids in encode(tokenizer, [d["text"] for d in documents])
            if len(ids) >= 2 * self.shortest
        ]
        if len(halves) < 2:
            raise PretrainError(
                f"retrieval: {len(halves)} of {len(documents)} documents have {2 * self.shortest} tokens; "
                "accepted: two or more, or a smaller shortest"
            )
        pieces = [query for query, _ in halves] + [passage for _, passage in halves]
        vectors_NE = text_features(model, pieces, framing, pooling=self.pooling)
        rank_N = ranks(vectors_NE[: len(halves)], vectors_NE[len(halves) :])
        names, values_NK = scores(rank_N)
        means_RK = resampled_sums(values_NK, self.resamples, self.seed) / len(halves)
        counts = {"retrieval_documents": len(halves), "retrieval_skipped": len(documents) - len(halves)}
        return Measured(
            dict(zip(names, values_NK.mean(0).tolist(), strict=True)) | {k: float(v) for k, v in counts.items()},
            intervals={name: bounds(means_RK[:, k]) for k, name in enumerate(names)},
        )


def ranks(query_NE: NDArray[np.floating], passage_NE: NDArray[np.floating]) -> NDArray[np.int64]:
    """The rank, from 1, of passage n for query n by cosine; ties count against it."""
    return ranks_among(query_NE, passage_NE, np.arange(len(query_NE)))


def ranks_among(
    query_QE: NDArray[np.floating], passage_NE: NDArray[np.floating], true_Q: NDArray[np.integer]
) -> NDArray[np.int64]:
    """The rank, from 1, of passage `true_Q[q]` for query q by cosine; ties count against it."""
    query_QE, passage_NE = (
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (query_QE, passage_NE)
    )
    parts = []
    for start in range(0, len(query_QE), 1024):
        cosine_BN = query_QE[start : start + 1024] @ passage_NE.T
        true_B = cosine_BN[np.arange(len(cosine_BN)), true_Q[start : start + 1024]]
        parts.append((cosine_BN >= true_B[:, None] - 1e-6).sum(1))  # the same but for rounding is a tie
    return np.concatenate(parts)


def scores(rank_N: NDArray[np.integer]) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """The metrics' names, and each query's values."""
    near_N = rank_N <= 10
    values = {
        "mrr@10": near_N / rank_N,
        "recall@1": rank_N <= 1,
        "recall@10": near_N,
        "ndcg@10": near_N / np.log2(1 + rank_N),
    }
    return tuple(values), np.stack([np.asarray(v, np.float64) for v in values.values()], axis=1)

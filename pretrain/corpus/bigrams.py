"""What counts of adjacent tokens predict: the line that a language model has to pass.

    p(w | v) = max(c(v, w) - D, 0) / c(v) + D n(v, .) / c(v) * p(w)
    p(w)     = max(n(., w) - D, 0) / n(., .) + D m / n(., .) / V

c counts pairs of adjacent tokens, n distinct pairs, m tokens with a predecessor; after a v never seen p(w | v) = p(w).
Interpolated Kneser-Ney (Chen and Goodman, *An Empirical Study of Smoothing Techniques for Language Modeling*,
arXiv:cmp-lg/9606011) with Ney, Essen and Kneser's one discount, D = n1 / (n1 + 2 n2), of the pairs seen once and twice.

Shape letters: N documents, T tokens of all of them, P distinct pairs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pretrain.core.errors import PretrainError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from pretrain.corpus.shards import Shards

CHUNK_TOKENS = 1 << 23  # counted at once


@dataclass(frozen=True, eq=False)
class Bigrams:
    """How often each token follows each other one, and what that says of text."""

    counts_VV: csr_array  # row: the token before; int64

    @classmethod
    def of(cls, shards: Shards, tokens: int | None = None) -> Bigrams:
        """Of all documents of a split; none is joined to the next.

        With `tokens` of a fixed random choice of them that holds about as many: as much as a short training has seen.
        """
        kept_N = np.ones(len(shards.offsets_N1) - 1, np.bool_)
        if tokens is not None:
            order_N = np.random.default_rng(0).permutation(len(kept_N))
            total_N = np.cumsum(np.diff(shards.offsets_N1)[order_N])
            kept_N[order_N[max(1, int(np.searchsorted(total_N, tokens, "right"))) :]] = False
        counts_VV = _count(np.zeros(0, np.int64), np.zeros(0, np.int64), shards.info["vocabulary"])
        for begin in range(0, shards.tokens - 1, CHUNK_TOKENS):
            tokens_T = np.asarray(shards.flat[begin : begin + CHUNK_TOKENS + 1])
            document_T = np.searchsorted(shards.offsets_N1, np.arange(begin, begin + len(tokens_T)), "right") - 1
            inside_T = (document_T[1:] == document_T[:-1]) & kept_N[document_T[1:]]
            counts_VV = counts_VV + _count(tokens_T[:-1][inside_T], tokens_T[1:][inside_T], counts_VV.shape[0])
        return cls(counts_VV)

    @property
    def discount(self) -> float:
        """D, which is between 0 and 1; a half where no pair was seen just once."""
        once, twice = (int(np.count_nonzero(self.counts_VV.data == n)) for n in (1, 2))
        return once / (once + 2 * twice) if once else 0.5

    def continuation_V(self) -> NDArray[np.float64]:
        """p(w): how likely a token is by the number of different tokens that it was seen after."""
        vocabulary, pairs = self.counts_VV.shape[0], self.counts_VV.nnz
        if not pairs:
            return np.full(vocabulary, 1 / vocabulary)
        before_V = np.bincount(self.counts_VV.indices, minlength=vocabulary)
        seen = np.maximum(before_V - self.discount, 0) / pairs
        return seen + self.discount * np.count_nonzero(before_V) / pairs / vocabulary

    def probability(self, previous_T: NDArray[np.integer], token_T: NDArray[np.integer]) -> NDArray[np.float64]:
        """p(token | previous) of each pair."""
        total_V = self.counts_VV.sum(axis=1)
        kinds_V = np.diff(self.counts_VV.indptr)
        # Where nothing followed, all of the mass is left for the continuation.
        left_V = np.where(total_V > 0, self.discount * kinds_V / np.maximum(total_V, 1), 1.0)
        counts_T = self._counts(previous_T, token_T)
        seen_T = np.maximum(counts_T - self.discount, 0) / np.maximum(total_V, 1)[previous_T]
        return seen_T + left_V[previous_T] * self.continuation_V()[token_T]

    def nll(self, documents: Sequence[NDArray[np.integer]]) -> NDArray[np.float64]:
        """`nll_N`: each document's negative log-likelihood in nats, its first token given, as `document_nll` has it."""
        lengths_N = np.array([len(tokens) for tokens in documents], np.int64)
        tokens_T = np.concatenate([np.zeros(0, np.int64), *documents]).astype(np.int64)
        vocabulary = self.counts_VV.shape[0]
        if len(tokens_T) and not 0 <= tokens_T.min() <= tokens_T.max() < vocabulary:
            wrong = next(int(t) for t in tokens_T if not 0 <= t < vocabulary)
            raise PretrainError(f"token {wrong}: accepted: 0 to {vocabulary - 1}, the vocabulary of the counts")
        document_T = np.repeat(np.arange(len(documents)), lengths_N)
        inside_T = document_T[1:] == document_T[:-1]
        probability_T = self.probability(tokens_T[:-1][inside_T], tokens_T[1:][inside_T])
        nll_N = np.bincount(document_T[1:][inside_T], -np.log(probability_T), minlength=len(documents))
        return np.asarray(nll_N, np.float64)

    def _counts(self, previous_T: NDArray[np.integer], token_T: NDArray[np.integer]) -> NDArray[np.int64]:
        """c(previous, token) of each pair, by a search among the pairs in their order."""
        vocabulary = self.counts_VV.shape[0]
        if not self.counts_VV.nnz:
            return np.zeros(len(token_T), np.int64)
        before_P = np.repeat(np.arange(vocabulary), np.diff(self.counts_VV.indptr))
        pairs_P = before_P * vocabulary + self.counts_VV.indices
        wanted_T, place_T = np.unique(previous_T.astype(np.int64) * vocabulary + token_T, return_inverse=True)
        nearest_T = np.minimum(np.searchsorted(pairs_P, wanted_T), len(pairs_P) - 1)
        return np.where(pairs_P[nearest_T] == wanted_T, self.counts_VV.data[nearest_T], 0)[place_T]


def _count(previous_T: NDArray[np.integer], token_T: NDArray[np.integer], vocabulary: int) -> csr_array:
    """`counts_VV` of pairs."""
    from scipy.sparse import coo_array

    ones_T = np.ones(len(token_T), np.int64)
    counts_VV = coo_array((ones_T, (previous_T, token_T)), shape=(vocabulary, vocabulary)).tocsr()
    counts_VV.sum_duplicates()  # which also puts them in order
    return counts_VV

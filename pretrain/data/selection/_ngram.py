"""An n-gram language model of words: interpolated Kneser-Ney smoothing with three discounts an order, as KenLM's.

    p(w | h) = (a(hw) - D(a(hw))) / a(h·) + γ(h) p(w | h'),     p(w) = (a(w) - D(a(w))) / a(·) + γ / V

a is the count in the highest order, and for n-grams that open a line; else the number of different words seen before
the n-gram (its continuation count). γ(h) gives the shorter history h' what the discounts took.

An n-gram is the number of its first n - 1 words in their table, and its last word: exact, no hashing, all in arrays.
Shape letters: T tokens of a stream of lines, each `<s> words </s>`; G different n-grams of an order; C contexts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UNKNOWN, BEGIN, END = 0, 1, 2
FALLBACK = (0.5, 1.0, 1.5)  # KenLM's discounts where the counts are too few to tell
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Order:
    """The n-grams of one order: sorted keys, discounted probability, and each context's share for the lower order."""

    keys_G: Ints
    discounted_G: NDArray[np.float64]
    gamma_C: NDArray[np.float64]  # by context, a number in the order below; 1 where nothing followed it


class NGram:
    """The model; `text`s are documents of lines, words are what white space parts."""

    def __init__(self, texts: Iterable[str], order: int = 5, words: int | None = None) -> None:
        """Count the texts, no more than the first `words` words of them (by whole documents)."""
        self.vocabulary = {"<unk>": UNKNOWN, "<s>": BEGIN, "</s>": END}
        token_T, at_T = self._stream(texts, grow=True, words=words)
        self.size = len(self.vocabulary)
        self.orders = self._count(token_T, at_T, order)

    def _stream(self, texts: Iterable[str], *, grow: bool = False, words: int | None = None) -> tuple[Ints, Ints]:
        """The texts' tokens, and the place of each in its line."""
        known, tokens, lengths = self.vocabulary, list[int](), list[int]()
        for text in texts:
            for line in text.split("\n"):
                split = line.split()
                if grow:
                    tokens += [BEGIN, *(known.setdefault(word, len(known)) for word in split), END]
                else:
                    tokens += [BEGIN, *(known.get(word, UNKNOWN) for word in split), END]
                lengths.append(len(split) + 2)
            if words is not None and len(tokens) - 2 * len(lengths) >= words:
                break
        lengths_ = np.array(lengths, dtype=np.int64)
        starts = np.repeat(np.cumsum(lengths_) - lengths_, lengths_)
        return np.array(tokens, dtype=np.int64), np.arange(len(tokens)) - starts

    def _count(self, token_T: Ints, at_T: Ints, order: int) -> list[_Order]:
        """Count each order's n-grams; the adjusted counts of one need the next, so that all are found first."""
        keys, ids = [np.arange(self.size)], [token_T]
        suffixes: list[Ints] = []
        for n in range(2, order + 1):
            end_M = np.flatnonzero(at_T >= n - 1)
            key_M = ids[-1][end_M - 1] * self.size + token_T[end_M]
            keys_G, first_G, gram_M = np.unique(key_M, return_index=True, return_inverse=True)
            suffixes.append(ids[-1][end_M][first_G])
            ids.append(np.full(len(token_T), -1))
            ids[-1][end_M] = gram_M
            keys.append(keys_G)
        orders, opens_G = [], np.arange(self.size) == BEGIN
        for n, (keys_G, gram_T) in enumerate(zip(keys, ids, strict=True)):
            context_G = keys_G // self.size
            opens_G = opens_G[context_G] if n else opens_G
            adjusted_G = np.bincount(gram_T[gram_T >= 0], minlength=len(keys_G))
            if n < order - 1:
                adjusted_G = np.where(opens_G, adjusted_G, np.bincount(suffixes[n], minlength=len(keys_G)))
            if n == 0:
                adjusted_G[BEGIN] = 0  # never predicted
            orders.append(_discount(keys_G, adjusted_G, context_G, len(keys[n - 1]) if n else 1))
        return orders

    def log_probability(self, texts: Sequence[str]) -> tuple[NDArray[np.float64], Ints]:
        """For each text the sum of its words' and lines' ends' ln p, and how many they are."""
        token_T, at_T = self._stream(texts)
        p_T = np.full(len(token_T), 1 / (self.size - 1))  # `<s>` is never predicted
        context_T = np.zeros(len(token_T), dtype=np.int64)
        for order in self.orders:
            if not len(order.keys_G):  # no line was so long
                break
            known_T = context_T >= 0
            key_T = np.where(known_T, context_T * self.size + token_T, -1)
            at = np.minimum(np.searchsorted(order.keys_G, key_T), len(order.keys_G) - 1)
            hit_T = known_T & (order.keys_G[at] == key_T)
            p_T = np.where(hit_T, order.discounted_G[at], 0) + np.where(known_T, order.gamma_C[context_T], 1) * p_T
            gram_T = np.where(hit_T, at, -1)
            context_T = np.concatenate([[-1], gram_T[:-1]])  # the next order's history ends one token before
            context_T[at_T == 0] = -1
        predicted_T = at_T > 0
        document_T = np.repeat(np.arange(len(texts)), [len(t.split()) + 2 * (t.count("\n") + 1) for t in texts])
        log_N = np.bincount(document_T[predicted_T], np.log(p_T[predicted_T]), minlength=len(texts))
        count_N = np.bincount(document_T[predicted_T], minlength=len(texts))
        return log_N.astype(np.float64), count_N.astype(np.int64)

    def perplexity(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """The texts' perplexities, over words and the ends of lines."""
        log_N, count_N = self.log_probability(texts)
        return np.exp(-log_N / count_N)


def _discount(keys_G: Ints, adjusted_G: Ints, context_G: Ints, contexts: int) -> _Order:
    """Discounted probabilities and back-off shares from the adjusted counts."""
    n1, n2, n3, n4 = (int((adjusted_G == k).sum()) for k in (1, 2, 3, 4))
    discounts = FALLBACK
    if n1 and n2 and n3:
        y = n1 / (n1 + 2 * n2)
        estimated = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if all(0 <= d <= k for k, d in enumerate(estimated, 1)):
            discounts = estimated
    taken_G = np.array([0.0, *discounts])[np.minimum(adjusted_G, 3)]
    total_C = np.bincount(context_G, adjusted_G, minlength=contexts)
    left_C = np.bincount(context_G, taken_G, minlength=contexts)
    gamma_C = np.divide(left_C, total_C, out=np.ones(contexts), where=total_C > 0)
    discounted_G = (adjusted_G - taken_G) / np.maximum(total_C[context_G], 1)
    return _Order(keys_G, discounted_G, gamma_C)

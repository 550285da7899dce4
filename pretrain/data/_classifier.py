"""A linear classifier of hashed word n-grams, what fastText's supervised mode comes to, by scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import SGDClassifier

if TYPE_CHECKING:
    from datasets import Dataset

BUCKETS = 2**21  # fastText has two million for n-grams
BLOCK = 2048  # documents


class Classifier:
    """Positive against negative texts; words are what white space parts, in their own case."""

    def __init__(self, *, epochs: int, ngrams: int, seed: int) -> None:
        self.features = HashingVectorizer(
            n_features=BUCKETS, ngram_range=(1, ngrams), token_pattern=r"\S+", lowercase=False, norm="l2"
        )
        self.model = SGDClassifier(loss="log_loss", max_iter=epochs, tol=None, random_state=seed)

    def fit(self, positive: Sequence[str], negative: Sequence[str]) -> None:
        """Learn to tell them apart."""
        texts = [*positive, *negative]
        self.model.fit(self.features.transform(texts), np.arange(len(texts)) < len(positive))

    def scores(self, corpus: Dataset) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """For each document the log-odds of positive, and its characters."""
        scores, lengths = [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
        for start in range(0, len(corpus), BLOCK):
            texts = corpus[start : start + BLOCK]["text"]
            scores.append(self.model.decision_function(self.features.transform(texts)))
            lengths.append(np.array([len(text) for text in texts]))
        return np.concatenate(scores), np.concatenate(lengths)

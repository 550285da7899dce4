"""Keep the documents that look like those on which better models have lower losses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretrain.core.bounds import AnyNumber, Count, PositiveShare, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.folders import corpus_of
from pretrain.core.method import Ref
from pretrain.corpus.store import Corpus
from pretrain.data import DataOperation
from pretrain.data._classifier import Classifier
from pretrain.data._work import desk
from pretrain.data.selection._scores import likelihoods, report, sizes
from pretrain.data.selection._select import top_share

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

    from pretrain.data._work import Desk


@dataclass(frozen=True)
class Preselect(DataOperation):
    """Predictive Data Selection: The Data That Predicts Is the Data That Teaches (arXiv:2503.00808).

    Of `models` in ascending order of ability with bits per character C_1 … C_N on a document, its predictive strength
    is S = Σ_{i<j} 1[C_i > C_j] / (N (N - 1) / 2): the share of pairs that its losses rank as the ability does. Among
    `documents` drawn at random those of the highest strength (the paper's: 1) are positive, as many of the lowest are
    negative; a linear classifier of hashed word n-grams learns to tell them apart, and the highest documents of the
    whole corpus that hold `ratio` of its characters are kept, in their order. Any number in `ability` that is higher
    for better models will do; without it, it is measured: fewer bits per byte on the held-out documents of the corpus
    `target` (of its `domains`; none: of all).
    """

    models: tuple[Ref, ...]
    target: Ref = ""
    domains: tuple[str, ...] = ()
    ability: tuple[AnyNumber, ...] = ()
    ratio: PositiveShare = 0.1
    documents: Count = 900_000
    length: Count = 1900
    stride: Count = 512
    epochs: Count = 3
    ngrams: Count = 2
    seed: Whole = 0

    def __post_init__(self) -> None:
        """Refuse what has no ranking."""
        super().__post_init__()
        if len(self.models) < 2:
            raise PretrainError(f"preselect: models {list(self.models)}: accepted: two or more")
        if bool(self.ability) == bool(self.target):
            raise PretrainError("preselect: accepted: either ability, a number for each model, or target, a corpus")
        if self.ability and len(self.ability) != len(self.models):
            raise PretrainError(f"preselect: ability {list(self.ability)}: accepted: {len(self.models)} numbers")

    def __call__(self, corpus: Dataset) -> Dataset:
        """The documents that the classifier puts highest."""
        drawn = np.random.default_rng(self.seed).permutation(len(corpus))[: self.documents]
        with desk() as here:
            ability = self.abilities(here)
            sample = corpus.select(drawn.tolist())  # in this order: of equals the lowest are a random choice
            strength_N = strengths(self._losses(sample, here), ability)
            if len(set(strength_N)) < 2:
                raise PretrainError(
                    f"preselect: all of {len(sample)} documents rank the models alike; accepted: models whose order "
                    "differs from document to document"
                )
            positive, negative = labels(strength_N)
            classifier = Classifier(epochs=self.epochs, ngrams=self.ngrams, seed=self.seed)
            classifier.fit(sample.select(positive.tolist())["text"], sample.select(negative.tolist())["text"])
            score_N, size_N = classifier.scores(corpus)
            kept = top_share(score_N, size_N, self.ratio)
            facts = {"ability": list(ability), "strength_counts": _counts(strength_N), "labelled": len(positive)}
            here.reports.append(report(self.name, corpus, kept, score_N) | facts)
            return here.keep(self.name, corpus, kept, "low score", score_N)

    def abilities(self, desk: Desk) -> tuple[float, ...]:
        """A number for each model; measured ones are negative bits per byte."""
        from datasets import Dataset

        ability = self.ability
        if not ability:
            stored = Corpus(corpus_of(Path(self.target)))
            chosen = [
                d["text"] for d in stored.documents("validation") if d["domain"] in (self.domains or stored.domains)
            ]
            if not chosen:
                raise PretrainError(
                    f"preselect: target {self.target}, domains {list(self.domains)}: no held-out documents; accepted: "
                    f"a corpus with validation documents in {', '.join(stored.domains)}"
                )
            held_out = Dataset.from_dict({"text": chosen})
            bits = math.log(2) * int(sizes(held_out).sum())
            scored = (likelihoods(m, held_out, desk, length=self.length, stride=self.stride) for m in self.models)
            ability = tuple(-float(losses.nll_N.sum()) / bits for losses in scored)
        if len(set(ability)) < len(ability):
            raise PretrainError(f"preselect: ability {list(ability)}: accepted: a different number for each model")
        return ability

    def _losses(self, corpus: Dataset, desk: Desk) -> NDArray[np.float64]:
        """What orders the models as bits per character do: M models' nats for each of N documents."""
        scored = (likelihoods(m, corpus, desk, length=self.length, stride=self.stride) for m in self.models)
        return np.stack([losses.nll_N for losses in scored])


def strengths(loss_MN: NDArray[np.float64], ability: tuple[float, ...]) -> NDArray[np.float64]:
    """Predictive strength of N documents, from 0 to 1."""
    ranked_MN = loss_MN[np.argsort(ability)]
    pairs = list(combinations(range(len(ranked_MN)), 2))
    agree_N = sum((ranked_MN[i] > ranked_MN[j]).astype(np.int64) for i, j in pairs)
    return np.asarray(agree_N / len(pairs))


def labels(strength_N: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The documents of the highest strength, and as many of the lowest that are below it."""
    highest = strength_N.max()
    positive = np.flatnonzero(strength_N == highest)
    order = np.argsort(strength_N, kind="stable")
    negative = order[strength_N[order] < highest][: len(positive)]
    return positive, negative


def _counts(strength_N: NDArray[np.float64]) -> dict[str, int]:
    values, counts = np.unique(strength_N, return_counts=True)
    return {f"{value:.4g}": int(count) for value, count in zip(values, counts, strict=True)}

"""Write how much a document is like reference texts into a column: what quality and toxicity are filtered by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pretrain.core.bounds import Count, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.folders import corpus_of
from pretrain.core.method import Ref
from pretrain.corpus.store import Corpus
from pretrain.data import DataOperation
from pretrain.data._classifier import Classifier
from pretrain.data._mapped import check_text
from pretrain.data._work import desk, percentiles

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class ReferenceClassifier(DataOperation):
    """A Pretrainer's Guide to Training Data: Measuring the Effects of Data Age, Domain Coverage, Quality, & Toxicity (arXiv:2305.13169).

    Of its axes quality and toxicity: a tagger that drops nothing and writes the column `reference_classifier_COLUMN`,
    the probability, by a logistic regression on hashed word n-grams, that a document is one of the corpora `positive`
    rather than of `negative` (none: of this corpus). With good texts as `positive` it is quality, as the classifier of
    GLaM (arXiv:2112.06905) that the paper takes: books and encyclopedias against web pages; with toxic ones it is
    toxicity, for which the paper asks a service (Perspective API). Then column_filter keeps documents above (`least`)
    or below (`most`) a threshold, or the others, as the paper's inverse filters do. Of each side at most
    `documents` training texts are drawn by `seed`. A column of this name that is there already is written anew.
    """  # noqa: E501

    computes: ClassVar[bool] = False
    speed: ClassVar[float] = 3.4e6

    positive: tuple[Ref, ...]
    negative: tuple[Ref, ...] = ()
    column: str = "quality"
    documents: Count = 100_000
    ngrams: Count = 2
    epochs: Count = 5
    seed: Whole = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.positive:
            raise PretrainError("reference_classifier: positive: accepted: one corpus or more", place=("positive",))
        if not self.column.isidentifier():
            raise PretrainError(f"reference_classifier: column {self.column!r}: accepted: a word", place=("column",))

    @property
    def adds(self) -> tuple[str, ...]:
        """The column that it writes."""
        return (f"{self.name}_{self.column}",)

    def __call__(self, corpus: Dataset) -> Dataset:
        """The corpus with the column."""
        import datasets

        check_text(self.name, corpus)
        (column,) = self.adds
        bare = corpus.remove_columns([column]) if column in corpus.column_names else corpus
        score_N = np.zeros(0)
        sides = self._texts(self.positive), self._texts(self.negative) if self.negative else self._drawn(bare)
        if len(bare):
            classifier = Classifier(epochs=self.epochs, ngrams=self.ngrams, seed=self.seed)
            classifier.fit(*sides)
            score_N = 0.5 + 0.5 * np.tanh(0.5 * classifier.scores(bare)[0])
        tagged = bare.add_column(column, score_N.tolist(), feature=datasets.Value("float64"))
        with desk() as here:
            here.reports.append({
                "method": self.name, "column": column, "positive": len(sides[0]), "negative": len(sides[1]),
                "percentiles": {self.column: percentiles(score_N)} if len(score_N) else {},
            })  # fmt: skip
        return tagged

    def _drawn(self, corpus: Dataset) -> list[str]:
        """Training texts of one side."""
        drawn = np.random.default_rng(self.seed).permutation(len(corpus))[: self.documents]
        return [text or "" for text in corpus.select(sorted(drawn.tolist()))["text"][:]]

    def _texts(self, folders: Sequence[str]) -> list[str]:
        from datasets import Dataset

        texts = [
            document["text"] for folder in folders for document in Corpus(corpus_of(Path(folder))).documents("train")
        ]
        if not texts:
            raise PretrainError(
                f"{self.name}: {', '.join(folders)}: no training documents; accepted: corpora with text"
            )
        return self._drawn(Dataset.from_dict({"text": texts}))

"""Tell each document's language, and keep those that are wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pretrain.core.bounds import Count, Share
from pretrain.core.errors import PretrainError, nearest
from pretrain.corpus.look import languages
from pretrain.data import DataOperation
from pretrain.data._mapped import remade
from pretrain.data._work import by_domain, desk

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray
    from py3langid.langid import LanguageIdentifier

    from pretrain.data._work import Desk

BLOCK = 1024  # documents
OPENING = 1.0  # seconds
COLUMNS = ("language", "language_score")


@dataclass(frozen=True)
class Language(DataOperation):
    """langid.py: An Off-the-shelf Language Identification Tool (ACL 2012).

    The column `language` is the ISO 639 code of the likeliest language of a document's first `characters`, and
    `language_score` its probability, by the naive Bayes classifier over byte n-grams that the package py3langid brings
    (139 languages, no network). With `keep` only documents of these languages stay, with `least` only those of a score
    that is at least so high. Where a corpus has both columns already they are read and nothing is identified again: a
    later data stage can keep other languages.
    """

    computes: ClassVar[bool] = False
    speed: ClassVar[float] = 1.5e6  # of what is read of each
    shared: ClassVar[bool] = True

    keep: tuple[str, ...] = ()
    least: Share = 0.0
    characters: Count = 2000

    @property
    def adds(self) -> tuple[str, ...]:
        """Both columns."""
        return COLUMNS

    def seconds(self, size: float, documents: float) -> float:
        """Of opening what it knows of languages, and of the beginnings of documents."""
        return OPENING + min(size, documents * self.characters) / self.speed

    def __call__(self, corpus: Dataset) -> Dataset:
        """The documents that are kept, in order, with their languages."""
        with desk() as here:
            tagged = corpus if set(COLUMNS) <= set(corpus.column_names) else self._tagged(corpus, here)
            return self._kept(tagged, here) if self.keep or self.least else tagged

    def _tagged(self, corpus: Dataset, here: Desk) -> Dataset:
        import datasets

        if "text" not in corpus.column_names or set(COLUMNS) & set(corpus.column_names):
            known, both = ", ".join(corpus.column_names) or "no columns", " and ".join(COLUMNS)
            raise PretrainError(f"language: a corpus with {known}; accepted: one with text, and with {both} or neither")
        self._identifier()  # what is wrong with `keep` is told at once

        def note(texts: list[str], pairs: list[tuple[str, float]]) -> dict[str, list[str] | list[float]]:
            return {"language": [code for code, _ in pairs], "language_score": [score for _, score in pairs]}

        kinds = {"language": datasets.Value("string"), "language_score": datasets.Value("float64")}
        features = datasets.Features({**corpus.features, **kinds})
        return remade(self.name, corpus, here, self.identified, note, features)

    def identified(self, texts: list[str]) -> list[tuple[str, float]]:
        """The language of each text, and its score."""
        identifier = self._identifier()
        pairs = (identifier.classify(text[: self.characters]) for text in texts)
        return [(code, float(score)) for code, score in pairs]

    def _identifier(self) -> LanguageIdentifier:
        identifier = languages.identifier()
        for code in self.keep:
            if code not in identifier.labels:
                known = ", ".join(sorted(identifier.labels))
                raise PretrainError(f"language: keep {code!r}{nearest(code, identifier.labels)}; accepted: {known}")
        return identifier

    def _kept(self, corpus: Dataset, here: Desk) -> Dataset:
        kept_K: list[NDArray[np.int64]] = []
        start = 0
        for table in corpus.select_columns(list(COLUMNS)).with_format("arrow").iter(BLOCK):
            languages, scores = (table[column].to_pylist() for column in COLUMNS)
            reasons = [self._why(*pair) for pair in zip(languages, scores, strict=True)]
            rows_D = np.flatnonzero([bool(why) for why in reasons])
            score_N = np.array([np.nan if score is None else score for score in scores], float)
            here.drop(self.name, corpus, start + rows_D, [reasons[n] for n in rows_D], score_N[rows_D])
            kept_K.append(start + np.flatnonzero([not why for why in reasons]))
            start += len(reasons)
        kept = np.concatenate(kept_K) if kept_K else np.zeros(0, np.int64)
        here.reports.append({"method": self.name, "documents": by_domain(corpus, kept)})
        return corpus.select(kept)

    def _why(self, language: str | None, score: float | None) -> str:
        if self.keep and language not in self.keep:
            return f"language {language}"
        return "language score" if (score or 0.0) < self.least else ""

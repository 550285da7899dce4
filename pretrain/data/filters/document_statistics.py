"""Write how long a document is and what its words are like into columns, for whoever is to decide by them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from pretrain.core.errors import PretrainError
from pretrain.core.folders import tokenizer_of
from pretrain.core.method import Ref
from pretrain.data import DataOperation
from pretrain.data._mapped import check_text, remade
from pretrain.data._work import desk, percentiles
from pretrain.data.filters._filter import Spread
from pretrain.data.filters._words import words
from pretrain.data.filters.language import COLUMNS, Language

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer

NUMBERS = ("characters", "words", "word_length", "letter_words")


@dataclass(frozen=True)
class DocumentStatistics(DataOperation):
    """Dolma: an Open Corpus of Three Trillion Tokens for Language Model Pretraining Research (arXiv:2402.00159).

    A tagger: it drops nothing and writes the columns `document_statistics_characters`, `…_words` (those with a letter
    or digit), `…_word_length` (their mean length), `…_letter_words` (the share of words and signs with a letter in
    them, of 0 to 1) and, with a `tokenizer`, `…_tokens`, without its ends; with `language` also what the method
    language writes. A later data stage has column_filter decide by them, with thresholds that can change without this
    being run again. Words are those of gopher_quality. What has no meaning, as the mean length of no words, is null.
    Columns of these names that are there already are measured anew.
    """

    computes: ClassVar[bool] = False
    speed: ClassVar[float] = 10e6
    shared: ClassVar[bool] = True

    tokenizer: Ref = ""
    language: bool = False

    @property
    def adds(self) -> tuple[str, ...]:
        """The columns that it writes."""
        return (*self.columns, *(COLUMNS if self.language else ()))

    @property
    def columns(self) -> list[str]:
        """Those of numbers."""
        return [f"{self.name}_{number}" for number in (*NUMBERS, *(("tokens",) if self.tokenizer else ()))]

    def __call__(self, corpus: Dataset) -> Dataset:
        """The corpus with the columns."""
        import datasets

        check_text(self.name, corpus)
        spread = Spread()

        def note(texts: list[str], measured_NM: NDArray[np.float64]) -> dict[str, list[float | None]]:
            spread.add(measured_NM)
            rows = [[None if value != value else value for value in row] for row in measured_NM.T.tolist()]
            return dict(zip(self.columns, rows, strict=True))

        bare = corpus.remove_columns([name for name in self.columns if name in corpus.column_names])
        kinds = {name: datasets.Value("float64") for name in self.columns}
        with desk() as here:
            features = datasets.Features({**bare.features, **kinds})
            tagged = remade(self.name, bare, here, self.measured, note, features)
        columns = np.array(spread.rows).reshape(-1, len(self.columns)).T
        lie = {name: percentiles(column[~np.isnan(column)]) for name, column in zip(self.columns, columns, strict=True)}
        with desk() as here:
            here.reports.append({"method": self.name, "tagged": len(tagged), "percentiles": lie})
            return Language()(tagged) if self.language else tagged

    def measured(self, texts: list[str]) -> NDArray[np.float64]:
        """The numbers of texts, a row each, in the order of the columns."""
        rows = np.array([_statistics(text) for text in texts], np.float64).reshape(-1, len(NUMBERS))
        if not self.tokenizer:
            return rows
        from pretrain.core.encoding import lengths

        return np.column_stack([rows, np.array(lengths(self.backend, texts), np.float64)])

    @cached_property
    def backend(self) -> Tokenizer:
        """The tokenizer."""
        from pretrain.core.encoding import plain_backend
        from pretrain.corpus.tokenizers import load_tokenizer

        backend = plain_backend(load_tokenizer(tokenizer_of(Path(self.tokenizer))))
        if backend is None:
            raise PretrainError(f"document_statistics: tokenizer {self.tokenizer}: accepted: one with tokenizer.json")
        return backend


def _statistics(text: str) -> tuple[float, ...]:
    """The numbers of `NUMBERS`."""
    total = real = length = lettered = 0
    for word, count in Counter(words(text)).items():
        total += count
        if any(map(str.isalpha, word)):
            lettered += count
        elif not any(map(str.isalnum, word)):
            continue
        real += count
        length += count * len(word)
    return len(text), real, length / real if real else np.nan, lettered / total if total else np.nan

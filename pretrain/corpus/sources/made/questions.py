"""Multiple-choice questions: which of several descriptions that are alike is a function's own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

import numpy as np
from numpy.typing import NDArray

from pretrain.core.bounds import Count, Ge, PositiveShare, Whole
from pretrain.corpus.sources._files import Document, Size, Source
from pretrain.corpus.sources._skipped import Skipped
from pretrain.corpus.sources.code import Functions

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

BLOCK = 512  # answers that are compared with all others at a time


@dataclass(frozen=True)
class Questions(Source):
    """When Does Pretraining Help? (arXiv:2104.08671): multiple-choice questions as CaseHOLD's, of documented functions.

    `text` is what `functions` gives, a function's code without its docstring; `choices` are the first paragraph of its
    docstring and those of `choices` - 1 other functions of these packages, in random order by `seed`, and `label` the
    number of the right one, from 0. As the paper's wrong holdings, the others are the nearest by the cosine of their
    tf-idf, but for those nearer than `most_similar`, which may be right as well (0.75 is the paper's as it is quoted;
    its text was not at hand). A function with too few of them has no question. Learnt by `multiple_choice`.
    """

    questions: tuple[str, ...]
    choices: Annotated[int, Ge(2)] = 5
    most_similar: PositiveShare = 0.75
    limit: Count | None = None  # at most so many modules of each package, from the whole of it alike
    longest: Count = 2000  # characters of code; longer functions are left out
    seed: Whole = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.functions  # which refuses no packages at all

    @cached_property
    def functions(self) -> Functions:
        """What the questions are about."""
        return Functions(self.questions, self.limit, self.longest)

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        documents = list(self.functions.documents(skipped))
        answers = [document.pop("target") for document in documents]
        rng = np.random.default_rng(self.seed)
        for number, others in enumerate(alike(answers, self.choices - 1, self.most_similar)):
            if len(others) < self.choices - 1:
                skipped.add("functions with too few descriptions like theirs", str(documents[number]["id"]))
                continue
            place = int(rng.integers(self.choices))
            choices = [answers[other] for other in others]
            choices.insert(place, answers[number])
            yield documents[number] | {"choices": choices, "label": str(place)}

    def domains(self) -> tuple[str, ...]:
        return self.questions

    def size(self) -> Size:
        return self.functions.size()

    def state(self) -> object:
        return self.functions.state()


def alike(texts: Sequence[str], count: int, most: float) -> Iterator[list[int]]:
    """For each text the `count` nearest others by the cosine of their tf-idf, the nearest first.

    Those whose cosine is above `most` are passed over, and so are those that share no word with it, and copies.
    """
    if not any(any(c.isalnum() for c in text) for text in texts):
        yield from ([] for _ in texts)
        return
    weight_NV = _tf_idf(texts)
    for start in range(0, len(texts), BLOCK):
        cosine_BN: NDArray[np.float64] = (weight_NV[start : start + BLOCK] @ weight_NV.T).toarray()
        for cosine_N in cosine_BN:
            fit_M = np.flatnonzero((cosine_N > 0) & (cosine_N <= most))
            order_M = fit_M[np.argsort(-cosine_N[fit_M], kind="stable")]
            nearest: dict[str, int] = {}
            for other in order_M.tolist():
                nearest.setdefault(texts[other], other)
                if len(nearest) == count:
                    break
            yield list(nearest.values())


def _tf_idf(texts: Sequence[str]) -> csr_matrix:
    """The words' counts times ln((1 + N) / (1 + documents with it)) + 1, each text's of length 1: scikit-learn's."""
    from scipy.sparse import csr_matrix

    words: dict[str, int] = {}
    columns = [[words.setdefault(word, len(words)) for word in re.findall(r"\w+", text.lower())] for text in texts]
    starts = np.cumsum([0, *map(len, columns)])
    ones = np.ones(starts[-1])
    weight_NV = csr_matrix((ones, np.concatenate(columns).astype(np.int64), starts), (len(texts), len(words)))
    weight_NV.sum_duplicates()
    documents_V = np.bincount(weight_NV.indices, minlength=len(words))
    weight_NV.data *= (np.log((1 + len(texts)) / (1 + documents_V)) + 1)[weight_NV.indices]
    length_N = np.sqrt(np.asarray(weight_NV.multiply(weight_NV).sum(1)).ravel())
    weight_NV.data /= np.repeat(np.where(length_N > 0, length_N, 1.0), np.diff(weight_NV.indptr))
    return weight_NV

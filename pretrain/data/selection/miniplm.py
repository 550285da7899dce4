"""Keep the documents that a large model finds much likelier than a small one does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pretrain.core.bounds import Count, PositiveShare
from pretrain.core.method import Ref
from pretrain.data import DataOperation
from pretrain.data._work import desk
from pretrain.data.selection._scores import likelihoods, report, sizes
from pretrain.data.selection._select import top

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Miniplm(DataOperation):
    """MiniPLM: Knowledge Distillation for Pre-Training Language Models (arXiv:2410.17215).

    Difference sampling: a document's score is r(x) = (log p_teacher(x) - log p_reference(x)) / |x|, and the share
    `ratio` with the highest scores is kept, in its order. Easy text, likely to both, and noise, likely to neither,
    score low. |x| counts tokens where both tokenizers cut every document into as many, and bytes where they do not.
    `teacher` and `reference` are causal checkpoints; documents longer than `length` tokens, or than what a model can
    take, are scored in pieces. The student is any model trained on what is left.
    """

    teacher: Ref
    reference: Ref
    ratio: PositiveShare = 0.5
    length: Count = 1024

    def __call__(self, corpus: Dataset) -> Dataset:
        """The corpus's documents with the highest differences."""
        with desk() as here:
            score_N = self.scores(corpus)
            kept = top(score_N, max(1, int(self.ratio * len(corpus))))
            here.reports.append(report(self.name, corpus, kept, score_N))
            return here.keep(self.name, corpus, kept, "low difference", score_N)

    def scores(self, corpus: Dataset) -> NDArray[np.float64]:
        """The documents' differences, in nats a token or a byte."""
        with desk() as here:
            teacher, reference = (
                likelihoods(folder, corpus, here, length=self.length) for folder in (self.teacher, self.reference)
            )
        alike = np.array_equal(teacher.tokens_N, reference.tokens_N)
        size_N = teacher.tokens_N if alike else sizes(corpus)
        return (reference.nll_N - teacher.nll_N) / np.maximum(size_N, 1)

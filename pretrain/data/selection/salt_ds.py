"""Keep, or name, the sequences that a small model finds hard to predict and yet nearly predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pretrain.core.bounds import Count, PositiveShare
from pretrain.core.method import Ref
from pretrain.data import DataOperation
from pretrain.data._work import desk
from pretrain.data.selection._scores import learnable_losses, report, sizes
from pretrain.data.selection._select import top_share

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray


@dataclass(frozen=True)
class SALTDS(DataOperation):
    """A Little Help Goes a Long Way: Efficient LLM Training by Leveraging Small LMs (arXiv:2410.18779).

    SALT_DS: the small language model also selects what the large one learns from it. With loss_i = -log p(x_i | x_<i):

        score(x) = median of loss_i over the tokens x_i that are among the model's `top_k` likeliest

    A high loss says that a sequence is hard, the top_k that it can be learnt: tokens that are noise are left out of the
    median. The highest documents that hold `share` of the text are kept. With a `domain` all are kept and the highest
    get that domain, so that a mixture draws them alone while `salt` is taught by the teacher, and all of them later.
    The `model` is a causal checkpoint; the paper takes one from early in the small model's training. Its top_k and
    share could not be verified: the defaults are ours. Documents longer than `length` tokens are scored in pieces.
    """

    model: Ref
    top_k: Count = 10
    share: PositiveShare = 0.5
    domain: str = ""
    length: Count = 1024

    @property
    def brings(self) -> tuple[str, ...]:
        """The domain that the highest documents get."""
        return (self.domain,) if self.domain else ()

    def __call__(self, corpus: Dataset) -> Dataset:
        """The corpus's documents with the highest scores, or all of them, these by their new domain."""
        with desk() as here:
            score_N = self.scores(corpus)
            chosen = top_share(score_N, sizes(corpus), self.share)
            here.reports.append(report(self.name, corpus, chosen, score_N))
            if not self.domain:
                return here.keep(self.name, corpus, chosen, "low score", score_N)
        import datasets

        names = corpus.column_names
        domain_N = np.array(corpus["domain"] if "domain" in names else ["text"] * len(corpus), object)
        domain_N[chosen] = self.domain
        bare = corpus.remove_columns(["domain"]) if "domain" in names else corpus
        renamed = bare.add_column("domain", domain_N.tolist(), feature=datasets.Value("string"))
        return renamed.select_columns(list(dict.fromkeys([*names, "domain"])))

    def scores(self, corpus: Dataset) -> NDArray[np.float64]:
        """The documents' scores, in nats."""
        with desk() as here:
            return learnable_losses(self.model, corpus, here, length=self.length, top_k=self.top_k)

"""Whether a model was trained on a text: the likelihood of the tokens that it expects least."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from pretrain.core.batch import Vocabulary
from pretrain.core.bounds import Count, OpenShare, PositiveShare, Whole
from pretrain.core.encoding import text_of
from pretrain.core.errors import PretrainError
from pretrain.core.folders import corpus_of
from pretrain.core.method import Ref
from pretrain.core.models.families import positions_of
from pretrain.corpus.store import Corpus
from pretrain.evaluation import Evaluation, Measured
from pretrain.evaluation._intervals import bounds, bounds_of_means, resampled_sums
from pretrain.evaluation._predictions import framed, predictions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document

DETECTORS = ("min_k", "min_k_loss", "min_k_zlib")


@dataclass(frozen=True)
class MinK(Evaluation):
    """Detecting Pretraining Data from Large Language Models (arXiv:2310.16789).

    A text that was trained on holds few tokens that the model finds very unlikely. Its score is the mean of log p(x_i |
    x_<i) over the share `k` of its tokens that are least likely (`min_k`, the mean over documents). Members of the
    training data are distinguished from others by it: `min_k_auroc`, and `min_k_tpr`, the share of members that the
    threshold finds which finds the most while fewer than the share `false_positives` of the others pass it. The same
    for two of the paper's baselines: the mean log-likelihood (`min_k_loss_…`) and that over the bytes that zlib makes
    of the text (`min_k_zlib_…`). `members` is a corpus whose training split holds members, the documents then being the
    others (as many of each at most); or `member` is a column that tells them. A text is a document's first `length`
    tokens, and shorter documents are left out (`min_k_skipped`), so that length tells nothing. Intervals: bootstrap
    over documents, members and others apart.
    """

    families: ClassVar[tuple[str, ...]] = ("causal",)

    cut: ClassVar[bool] = True

    k: PositiveShare = 0.2
    length: Count = 128
    members: Ref | None = None
    member: str = ""
    false_positives: OpenShare = 0.05
    resamples: Count = 1000
    seed: Whole = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        super().__post_init__()
        if self.members and self.member:
            raise PretrainError(f"min_k: members {self.members!r} and member {self.member!r}: accepted: one of them")

    @property
    def columns(self) -> tuple[str, ...]:
        """The column that tells members, if there is one."""
        return (self.member,) if self.member else ()

    @property
    def predicted(self) -> float:
        """All that is read."""
        return 1.0

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The metrics on documents with `text`, and the members' column if that is asked for."""
        chosen, member_N = self._labelled(documents)
        kept_N, scores_ND = self._scores(model, tokenizer, [d["text"] for d in chosen])
        member_N, scores_N = None if member_N is None else member_N[kept_N], scores_ND[:, 0]
        scored_N = np.arange(len(scores_N)) if member_N is None or not self.members else np.flatnonzero(~member_N)
        if not len(scored_N):
            raise PretrainError(
                f"min_k: none of {len(documents)} documents has {self.length} tokens; accepted: a smaller length"
            )
        by_domain, names = defaultdict(list), [str(chosen[kept_N[i]].get("domain", "text")) for i in scored_N]
        for i, name in zip(scored_N, names, strict=True):
            by_domain[name].append(scores_N[i])
        means_R = resampled_sums(scores_N[scored_N, None], self.resamples, self.seed)[:, 0] / len(scored_N)
        counts = {"min_k_documents": len(kept_N), "min_k_skipped": len(chosen) - len(kept_N)}
        measured = Measured(
            {"min_k": float(scores_N[scored_N].mean())} | {name: float(n) for name, n in counts.items()},
            {domain: {"min_k": float(np.mean(values))} for domain, values in sorted(by_domain.items())},
            {"min_k": bounds(means_R)},
            domain_intervals=bounds_of_means("min_k", scores_N[scored_N], names, self.resamples, self.seed),
        )
        return measured if member_N is None else self._detect(measured, scores_ND, member_N)

    def _labelled(self, documents: Sequence[Document]) -> tuple[list[Document], NDArray[np.bool_] | None]:
        """The documents to score, and which of them are members where that is known."""
        if self.members:
            trained = Corpus(corpus_of(Path(self.members))).sample("train", len(documents))
            return [*documents, *trained], np.arange(len(documents) + len(trained)) >= len(documents)
        if not self.member:
            return list(documents), None
        chosen = [d for d in documents if d.get(self.member) is not None]
        for document in chosen:
            if document[self.member] not in (0, 1):
                raise PretrainError(
                    f"min_k: column {self.member!r} has {document[self.member]!r}; accepted: true, false"
                )
        return chosen, np.array([bool(d[self.member]) for d in chosen], np.bool_)

    def _scores(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Which texts are long enough, and what each detector makes of them: the higher, the rather a member."""
        vocabulary = Vocabulary.of(tokenizer)
        begins = vocabulary.begin is not None
        limit = positions_of(model)
        if isinstance(limit, int) and self.length > limit:
            raise PretrainError(f"min_k: length {self.length}: accepted: at most the model's {limit} positions")
        tokens = framed(tokenizer, vocabulary, texts, end=False)
        fewest = max(self.length + begins, 2)
        kept_N = np.array([i for i, ids in enumerate(tokens) if len(ids) >= fewest], np.int64)
        cut = [tokens[i][: self.length + begins] for i in kept_N]
        nlls = [prediction.nll_T for prediction in predictions(model, cut, length=self.length)]
        packed_N = np.array(
            [len(zlib.compress(text_of(tokenizer, t[begins:]).encode("utf-8", "replace"))) for t in cut]
        )
        loss_N = np.array([nll_T.mean() for nll_T in nlls])
        least_N = np.array([least_likely(nll_T, self.k) for nll_T in nlls])
        return kept_N, np.stack([least_N, -loss_N, -loss_N / packed_N], axis=1)

    def _detect(self, measured: Measured, scores_ND: NDArray[np.float64], member_N: NDArray[np.bool_]) -> Measured:
        """The metrics with those of the detectors."""
        if member_N.all() or not member_N.any():
            raise PretrainError(
                f"min_k: {int(member_N.sum())} of {len(member_N)} documents of {self.length} tokens are members; "
                "accepted: some that are and some that are not"
            )
        metrics = measured.metrics | {"min_k_members": float(member_N.sum())}
        intervals = dict(measured.intervals)
        for name, scores_N in zip(DETECTORS, scores_ND.T, strict=True):
            seen_M, other_N = scores_N[member_N], scores_N[~member_N]
            rng = np.random.default_rng(self.seed)  # the same documents for each detector
            drawn = [
                (rng.choice(seen_M, len(seen_M)), rng.choice(other_N, len(other_N))) for _ in range(self.resamples)
            ]
            metrics[f"{name}_auroc"] = auroc(seen_M, other_N)
            metrics[f"{name}_tpr"] = true_positives(seen_M, other_N, self.false_positives)
            intervals[f"{name}_auroc"] = bounds(np.array([auroc(*sample) for sample in drawn]))
            intervals[f"{name}_tpr"] = bounds(np.array([true_positives(*s, self.false_positives) for s in drawn]))
        return Measured(metrics, measured.domains, intervals, domain_intervals=measured.domain_intervals)


def least_likely(nll_T: NDArray[np.float64], k: float) -> float:
    """The mean log-likelihood of the share `k` of tokens that are least likely, of one at least."""
    count = max(1, int(len(nll_T) * k))
    return float(-np.sort(nll_T)[-count:].mean())


def auroc(seen_M: NDArray[np.float64], other_N: NDArray[np.float64]) -> float:
    """How often a member scores above another document, ties counting half."""
    other_N = np.sort(other_N)
    below_M = np.searchsorted(other_N, seen_M, "left") + np.searchsorted(other_N, seen_M, "right")
    return float(below_M.mean() / 2 / len(other_N))


def true_positives(seen_M: NDArray[np.float64], other_N: NDArray[np.float64], share: float) -> float:
    """The share of members above the threshold that fewer than `share` of the others pass."""
    passing = max(0, int(np.ceil(share * len(other_N))) - 1)
    return float((seen_M > np.sort(other_N)[len(other_N) - 1 - passing]).mean())

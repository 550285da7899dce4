"""Whether a model is right as often as it is sure, and how well it predicts early and late in a document.

Shape letters: N documents, T tokens of one, M bins, P buckets of positions, R resamples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from pretrain.core.batch import Vocabulary
from pretrain.core.bounds import Count, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import positions_of
from pretrain.core.quick.quantities import counted
from pretrain.evaluation import Evaluation, Measured
from pretrain.evaluation._intervals import bounds, bounds_by_domain, resampled_sums
from pretrain.evaluation._predictions import framed, predictions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document
    from pretrain.evaluation._predictions import Predictions

DOMAIN_METRICS = ("ece", "token_accuracy")  # those that are told of each domain


@dataclass(frozen=True)
class Calibration(Evaluation):
    """On Calibration of Modern Neural Networks (arXiv:1706.04599).

    Next-token predictions fall into `bins` of equal width by their confidence, the largest probability: bin m holds
    those in ((m - 1) / bins, m / bins]. With acc and conf the mean accuracy and confidence in a bin B of all n, the
    expected calibration error is `ece` = sum |B| / n |acc(B) - conf(B)|, and `mce` the largest |acc(B) - conf(B)|.
    `token_accuracy` and `token_confidence` are the means over all tokens; `bin_03_accuracy`, `bin_03_confidence` and
    `bin_03_share` the third bin's, a reliability diagram, where a bin holds any. Besides, `perplexity@P` is that of the
    tokens from position P of their document on (the first is 0) to the next in `positions`; contexts are as for
    `held_out`: windows of `length` inputs that advance by `stride`, by default half of it. Intervals: bootstrap over
    documents.
    """

    families: ClassVar[tuple[str, ...]] = ("causal",)
    windowed: ClassVar[bool] = True

    bins: Count = 15
    positions: tuple[Whole, ...] = (0, 16, 64, 256, 1024)
    length: Whole = 0
    stride: Whole = 0
    resamples: Count = 1000
    seed: Whole = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        super().__post_init__()
        if any(a >= b for a, b in zip(self.positions, self.positions[1:])):
            raise PretrainError(f"calibration: positions {self.positions}: accepted: numbers that rise")
        if self.length and self.stride > self.length:
            accepted = "stride at most length"
            raise PretrainError(f"calibration: stride {self.stride}, length {self.length}: accepted: {accepted}")

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The metrics on documents with `text` and `domain`."""
        vocabulary = Vocabulary.of(tokenizer)
        tokens = framed(tokenizer, vocabulary, [d["text"] for d in documents], end=True)
        length = self.length or min(1024, positions_of(model) or 1024)
        predicted = predictions(model, tokens, length=length, stride=self.stride or max(1, length // 2))
        if not any(len(prediction.nll_T) for prediction in predicted):
            raise PretrainError(
                f"calibration: no text to predict in {counted(len(documents), 'document')}; accepted: some text"
            )
        # Where a token begins a document, the first that is predicted is the text's first.
        begins = vocabulary.begin is not None
        sums_NK = np.stack([self._sums(prediction, 0 if begins else 1) for prediction in predicted])
        by_domain: dict[str, list[int]] = defaultdict(list)
        for i, document in enumerate(documents):
            by_domain[document.get("domain", "text")].append(i)
        domains: dict[str, dict[str, float]] = {}
        for domain, numbers in sorted(by_domain.items()):
            values = self._summed(sums_NK[numbers])
            domains[domain] = {name: v for name, v in values.items() if name in DOMAIN_METRICS}
        metrics = self._summed(sums_NK)
        intervals = {}
        for name, value_R in self._measures(resampled_sums(sums_NK, self.resamples, self.seed)).items():
            known_R = value_R[np.isfinite(value_R)]
            if name in metrics and len(known_R) and not name.endswith("_share"):
                intervals[name] = bounds(known_R)
        names = [str(document.get("domain", "text")) for document in documents]
        apart = bounds_by_domain(sums_NK, names, self._of_domain, self.resamples, self.seed)
        return Measured(metrics, domains, intervals, domain_intervals=apart)

    def _of_domain(self, sums_RK: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """What is told of each domain, of the draws in which it has a value."""
        values = {name: value_R[np.isfinite(value_R)] for name, value_R in self._measures(sums_RK).items()}
        return {name: value_R for name, value_R in values.items() if name in DOMAIN_METRICS and len(value_R)}

    def _summed(self, sums_NK: NDArray[np.float64]) -> dict[str, float]:
        """The metrics of all these documents together that have a value."""
        values = self._measures(sums_NK.sum(0, keepdims=True))
        return {name: float(value_1[0]) for name, value_1 in values.items() if np.isfinite(value_1[0])}

    def _sums(self, prediction: Predictions, first: int) -> NDArray[np.float64]:
        """A document's count, right answers and confidence by bin, then its count and nll by bucket of positions."""
        edges_M = np.arange(1, self.bins) / self.bins
        bin_T = np.searchsorted(edges_M, prediction.confidence_T, "left")  # the upper edge is a bin's own
        place_T = np.arange(len(prediction.nll_T)) + first
        bucket_T = np.searchsorted(np.array(self.positions), place_T, "right")  # 0: before the first bucket
        within = [
            np.bincount(bin_T, weights, minlength=self.bins)
            for weights in (None, prediction.right_T, prediction.confidence_T)
        ]
        along = [np.bincount(bucket_T, w, minlength=len(self.positions) + 1)[1:] for w in (None, prediction.nll_T)]
        return np.concatenate([*within, *along]).astype(np.float64)

    def _measures(self, sums_RK: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """The metrics of summed documents; not a number where there is nothing to measure."""
        within_RK, along_RK = np.split(sums_RK, [3 * self.bins], axis=1)
        (count_RM, right_RM, sure_RM), (tokens_RP, nll_RP) = np.split(within_RK, 3, 1), np.split(along_RK, 2, 1)
        all_R = np.maximum(count_RM.sum(1), 1)
        divisor_RM = np.maximum(count_RM, 1)
        gap_RM = np.abs(right_RM - sure_RM)
        metrics = {
            "ece": gap_RM.sum(1) / all_R,
            "mce": (gap_RM / divisor_RM).max(1),
            "token_accuracy": right_RM.sum(1) / all_R,
            "token_confidence": sure_RM.sum(1) / all_R,
        }
        metrics = {name: np.where(count_RM.any(1), value_R, np.nan) for name, value_R in metrics.items()}
        for p, position in enumerate(self.positions):
            mean_R = nll_RP[:, p] / np.maximum(tokens_RP[:, p], 1)
            metrics[f"perplexity@{position}"] = np.where(tokens_RP[:, p] > 0, np.exp(np.minimum(mean_R, 700)), np.nan)
        for m in range(self.bins):
            parts = {"accuracy": right_RM[:, m] / divisor_RM[:, m], "confidence": sure_RM[:, m] / divisor_RM[:, m]}
            for part, value_R in (parts | {"share": count_RM[:, m] / all_R}).items():
                metrics[f"bin_{m + 1:02d}_{part}"] = np.where(count_RM[:, m] > 0, value_R, np.nan)
        return metrics

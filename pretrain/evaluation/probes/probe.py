"""Frozen features and a simple classifier: how much of a document's label the model's states show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from pretrain.core.bounds import AnyInteger, Count, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.models.features import labelled, piece_features
from pretrain.corpus.payload import content, only_text
from pretrain.evaluation import Evaluation, Measured
from pretrain.evaluation._intervals import bounds, resampled_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document

Features = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Probe(Evaluation):
    """A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning (arXiv:2210.04428).

    The model stays frozen; a simple classifier on its features predicts each document's `label`. `nearest_mean` is the
    paper's: the class c that minimises ||f(x) - mean of f over class c||. `linear` is a logistic regression on
    standardised features. The feature is pooled from `layer` over `length` tokens (fewer where the model has fewer
    positions) of the document's middle; of other documents over all that their processor gives, `length` samples of a
    recording (0: the length that the checkpoint was trained at). A hash of its content puts a document on the side
    to fit or the side to test. Metrics on the latter: `probe_accuracy`, `probe_macro_f1`, `probe_majority` (the
    accuracy of always answering the commonest class of the former), `probe_documents` (how many are tested) and of the
    logistic regression `probe_loss`, the mean of -log p(true label) in nats; a nearest mean gives no probability. The
    u labels that none of the n documents to fit has share u / (n + u) of the probability. The intervals are by
    bootstrap over the tested documents, the classifier given. Documents without content or label are left out.
    """

    cut: ClassVar[bool] = True

    classifier: Literal["linear", "nearest_mean"] = "linear"
    label: str = "domain"
    pooling: Literal["mean", "cls", "last"] = "mean"
    length: Whole = 128
    layer: AnyInteger = -1
    resamples: Count = 1000
    seed: Whole = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """The label's."""
        return (self.label,)

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The metrics on documents with the label and the columns that the processor reads."""
        length = self.length or 512
        kept = labelled(model, tokenizer, documents, self.label, length)
        classes = sorted({str(document[self.label]) for document, _ in kept})
        if len(classes) < 2:
            raise PretrainError(
                f"probe: label {self.label!r} has {len(classes)} values in {len(documents)} documents; "
                "accepted: a column with two or more"
            )
        number = {name: i for i, name in enumerate(classes)}
        label_N = np.array([number[str(document[self.label])] for document, _ in kept])
        fit_N = np.array([to_fit(document) for document, _ in kept])
        if fit_N.all() or not fit_N.any():
            side = "test" if fit_N.all() else "fit"
            raise PretrainError(f"probe: {len(kept)} documents leave none to {side}; accepted: more documents")
        pieces = [piece for _, piece in kept]
        features_NE = piece_features(model, tokenizer, pieces, length, pooling=self.pooling, layer=self.layer)
        features_NE = features_NE.astype(np.float64)
        halves = features_NE[fit_N], label_N[fit_N], features_NE[~fit_N]
        majority = np.bincount(label_N[fit_N]).argmax()
        constant = float((label_N[~fit_N] == majority).mean())
        if self.classifier == "nearest_mean":
            return self._measure(label_N[~fit_N], self._nearest(*halves), len(classes), constant)
        predicted_N, log_NC = self._linear(*halves, len(classes))
        nll_N = -log_NC[np.arange(len(log_NC)), label_N[~fit_N]]
        measured = self._measure(label_N[~fit_N], predicted_N, len(classes), constant)
        sums_RK = resampled_sums(nll_N[:, None], self.resamples, self.seed)
        tested = [document for (document, _), fit in zip(kept, fit_N, strict=True) if not fit]
        return Measured(
            measured.metrics | {"probe_loss": float(nll_N.mean())},
            intervals=measured.intervals | {"probe_loss": bounds(sums_RK[:, 0] / len(nll_N))},
            documents=[
                {"domain": str(document.get("domain", "")), "nll": float(nll), "targets": 1.0}
                for document, nll in zip(tested, nll_N, strict=True)
            ],
        )

    def _nearest(self, fit_NE: Features, label_N: Labels, test_NE: Features) -> Labels:
        present = np.unique(label_N)
        means_CE = np.stack([fit_NE[label_N == c].mean(0) for c in present])
        distance_NC = np.stack([np.linalg.norm(test_NE - mean_E, axis=1) for mean_E in means_CE], axis=1)
        return present[distance_NC.argmin(1)]

    def _linear(self, fit_NE: Features, label_N: Labels, test_NE: Features, classes: int) -> tuple[Labels, Features]:
        """The likeliest of the classes that were fitted, and `log_NC`, the log-probability of every class."""
        present = np.unique(label_N)
        unseen = classes - len(present)
        log_NC = np.full((len(test_NE), classes), -np.log(len(label_N) + unseen))
        log_NC[:, present] = self._log_probabilities(fit_NE, label_N, test_NE) - np.log1p(unseen / len(label_N))
        return present[log_NC[:, present].argmax(1)], log_NC

    def _log_probabilities(self, fit_NE: Features, label_N: Labels, test_NE: Features) -> Features:
        """`log_NC` of the classes that occur among the labels; where one alone does, it has all the probability."""
        if len(np.unique(label_N)) == 1:
            return np.zeros((len(test_NE), 1))
        from scipy.special import log_softmax
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        made = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(fit_NE, label_N)
        logits_NC = made.decision_function(test_NE)
        if logits_NC.ndim == 1:  # of two classes: the second's over the first's
            logits_NC = np.stack([np.zeros_like(logits_NC), logits_NC], axis=1)
        return np.asarray(log_softmax(logits_NC, axis=1))

    def _measure(self, label_N: Labels, predicted_N: Labels, classes: int, majority: float) -> Measured:
        true_NC, predicted_NC = (np.arange(classes) == x_N[:, None] for x_N in (label_N, predicted_N))
        counts_NK = np.concatenate([true_NC & predicted_NC, true_NC, predicted_NC], axis=1)
        accuracy, f1 = _scores(counts_NK.sum(0, keepdims=True))
        sums_RK = resampled_sums(counts_NK, self.resamples, self.seed)
        accuracies_R, f1_R = _scores(sums_RK)
        return Measured(
            {
                "probe_accuracy": float(accuracy[0]),
                "probe_macro_f1": float(f1[0]),
                "probe_majority": majority,
                "probe_documents": float(len(label_N)),
            },
            intervals={"probe_accuracy": bounds(accuracies_R), "probe_macro_f1": bounds(f1_R)},
        )


def _scores(sums_RK: NDArray[np.number]) -> tuple[Features, Features]:
    """Accuracy and macro F1 (over the classes that occur or are answered) from summed hits, truths and answers."""
    hit_RC, true_RC, predicted_RC = np.split(sums_RK, 3, axis=1)
    either_RC = true_RC + predicted_RC
    f1_RC = 2 * hit_RC / np.maximum(either_RC, 1)
    return hit_RC.sum(1) / true_RC.sum(1), f1_RC.sum(1) / (either_RC > 0).sum(1)


def to_fit(document: Document) -> bool:
    """Whether a document serves to fit the classifier; independent of the hash that splits a corpus."""
    data = document["text"].encode("utf-8", "surrogatepass") if only_text(document) else content(document)
    return bool(blake2b(data, digest_size=8, person=b"probe").digest()[0] & 1)

"""Frozen features and a simple classifier: how much of a document's label the model's states show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from pretrain.core.bounds import Whole
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
    accuracy of always answering the commonest class of the former) and `probe_documents` (how many are tested). The
    intervals are by bootstrap over the tested documents, the classifier given. Documents without content or label
    are left out.
    """

    classifier: Literal["linear", "nearest_mean"] = "linear"
    label: str = "domain"
    pooling: Literal["mean", "cls", "last"] = "mean"
    length: Whole = 128
    layer: int = -1
    resamples: int = 1000
    seed: int = 0

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
        predicted_N = self._predict(features_NE[fit_N], label_N[fit_N], features_NE[~fit_N])
        majority = np.bincount(label_N[fit_N]).argmax()
        return self._measure(label_N[~fit_N], predicted_N, len(classes), float((label_N[~fit_N] == majority).mean()))

    def _predict(self, fit_NE: Features, label_N: Labels, test_NE: Features) -> Labels:
        present = np.unique(label_N)
        if self.classifier == "nearest_mean" or len(present) == 1:
            means_CE = np.stack([fit_NE[label_N == c].mean(0) for c in present])
            distance_NC = np.stack([np.linalg.norm(test_NE - mean_E, axis=1) for mean_E in means_CE], axis=1)
            return present[distance_NC.argmin(1)]
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        made = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        return made.fit(fit_NE, label_N).predict(test_NE)

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

"""What a classifier of several labels a document is worth on labelled documents.

Shape letters: R resamples, D documents, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pretrain.core.batch import Context, Example
from pretrain.core.bounds import Whole
from pretrain.core.errors import PretrainError, brief, listed, nearest
from pretrain.core.foreign import json
from pretrain.core.models.heads import labels_of
from pretrain.evaluation import Evaluation, Measured
from pretrain.inference.heads import Head, predict_batch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document

BATCH = 32
SEPARATORS = (";", "|", ",")  # of labels in a cell; the first that it has


@dataclass(frozen=True)
class Several(Evaluation):
    """How well a head predicts the sets of labels in the column `label`.

    `micro_f1` over all labels of all documents, `macro_f1`, the mean over the classes that a document has or is given,
    and `exact_match`, the share of documents with the very set; by class its F1. Intervals: bootstrap over documents.
    """

    head: Head
    label: str = "labels"
    resamples: Whole = 200

    @property
    def method(self) -> Several:
        """What knows the true labels, as the objective of a `task` does."""
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The texts' and the labels'."""
        return (*self.head.columns, self.label)

    def expected(self, examples: Sequence[Example], context: Context | None = None) -> list[tuple[str, ...]]:
        """The true labels of each; one that the model has not learnt is an error."""
        names = labels_of(self.head.model)
        return [self._labels(example.columns[self.label], names) for example in examples]

    def _labels(self, value: object, names: Sequence[str]) -> tuple[str, ...]:
        """Those of a cell: a list, a JSON array, or names with `;`, `|` or `,` between them."""
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except json.NotJSON as error:
                raise PretrainError(f"{self.label} {value!r}: not JSON ({error}); accepted: labels") from error
        if isinstance(value, str) and value not in names:
            mark = next((mark for mark in SEPARATORS if mark in value), ";")
            value = [part.strip() for part in value.split(mark) if part.strip()]
        given = [str(each) for each in (value if isinstance(value, list | tuple) else [value])]
        unknown = next((name for name in given if name not in names), None)
        if unknown is not None:
            raise PretrainError(
                f"{self.label} {brief(unknown)}{nearest(unknown, names)}; accepted: labels that it has learnt "
                f"({listed(names, unknown)})"
            )
        return tuple(given)

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The metrics over all documents; `domains` are the classes."""
        names, answers = labels_of(model), list[object]()
        for start in range(0, len(documents), BATCH):
            answers += [row["labels"] for row in predict_batch(self.head, documents[start : start + BATCH])]
        true = self.expected([Example(document, 0, number) for number, document in enumerate(documents)])
        given_DC, true_DC = _matrix(answers, names), _matrix(true, names)
        whole = _metrics(given_DC, true_DC) | {"documents": float(len(documents))}
        classes = {
            name: {"f1": _f1(given_DC[:, c], true_DC[:, c])}
            for c, name in enumerate(names)
            if given_DC[:, c].any() or true_DC[:, c].any()
        }
        rng, count = np.random.default_rng(0), len(documents)
        drawn = [rng.integers(count, size=count) for _ in range(self.resamples)]
        resampled = [_metrics(given_DC[chosen], true_DC[chosen]) for chosen in drawn]
        intervals = {}
        for name in resampled[0] if resampled else ():
            low, high = np.quantile([metrics[name] for metrics in resampled], [0.025, 0.975])
            intervals[name] = (float(low), float(high))
        return Measured(whole, classes, intervals)


def _matrix(rows: Sequence[object], names: Sequence[str]) -> NDArray[np.bool_]:
    """Which document has which class: shape D, C."""
    return np.array([[name in labels for name in names] for labels in rows if isinstance(labels, list | tuple)])


def _f1(given: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
    """2 · both / (given + true); 1 where there is nothing to find and nothing is given."""
    total = int(given.sum() + true.sum())
    return 2 * int((given & true).sum()) / total if total else 1.0


def _metrics(given_DC: NDArray[np.bool_], true_DC: NDArray[np.bool_]) -> dict[str, float]:
    seen = [c for c in range(given_DC.shape[1]) if given_DC[:, c].any() or true_DC[:, c].any()]
    return {
        "micro_f1": _f1(given_DC, true_DC),
        "macro_f1": float(np.mean([_f1(given_DC[:, c], true_DC[:, c]) for c in seen])) if seen else 1.0,
        "exact_match": float((given_DC == true_DC).all(1).mean()),
    }

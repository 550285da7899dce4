"""The metrics of a fine-tuned model on labelled documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from pretrain.core.batch import NO_VOCABULARY, Context, Example, Vocabulary
from pretrain.core.bounds import Whole
from pretrain.core.encoding import Encoder
from pretrain.core.errors import PretrainError, brief, listed
from pretrain.core.folders import corpus_of
from pretrain.core.method import InnerObjective, Ref
from pretrain.core.models.families import positions_of
from pretrain.core.models.heads import answers_with_labels, labels_of, other_column
from pretrain.core.quick.confusion import Mistake, confusion_of, wrong_answers
from pretrain.corpus.examples import Examples
from pretrain.corpus.store import Corpus
from pretrain.evaluation import Evaluation, Learnt, Measured, Yardsticks
from pretrain.evaluation.tasks import _word_counts as word_counts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document
    from pretrain.objectives.labelled import FineTuning

BINS = 15  # of confidence, as in the paper
BASELINES = {"majority", "mse_of_mean"}  # of the documents alone, which say nothing of the model


def check_head(objective: FineTuning, model: PreTrainedModel) -> None:
    """Refuse a model without a head that gives labels, where the objective's answers are its own."""
    inner = getattr(objective, "wrapped", objective)
    if inner.headed and not answers_with_labels(model):
        raise PretrainError(
            f"task: a {type(model).__name__} gives no labels; accepted: a checkpoint that {inner.name} has trained, or "
            "another evaluation"
        )


@dataclass(frozen=True)
class Task(Evaluation):
    """GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding (arXiv:1804.07461).

    What the fine-tuning `objective` (`classification`, or `{method: seq2seq, target: summary}`) measures on documents
    with its columns: accuracy (`majority`: that of always answering the commonest class), macro F1 and Matthews'
    correlation of classes, with how often each is taken for which, and `label_loss`, the mean of -log p(true label)
    in nats, `confidence`, the mean probability of what is answered, and `ece`, how far that is from the share that is
    right (Guo et al., arXiv:1706.04599, over 15 bins); mean squared error (`mse_of_mean`: that of the mean),
    Pearson's and Spearman's correlation of numbers; F1 of entities; exact match, F1 of words and ROUGE-L of answers.
    Of classes the wrong answers are listed too, the most confident first. Where the training documents are there,
    counts of words and of character n-grams learn from them as a yardstick, `accuracy_of_counts` or `mse_of_counts`:
    the best of naive Bayes with two smoothings and of ridge regressions on tf-idf, by cross-validation on these
    documents; which it was stands beside (`yardsticks`). Documents are cut to `length` tokens (0: the length that the
    checkpoint was trained at); those of a class that was never learnt are passed over (`unlearnt` says how many); an
    objective that shows training examples beside each document takes them from the corpus `pool`. Intervals:
    bootstrap over documents, `resamples` times.
    """

    version: ClassVar[int] = 3  # 2: counts beside it are the best of several, wrong answers listed; 3: confidence

    objective: InnerObjective = "classification"
    pool: Ref = ""
    length: Whole = 0
    resamples: Whole = 200
    seed: Whole = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not hasattr(self.method, "predict"):
            raise PretrainError(f"task: objective {self.method.name!r}: accepted: one that learns from labels")

    @cached_property
    def method(self) -> FineTuning:
        """The objective."""
        return self.held()["objective"]

    @property
    def columns(self) -> tuple[str, ...]:
        """The objective's."""
        return self.method.columns

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The objective's metrics over all documents and by domain."""
        objective = self.method
        check_head(objective, model)
        labels = labels_of(model)
        known, whole_count = self._known(documents, labels)
        if not known:
            raise PretrainError(f"task: no document has all of {', '.join(objective.columns)}: accepted: at least one")
        self._check_learnt(known[0], labels, model)
        examples = [Example(document, 0, number) for number, document in enumerate(known)]
        length = self.length or min(512, positions_of(model) or 512)
        context = Context(
            Vocabulary.of(tokenizer), length, np.random.default_rng(self.seed), encoder=Encoder(tokenizer),
            labels=labels, pool=self._pool(tokenizer),
        )  # fmt: skip
        answered, true = objective.answered(model, examples, context), objective.expected(examples, context)
        predicted, nll = answered.values, answered.nll
        sure_N = np.array(answered.probabilities, float)
        right_N = (
            np.array([answer == label for answer, label in zip(predicted, true, strict=True)])
            if len(sure_N)
            else sure_N
        )

        def metrics(chosen: Sequence[int] | NDArray[np.int64]) -> dict[str, float]:
            measured: dict[str, float] = objective.metrics([predicted[i] for i in chosen], [true[i] for i in chosen])
            measured |= {"label_loss": float(np.mean([nll[i] for i in chosen]))} if nll else {}
            return measured | (sureness(right_N[chosen], sure_N[chosen]) if len(sure_N) else {})

        names = [d.get("domain") or "" for d in known]
        domains = {name: [i for i, other in enumerate(names) if other == name] for name in sorted({*names} - {""})}
        by_domain = {name: metrics(chosen) for name, chosen in domains.items()} if len(domains) > 1 else {}
        whole = metrics(np.arange(len(known)))
        rows: list[dict[str, str | float]] = [
            {"domain": name, "nll": value, "targets": 1.0} for name, value in zip(names, nll, strict=bool(nll))
        ]
        whole |= {"documents": float(len(known))}
        whole |= {"unlearnt": float(whole_count - len(known))} if len(known) < whole_count else {}
        confusion = confusion_of(objective.classes(predicted), objective.classes(true))
        return Measured(
            whole, by_domain, self._intervals(metrics, len(known)), rows, confusion,
            mistakes=self._mistakes(known, true, predicted, answered.probabilities),
        )  # fmt: skip

    def _mistakes(
        self, documents: Sequence[Document], true: Sequence[object], predicted: Sequence[object],
        probabilities: Sequence[float],
    ) -> list[Mistake]:  # fmt: skip
        """The wrong answers of a classifier, the most confident first."""
        if not probabilities:
            return []
        *columns, _ = self.method.columns
        texts = ["\n".join(str(document[column]) for column in columns) for document in documents]
        names, answered = self.method.classes(true), self.method.classes(predicted)
        return wrong_answers(texts, names, answered, probabilities, [document.get("id") for document in documents])

    def _known(self, documents: Sequence[Document], labels: Sequence[str]) -> tuple[list[Document], int]:
        """The documents that are measured, and how many have a label at all."""
        *_, label = columns = self.method.columns
        whole = [d for d in documents if all(d.get(column) is not None for column in columns)]
        learnt = [d for d in whole if self.method.learnt(d[label], labels)]
        return learnt or whole, len(whole)  # of none at all the objective says what is wrong

    def _check_learnt(self, document: Document, labels: Sequence[str], model: PreTrainedModel) -> None:
        """Refuse documents none of which has a label that was learnt, where it is known that another column's were."""
        column = self.method.columns[-1]
        other = "" if self.method.learnt(document[column], labels) else other_column(model, column)
        if other:
            value, name = str(document[column]), document.get("id")
            raise PretrainError(
                f"task: document {name!r}: {column} {brief(value)}{other}; accepted: documents with its labels "
                f"({listed(labels, value)}), or a model that has learnt {column!r}"
            )

    def yardsticks(self, model: PreTrainedModel, documents: Sequence[Document], learnt: Learnt) -> Yardsticks:
        """What counts in the model's training documents reach: `accuracy_of_counts`, or `mse_of_counts`."""
        labels, columns = labels_of(model), self.method.columns
        context = Context(NO_VOCABULARY, 2, np.random.default_rng(0), labels=labels)
        known, _ = self._known(documents, labels)
        true = self.method.expected([Example(document, 0, n) for n, document in enumerate(known)], context)
        numbers = isinstance(true[0], float)
        if not numbers and not (isinstance(true[0], str) and self.method.classes(true[:1])):
            return Yardsticks()  # generated answers, tags of words
        answers = word_counts.answers(learnt(columns), known, columns, numbers=numbers)
        if answers is None:
            return Yardsticks()
        metric = "mse" if numbers else "accuracy"
        name = f"{metric}_of_counts"
        return Yardsticks({name: self.method.metrics(answers.values, true)[metric]}, {name: answers.words})

    def _pool(self, tokenizer: PreTrainedTokenizerBase) -> Examples | None:
        """The training examples of the corpus `pool`."""
        if not self.pool:
            return None
        return Examples(Corpus(corpus_of(Path(self.pool))), "train", tokenizer, self.method.columns)

    def _intervals(
        self, metrics: Callable[[Sequence[int] | NDArray[np.int64]], dict[str, float]], count: int
    ) -> dict[str, tuple[float, float]]:
        rng = np.random.default_rng(self.seed)
        drawn = [metrics(rng.integers(count, size=count)) for _ in range(self.resamples)]
        ends: dict[str, tuple[float, float]] = {}
        for name in [name for name in drawn[0] if name not in BASELINES] if drawn else ():
            low, high = np.quantile([resample[name] for resample in drawn], [0.025, 0.975])
            ends[name] = (float(low), float(high))
        return ends


def sureness(right_N: NDArray[np.bool_], sure_N: NDArray[np.float64]) -> dict[str, float]:
    """`confidence`, the mean probability of answers, and `ece`, its distance from the share right, by bins of it."""
    bin_N = np.minimum((sure_N * BINS).astype(int), BINS - 1)
    gap_M = np.bincount(bin_N, sure_N - right_N, minlength=BINS)
    return {"confidence": float(sure_N.mean()), "ece": float(np.abs(gap_M).sum() / len(sure_N))}

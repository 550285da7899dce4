"""Evaluations: `(model, tokenizer, documents) -> Measured`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from pretrain.core.method import Method
from pretrain.core.quick.confusion import Mistake

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document


# The documents that a model has learnt from, with the columns that are asked for; none where they are not known.
Learnt: TypeAlias = "Callable[[Sequence[str]], Sequence[Document]]"


@dataclass(frozen=True)
class Measured:
    """What an evaluation finds: metrics by name, the same by domain, and 95% intervals of those that have one.

    `documents`, where an evaluation gives them: for each document a row of the numbers that the metrics are made of, so
    that two models can be compared document by document. `confusion`, of a classifier: by true class how often each
    class was answered. `few` is the number of documents where it is too small for intervals. `listed`, of an evaluation
    that looks into the model: a row for each of its parts that it lists. `domain_intervals` are those of the metrics by
    domain, where a domain has documents enough. `yardsticks`: what a metric that is no model's is of, in words.
    `mistakes`, of a classifier: its wrong answers, the most confident first.
    """

    metrics: dict[str, float]
    domains: dict[str, dict[str, float]] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    documents: list[dict[str, str | float]] = field(default_factory=list)
    confusion: dict[str, dict[str, int]] = field(default_factory=dict)
    few: int = 0
    listed: list[dict[str, str | float]] = field(default_factory=list)
    domain_intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    yardsticks: dict[str, str] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)


@dataclass(frozen=True)
class Yardsticks:
    """Metrics of what is no model, and what some of them are of, in words."""

    metrics: dict[str, float] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)


class Evaluation(Method):
    """Base of the evaluations. `documents` are dicts with `text`, where known `domain`, and the `columns` asked for."""

    kind: ClassVar[str] = "evaluation"
    given: ClassVar[bool] = True  # what is measured are the documents that it is given, and no items of its own
    windowed: ClassVar[bool] = False  # whether its `length` is that of windows, which the positions must hold

    cut: ClassVar[bool] = False  # whether it reads the states of at most `length` tokens of a document
    estimated: ClassVar[bool] = True  # whether it reads, and no more: not of one that trains, generates or has items

    @property
    def predicted(self) -> float:
        """The share of a document's tokens that it has the model predict: none of what reads states alone."""
        return 0.0 if self.cut else 1.0

    @property
    def passes(self) -> float:
        """How often the model reads each document, without gradients; that windows overlap is counted besides."""
        return 1.0

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it needs besides `text` and `domain`."""
        return ()

    def yardsticks(self, model: PreTrainedModel, documents: Sequence[Document], learnt: Learnt) -> Yardsticks:
        """Metrics of what is no model, on the same documents, made of those that the model has `learnt` from."""
        return Yardsticks()

    @abstractmethod
    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The metrics on the documents."""
        raise NotImplementedError

"""Learning from labelled documents: what the objectives here have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, NamedTuple, TypeVar

from pretrain.core.batch import Batch, Context, Example, Row, Vocabulary, to_device
from pretrain.core.errors import PretrainError
from pretrain.core.models.features import evaluating
from pretrain.objectives import Objective

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Answer = TypeVar("Answer")  # to an example: a label, a number, a text, tags


class Answered(NamedTuple, Generic[Answer]):
    """What a model says of examples; of classes -log p of the true one, in nats, and p of the answered one."""

    values: list[Answer]
    nll: Sequence[float] = ()
    probabilities: Sequence[float] = ()


class FineTuning(Objective, Generic[Answer]):
    """Base of the objectives on labelled documents. `prepare` is given `Example`s and sees `context.encoder`."""

    reads: ClassVar[Literal["rows", "examples"]] = "examples"
    predicted: ClassVar[float] = 0.0  # the head is one of labels
    headed: ClassVar[bool] = False  # the answers are those of a head of its own, which other models have not
    fill: ClassVar[Literal["longest", "rows", "apart"]] = "longest"  # what a batch makes of its inputs

    def __post_init__(self) -> None:
        """No column is read in two places: what is true of a document is not among its inputs."""
        super().__post_init__()
        with suppress(ValueError):  # of what is no prompt, which the objective refuses itself
            twice = next((column for column in self.columns if self.columns.count(column) > 1), None)
            if twice is not None:
                given = [each.name for each in fields(self) if getattr(self, each.name) == twice != each.default]
                raise PretrainError(
                    f"{self.name}: {''.join(given[:1]) or 'column'} {twice!r} is read in another place too; "
                    "accepted: a column for each",
                    place=tuple(given[:1]),
                )

    @property
    def task(self) -> str:
        """What a model made anew is before it is given its head."""
        return "base"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that each document must have."""
        return ("text",)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """All that `metrics` may return, to check what is asked for before anything runs; empty: that is not known."""
        return ()

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """The columns that go into an input, in groups of which each is filled up to its longest by itself."""
        return (self.columns[:-1] or self.columns,)

    def labels(self, values: Iterable[object]) -> tuple[str, ...]:
        """The names of the classes among the values of the last of `columns`."""
        return ()

    def ready(
        self, model: PreTrainedModel, labels: Sequence[str], vocabulary: Vocabulary, seed: int
    ) -> PreTrainedModel:
        """The model with the head that the objective trains."""
        return model

    def begin(self, model: PreTrainedModel, values: Iterable[object], *, fresh: bool) -> None:
        """Called before training with the training documents' values of the last of `columns`.

        `fresh`: the head is new, and has not been trained before.
        """
        return

    def end(self, model: PreTrainedModel, stored: torch.dtype | None) -> torch.dtype | None:
        """Called before the trained model is written in the type `stored` (None: its own); the type that it needs."""
        return stored

    @abstractmethod
    def prepare(self, rows: Sequence[Row] | Sequence[Example], context: Context) -> Batch:
        """Turn examples into tensors; `tokens` among them, how many they hold."""
        raise NotImplementedError

    @abstractmethod
    def predict(self, model: PreTrainedModel, batch: Batch, context: Context) -> list[Answer]:
        """What the model says of each example of a batch."""
        raise NotImplementedError

    def answers(self, model: PreTrainedModel, batch: Batch, context: Context) -> Answered[Answer]:
        """What `predict` says, and of classes how likely the true and the answered are held."""
        return Answered(self.predict(model, batch, context))

    @abstractmethod
    def metrics(self, predictions: Sequence[Answer], references: Sequence[Answer]) -> dict[str, float]:
        """How well predictions fit the examples' references."""
        raise NotImplementedError

    def learnt(self, value: object, labels: Sequence[str]) -> bool:
        """Whether what is true of a document, the last of `columns`, is among the classes that were learnt."""
        return True

    def classes(self, answers: Sequence[Answer]) -> list[str]:
        """The classes among answers or references, one after another; none where they are no classes."""
        return []

    @abstractmethod
    def expected(self, examples: Sequence[Example], context: Context) -> list[Answer]:
        """What `metrics` compares the predictions with."""
        raise NotImplementedError

    def predictions(
        self, model: PreTrainedModel, examples: Sequence[Example], context: Context, batch: int = 32
    ) -> list[Answer]:
        """What the model says of the examples, in order; each is predicted beside others of its length."""
        return self.answered(model, examples, context, batch).values

    def answered(
        self, model: PreTrainedModel, examples: Sequence[Example], context: Context, batch: int = 32
    ) -> Answered[Answer]:
        """The `answers` to the examples, in order."""
        context = replace(context, predicting=True)
        order = sorted(range(len(examples)), key=lambda i: len(str(examples[i].columns.get("text"))))
        read, values, nll, probabilities = list[int](), list[Answer](), list[float](), list[float]()
        with evaluating(model):
            for start in range(0, len(order), batch):
                chosen = order[start : start + batch]
                prepared = self.prepare([examples[i] for i in chosen], context)
                answers = self.answers(model, to_device(prepared, model.device), context)
                read += chosen
                values += answers.values
                nll += answers.nll
                probabilities += answers.probabilities
        places = sorted(range(len(read)), key=read.__getitem__)
        nll, probabilities = ([each[p] for p in places if each] for each in (nll, probabilities))
        return Answered([values[p] for p in places], nll, probabilities)

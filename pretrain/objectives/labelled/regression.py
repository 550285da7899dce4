"""Regression: a pretrained model with a new last layer of one output learns a number for each document or pair."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsFloat

import torch
from torch import nn

from pretrain.core.batch import Batch, Context, Example, Row, Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.models.heads import NUMBER, with_head
from pretrain.objectives import Loss
from pretrain.objectives._fine_tuning import classified, examples_of, named, read
from pretrain.objectives._metrics import regression
from pretrain.objectives.labelled import FineTuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Regression(FineTuning[float]):
    """BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding (arXiv:1810.04805).

    Fine-tuning as the classification does, with one output y and the loss (y - `label`)², as the paper's task STS-B.
    """

    label: str = "label"
    text: str = "text"
    pair: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The text's, the pair's and the number's."""
        return (self.text, *([self.pair] if self.pair else []), self.label)

    def labels(self, values: Iterable[object]) -> tuple[str, ...]:
        """One output; the values must be numbers."""
        for value in values:
            _number(value, self.label)
        return (NUMBER,)

    def ready(
        self, model: PreTrainedModel, labels: Sequence[str], vocabulary: Vocabulary, seed: int
    ) -> PreTrainedModel:
        """The model with one output."""
        return with_head(model, "sequence", labels, vocabulary, seed=seed)

    def prepare(self, rows: Sequence[Row] | Sequence[Example], context: Context) -> Batch:
        """`tokens_BL`, `mask_BL`, `segment_BL` and `number_B`."""
        examples = examples_of(rows, self.name)
        batch = read(examples, self.text, self.pair, context)
        batch["number_B"] = torch.tensor(self.expected(examples, context))
        batch["weight"] = torch.tensor(len(examples))
        return batch

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean squared error."""
        output_B = classified(model, batch).float().squeeze(-1)
        return Loss(nn.functional.mse_loss(output_B, batch["number_B"]), {})

    def predict(self, model: PreTrainedModel, batch: Batch, context: Context) -> list[float]:
        """A number for each example."""
        return classified(model, batch).float().squeeze(-1).tolist()

    def expected(self, examples: Sequence[Example], context: Context) -> list[float]:
        """The numbers."""
        return [_number(example.columns[self.label], self.label, f"{named(example)}: ") for example in examples]

    def metrics(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        """Mean squared error, Pearson's and Spearman's correlation."""
        return regression(predictions, references)


def _number(value: object, column: str, whose: str = "") -> float:
    if isinstance(value, str | bytes | SupportsFloat):
        with suppress(TypeError, ValueError):
            number = float(value)
            if math.isfinite(number):
                return number
    raise PretrainError(
        f"regression: {whose}column {column!r} holds {value!r}: accepted: numbers; numbers: [{column}] in its source "
        "of files names the row, and with on_error: skip passes it over"
    )

"""Regression: a pretrained model with a new last layer of one output learns a number for each document or pair."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, SupportsFloat

import torch
from torch import nn

from pretrain.core.batch import Batch, Context, Example, Row, Vocabulary
from pretrain.core.errors import PretrainError, warn
from pretrain.core.models.heads import LOGARITHMS, NUMBER, last_linear, with_head
from pretrain.core.quick.quantities import WIDE, decades
from pretrain.objectives import Loss
from pretrain.objectives._fine_tuning import classified, examples_of, named, read
from pretrain.objectives._metrics import log_error, regression
from pretrain.objectives.labelled import FineTuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FAR = 10.0  # labels that lie further from 0 take long to reach; STS-B's are 0 to 5
METRICS = ("mse", "mse_of_mean", "pearson", "spearman")
ROUNDED = 0.01  # of their deviation, by which written numbers may be off
SCALE = "pretrain_scale"  # the attribute of a last layer that learns standardised numbers


class Scale(NamedTuple):
    """What the outputs of a last layer are multiplied by, and what is added, to be numbers as the labels are."""

    mean: float = 0.0
    deviation: float = 1.0


def scale_of(model: nn.Module) -> Scale:
    """The scale that the last layer learns in; that of the labels where it is not standardised."""
    return getattr(last_linear(model), SCALE, Scale())


@dataclass(frozen=True)
class Regression(FineTuning[float]):
    """BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding (arXiv:1810.04805).

    Fine-tuning as the classification does, with one output y and the loss (y - `label`)², as the paper's task STS-B.

    An optimiser that moves a weight by its rate in each step is long on its way to labels that lie around 20,000. With
    `standardise` it learns (`label` - m) / s instead, m the mean and s the standard deviation of the training labels
    (0 and the root mean square for a last layer without bias). What is predicted and measured are numbers as the labels
    are, and so are the outputs of what is written: s (w · h + b) + m = (s w) · h + (s b + m).

    Of numbers that span decades, as prices do, the squared error is that of the largest. With `log` it learns ln(label)
    of labels above 0. What is predicted and measured are numbers as the labels are, `mse_of_log` is the squared error
    of natural logarithms; the outputs of what is written are logarithms, as its config says.
    """

    headed: ClassVar[bool] = True

    label: str = "label"
    text: str = "text"
    pair: str | None = None
    standardise: bool = False
    log: bool = False

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Those of `metrics`."""
        return (*METRICS, *(["mse_of_log"] if self.log else []))

    @property
    def columns(self) -> tuple[str, ...]:
        """The text's, the pair's and the number's."""
        return (self.text, *([self.pair] if self.pair else []), self.label)

    def labels(self, values: Iterable[object]) -> tuple[str, ...]:
        """One output; the values must be numbers."""
        for value in values:
            self._learnt(_number(value, self.label))
        return (NUMBER,)

    def ready(
        self, model: PreTrainedModel, labels: Sequence[str], vocabulary: Vocabulary, seed: int
    ) -> PreTrainedModel:
        """The model with one output."""
        return with_head(model, "sequence", labels, vocabulary, seed=seed)

    @torch.no_grad()
    def begin(self, model: PreTrainedModel, values: Iterable[object], *, fresh: bool) -> None:
        """Let the last layer learn standardised numbers; where none are asked for, say so of labels far from 0."""
        if self.log or hasattr(model.config, LOGARITHMS):
            setattr(model.config, LOGARITHMS, self.log)
        numbers = [_number(value, self.label) for value in values]
        if not self.log and decades(numbers) >= WIDE:
            warn(
                f"regression: the numbers in {self.label!r} span {decades(numbers):.1f} decades, so that the error is "
                "that of the largest; log: true learns their logarithms"
            )
        number_N = torch.tensor([self._learnt(number) for number in numbers], dtype=torch.float64)
        mean, deviation = float(number_N.mean()), float(number_N.std(correction=0))
        if not self.standardise:
            if max(abs(mean), deviation) > FAR:
                warn(
                    f"regression: the numbers in {self.label!r} lie around {mean:.4g} ± {deviation:.2g}, which takes "
                    "many steps to reach; standardise: true learns them by their mean and deviation"
                )
            return
        layer = last_linear(model)
        if layer is None:
            raise PretrainError(
                f"regression: standardise: true: a {type(model).__name__} has no last layer that could take the scale "
                "in; accepted: false"
            )
        if layer.bias is None:
            mean, deviation = 0.0, float(number_N.square().mean().sqrt())
        setattr(layer, SCALE, Scale(mean, deviation or 1.0))
        if not fresh:  # what it gives so far stays the same
            layer.weight.div_(deviation or 1.0)
            if layer.bias is not None:
                layer.bias.sub_(mean).div_(deviation or 1.0)

    @torch.no_grad()
    def end(self, model: PreTrainedModel, stored: torch.dtype | None) -> torch.dtype | None:
        """Take the scale into the last layer; a narrow type that would move the mean is not written."""
        layer = last_linear(model)
        if layer is None or not hasattr(layer, SCALE):
            return stored
        scale = scale_of(model)
        delattr(layer, SCALE)
        layer.weight.mul_(scale.deviation)
        if layer.bias is None:
            return stored
        layer.bias.mul_(scale.deviation).add_(scale.mean)
        if stored is not None and float((layer.bias.to(stored) - layer.bias).abs().max()) > ROUNDED * scale.deviation:
            warn(f"regression: {stored} cannot tell numbers of {scale.mean:.4g} ± {scale.deviation:.2g} apart: "
                 f"written in {layer.bias.dtype}")  # fmt: skip
            return None
        return stored

    def prepare(self, rows: Sequence[Row] | Sequence[Example], context: Context) -> Batch:
        """`tokens_BL`, `mask_BL`, `segment_BL` and `number_B`."""
        examples = examples_of(rows, self.name)
        batch = read(examples, self.text, self.pair, context)
        batch["number_B"] = torch.tensor([self._learnt(number) for number in self.expected(examples, context)])
        batch["weight"] = torch.tensor(len(examples))
        return batch

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean squared error; of standardised numbers, where these are learnt."""
        scale, output_B = scale_of(model), classified(model, batch).float().squeeze(-1)
        return Loss(nn.functional.mse_loss(output_B, (batch["number_B"] - scale.mean) / scale.deviation), {})

    def predict(self, model: PreTrainedModel, batch: Batch, context: Context) -> list[float]:
        """A number for each example."""
        if getattr(model.config, LOGARITHMS, False) is not self.log:
            words = ("logarithms", "true") if not self.log else ("no logarithms", "false")
            raise PretrainError(
                f"regression: log: {str(self.log).lower()}: the model has learnt {words[0]}; accepted: {words[1]}"
            )
        scale = scale_of(model)
        output_B = classified(model, batch).float().squeeze(-1) * scale.deviation + scale.mean
        return (output_B.exp() if self.log else output_B).tolist()

    def expected(self, examples: Sequence[Example], context: Context) -> list[float]:
        """The numbers."""
        return [_number(example.columns[self.label], self.label, f"{named(example)}: ") for example in examples]

    def metrics(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        """Mean squared error, Pearson's and Spearman's correlation; with `log` also the error of the logarithms."""
        metrics = regression(predictions, references)
        return metrics | ({"mse_of_log": log_error(predictions, references)} if self.log else {})

    def _learnt(self, number: float) -> float:
        """What is learnt in a number's place."""
        if not self.log:
            return number
        if number <= 0:
            raise PretrainError(
                f"regression: log: true: column {self.label!r} holds {number:g}; accepted: numbers above 0, or "
                "log: false"
            )
        return math.log(number)


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

"""Classification: a pretrained model with a new last layer learns the labels of documents or of pairs of texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from pretrain.core.batch import Batch, Context, Example, Row, Vocabulary
from pretrain.core.bounds import ProperShare
from pretrain.core.errors import PretrainError, brief, listed, nearest
from pretrain.core.models.heads import labels_of, with_head
from pretrain.objectives import Loss
from pretrain.objectives._fine_tuning import classified, confidences, examples_of, named, read, surprises, texts_of
from pretrain.objectives._metrics import classification
from pretrain.objectives.labelled import Answered, FineTuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Classification(FineTuning[str]):
    """BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding (arXiv:1810.04805).

    Fine-tuning: the input is `begin text end`, with a `pair` `begin text end pair end`; a new linear layer on the state
    of one position (`transformers`' classifier of the family: the first token's or a causal model's last) gives the
    logits of the classes; the loss is the mean of -log p(`label` | text). The classes are those of the training split.
    The checkpoint is `transformers`' AutoModelForSequenceClassification, with the names of the classes.
    """

    headed: ClassVar[bool] = True
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "majority", "macro_f1", "matthews")

    label: str = "label"
    text: str = "text"
    pair: str | None = None
    label_smoothing: ProperShare = 0.0

    @property
    def columns(self) -> tuple[str, ...]:
        """The text's, the pair's and the label's."""
        return (self.text, *([self.pair] if self.pair else []), self.label)

    def labels(self, values: Iterable[object]) -> tuple[str, ...]:
        """All that occur, sorted; numbers by value."""
        distinct = set(values)
        numbers = [value for value in distinct if isinstance(value, int | float)]
        names = tuple(map(str, sorted(numbers)) if len(numbers) == len(distinct) else sorted(map(str, distinct)))
        if len(names) < 2:
            raise PretrainError(f"classification: column {self.label!r} holds {len(names)} label: accepted: 2 or more")
        return names

    def ready(
        self, model: PreTrainedModel, labels: Sequence[str], vocabulary: Vocabulary, seed: int
    ) -> PreTrainedModel:
        """The model as a classifier of the labels."""
        return with_head(model, "sequence", labels, vocabulary, seed=seed)

    def prepare(self, rows: Sequence[Row] | Sequence[Example], context: Context) -> Batch:
        """`tokens_BL`, `mask_BL`, `segment_BL` and `label_B`, -100 where an example has no label."""
        examples = examples_of(rows, self.name)
        batch = read(examples, self.text, self.pair, context)
        numbers = {name: number for number, name in enumerate(context.labels)}
        labels = [example.columns.get(self.label) for example in examples]
        for example, value in zip(examples, labels, strict=True):
            if value is not None and str(value) not in numbers:
                raise PretrainError(
                    f"classification: {named(example)}: {self.label} {brief(value)}{nearest(str(value), numbers)}: "
                    f"accepted: a label of the training documents ({listed(list(numbers), str(value))})"
                )
        batch["label_B"] = torch.tensor([-100 if value is None else numbers[str(value)] for value in labels])
        batch["weight"] = (batch["label_B"] != -100).sum()
        return batch

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean cross-entropy of the labels; part `accuracy`."""
        logits_BC, label_B = classified(model, batch).float(), batch["label_B"]
        count = (label_B != -100).sum().clamp(min=1)
        value = nn.functional.cross_entropy(
            logits_BC, label_B, reduction="sum", ignore_index=-100, label_smoothing=self.label_smoothing
        )
        right = (logits_BC.detach().argmax(-1) == label_B).sum() / count
        return Loss(value / count, {"accuracy": right})

    def predict(self, model: PreTrainedModel, batch: Batch, context: Context) -> list[str]:
        """The likeliest label of each example."""
        return self.answers(model, batch, context).values

    def answers(self, model: PreTrainedModel, batch: Batch, context: Context) -> Answered[str]:
        """The likeliest label of each example with its p, and -log p of its true one."""
        names, logits_BC = labels_of(model), classified(model, batch)
        likeliest = [names[number] for number in logits_BC.argmax(-1).tolist()]
        return Answered(likeliest, surprises(logits_BC, batch["label_B"]), confidences(logits_BC))

    def expected(self, examples: Sequence[Example], context: Context) -> list[str]:
        """The labels."""
        return texts_of(examples, self.label)

    def learnt(self, value: object, labels: Sequence[str]) -> bool:
        """Whether it is one of the labels."""
        return str(value) in labels

    def classes(self, answers: Sequence[str]) -> list[str]:
        """The labels."""
        return list(answers)

    def metrics(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Accuracy, that of the commonest class, macro F1, Matthews' correlation."""
        return classification(predictions, references)

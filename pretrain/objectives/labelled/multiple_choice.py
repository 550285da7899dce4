"""Multiple choice: a pretrained model with a new last layer of one output chooses among the answers to a prompt.

Shape letters: B questions of a batch, C choices, N choices of all questions, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch, Context, Example, Row, Vocabulary
from pretrain.core.errors import PretrainError, brief
from pretrain.core.models.heads import NUMBER, with_head
from pretrain.objectives import Loss
from pretrain.objectives._fine_tuning import classified, examples_of, framed, inputs_of, named, surprises
from pretrain.objectives._metrics import classification
from pretrain.objectives.labelled import Answered, FineTuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class MultipleChoice(FineTuning[str]):
    """When Does Pretraining Help? Assessing Self-Supervised Learning for Law and the CaseHOLD Dataset (arXiv:2104.08671).

    Which of several holdings does a decision cite? Each of a question's choices is read after the prompt, as
    `begin text end choice end`, a new linear layer on the state of one position gives its score, and the loss is the
    mean of -log softmax over the question's choices at the right one. `choices` is a column of lists, which may differ
    in length, or the names of several columns, one for each choice (CaseHOLD's `holding_0` to `holding_4`); `label` is
    the number of the right one, from 0. Metrics are of these numbers: accuracy, and macro F1 as in the paper. The
    weights are those of `transformers`' AutoModelForMultipleChoice; the checkpoint is a classifier with one output,
    which more families have. In the authors' scripts CaseHOLD is learnt for 3 epochs at 5e-6, in rows of 128 tokens.
    """  # noqa: E501

    headed: ClassVar[bool] = True
    fill: ClassVar[Literal["longest", "rows", "apart"]] = "apart"
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "majority", "macro_f1", "matthews")

    label: str = "label"
    text: str = "text"
    choices: tuple[str, ...] = ("choices",)

    @property
    def columns(self) -> tuple[str, ...]:
        """The prompt's, those of the choices and the label's."""
        return (self.text, *self.choices, self.label)

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """The prompt with each of the choices."""
        return tuple((self.text, column) for column in self.choices)

    def labels(self, values: Iterable[object]) -> tuple[str, ...]:
        """One output, a choice's score."""
        return (NUMBER,)

    def ready(
        self, model: PreTrainedModel, labels: Sequence[str], vocabulary: Vocabulary, seed: int
    ) -> PreTrainedModel:
        """The model with one output."""
        return with_head(model, "sequence", labels, vocabulary, seed=seed)

    def prepare(self, rows: Sequence[Row] | Sequence[Example], context: Context) -> Batch:
        """The inputs of all choices, a question's after another's, `choice_BC` (True where there is one), `label_B`."""
        examples = examples_of(rows, self.name)
        choices = [self._choices(example) for example in examples]
        counts = [len(each) for each in choices]
        prompts = [str(example.columns[self.text]) for example in examples for _ in self._choices(example)]
        batch = inputs_of(framed(context, prompts, [choice for each in choices for choice in each]), context)
        batch["choice_BC"] = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        batch["label_B"] = torch.tensor([self._label(each, n) for each, n in zip(examples, counts, strict=True)])
        batch["weight"] = (batch["label_B"] >= 0).sum()
        return batch

    def _choices(self, example: Example) -> list[str]:
        values = [example.columns.get(column) for column in self.choices]
        first = values[0] if values else None
        choices = first if len(values) == 1 and isinstance(first, list | tuple) else values
        if len(choices) < 2 or any(choice is None for choice in choices):
            where = ", ".join(self.choices)
            raise PretrainError(
                f"{self.name}: {named(example)}: choices in {where}: {brief(choices)}: accepted: a column of lists of "
                "2 or more, or several columns"
            )
        return [str(choice) for choice in choices]

    def _label(self, example: Example, count: int) -> int:
        value = example.columns.get(self.label)
        if value is None:
            return -100
        written = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
        if not written.isdecimal() or int(written) >= count:
            raise PretrainError(
                f"{self.name}: {named(example)}: {self.label} {brief(value)}: accepted: the number of the right "
                f"choice, 0 to {count - 1}"
            )
        return int(written)

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """`score_BC` in float32, minus infinity where a question has no more choices."""
        score_N, choice_BC = classified(model, batch).float().squeeze(-1), batch["choice_BC"]
        return score_N.new_full(choice_BC.shape, -torch.inf).masked_scatter(choice_BC, score_N)

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean cross-entropy of the right choices; part `accuracy`."""
        score_BC, label_B = self.scores(model, batch), batch["label_B"]
        count = (label_B != -100).sum().clamp(min=1)
        value = nn.functional.cross_entropy(score_BC, label_B, reduction="sum", ignore_index=-100)
        right = (score_BC.detach().argmax(-1) == label_B).sum() / count
        return Loss(value / count, {"accuracy": right})

    def predict(self, model: PreTrainedModel, batch: Batch, context: Context) -> list[str]:
        """The number of the choice that each question's highest score is of."""
        return self.answers(model, batch, context).values

    def answers(self, model: PreTrainedModel, batch: Batch, context: Context) -> Answered[str]:
        """The same, with -log p of the right choice."""
        score_BC = self.scores(model, batch)
        return Answered([*map(str, score_BC.argmax(-1).tolist())], surprises(score_BC, batch["label_B"]))

    def expected(self, examples: Sequence[Example], context: Context) -> list[str]:
        """The numbers of the right choices."""
        return [str(self._label(example, len(self._choices(example)))) for example in examples]

    def metrics(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Accuracy, that of the commonest number, macro F1 over the numbers, Matthews' correlation."""
        return classification(predictions, references)

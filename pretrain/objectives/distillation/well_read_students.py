"""A pretrained compact classifier learns what a larger fine-tuned one says of documents, labelled or not.

Shape letters: B documents of a batch, L tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import nn

from pretrain.core.batch import Batch, Context, Example, Row, Vocabulary
from pretrain.core.bounds import NonNegative, Positive
from pretrain.core.checkpoint import load, load_config
from pretrain.core.encoding import Encoder
from pretrain.core.errors import PretrainError, brief, listed, nearest
from pretrain.core.folders import checkpoint_of
from pretrain.core.method import Ref
from pretrain.core.models.fast import accelerate
from pretrain.core.models.heads import HEADS, NUMBER, labels_of, with_head
from pretrain.core.quick.vocabulary import check_named, labels_in
from pretrain.corpus.shards import tokenizer_fingerprint
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.objectives import Loss
from pretrain.objectives._distil import Teacher
from pretrain.objectives._fine_tuning import classified, examples_of, read
from pretrain.objectives._metrics import classification
from pretrain.objectives.labelled import FineTuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TAUGHT = "teacher_"  # before the names of the teacher's own input in a batch


@dataclass(frozen=True)
class WellReadStudents(FineTuning[str | None]):
    """Well-Read Students Learn Better: On the Importance of Pre-training Compact Models (arXiv:1908.08962).

    The second of the three stages pre-train, distil, fine-tune. With p the student's and q the teacher's predictions,
    p_T and q_T at `temperature` T, over the documents of a batch, of which some may have a `label`:

        L = mean of [soft · T² · Σ -q_T log p_T  +  hard · -log p(label), where there is one]

    The `teacher`, a classifier that `classification` has trained, is only read; the student's head has its labels.
    Where its tokenizer is another than the student's, or its positions are fewer, each reads the text in its own
    tokens, as many as fit. `label: null` leaves labels unread. Evaluate with `task` and `classification`.
    """

    headed: ClassVar[bool] = True

    teacher: Ref
    label: str | None = "label"
    text: str = "text"
    pair: str | None = None
    soft: NonNegative = 1.0
    hard: NonNegative = 0.0
    temperature: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hard and self.label is None:
            raise PretrainError(f"well_read_students: hard {self.hard}: accepted: 0 without a label", place=("hard",))

    @property
    def columns(self) -> tuple[str, ...]:
        """The text's and the pair's: a document may lack a label."""
        return (self.text, *([self.pair] if self.pair else []))

    def parts(self) -> tuple[str, ...]:
        """Labels are measured as `classification` does."""
        return ("classification",)

    def labels(self, values: Iterable[object]) -> tuple[str, ...]:
        """The teacher's, whatever the documents hold."""
        config = load_config(checkpoint_of(Path(self.teacher)))
        wanted = HEADS["sequence"]._model_mapping.get(type(config), None)
        names = tuple(name for _, name in sorted((config.id2label or {}).items()))
        check_named(Path(self.teacher), labels_in(config.to_dict()))
        if wanted is None or config.architectures != [wanted.__name__] or names == (NUMBER,):
            kind = "regression" if names == (NUMBER,) else ", ".join(config.architectures or ["no known model"])
            raise PretrainError(
                f"well_read_students: teacher {self.teacher!r} is a {kind}: accepted: a classifier of documents, as "
                "`classification` makes",
                place=("teacher",),
            )
        return names

    def ready(
        self, model: PreTrainedModel, labels: Sequence[str], vocabulary: Vocabulary, seed: int
    ) -> PreTrainedModel:
        """The model as a classifier of the teacher's labels."""
        return with_head(model, "sequence", labels, vocabulary, seed=seed)

    def modules(self, model: nn.Module) -> nn.Module:
        """The teacher."""
        self.labels(())
        teacher, _ = load(checkpoint_of(Path(self.teacher)), dtype=torch.float32)
        _order(teacher, model)
        accelerate(teacher)
        return Teacher(teacher)

    def prepare(self, rows: Sequence[Row] | Sequence[Example], context: Context) -> Batch:
        """The student's input and `label_B`, -100 without a label; the teacher's input where it is another."""
        assert context.encoder is not None, "examples come with an encoder"
        examples = examples_of(rows, self.name)
        batch = read(examples, self.text, self.pair, context)
        reading = _reading(self.teacher, context.encoder, context.length)
        if reading is not None:
            taught = replace(context, vocabulary=reading[0], encoder=reading[1], length=reading[2], cut=set())
            theirs = read(examples, self.text, self.pair, taught)
            batch |= {TAUGHT + name: tensor for name, tensor in theirs.items() if name != "tokens"}
        batch["label_B"] = torch.tensor([self._number(example, context.labels) for example in examples])
        batch["weight"] = torch.tensor(len(examples))
        return batch

    def _number(self, example: Example, labels: Sequence[str]) -> int:
        """The number of an example's label; -100 if it has none."""
        value = example.columns.get(self.label) if self.label else None
        if value is None:
            return -100
        if str(value) not in labels:
            raise PretrainError(
                f"well_read_students: {self.label} {brief(value)}{nearest(str(value), labels)}: "
                f"accepted: a label of the teacher ({listed(labels, str(value))}), or label: null"
            )
        return labels.index(str(value))

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The losses; parts `soft` (without T²), `hard`, and `agreement` with the teacher's likeliest labels."""
        assert isinstance(modules, Teacher), "the student reads a teacher: see `modules`"
        teacher_batch = {name.removeprefix(TAUGHT): tensor for name, tensor in batch.items() if name.startswith(TAUGHT)}
        ours_BC = classified(model, batch).float()
        with torch.no_grad():
            theirs_BC = classified(modules.model, teacher_batch or batch).float()[:, _order(modules.model, model)]
        q_BC = theirs_BC.div(self.temperature).softmax(-1)
        soft = -(q_BC * ours_BC.div(self.temperature).log_softmax(-1)).sum(-1).mean()
        hard = nn.functional.cross_entropy(ours_BC, batch["label_B"], reduction="sum", ignore_index=-100) / len(ours_BC)
        agreement = (ours_BC.detach().argmax(-1) == theirs_BC.argmax(-1)).float().mean()
        value = self.soft * self.temperature**2 * soft + self.hard * hard
        return Loss(value, {"soft": soft.detach(), "hard": hard.detach(), "agreement": agreement})

    def predict(self, model: PreTrainedModel, batch: Batch, context: Context) -> list[str | None]:
        """The likeliest label of each example."""
        names = labels_of(model)
        return [names[number] for number in classified(model, batch).argmax(-1).tolist()]

    def expected(self, examples: Sequence[Example], context: Context) -> list[str | None]:
        """The labels, None where there is none."""
        labels = [example.columns.get(self.label) if self.label else None for example in examples]
        return [None if value is None else str(value) for value in labels]

    def metrics(self, predictions: Sequence[str | None], references: Sequence[str | None]) -> dict[str, float]:
        """Accuracy, macro F1, Matthews' correlation over the documents with a label; nothing if none has."""
        pairs = zip(predictions, references, strict=True)
        known = [(str(predicted), true) for predicted, true in pairs if true is not None]
        return classification([predicted for predicted, _ in known], [true for _, true in known]) if known else {}


def _order(teacher: nn.Module, model: nn.Module) -> list[int]:
    """The teacher's numbers of the labels in the order of the student's."""
    theirs, ours = (labels_of(cast("PreTrainedModel", classifier)) for classifier in (teacher, model))
    if set(theirs) != set(ours):
        raise PretrainError(
            f"well_read_students: the student classifies {', '.join(ours)}: accepted: {', '.join(theirs)}, as the "
            "teacher, or a model without such a head"
        )
    return [theirs.index(name) for name in ours]


@lru_cache(maxsize=4)
def _reading(teacher: str, encoder: Encoder, length: int) -> tuple[Vocabulary, Encoder, int] | None:
    """How the teacher reads texts: its vocabulary, its encoder, how many tokens. None: just as the student."""
    folder = checkpoint_of(Path(teacher))
    tokenizer, config = load_tokenizer(folder), load_config(folder)
    most = getattr(config, "max_position_embeddings", None) or length
    if tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(encoder.tokenizer) and most >= length:
        return None
    return Vocabulary.of(tokenizer), Encoder(tokenizer), min(length, most)

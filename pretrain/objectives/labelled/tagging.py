"""Tagging: a pretrained model with a new last layer learns a tag for each word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from pretrain.core.batch import Batch, Context, Example, Row, Vocabulary
from pretrain.core.errors import PretrainError, brief, listed, nearest
from pretrain.core.models.heads import labels_of, with_head
from pretrain.objectives import Loss
from pretrain.objectives._fine_tuning import classified, examples_of, inputs_of, named
from pretrain.objectives._metrics import tagging
from pretrain.objectives._words import words_of_characters, words_of_tokens
from pretrain.objectives.labelled import FineTuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Tagging(FineTuning[list[str]]):
    """BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding (arXiv:1810.04805).

    Fine-tuning for named entities: words are what white space parts in `text`, `tags` holds one tag a word (a list, or
    text parted likewise); each word's tag is predicted from the state of its `first` token (the `last` for a causal
    model, which sees no more of the word before), and the loss is the mean of -log p(tag). Words beyond the model's
    length are not learnt, and predicted `O`.
    """

    headed: ClassVar[bool] = True
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "majority", "precision", "recall", "f1")

    tags: str = "tags"
    text: str = "text"
    token: Literal["first", "last"] = "first"

    @property
    def columns(self) -> tuple[str, ...]:
        """The text's and the tags'."""
        return (self.text, self.tags)

    def labels(self, values: Iterable[object]) -> tuple[str, ...]:
        """All tags that occur, sorted."""
        names = tuple(sorted({tag for value in values for tag in _tags(value)}))
        if len(names) < 2:
            raise PretrainError(f"tagging: column {self.tags!r} holds {len(names)} tag: accepted: 2 or more")
        return names

    def ready(
        self, model: PreTrainedModel, labels: Sequence[str], vocabulary: Vocabulary, seed: int
    ) -> PreTrainedModel:
        """The model as a classifier of tokens."""
        return with_head(model, "token", labels, vocabulary, seed=seed)

    def prepare(self, rows: Sequence[Row] | Sequence[Example], context: Context) -> Batch:
        """`tokens_BL`, `mask_BL`, `word_BL` (each word's number from 1 where its tag is read) and `label_BL`."""
        examples = examples_of(rows, self.name)
        assert context.encoder is not None, "examples come with an encoder"
        begin = [] if context.vocabulary.begin is None else [context.vocabulary.begin]
        end = [] if context.vocabulary.eos is None else [context.vocabulary.eos]
        room = context.length - len(begin) - len(end)
        inputs, places = [], []
        for place, example in enumerate(examples):
            ids, spans = context.encoder.spans(str(example.columns[self.text]))
            context.cut.update({place} if len(ids) > room else ())
            inputs.append(([*begin, *ids[:room], *end], len(begin) + min(len(ids), room) + len(end)))
            words = words_of_tokens(words_of_characters(str(example.columns[self.text])), spans, self.token)[:room]
            places.append([0] * len(begin) + words)
        batch = inputs_of(inputs, context)
        word_BL = torch.zeros_like(batch["tokens_BL"])
        for b, words in enumerate(places):
            word_BL[b, : len(words)] = torch.tensor(words, dtype=torch.long)
        numbers = {name: number for number, name in enumerate(context.labels)}
        label_BL = torch.full_like(word_BL, -100)
        for b, tags in enumerate(self.expected(examples, context)):
            for tag in tags:
                if tag not in numbers:
                    wrong = f"tagging: {named(examples[b])}: tag {brief(tag)}{nearest(tag, numbers)}"
                    raise PretrainError(f"{wrong}: accepted: {listed(list(numbers), tag)}")
            known = torch.tensor([-100, *(numbers[tag] for tag in tags)])
            label_BL[b] = known[word_BL[b]]
        batch |= {"word_BL": word_BL, "label_BL": label_BL, "weight": (label_BL != -100).sum()}
        batch["words_B"] = torch.tensor([len(tags) for tags in self.expected(examples, context)])
        return batch

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean cross-entropy of the words' tags; part `accuracy`."""
        logits_BLC, label_BL = classified(model, batch).float(), batch["label_BL"]
        count = (label_BL != -100).sum().clamp(min=1)
        value = nn.functional.cross_entropy(logits_BLC.flatten(0, 1), label_BL.flatten(), reduction="sum")
        right = (logits_BLC.detach().argmax(-1) == label_BL).sum() / count
        return Loss(value / count, {"accuracy": right})

    def predict(self, model: PreTrainedModel, batch: Batch, context: Context) -> list[list[str]]:
        """The likeliest tag of each word."""
        names, predicted_BL = labels_of(model), classified(model, batch).argmax(-1)
        outside = "O" if "O" in names else names[0]
        answers = []
        for word_L, predicted_L, words in zip(batch["word_BL"], predicted_BL, batch["words_B"].tolist(), strict=True):
            tags = [outside] * words
            for word, number in zip(word_L.tolist(), predicted_L.tolist(), strict=True):
                if word:
                    tags[word - 1] = names[number]
            answers.append(tags)
        return answers

    def expected(self, examples: Sequence[Example], context: Context) -> list[list[str]]:
        """The tags of each example's words."""
        references = []
        for example in examples:
            tags, words = _tags(example.columns[self.tags]), str(example.columns[self.text]).split()
            if len(tags) != len(words):
                raise PretrainError(
                    f"tagging: {named(example)} has {len(words)} words and {len(tags)} tags: accepted: as many"
                )
            references.append(tags)
        return references

    def learnt(self, value: object, labels: Sequence[str]) -> bool:
        """Whether all its tags are among them."""
        return set(_tags(value)) <= set(labels)

    def classes(self, answers: Sequence[list[str]]) -> list[str]:
        """The tags of all words."""
        return [tag for tags in answers for tag in tags]

    def metrics(self, predictions: Sequence[list[str]], references: Sequence[list[str]]) -> dict[str, float]:
        """Accuracy of words; precision, recall and F1 of entities."""
        return tagging(predictions, references)


def _tags(value: object) -> list[str]:
    if isinstance(value, str):
        return value.split()
    if not isinstance(value, Iterable):
        raise PretrainError(f"tagging: tags {value!r}: accepted: a list of tags, or a text of them")
    return [str(tag) for tag in value]

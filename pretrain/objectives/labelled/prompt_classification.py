"""Classification by a prompt: the label is the word that the model's own head puts into a template.

Shape letters: B examples of a batch, N inputs (each example once for each of its sets of demonstrations), L tokens,
C classes, E width, V vocabulary.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch, Context, Example, Row, Vocabulary
from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError, brief, listed, nearest
from pretrain.core.models.families import family, head, hidden
from pretrain.objectives import Loss
from pretrain.objectives._fine_tuning import confidences, examples_of, padded, surprises, texts_of
from pretrain.objectives._metrics import classification
from pretrain.objectives.labelled import Answered, FineTuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HOLE = "mask"  # the name of the template's hole for the label's word


@dataclass(frozen=True)
class PromptClassification(FineTuning[str]):
    """Making Pre-trained Language Models Better Few-shot Learners (arXiv:2012.15723).

    Prompt-based fine-tuning (LM-BFF): the columns of a document stand in a `template` with one hole, `words` gives each
    class y a word w(y) of one token, and with the state h at the hole and the rows of the language-model head

        p(y | x) = exp(w(y) · h) / sum over classes y' of exp(w(y') · h)

    Nothing is added to the model. A masked model reads the mask token in the hole, a `causal` one ends before it. With
    `demonstrations` a training example of each class other than x, drawn anew each time, is shown with its word filled
    in, after x (a causal model: before it); a prediction is that of the mean logits of `samples` such draws.
    `_prompt_words.choose_words` searches the words.
    """

    families: ClassVar[tuple[str, ...]] = ("causal", "masked")
    own_evaluation: ClassVar[bool] = True
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "majority", "macro_f1", "matthews")

    words: dict[str | int, str]
    template: str = "{text} It was {mask}."
    label: str = "label"
    lm: Literal["masked", "causal"] = "masked"
    demonstrations: bool = False
    samples: Count = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            pieces = [(n, s, c) for _, n, s, c in string.Formatter().parse(self.template) if n is not None]
        except ValueError as error:
            raise PretrainError(f"prompt_classification: template {self.template!r}: {error}") from error
        names = [name for name, _, _ in pieces]
        plain = all(name.isidentifier() and not form and not conversion for name, form, conversion in pieces)
        if not plain or names.count(HOLE) != 1 or len(names) < 2:
            raise PretrainError(
                f"prompt_classification: template {self.template!r}: accepted: text with one {{mask}} and at least one "
                "{column}",
                place=("template",),
            )
        if self.lm == "causal" and names[-1] != HOLE:
            raise PretrainError(
                f"prompt_classification: template {self.template!r}: accepted with lm causal: columns before {{mask}} "
                "alone; the model does not see what comes after",
                place=("template",),
            )
        if len(self.words) < 2 or len(set(self.words.values())) < len(self.words) or not all(self.words.values()):
            raise PretrainError(
                f"prompt_classification: words {brief(self.words)}: accepted: 2 or more labels, each with "
                "a word of its own",
                place=("words",),
            )

    @property
    def task(self) -> str:
        """The kind of model whose head is asked."""
        return self.lm

    @cached_property
    def shown(self) -> tuple[str, ...]:
        """The columns in the template."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.template) if name]
        return tuple(dict.fromkeys(name for name in names if name != HOLE))

    @cached_property
    def word_of(self) -> dict[str, str]:
        """The word of each class, with the space that parts it from what is before it."""
        return {str(label): " " * self.spaced + word for label, word in self.words.items()}

    @cached_property
    def spaced(self) -> bool:
        """Whether a space parts the word from what is before it."""
        pieces = string.Formatter().parse(self.template)
        return next(literal for literal, name, _, _ in pieces if name == HOLE).endswith(" ")

    @property
    def columns(self) -> tuple[str, ...]:
        """Those in the template, and the label's."""
        return (*self.shown, self.label)

    def labels(self, values: Iterable[object]) -> tuple[str, ...]:
        """Those that have a word; others are an error."""
        for value in values:
            self._number(value)
        return tuple(self.word_of)

    def ready(
        self, model: PreTrainedModel, labels: Sequence[str], vocabulary: Vocabulary, seed: int
    ) -> PreTrainedModel:
        """The model as it is; it must be a language model of the kind `lm`."""
        entry = family(model)
        head(model)
        if entry.decoder_blocks is not None or entry.causal != (self.lm == "causal"):
            raise PretrainError(f"prompt_classification: lm {self.lm!r}: accepted: that of the model, {entry.name}")
        return model

    def filled(self, columns: Mapping[str, object], label: object) -> str:
        """The template with a document's columns and its label's word."""
        before, after = self._sides({name: str(columns[name]) for name in self.shown})
        return before + tuple(self.word_of.values())[self._number(label)] + after

    def prepare(self, rows: Sequence[Row] | Sequence[Example], context: Context) -> Batch:
        """`tokens_NL`, `mask_NL`, `place_N` (where the head is asked), `word_C` and `label_B`, -100 where none is."""
        examples = examples_of(rows, self.name)
        labels = [example.columns.get(self.label) for example in examples]
        label_B = torch.tensor([-100 if value is None else self._number(value) for value in labels])
        word_C = torch.tensor(self._word_ids(context))
        return self.rendered(examples, context) | {
            "word_C": word_C, "label_B": label_B, "weight": (label_B != -100).sum(),
        }  # fmt: skip

    def rendered(self, examples: Sequence[Example], context: Context) -> Batch:
        """`tokens_NL`, `mask_NL`, `place_N` and how many `tokens` they are."""
        times = self.samples if self.demonstrations and context.predicting else 1
        inputs = [self._input(each, place, context) for place, each in enumerate(examples) for _ in range(times)]
        tokens_NL = padded([ids for ids, _ in inputs], context.vocabulary.pad, context.length)
        lengths_N = torch.tensor([len(ids) for ids, _ in inputs])
        mask_NL = (torch.arange(tokens_NL.shape[1]) < lengths_N[:, None]).long()
        place_N = torch.tensor([place for _, place in inputs])
        return {"tokens_NL": tokens_NL, "mask_NL": mask_NL, "place_N": place_N, "tokens": lengths_N.sum()}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """`logits_NC` of the words."""
        causal = {"use_cache": False} if family(model).causal else {}
        states_NLE = hidden(model, input_ids=batch["tokens_NL"], attention_mask=batch["mask_NL"], **causal)
        weight_VE, bias_V = head(model)
        asked_NE = states_NLE[torch.arange(len(states_NLE), device=states_NLE.device), batch["place_N"]]
        bias_C = None if bias_V is None else bias_V[batch["word_C"]]
        return nn.functional.linear(asked_NE, weight_VE[batch["word_C"]], bias_C)

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean cross-entropy of the labels among the words; part `accuracy`."""
        logits_BC, label_B = self.logits(model, batch).float(), batch["label_B"]
        count = (label_B != -100).sum().clamp(min=1)
        total = nn.functional.cross_entropy(logits_BC, label_B, reduction="sum", ignore_index=-100)
        return Loss(total / count, {"accuracy": (logits_BC.detach().argmax(-1) == label_B).sum() / count})

    def predict(self, model: PreTrainedModel, batch: Batch, context: Context) -> list[str]:
        """The label whose word has the highest logit, on average over the draws."""
        return self.answers(model, batch, context).values

    def answers(self, model: PreTrainedModel, batch: Batch, context: Context) -> Answered[str]:
        """The likeliest label of each example with its p, and -log p of its true one, by the draws' mean logits."""
        names, logits_BC = tuple(self.word_of), self.scores(model, batch)
        likeliest = [names[number] for number in logits_BC.argmax(-1).tolist()]
        return Answered(likeliest, surprises(logits_BC, batch["label_B"]), confidences(logits_BC))

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """`logits_BC`: the mean over each example's draws, which are read a set at a time."""
        count, rows = len(batch["label_B"]), len(batch["tokens_NL"])
        parts = (
            batch | {name: batch[name][at : at + count] for name in ("tokens_NL", "mask_NL", "place_N")}
            for at in range(0, rows, count)
        )
        chunks = [self.logits(model, part) for part in parts]
        return torch.cat(chunks).float().unflatten(0, (count, rows // count)).mean(1)

    def expected(self, examples: Sequence[Example], context: Context) -> list[str]:
        """The labels."""
        return texts_of(examples, self.label)

    def classes(self, answers: Sequence[str]) -> list[str]:
        """The labels."""
        return list(answers)

    def metrics(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Accuracy, that of the commonest class, macro F1, Matthews' correlation."""
        return classification(predictions, references)

    def _number(self, value: object) -> int:
        known = tuple(self.word_of)
        if str(value) not in known:
            raise PretrainError(
                f"prompt_classification: {self.label} {brief(value)}{nearest(str(value), known)}: accepted: a label "
                f"that has a word ({listed(known, str(value))})"
            )
        return known.index(str(value))

    def _word_ids(self, context: Context) -> list[int]:
        assert context.encoder is not None, "examples come with an encoder"
        pieces = context.encoder.ids(list(self.word_of.values()))
        for label, ids in zip(self.word_of, pieces, strict=True):
            if len(ids) != 1:
                raise PretrainError(
                    f"prompt_classification: words {label!r}: {self.word_of[label]!r} is {len(ids)} tokens: accepted: "
                    "a word of one token"
                )
        return [ids[0] for ids in pieces]

    def _sides(self, columns: dict[str, str]) -> tuple[str, str]:
        """The text before the hole, without a space that ends it (which is the word's), and after it."""
        text, side = ["", ""], 0
        for literal, name, _, _ in string.Formatter().parse(self.template):
            text[side] += literal
            if name == HOLE:
                side = 1
            elif name is not None:
                text[side] += columns[name]
        return text[0].removesuffix(" ") if self.spaced else text[0], text[1]

    def _input(self, example: Example, place: int, context: Context) -> tuple[list[int], int]:
        """An input's tokens, and the place whose state the head reads."""
        vocabulary, masked, mask = context.vocabulary, self.lm == "masked", context.vocabulary.mask
        if masked and mask is None:
            raise PretrainError("prompt_classification: no mask token; accepted: a tokenizer made with mask: true")
        begin = [] if vocabulary.begin is None else [vocabulary.begin]
        end = [] if vocabulary.eos is None else [vocabulary.eos]
        shown = self._demonstrations(example, context)
        room = context.length - len(begin) - masked - len(end) * (masked + len(shown))
        share = room // (1 + len(shown))
        others = [[*self._cut(columns, share, context, label)[0], *end] for label, columns in shown]
        room -= sum(len(ids) - len(end) for ids in others)
        sides = self._cut(example.columns, room, context, place=place)
        if masked and mask is not None:
            start = [*begin, *sides[0]]
            return [*start, mask, *sides[1], *end, *(i for ids in others for i in ids)], len(start)
        whole = [*begin, *(i for ids in others for i in ids), *sides[0]]
        return whole, len(whole) - 1

    def _cut(
        self, columns: Mapping[str, object], room: int, context: Context, label: str | None = None,
        place: int | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """The tokens of the template's sides, or with a label of the whole; the longest column loses the excess.

        That of the example at a `place` in the batch is noted.
        """
        assert context.encoder is not None, "examples come with an encoder"
        kept = {name: str(columns[name]) for name in self.shown}
        while True:
            sides = self._sides(kept)[: 1 if self.lm == "causal" else 2]
            pieces = context.encoder.ids(sides if label is None else [self.filled(kept, label)])
            excess = sum(map(len, pieces)) - room
            if excess <= 0:
                return pieces
            context.cut.update(() if place is None else {place})
            longest = max(kept, key=lambda name: len(kept[name]))
            if not kept[longest]:
                raise PretrainError(
                    f"length {context.length}: accepted: room for the template and what it is filled with"
                )
            ids, spans = context.encoder.spans(kept[longest])
            kept[longest] = kept[longest][: spans[max(0, len(ids) - excess)][0]]

    def _demonstrations(self, example: Example, context: Context) -> list[tuple[str, Mapping[str, object]]]:
        """A training example of each class that has one other than the example, with its label."""
        if not self.demonstrations:
            return []
        if context.pool is None:
            raise PretrainError(
                "prompt_classification: demonstrations: there are no training examples here; accepted: a train stage, "
                "or the evaluation task with pool: CORPUS"
            )
        members = context.pool.members(self.label)
        demonstrations: list[tuple[str, Mapping[str, object]]] = []
        for label in self.word_of:
            numbers = members.get(label, [])
            for drawn in context.rng.choice(len(numbers), min(2, len(numbers)), replace=False):
                columns = context.pool.row(context.pool, numbers[drawn]).columns
                if any(str(columns[name]) != str(example.columns[name]) for name in self.shown):
                    demonstrations.append((label, columns))
                    break
        return demonstrations

"""Chat: a decoder learns the assistant's answers of whole conversations, in the chat template of its tokenizer.

Shape letters: B conversations, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from pretrain.core.batch import Batch, Context, Example, Row, Vocabulary, padded_length, rows_to_tensors
from pretrain.core.bounds import Count
from pretrain.core.encoding import ASSISTANT, Encoder
from pretrain.core.errors import PretrainError
from pretrain.core.models.cross_entropy import IGNORE
from pretrain.corpus.sources.content.chat import Turns, turns_of
from pretrain.objectives import Loss
from pretrain.objectives._answers import greedy, prompts_of
from pretrain.objectives._fine_tuning import examples_of, filled, named
from pretrain.objectives._metrics import generation
from pretrain.objectives._token_loss import token_loss
from pretrain.objectives.labelled import FineTuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Chat(FineTuning[str]):
    """Training language models to follow instructions with human feedback (arXiv:2203.02155).

    Its supervised step. The loss is the mean of -log p(y_t | all before it) over the tokens y of the assistant's
    answers and of their ends; what the system, the user and the template say is read and not learnt. `messages` is the
    column of conversations, lists of `{role, content}` (`conversations: whole` of a source of files keeps them), or
    null: a conversation of two messages then, the columns `prompt` and `target`, after the message of `system` where
    one is given. The template is the tokenizer's own; one without any is given one by the surgery `chat_template`. A
    conversation that is longer than the stage's `length` loses its end, or its beginning where no answer would be left.
    Short conversations of a batch share rows, in which none sees another. Metrics are of the greedy answer, of at most
    `answer` tokens, in place of the last answer.
    """

    families: ClassVar[tuple[str, ...]] = ("causal",)
    predicted: ClassVar[float] = 0.5  # the answers' share of a conversation, about
    fill: ClassVar[Literal["longest", "rows", "apart"]] = "rows"
    metric_names: ClassVar[tuple[str, ...]] = ("exact_match", "token_f1", "rouge_l")

    messages: str | None = "messages"
    prompt: str = "text"
    target: str = "target"
    system: str = ""
    answer: Count = 64

    @property
    def task(self) -> str:
        """A model made anew generates."""
        return "causal"

    @property
    def columns(self) -> tuple[str, ...]:
        """The conversation's, or the prompt's and the target's."""
        return (self.prompt, self.target) if self.messages is None else (self.messages,)

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """The text of a conversation, or of its two messages."""
        return ((self.prompt,), (self.target,)) if self.messages is None else (("text",),)

    def ready(
        self, model: PreTrainedModel, labels: Sequence[str], vocabulary: Vocabulary, seed: int
    ) -> PreTrainedModel:
        """The model as it is; it must be one that generates."""
        if not model.can_generate() or model.config.is_encoder_decoder:
            raise PretrainError(f"chat: a {type(model).__name__} is no decoder: accepted: a causal LM")
        return model

    def turns(self, example: Example) -> Turns:
        """A conversation as (role, content), up to its last answer."""
        if self.messages is None:
            turns = [("user", str(example.columns[self.prompt])), (ASSISTANT, str(example.columns[self.target]))]
            return [("system", self.system), *turns] if self.system else turns
        turns = turns_of(example.columns[self.messages]) or []
        if not turns:
            raise PretrainError(
                f"chat: {named(example)}: column {self.messages!r} holds no conversation: accepted: a list of "
                "{role, content}; conversations: whole in its source keeps them"
            )
        answers = [number for number, (role, _) in enumerate(turns) if role == ASSISTANT and number > 0]
        if not answers:
            raise PretrainError(f"chat: {named(example)}: no answer of the {ASSISTANT}: accepted: one or more")
        start = [("system", self.system)] if self.system and turns[0][0] != "system" else []
        return [*start, *turns[: answers[-1] + 1]]

    def prepare(self, rows: Sequence[Row] | Sequence[Example], context: Context) -> Batch:
        """Rows of conversations with their `target_BL`; to predict from, `prompt_BL` and `mask_BL`."""
        examples, encoder = examples_of(rows, self.name), _encoder(context)
        turns = [self.turns(example) for example in examples]
        if context.predicting:
            return self._prompts(turns, encoder, context)
        whole = [encoder.conversation(each) for each in turns]
        context.cut.update(place for place, (ids, _) in enumerate(whole) if len(ids) > context.length)
        inputs, targets = zip(*(self._cut(*each, context.length) for each in whole), strict=True)
        rows_of, target_BL = _packed([len(ids) for ids in inputs], context.length), []
        made = []
        for number, members in enumerate(rows_of):
            parts = [np.array(inputs[i], np.int32) for i in members]
            starts_D = np.cumsum([0, *map(len, parts[:-1])]).astype(np.int32)
            made.append(Row(np.concatenate(parts), starts_D, np.array(members, np.int64), examples[0].domain, number))
            target_BL.append([token for i in members for token in targets[i]])
        width = padded_length(max(row.tokens for row in made), context.length)
        batch = rows_to_tensors(made, width, context.vocabulary.pad)
        batch["target_BL"] = filled(target_BL, IGNORE, width)
        tokens = sum(map(len, inputs))
        return batch | {"weight": (batch["target_BL"] != IGNORE).sum(), "tokens": torch.tensor(tokens)}

    def _cut(self, ids: list[int], answer: list[int], length: int) -> tuple[list[int], list[int]]:
        """At most `length` tokens, and for each the next one where that is part of an answer."""
        if max(answer[1:length], default=-1) < 0:
            ids, answer = ids[-length:], answer[-length:]
        ids, answer = ids[:length], answer[:length]
        following = zip(ids[1:], answer[1:], strict=True)
        return ids, [*(token if number >= 0 else IGNORE for token, number in following), IGNORE]

    def _prompts(self, turns: Sequence[Turns], encoder: Encoder, context: Context) -> Batch:
        """All before the last answer, whose beginning goes where it leaves no room for one."""
        room = context.length - min(self.answer, context.length // 2)
        whole = [encoder.conversation(each[:-1], answering=True)[0] for each in turns]
        context.cut.update(place for place, ids in enumerate(whole) if len(ids) > room)
        inputs = [ids[-room:] for ids in whole]
        prompt_BL, mask_BL = prompts_of(inputs, context.vocabulary.pad, max(map(len, inputs)))
        return {"prompt_BL": prompt_BL, "mask_BL": mask_BL, "weight": torch.tensor(len(inputs)),
                "tokens": mask_BL.sum()}  # fmt: skip

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean cross-entropy of the answers' tokens."""
        return Loss(token_loss(model, batch, causal=True).value, {})

    def predict(self, model: PreTrainedModel, batch: Batch, context: Context) -> list[str]:
        """The greedy answer to each conversation, as text."""
        return greedy(model, _encoder(context).tokenizer, batch["prompt_BL"], batch["mask_BL"], self.answer)

    def expected(self, examples: Sequence[Example], context: Context) -> list[str]:
        """The last answers."""
        return [self.turns(example)[-1][1].strip() for example in examples]

    def metrics(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Exact match, F1 of words, ROUGE-L."""
        return generation(predictions, references)


def _packed(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Which conversations share a row of at most `length` tokens: the longest first, each where it fits first."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((r for r, left in enumerate(room) if lengths[i] <= left), None)
        if place is None:
            rows.append([i])
            room.append(length - lengths[i])
        else:
            rows[place].append(i)
            room[place] -= lengths[i]
    return rows


def _encoder(context: Context) -> Encoder:
    """The context's, of a tokenizer with a chat template."""
    if context.encoder is None or not getattr(context.encoder.tokenizer, "chat_template", None):
        raise PretrainError(
            "chat: the tokenizer has no chat template: accepted: one that has, or surgeries: [chat_template]"
        )
    return context.encoder

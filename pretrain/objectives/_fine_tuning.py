"""What objectives on labelled examples share: their base, how texts become a model's input, and predictions.

Shape letters: B examples of a batch, L tokens, C classes, M tokens of a target.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch, Context, Example, Row, Vocabulary, to_device
from pretrain.core.errors import PretrainError
from pretrain.objectives import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEP = 16  # rows are padded to a multiple of it: few shapes, and the work of each is metered once


class FineTuning(Objective):
    """Base of the objectives on labelled documents. `prepare` is given `Example`s and sees `context.encoder`."""

    task: ClassVar[str] = "base"  # what a model made anew is before it is given its head
    labelled: ClassVar[bool] = True

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that each document must have."""
        return ("text",)

    def labels(self, values: Iterable[Any]) -> tuple[str, ...]:
        """The names of the classes among the values of the last of `columns`."""
        return ()

    def ready(
        self, model: PreTrainedModel, labels: Sequence[str], vocabulary: Vocabulary, seed: int
    ) -> PreTrainedModel:
        """The model with the head that the objective trains."""
        return model

    def prepare(self, rows: Sequence[Row] | Sequence[Example], context: Context) -> Batch:
        """Turn examples into tensors; `tokens` among them, how many they hold."""
        raise NotImplementedError

    def predict(self, model: PreTrainedModel, batch: Batch, context: Context) -> list[Any]:
        """What the model says of each example of a batch."""
        raise NotImplementedError

    def metrics(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """How well predictions fit the examples' references."""
        raise NotImplementedError

    def expected(self, examples: Sequence[Example], context: Context) -> list[Any]:
        """What `metrics` compares the predictions with."""
        raise NotImplementedError


def predictions(
    model: PreTrainedModel, objective: FineTuning, examples: Sequence[Example], context: Context, batch: int = 32
) -> list[Any]:
    """What the model says of the examples, in order; each is predicted beside others of its length."""
    from pretrain.evaluation._features import evaluating

    context = replace(context, predicting=True)
    order = sorted(range(len(examples)), key=lambda i: len(str(examples[i].columns.get("text"))))
    found: list[Any] = [None] * len(examples)
    with evaluating(model):
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            prepared = objective.prepare([examples[i] for i in chosen], context)
            answers = objective.predict(model, to_device(prepared, model.device), context)
            for i, said in zip(chosen, answers, strict=True):
                found[i] = said
    return found


def examples_of(rows: Sequence[Row] | Sequence[Example], name: str) -> list[Example]:
    """The rows, which must be examples."""
    if not all(isinstance(row, Example) for row in rows):
        raise PretrainError(f"{name} learns from labelled documents, not from packed rows: give it `Examples`")
    return list(rows)  # type: ignore[arg-type]


def texts_of(examples: Sequence[Example], column: str) -> list[str]:
    """One column as text."""
    return [str(example.columns[column]) for example in examples]


def framed(context: Context, first: Sequence[str], second: Sequence[str] | None = None) -> list[tuple[list[int], int]]:
    """Each input as `begin first end [second end]` in at most `context.length` tokens, and how long its first part is.

    What is too long loses the end of the longer of its two texts.
    """
    assert context.encoder is not None, "examples come with an encoder"
    begin = [] if context.vocabulary.begin is None else [context.vocabulary.begin]
    end = [] if context.vocabulary.eos is None else [context.vocabulary.eos]
    others = context.encoder.ids(second) if second is not None else [None] * len(first)
    inputs = []
    for one, other in zip(context.encoder.ids(first), others, strict=True):
        room = context.length - len(begin) - len(end) * (1 if other is None else 2)
        if room < 1:
            raise PretrainError(f"length {context.length}: accepted: room for text between the special tokens")
        if other is None:
            inputs.append(([*begin, *one[:room], *end], len(begin) + min(len(one), room) + len(end)))
            continue
        keep = max(room - len(other), (room + 1) // 2)
        one = one[:keep]
        head = [*begin, *one, *end]
        inputs.append(([*head, *other[: room - len(one)], *end], len(head)))
    return inputs


def padded(inputs: Sequence[Sequence[int]], fill: int, length: int | None = None) -> Tensor:
    """`ids_BL`: rows filled up to the longest, rounded up to a multiple of `STEP` but not beyond `length`."""
    longest = -(-max(map(len, inputs)) // STEP) * STEP
    longest = longest if length is None else max(min(longest, length), max(map(len, inputs)))
    ids_BL = np.full((len(inputs), longest), fill, np.int64)
    for b, row in enumerate(inputs):
        ids_BL[b, : len(row)] = row
    return torch.from_numpy(ids_BL)


def inputs_of(inputs: Sequence[tuple[list[int], int]], context: Context) -> Batch:
    """`tokens_BL`, `mask_BL` (1 on tokens), `segment_BL` (1 on the second text) and the number of `tokens`."""
    tokens_BL = padded([ids for ids, _ in inputs], context.vocabulary.pad, context.length)
    position_L = torch.arange(tokens_BL.shape[1])
    lengths_B = torch.tensor([len(ids) for ids, _ in inputs])
    mask_BL = position_L < lengths_B[:, None]
    segment_BL = (position_L >= torch.tensor([first for _, first in inputs])[:, None]) & mask_BL
    return {
        "tokens_BL": tokens_BL, "mask_BL": mask_BL.long(), "segment_BL": segment_BL.long(), "tokens": lengths_B.sum(),
    }  # fmt: skip


def read(examples: Sequence[Example], text: str, pair: str | None, context: Context) -> Batch:
    """`inputs_of` the examples' texts, with the second texts of the column `pair` where there is one."""
    second = texts_of(examples, pair) if pair else None
    return inputs_of(framed(context, texts_of(examples, text), second), context)


def classified(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of a model with a head of `core.heads`."""
    segments = "type_vocab_size" in model.config.to_dict()  # type: ignore[union-attr, operator]
    more = {"token_type_ids": batch["segment_BL"]} if segments else {}
    if getattr(model.config, "is_encoder_decoder", False) or "use_cache" in model.config.to_dict():  # type: ignore[union-attr, operator]
        more["use_cache"] = False  # type: ignore[assignment]
    return model(input_ids=batch["tokens_BL"], attention_mask=batch["mask_BL"], **more).logits

"""What objectives on labelled examples share: their base, how texts become a model's input, and predictions.

Shape letters: B examples of a batch, L tokens, C classes, M tokens of a target.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pretrain.core.batch import Batch, Context, Example, Row
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import at

STEP = 16  # rows are padded to a multiple of it: few shapes, and the work of each is metered once


def examples_of(rows: Sequence[Row] | Sequence[Example], name: str) -> list[Example]:
    """The rows, which must be examples."""
    examples = [row for row in rows if isinstance(row, Example)]
    if len(examples) < len(rows):
        raise PretrainError(f"{name} reads examples, not packed rows: give it `Examples`")
    return examples


def named(example: Example) -> str:
    """What a message calls an example: its document's id, where it has one."""
    return f"document {example.columns.get('id', example.index)!r}"


def surprises(logits_BC: Tensor, label_B: Tensor) -> list[float]:
    """-log p of each example's true class, in nats; 0 where an example has none (-100)."""
    return nn.functional.cross_entropy(logits_BC.float(), label_B, reduction="none", ignore_index=-100).tolist()


def confidences(logits_BC: Tensor) -> list[float]:
    """The probability of each example's likeliest class."""
    return logits_BC.float().softmax(-1).amax(-1).tolist()


def texts_of(examples: Sequence[Example], column: str) -> list[str]:
    """One column as text."""
    return [str(example.columns[column]) for example in examples]


def framed(context: Context, first: Sequence[str], second: Sequence[str] | None = None) -> list[tuple[list[int], int]]:
    """Each input as `begin first end [second end]` in at most `context.length` tokens, and how long its first part is.

    What is too long loses the end of the longer of its two texts, and is noted in `context.cut`.
    """
    if context.encoder is None:
        raise PretrainError("documents of text need a tokenizer: accepted: a tokenizer, or a processor that holds one")
    begin = [] if context.vocabulary.begin is None else [context.vocabulary.begin]
    end = [] if context.vocabulary.eos is None else [context.vocabulary.eos]
    second_rows = context.encoder.ids(second) if second is not None else [None] * len(first)
    inputs = []
    for place, (ids, others) in enumerate(zip(context.encoder.ids(first), second_rows, strict=True)):
        room = context.length - len(begin) - len(end) * (1 if others is None else 2)
        if room < 1:
            raise PretrainError(f"length {context.length}: accepted: room for text between the special tokens")
        if len(ids) + len(others or ()) > room:
            context.cut.add(place)
        if others is None:
            inputs.append(([*begin, *ids[:room], *end], len(begin) + min(len(ids), room) + len(end)))
            continue
        keep = max(room - len(others), (room + 1) // 2)
        ids = ids[:keep]
        head = [*begin, *ids, *end]
        inputs.append(([*head, *others[: room - len(ids)], *end], len(head)))
    return inputs


def padded(inputs: Sequence[Sequence[int]], fill: int, length: int) -> Tensor:
    """`ids_BL`: rows filled up to the longest, rounded up to a multiple of `STEP` but not beyond `length`."""
    longest = max(map(len, inputs))
    return filled(inputs, fill, max(min(-(-longest // STEP) * STEP, length), longest))


def filled(inputs: Sequence[Sequence[int]], fill: int, width: int) -> Tensor:
    """`ids_BL`: rows filled up to `width`."""
    ids_BL = np.full((len(inputs), width), fill, np.int64)
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


def segments(config: PreTrainedConfig, batch: Batch) -> dict[str, Tensor]:
    """Which of two texts a token is of, for a model that has a vector of each: RoBERTa has one alone."""
    several = (config.to_dict().get("type_vocab_size") or 0) > 1
    return {"token_type_ids": batch["segment_BL"]} if several else {}


def classified(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of a model with a head of `core.models.heads`."""
    config = at(model, "config")
    known, more = config.to_dict(), dict[str, Tensor | bool](segments(config, batch))
    if getattr(config, "is_encoder_decoder", False) or "use_cache" in known:
        more["use_cache"] = False
    return model(input_ids=batch["tokens_BL"], attention_mask=batch["mask_BL"], **more).logits

"""What a model's own pretraining loss needs besides what its processor gives, by the class of the model.

One function a kind of model: it is given the processor's batch, the model's configuration and the context, and returns
what is to be added. All chance is drawn from the context's generator, so that it is a function of (seed, step, rank);
a model that draws within itself is given a `seed`. `weight` is the number of targets, by default the examples;
`divisor` is there where a model's loss is a sum over targets and not their mean.

Shape letters: B examples, L tokens, P patches, F frames, K negatives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedConfig

from pretrain.core.batch import Batch, Context
from pretrain.core.errors import PretrainError

IGNORE = -100


def additions(batch: Batch, context: Context, rate: float) -> Batch:
    """What the batch lacks for the loss of the context's model, `weight` among it."""
    name = (getattr(context.config, "architectures", None) or [""])[0]
    examples = len(next(value for key, value in batch.items() if key != "tokens"))
    more = {"weight": torch.tensor(examples)}
    for ending, prepare in BY_ENDING.items():
        if name.endswith(ending):
            return more | prepare(batch, context, rate)
    return more


def masked_patches(batch: Batch, context: Context, _: float) -> Batch:
    """ViTMAE hides the patches whose `noise` (B, P) is largest: the same number in each image."""
    size = context.config.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    count, _, rows, columns = batch["pixel_values"].shape
    noise_BP = context.rng.random((count, (rows // height) * (columns // width)), np.float32)
    return {"noise": torch.from_numpy(noise_BP)}


def drawn_within(batch: Batch, context: Context, _: float) -> Batch:
    """PatchTST draws which patches it hides itself, the same number in each series."""
    return {"seed": torch.tensor(int(context.rng.integers(2**62)))}


def masked_frames(batch: Batch, context: Context, _: float) -> Batch:
    """Wav2Vec2: spans of frames to hide, and for each hidden frame other hidden ones of its recording as negatives.

    `mask_time_indices` (B, F), bool; `sampled_negative_indices` (B, F, K) count through the batch's frames. The loss
    is a sum over hidden frames. Its quantiser draws within.
    """
    config, rng = context.config, context.rng
    frames = _frames(batch["input_values"].shape[1], config)
    mask_BL = batch.get("attention_mask")
    samples_B = [batch["input_values"].shape[1]] * len(batch["input_values"]) if mask_BL is None else mask_BL.sum(1)
    hidden_BF = np.zeros((len(batch["input_values"]), frames), bool)
    negative_BFK = np.zeros((*hidden_BF.shape, config.num_negatives), np.int64)
    for b, samples in enumerate(samples_B):
        hidden_BF[b] = _spans(_frames(int(samples), config), frames, config, rng)
        places_H = np.flatnonzero(hidden_BF[b])
        if len(places_H) < 2:  # nothing to tell it from
            hidden_BF[b] = False
            continue
        draw_HK = rng.integers(0, len(places_H) - 1, (len(places_H), config.num_negatives))
        draw_HK += draw_HK >= np.arange(len(places_H))[:, None]  # never the frame itself
        negative_BFK[b, places_H] = places_H[draw_HK] + b * frames
    weight = torch.tensor(int(hidden_BF.sum()))
    return drawn_within(batch, context, 0) | {
        "mask_time_indices": torch.from_numpy(hidden_BF), "sampled_negative_indices": torch.from_numpy(negative_BFK),
        "weight": weight, "divisor": weight.clamp(min=1),
    }  # fmt: skip


def _frames(samples: int, config: PreTrainedConfig) -> int:
    """How many frames the convolutions make of so many samples."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
    if samples < 1:
        raise PretrainError(
            "a recording is shorter than one frame of the model; accepted: a larger shortest, or length"
        )
    return samples


def _spans(length: int, frames: int, config: PreTrainedConfig, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which of `frames` frames are hidden: spans of `mask_time_length`, `mask_time_prob` of the first `length`."""
    span = min(config.mask_time_length, length)
    count = int(config.mask_time_prob * length / span + rng.random())
    count = min(max(count, config.mask_time_min_masks, 1), length - span + 1)
    hidden_F = np.zeros(frames, bool)
    for start in rng.choice(length - span + 1, count, replace=False):
        hidden_F[start : start + span] = True
    return hidden_F


def masked_tokens(batch: Batch, context: Context, rate: float) -> Batch:
    """Masked language models: of `rate` of the tokens 80% are hidden, 10% exchanged, 10% left; they are the targets."""
    vocabulary, rng = context.vocabulary, context.rng
    if vocabulary.mask is None:
        raise PretrainError("native: no mask token; accepted: a tokenizer made with mask: true")
    tokens_BL = batch["input_ids"].numpy().copy()
    plain_BL = ~vocabulary.special_V[tokens_BL] & batch["attention_mask"].numpy().astype(bool)
    label_BL = np.full(tokens_BL.shape, IGNORE)
    ordinary = np.flatnonzero(~vocabulary.special_V)
    for b, plain_L in enumerate(plain_BL):
        places = np.flatnonzero(plain_L)
        chosen = rng.choice(places, min(len(places), max(1, round(rate * len(places)))), replace=False)
        label_BL[b, chosen] = tokens_BL[b, chosen]
        draw = rng.random(len(chosen))
        tokens_BL[b, chosen[draw < 0.8]] = vocabulary.mask
        exchanged = chosen[(draw >= 0.8) & (draw < 0.9)]
        tokens_BL[b, exchanged] = rng.choice(ordinary, len(exchanged))
    labels_BL = torch.from_numpy(label_BL)
    return {"input_ids": torch.from_numpy(tokens_BL), "labels": labels_BL, "weight": (labels_BL != IGNORE).sum()}


def next_tokens(batch: Batch, context: Context, _: float) -> Batch:
    """Causal language models: each token but the first is a target."""
    labels_BL = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
    return {"labels": labels_BL, "weight": (labels_BL[:, 1:] != IGNORE).sum()}


# By the end of a class's name: the first that fits. Of any other class the processor's batch is all.
BY_ENDING: dict[str, Callable[[Batch, Context, float], Batch]] = {
    "ViTMAEForPreTraining": masked_patches,
    "PatchTSTForPretraining": drawn_within,
    "Wav2Vec2ForPreTraining": masked_frames,
    "ForMaskedLM": masked_tokens,
    "ForCausalLM": next_tokens,
    "LMHeadModel": next_tokens,
}


def arguments(model: nn.Module, batch: Batch) -> Batch:
    """Those of the batch that the model takes."""
    accepted = inspect.signature(model.forward).parameters
    return {name: value for name, value in batch.items() if name in accepted}


def answer(model: nn.Module, batch: Batch) -> Any:
    """The model's output; what it draws within follows from the batch's `seed`, where it has one."""
    with seeded(batch.get("seed")):
        return model(**arguments(model, batch))


@contextmanager
def seeded(seed: torch.Tensor | None) -> Iterator[None]:
    """While open, what is drawn on the device follows from the seed alone, and nothing after it is changed."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(int(seed))  # waits for the device: few models draw within themselves
        yield

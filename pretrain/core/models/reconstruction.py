"""What a model makes of what is hidden from it, as samples to look at: `reconstructions(model, batch, documents)`.

The model is asked once, and by what it answers with it is known how that is shown: `ANSWERS` says it in one place. Of a
model whose answer is none of these nothing is shown.

Shape letters: B documents, P patches, S pixels of a side, C channels, L steps or samples, F frames, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from pretrain.core.batch import Batch
from pretrain.core.encoding import text_of
from pretrain.core.models.families import at
from pretrain.core.models.features import evaluating
from pretrain.core.processors import Document, Processor, samples_of, tokenizer_in
from pretrain.core.samples import Sample, about, picture, series_sample, text_sample, waveform_sample


@dataclass(frozen=True)
class Answer:
    """A model's answer to a batch, and what made it."""

    model: PreTrainedModel
    batch: Batch
    output: ModelOutput
    inner: ModelOutput | None  # what the model inside has answered; None where there is none
    processor: Processor | None
    documents: Sequence[Document] = ()

    def made(self, name: str) -> Tensor:
        """A tensor of the output."""
        tensor: Tensor = getattr(self.output, name)
        return tensor

    def inside(self, name: str) -> NDArray[np.float32]:
        """A tensor of what the model inside has answered."""
        return _array(getattr(self.inner, name))


def reconstructions(
    model: PreTrainedModel,
    batch: Batch,
    documents: Sequence[Document],
    processor: Processor | None = None,
    seed: int = 0,
) -> list[Sample]:
    """A sample of each document, with what the model makes of what it did not see; none where it says nothing of it.

    `batch` is what an objective or a processor prepared of the documents, in their order: the model's own arguments;
    others in it are passed over. What a model hides by chance is drawn from `seed`; the global state is left as it was.
    """
    answer = _ask(model, batch, documents, processor, seed)
    for column, answers, shown in ANSWERS:
        if answers(answer):
            pairs = zip(documents, shown(answer), strict=False)
            return [sample | about(document, column) for document, sample in pairs]
    return []


def _ask(
    model: PreTrainedModel, batch: Batch, documents: Sequence[Document], processor: Processor | None, seed: int
) -> Answer:
    """The model's answer in evaluation mode, without gradients."""
    accepted = inspect.signature(model.forward).parameters
    inputs = {name: value.to(model.device) for name, value in batch.items() if name in accepted}
    inside: list[ModelOutput] = []
    base = getattr(model, model.base_model_prefix, None)
    hook = None
    if isinstance(base, nn.Module) and base is not model:
        hook = base.register_forward_hook(lambda module, given, output: inside.append(output))
    try:
        devices = [model.device] if model.device.type == "cuda" else []
        with evaluating(model), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            output = model(**inputs)
    finally:
        if hook is not None:
            hook.remove()
    return Answer(model, inputs, output, inside[0] if inside else None, processor, documents)


def _has(output: ModelOutput | None, *names: str) -> bool:
    return all(isinstance(getattr(output, name, None), Tensor) for name in names)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().float().cpu().numpy()


def _patched_images(answer: Answer) -> list[Sample]:
    """ViTMAE: `logits` (B, P, S·S·C) are the pixels of patches, `mask` (B, P) says which were hidden."""
    model, pixels_BCHW = answer.model, answer.batch["pixel_values"]
    size, unpatchify = tuple(pixels_BCHW.shape[-2:]), at(model, "unpatchify")
    made_BPN = answer.made("logits")
    if getattr(model.config, "norm_pix_loss", False):  # it learns patches of mean 0 and deviation 1
        true_BPN: Tensor = at(model, "patchify")(pixels_BCHW)
        made_BPN = made_BPN * (true_BPN.var(-1, keepdim=True) + 1e-6) ** 0.5 + true_BPN.mean(-1, keepdim=True)
    hidden_BPN = answer.made("mask")[..., None].expand_as(made_BPN).to(made_BPN)
    made_BCHW, hidden_BCHW = (unpatchify(table, original_image_size=size) for table in (made_BPN, hidden_BPN))
    return _images(answer, made_BCHW, hidden_BCHW)


def _whole_images(answer: Answer) -> list[Sample]:
    """SimMIM: `reconstruction` (B, C, H, W), and the patches hidden are `bool_masked_pos` (B, P) of the batch."""
    made_BCHW, hidden_BP = answer.made("reconstruction"), answer.batch["bool_masked_pos"]
    side = round(hidden_BP.shape[1] ** 0.5)
    hidden_B1HW = hidden_BP.float().reshape(len(hidden_BP), 1, side, side)
    hidden_B1HW = nn.functional.interpolate(hidden_B1HW, size=made_BCHW.shape[-2:])
    return _images(answer, made_BCHW, hidden_B1HW.expand_as(made_BCHW))


def _images(answer: Answer, made_BCHW: Tensor, hidden_BCHW: Tensor) -> list[Sample]:
    """The images, what was seen of them (the rest grey), and that with the model's pixels where it saw none."""
    samples: list[Sample] = []
    for true_CHW, made_CHW, hidden_CHW in zip(answer.batch["pixel_values"], made_BCHW, hidden_BCHW.bool(), strict=True):
        show = _painter(true_CHW, answer.processor)
        seen = show(true_CHW)
        seen[hidden_CHW.cpu().numpy().any(0)] = 128
        filled = show(torch.where(hidden_CHW, made_CHW, true_CHW))
        pictures = {"input": picture(show(true_CHW)), "masked": picture(seen), "output": picture(filled)}
        samples.append({"kind": "image", **pictures})
    return samples


def _painter(true_CHW: Tensor, processor: Processor | None) -> Callable[[Tensor], NDArray[np.uint8]]:
    """From a model's values to pixels: back through the image processor's steps, or without one from least to most."""
    part = getattr(processor, "image_processor", processor)
    white, shift_C, scale_C = 255.0, np.zeros(1), np.ones(1)  # the value of white, and what undoes the normalisation
    if not hasattr(part, "do_normalize"):
        low, high = float(true_CHW.min()), float(true_CHW.max())
        scale_C = scale_C / max(high - low, 1e-6)
        shift_C = -low * scale_C
    else:
        if getattr(part, "do_normalize", False):
            shift_C, scale_C = (np.asarray(getattr(part, name)) for name in ("image_mean", "image_std"))
        white = 1 / getattr(part, "rescale_factor", 1 / 255) if getattr(part, "do_rescale", True) else 1.0

    def show(values_CHW: Tensor) -> NDArray[np.uint8]:
        unit_HWC = _array(values_CHW).transpose(1, 2, 0) * scale_C + shift_C
        pixels_HWC = np.clip(np.rint(unit_HWC * white), 0, 255).astype(np.uint8)
        return pixels_HWC[..., 0] if pixels_HWC.shape[-1] == 1 else pixels_HWC[..., :3]

    return show


def _patched_series(answer: Answer) -> list[Sample]:
    """PatchTST: `prediction_output` (B, C, P, N) are patches' values, scaled; `mask` (B, C, P) is of the model inside.

    Shown is what it makes of what was hidden: the rest it does not learn. Where patches overlap that is the mean.
    """
    patches = at(answer.model, "model.patchifier")
    first, stride, length = (int(getattr(patches, n)) for n in ("sequence_start", "patch_stride", "patch_length"))
    made_BCPN, hidden_BCP = _array(answer.made("prediction_output")), answer.inside("mask")
    loc_B1C, scale_B1C = answer.inside("loc"), answer.inside("scale")
    samples: list[Sample] = []
    for b, true_LC in enumerate(_array(answer.batch["past_values"])):
        sum_LC, count_LC = np.zeros_like(true_LC), np.zeros_like(true_LC)
        for p in range(made_BCPN.shape[2]):
            place = slice(first + p * stride, first + p * stride + length)
            sum_LC[place] += made_BCPN[b, :, p].T * hidden_BCP[b, :, p]
            count_LC[place] += hidden_BCP[b, :, p]
        mean_LC = np.where(count_LC > 0, sum_LC / np.maximum(count_LC, 1), np.nan)
        samples.append(series_sample(true_LC, mean_LC * scale_B1C[b] + loc_B1C[b], count_LC > 0))
    return samples


def _forecasts(answer: Answer) -> list[Sample]:
    """`prediction_outputs` (B, L, C) go on where `past_values` end; what came is `future_values` of the batch."""
    samples: list[Sample] = []
    future_BLC = answer.batch.get("future_values")
    for b, past_LC in enumerate(_array(answer.batch["past_values"])):
        made_LC = _array(answer.made("prediction_outputs")[b])
        after_LC = np.concatenate([np.full((len(past_LC), made_LC.shape[1]), np.nan), made_LC])
        true_LC = past_LC if future_BLC is None else np.concatenate([past_LC, _array(future_BLC[b])])
        hidden_LC = np.broadcast_to(np.arange(len(after_LC))[:, None] >= len(past_LC), after_LC.shape)
        samples.append(series_sample(true_LC, after_LC, hidden_LC))
    return samples


def _frames(answer: Answer) -> list[Sample]:
    """Wav2Vec2: how alike `projected_states` (B, F, E) are to the frames that were hidden, from -1 to 1."""
    guess_BFE, true_BFE = answer.made("projected_states"), answer.made("projected_quantized_states")
    alike_BF = _array(torch.cosine_similarity(guess_BFE, true_BFE, dim=-1))
    hidden_BF = _array(answer.batch["mask_time_indices"]) > 0.5
    rate = int(getattr(answer.processor, "sampling_rate", None) or 16_000)
    samples: list[Sample] = []
    for b, padded_L in enumerate(_array(answer.batch["input_values"])):
        samples_L = _recording(answer, b, padded_L, rate)
        frames = max(1, round(alike_BF.shape[1] * len(samples_L) / len(padded_L)))  # those of padding are not drawn
        output_F = np.where(hidden_BF[b], alike_BF[b], np.nan)[:frames]
        sample = waveform_sample(samples_L, rate, output_F, hidden_BF[b, :frames])
        samples.append(sample | {"measure": "cosine of the guessed and the true frame"})
    return samples


def _recording(answer: Answer, b: int, padded_L: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """A document's recording as far as the model was given it; where it has none, what the model was given."""
    samples_L, mask_BL = padded_L, answer.batch.get("attention_mask")
    if b < len(answer.documents) and answer.documents[b].get("audio") is not None:
        samples_L = samples_of(answer.documents[b]["audio"], rate)[: len(padded_L)]
    return samples_L if mask_BL is None else samples_L[: int(mask_BL[b].sum())]


def _tokens(answer: Answer) -> list[Sample]:
    """Masked language models: the likeliest entries of `logits` (B, L, V) where `labels` (B, L) are to be predicted.

    Special tokens are left out, except the one that hides.
    """
    tokenizer = tokenizer_in(answer.processor)
    assert tokenizer is not None
    ends = set(getattr(tokenizer, "all_special_ids", ())) - {getattr(tokenizer, "mask_token_id", None)}
    input_BL, label_BL = answer.batch["input_ids"].cpu(), answer.batch["labels"].cpu()
    best_BL = answer.made("logits").argmax(-1).cpu()
    real_BL = answer.batch.get("attention_mask", torch.ones_like(input_BL)).cpu() != 0
    samples: list[Sample] = []
    for b, asked_L in enumerate(label_BL >= 0):
        ids = {
            "input": torch.where(asked_L, label_BL[b], input_BL[b]),
            "masked": input_BL[b],
            "output": torch.where(asked_L, best_BL[b], input_BL[b]),
        }
        kept = {name: [i for i in ids_L[real_BL[b]].tolist() if i not in ends] for name, ids_L in ids.items()}
        texts = {name: text_sample(text_of(tokenizer, tokens))["input"] for name, tokens in kept.items()}
        samples.append({"kind": "text", **texts})
    return samples


# Which column an answer is about, how it is known, and how it is shown; the first that fits is taken.
ANSWERS: tuple[tuple[str, Callable[[Answer], bool], Callable[[Answer], list[Sample]]], ...] = (
    ("image", lambda a: _has(a.output, "logits", "mask") and hasattr(a.model, "unpatchify"), _patched_images),
    ("image", lambda a: _has(a.output, "reconstruction") and "bool_masked_pos" in a.batch, _whole_images),
    ("series", lambda a: _has(a.output, "prediction_output") and _has(a.inner, "mask", "loc"), _patched_series),
    ("series", lambda a: _has(a.output, "prediction_outputs") and "past_values" in a.batch, _forecasts),
    ("audio", lambda a: _has(a.output, "projected_states") and "mask_time_indices" in a.batch, _frames),
    ("text", lambda a: _has(a.output, "logits") and _asks_tokens(a), _tokens),
)


def _asks_tokens(answer: Answer) -> bool:
    """Whether labels are asked for in the places of tokens, and one of those was hidden or exchanged."""
    label_BL, input_BL, logits_BLV = answer.batch.get("labels"), answer.batch.get("input_ids"), answer.made("logits")
    decodes = hasattr(tokenizer_in(answer.processor), "decode")
    if not decodes or label_BL is None or input_BL is None or logits_BLV.shape[:-1] != label_BL.shape:
        return False
    return bool(((label_BL >= 0) & (label_BL != input_BL)).any())

"""What a model makes of what is hidden from it, as samples to look at: `samples_of(model, batch, documents)`.

The model is asked once, and by what it answers with it is known how that is shown: `ANSWERS` says it in one place. Of a
model whose answer is none of these the documents alone are shown.

Shape letters: B documents, P patches, S pixels of a side, C channels, L steps or samples, F frames, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pretrain.core.samples import Sample, about, document_samples, picture, series_sample, text_sample, waveform_sample


@dataclass(frozen=True)
class Answer:
    """A model's answer to a batch, and what made it."""

    model: Any
    batch: dict[str, Any]
    output: Any
    inner: Any  # what the model inside has answered; None where there is none
    processor: Any


def samples_of(
    model: nn.Module, batch: dict[str, Any], documents: Sequence[dict[str, Any]], processor: Any = None, seed: int = 0
) -> list[Sample]:
    """A sample of each document, with what the model makes of it where it says so.

    `batch` is what an objective or a processor prepared of the documents, in their order: the model's own arguments;
    others in it are passed over. What a model hides by chance is drawn from `seed`; the global state is left as it was.
    """
    answer = _ask(model, batch, processor, seed)
    for column, answers, shown in ANSWERS:
        if answers(answer):
            pairs = zip(documents, shown(answer), strict=False)
            return [sample | about(document, column) for document, sample in pairs]
    return document_samples(documents)


def _ask(model: Any, batch: dict[str, Any], processor: Any, seed: int) -> Answer:
    """The model's answer in evaluation mode, without gradients."""
    device = next(model.parameters()).device
    known = inspect.signature(model.forward).parameters
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k in known}
    inside: list[Any] = []
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    hook = None if base is None or base is model else base.register_forward_hook(lambda *found: inside.append(found[2]))
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            output = model.eval()(**inputs)
    finally:
        for module, mode in modes:
            module.training = mode
        if hook is not None:
            hook.remove()
    return Answer(model, inputs, output, inside[0] if inside else None, processor)


def _has(output: Any, *names: str) -> bool:
    return all(isinstance(getattr(output, name, None), Tensor) for name in names)


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().float().cpu().numpy()


def _patched_images(answer: Answer) -> list[Sample]:
    """ViTMAE: `logits` (B, P, S·S·C) are the pixels of patches, `mask` (B, P) says which were hidden."""
    model, pixels_BCHW = answer.model, answer.batch["pixel_values"]
    size = tuple(pixels_BCHW.shape[-2:])
    made_BPN = answer.output.logits
    if getattr(model.config, "norm_pix_loss", False):  # it learns patches of mean 0 and deviation 1
        true_BPN = model.patchify(pixels_BCHW)
        made_BPN = made_BPN * (true_BPN.var(-1, keepdim=True) + 1e-6) ** 0.5 + true_BPN.mean(-1, keepdim=True)
    hidden_BPN = answer.output.mask[..., None].expand_as(made_BPN).to(made_BPN)
    made_BCHW, hidden_BCHW = (model.unpatchify(table, original_image_size=size) for table in (made_BPN, hidden_BPN))
    return _images(answer, made_BCHW, hidden_BCHW)


def _whole_images(answer: Answer) -> list[Sample]:
    """SimMIM: `reconstruction` (B, C, H, W), and the patches hidden are `bool_masked_pos` (B, P) of the batch."""
    made_BCHW, hidden_BP = answer.output.reconstruction, answer.batch["bool_masked_pos"]
    side = round(hidden_BP.shape[1] ** 0.5)
    hidden_B1HW = hidden_BP.float().reshape(len(hidden_BP), 1, side, side)
    hidden_B1HW = nn.functional.interpolate(hidden_B1HW, size=made_BCHW.shape[-2:])
    return _images(answer, made_BCHW, hidden_B1HW.expand_as(made_BCHW))


def _images(answer: Answer, made_BCHW: Tensor, hidden_BCHW: Tensor) -> list[Sample]:
    """The images, what was seen of them (the rest grey), and that with the model's pixels where it saw none."""
    found = []
    for true_CHW, made_CHW, hidden_CHW in zip(answer.batch["pixel_values"], made_BCHW, hidden_BCHW.bool(), strict=True):
        show = _painter(true_CHW, answer.processor)
        seen = show(true_CHW)
        seen[_array(hidden_CHW).any(0)] = 128
        pictures = {
            "input": show(true_CHW),
            "masked": seen,
            "output": show(torch.where(hidden_CHW, made_CHW, true_CHW)),
        }
        found.append({"kind": "image"} | {name: picture(pixels) for name, pixels in pictures.items()})
    return found


def _painter(true_CHW: Tensor, processor: Any) -> Callable[[Tensor], NDArray[np.uint8]]:
    """From a model's values to pixels: back through the processor's mean and deviation, or from least to most."""
    shift_C: Any = getattr(processor, "image_mean", None)
    scale_C: Any = getattr(processor, "image_std", None)
    if shift_C is None or scale_C is None or not getattr(processor, "do_normalize", False):
        low, high = float(true_CHW.min()), float(true_CHW.max())
        shift_C, scale_C = -low / max(high - low, 1e-6), 1 / max(high - low, 1e-6)

    def show(values_CHW: Tensor) -> NDArray[np.uint8]:
        unit_HWC = _array(values_CHW).transpose(1, 2, 0) * np.asarray(scale_C) + np.asarray(shift_C)
        pixels_HWC = np.clip(np.rint(unit_HWC * 255), 0, 255).astype(np.uint8)
        return pixels_HWC[..., 0] if pixels_HWC.shape[-1] == 1 else pixels_HWC[..., :3]

    return show


def _patched_series(answer: Answer) -> list[Sample]:
    """PatchTST: `prediction_output` (B, C, P, N) are patches' values, scaled; `mask` (B, C, P) is of the model inside.

    Shown is what it makes of what was hidden: the rest it does not learn. Where patches overlap that is the mean.
    """
    inner, patches = answer.inner, answer.model.model.patchifier
    true_BLC = _array(answer.batch["past_values"])
    made_BCPN, hidden_BCP = _array(answer.output.prediction_output), _array(inner.mask)
    loc_B1C, scale_B1C = _array(inner.loc), _array(inner.scale)
    found = []
    for b, true_LC in enumerate(true_BLC):
        sum_LC, count_LC = np.zeros_like(true_LC), np.zeros_like(true_LC)
        for p in range(made_BCPN.shape[2]):
            start = patches.sequence_start + p * patches.patch_stride
            place = slice(start, start + patches.patch_length)
            sum_LC[place] += made_BCPN[b, :, p].T * hidden_BCP[b, :, p]
            count_LC[place] += hidden_BCP[b, :, p]
        mean_LC = np.where(count_LC > 0, sum_LC / np.maximum(count_LC, 1), np.nan)
        found.append(series_sample(true_LC, mean_LC * scale_B1C[b] + loc_B1C[b], count_LC > 0))
    return found


def _forecasts(answer: Answer) -> list[Sample]:
    """`prediction_outputs` (B, L, C) go on where `past_values` end; what came is `future_values` of the batch."""
    found = []
    future_BLC = answer.batch.get("future_values")
    for b, past_LC in enumerate(_array(answer.batch["past_values"])):
        made_LC = _array(answer.output.prediction_outputs[b])
        after_LC = np.concatenate([np.full((len(past_LC), made_LC.shape[1]), np.nan), made_LC])
        true_LC = past_LC if future_BLC is None else np.concatenate([past_LC, _array(future_BLC[b])])
        hidden_LC = np.broadcast_to(np.arange(len(after_LC))[:, None] >= len(past_LC), after_LC.shape)
        found.append(series_sample(true_LC, after_LC, hidden_LC))
    return found


def _frames(answer: Answer) -> list[Sample]:
    """Wav2Vec2: how alike `projected_states` (B, F, E) are to the frames that were hidden, from -1 to 1."""
    alike_BF = _array(
        torch.cosine_similarity(answer.output.projected_states, answer.output.projected_quantized_states, dim=-1)
    )
    hidden_BF = _array(answer.batch["mask_time_indices"]) > 0.5
    rate = getattr(answer.processor, "sampling_rate", None) or 16_000
    found = []
    for b, samples_L in enumerate(_array(answer.batch["input_values"])):
        length = len(samples_L)
        if (mask_BL := answer.batch.get("attention_mask")) is not None:
            length = int(mask_BL[b].sum())
        frames = max(1, round(alike_BF.shape[1] * length / len(samples_L)))
        output_F = np.where(hidden_BF[b], alike_BF[b], np.nan)[:frames]
        sample = waveform_sample(samples_L[:length], rate, output_F, hidden_BF[b, :frames])
        found.append(sample | {"measure": "similarity to what was hidden"})
    return found


def _tokens(answer: Answer) -> list[Sample]:
    """Masked language models: the likeliest entries of `logits` (B, L, V) where `labels` (B, L) are to be predicted."""
    tokenizer = getattr(answer.processor, "tokenizer", answer.processor)
    input_BL, label_BL = answer.batch["input_ids"].cpu(), answer.batch["labels"].cpu()
    best_BL = answer.output.logits.argmax(-1).cpu()
    padded_BL = answer.batch.get("attention_mask", torch.ones_like(input_BL)).cpu() == 0
    found = []
    for b in range(len(input_BL)):
        asked_L = label_BL[b] >= 0
        keep_L = ~padded_BL[b]
        texts = {
            "input": torch.where(asked_L, label_BL[b], input_BL[b]),
            "masked": input_BL[b],
            "output": torch.where(asked_L, best_BL[b], input_BL[b]),
        }
        decoded = {name: tokenizer.decode(ids_L[keep_L].tolist()) for name, ids_L in texts.items()}
        found.append({name: text_sample(text)["input"] for name, text in decoded.items()} | {"kind": "text"})
    return found


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
    label_BL, logits = answer.batch.get("labels"), answer.output.logits
    decodes = hasattr(getattr(answer.processor, "tokenizer", answer.processor), "decode")
    return decodes and label_BL is not None and "input_ids" in answer.batch and logits.shape[:-1] == label_BL.shape

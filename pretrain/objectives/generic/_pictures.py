"""What a model makes of what was hidden from it, as samples to look at (`core/samples.py`), by the class of the model.

Shape letters: B examples, C channels, P patches, D numbers of a patch, L steps or samples, F frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.core.batch import Batch, Context
from pretrain.core.processors import samples_of, tokenizer_in
from pretrain.core.samples import LETTERS, Sample, about, picture, series_sample, waveform_sample
from pretrain.objectives.generic._inputs import answer, arguments, seeded


def pictures(model: Any, batch: Batch, documents: Sequence[dict[str, Any]], context: Context) -> list[Sample]:
    """A sample of each document; none of a model whose output has no picture here."""
    name = type(model).__name__
    for ending, (column, draw) in BY_ENDING.items():
        if name.endswith(ending):
            drawn = draw(model, batch, documents, context)
            return [one | about(document, column) for one, document in zip(drawn, documents, strict=True)]
    return []


def images(model: Any, batch: Batch, documents: Sequence[Any], context: Context) -> list[Sample]:
    """ViTMAE: the image, what is left of it, and the image with the hidden patches as the model fills them in."""
    output = answer(model, batch)
    true_BPD, made_BPD = model.patchify(batch["pixel_values"]), output.logits.float()
    if model.config.norm_pix_loss:  # the model predicts patches of mean 0 and deviation 1
        deviation_BP1 = (true_BPD.var(-1, keepdim=True) + 1e-6).sqrt()
        made_BPD = made_BPD * deviation_BP1 + true_BPD.mean(-1, keepdim=True)
    hidden_BP1 = output.mask[..., None].bool()
    grey_BPD = torch.zeros_like(true_BPD)
    shown = [true_BPD, torch.where(hidden_BP1, grey_BPD, true_BPD), torch.where(hidden_BP1, made_BPD, true_BPD)]
    drawn = [_pixels(model.unpatchify(one_BPD), context.processor) for one_BPD in shown]
    return [
        {"kind": "image", "input": picture(one), "masked": picture(left), "output": picture(filled)}
        for one, left, filled in zip(*drawn, strict=True)
    ]


def _pixels(values_BCHW: Tensor, processor: Any) -> NDArray[np.uint8]:
    """Normalised values as pixels from 0 to 255 (B, H, W, C)."""
    values_BCHW = values_BCHW.cpu()
    if processor.do_normalize:
        mean_C, deviation_C = (torch.tensor(getattr(processor, name)) for name in ("image_mean", "image_std"))
        values_BCHW = values_BCHW * deviation_C[:, None, None] + mean_C[:, None, None]
    scale = 1 / processor.rescale_factor if processor.do_rescale else 1
    return (values_BCHW * scale).clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()


def series(model: Any, batch: Batch, documents: Sequence[Any], context: Context) -> list[Sample]:
    """PatchTST: the series as the model scales it, and with the hidden patches as the model fills them in."""
    with seeded(batch["seed"]):
        inner = model.model(**arguments(model.model, batch))
    made_BCPD, size = model.head(inner.last_hidden_state).float(), model.config.patch_length
    if model.config.use_cls_token:
        made_BCPD = made_BCPD[:, :, 1:]
    found = []
    parts = (part.cpu() for part in (inner.patch_input, made_BCPD, inner.mask.bool()))
    for true_CPD, made_CPD, hidden_CP in zip(*parts, strict=True):
        filled_CPD = torch.where(hidden_CP[..., None], made_CPD, true_CPD)
        hidden_LC = hidden_CP[..., None].expand(*hidden_CP.shape, size).flatten(1).T.numpy()
        true_LC, filled_LC = (_joined(one_CPD, model.config.patch_stride) for one_CPD in (true_CPD, filled_CPD))
        found.append(series_sample(true_LC, filled_LC, hidden_LC[: len(true_LC)]))
    return found


def _joined(patch_CPD: Tensor, stride: int) -> NDArray[Any]:
    """Patches side by side (L, C), without what overlaps."""
    return patch_CPD[..., :stride].flatten(1).T.numpy()


def waveforms(model: Any, batch: Batch, documents: Sequence[Any], context: Context) -> list[Sample]:
    """Wav2Vec2: the recording, its hidden frames, and how alike the model's guess of each frame is to the true one."""
    output = answer(model, batch)
    alike_BF = torch.cosine_similarity(output.projected_states, output.projected_quantized_states, dim=-1).cpu()
    rate, found = context.processor.sampling_rate, []
    for document, alike_F, hidden_F in zip(documents, alike_BF, batch["mask_time_indices"].cpu(), strict=True):
        samples_L = samples_of(document["audio"], rate)[: context.length]
        share = min(1.0, len(samples_L) / batch["input_values"].shape[1])
        frames = max(1, round(share * len(hidden_F)))  # those of padding are not drawn
        drawn = waveform_sample(samples_L, rate, alike_F[:frames].numpy(), hidden_F[:frames].numpy())
        found.append(drawn | {"measure": "cosine of the guessed and the true frame"})
    return found


def texts(model: Any, batch: Batch, documents: Sequence[Any], context: Context) -> list[Sample]:
    """A masked language model: the text, without what was hidden, and with the model's likeliest tokens there."""
    tokenizer: Any = tokenizer_in(context.processor)
    target_BL, guess_BL = batch["labels"] != -100, answer(model, batch).logits.argmax(-1)
    true_BL = torch.where(target_BL, batch["labels"], batch["input_ids"])
    lines = [true_BL, batch["input_ids"], torch.where(target_BL, guess_BL, true_BL)]
    special, found = context.vocabulary.special - {context.vocabulary.mask}, []
    for b, real_L in enumerate(batch["attention_mask"].bool()):
        read = [ids_BL[b][real_L].tolist() for ids_BL in lines]
        whole = [tokenizer.decode([token for token in tokens if token not in special])[:LETTERS] for tokens in read]
        found.append({"kind": "text", **dict(zip(("input", "masked", "output"), whole, strict=True))})
    return found


Draw = Callable[[Any, Batch, Sequence[Any], Context], list[Sample]]
BY_ENDING: dict[str, tuple[str, Draw]] = {
    "ViTMAEForPreTraining": ("image", images),
    "PatchTSTForPretraining": ("series", series),
    "Wav2Vec2ForPreTraining": ("audio", waveforms),
    "ForMaskedLM": ("text", texts),
}

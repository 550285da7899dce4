"""Documents of packed rows in rows of their own, for a model that cannot keep them apart in one.

Shape letters: B rows, L positions, D documents, M positions of the longest, E width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pretrain.core.batch import spread
from pretrain.core.models.layers import at
from pretrain.core.models.unlisted.layout import captured


class Apart:
    """Where each position of rows with `document_BL` (0: padding) goes: `to_rows` puts it there, `back` fetches it.

    `sizes` are D and M, where the host knows them: else it waits for the device to tell.
    """

    def __init__(self, document_BL: Tensor, sizes: tuple[int, int] | None = None) -> None:
        self.rows, self.longest = sizes or spread(document_BL.cpu().numpy())
        self.kept_BL = document_BL != 0
        before_BL = torch.nn.functional.pad(document_BL[:, :-1], (1, 0))
        starts_BL = self.kept_BL & (document_BL != before_BL)
        places_BL = torch.arange(document_BL.shape[1], device=document_BL.device).expand_as(document_BL)
        begun_BL = torch.where(starts_BL, places_BL, 0).cummax(1).values
        number_BL = (starts_BL.flatten().cumsum(0) - 1).view_as(document_BL)
        whole_BL = number_BL * self.longest + places_BL - begun_BL
        self.place_BL = torch.where(self.kept_BL, whole_BL, self.rows * self.longest)  # padding goes to one more place

    def to_rows(self, x_BL: Tensor, fill: int) -> Tensor:
        """`x_DM`, with `fill` after each document's end."""
        flat = x_BL.new_full((self.rows * self.longest + 1,), fill)
        flat[self.place_BL.flatten()] = x_BL.flatten()
        return flat[:-1].view(self.rows, self.longest)

    def mask(self) -> Tensor:
        """`mask_DM`: 1 on tokens, 0 on padding; a row without any has a first token."""
        mask_DM = self.to_rows(self.kept_BL.long(), 0)
        mask_DM[:, 0] = 1
        return mask_DM

    def back(self, x_DME: Tensor) -> Tensor:
        """`x_BLE`, 0 on padding."""
        flat = torch.cat([x_DME.flatten(0, 1), x_DME.new_zeros(1, x_DME.shape[-1])])
        return flat[self.place_BL]


def captured_apart(model: nn.Module, documents: tuple[Tensor, ...], *, input_ids: Tensor, **more: Any) -> Tensor:
    """`captured` of rows of `documents`: `document_BL`, of an encoder-decoder `owner_BM` too, and their `sizes`."""
    decoder_ids_BM = more.pop("decoder_input_ids", None)
    sides = 1 if decoder_ids_BM is None else 2
    sizes: list[int | None] = documents[sides].tolist() if len(documents) > sides else [None] * (1 + sides)
    pad = getattr(at(model, "config"), "pad_token_id", None) or 0
    rows, longest = sizes[:2]
    inner = Apart(documents[0], None if rows is None or longest is None else (rows, longest))
    inputs = {"input_ids": inner.to_rows(input_ids, pad), "attention_mask": inner.mask()}
    if decoder_ids_BM is not None:
        most = sizes[2]
        inner = Apart(documents[1], None if rows is None or most is None else (rows, most))
        inputs |= {"decoder_input_ids": inner.to_rows(decoder_ids_BM, pad), "decoder_attention_mask": inner.mask()}
    return inner.back(captured(model, **inputs, **more))

"""Many texts that began at different times, read in one pass: new tokens of each, with a cache for each.

The new tokens of all texts stand one after another in one row of the model's input, so that its weights are read once
for all of them; attention alone goes text by text, over keys and values that are that text's own. Nothing is padded, a
text may come or go between two passes, and what is beside it changes nothing but rounding in the matrix products.

Shape letters: R texts, T new tokens of all, N of one text, H query heads, K key heads, C places of a text so far,
D width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from pretrain.core.generation.forward import Forward

NAME = "pretrain_packed"  # of the attention, among those of transformers


class Cached:
    """One text's keys and values, with room for `room` tokens, of which the model has read `length`."""

    def __init__(self, room: int) -> None:
        self.room, self.length = room, 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, KCD each

    def extended(self, layer: int, keys_KND: Tensor, values_KND: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values; returns all up to them."""
        if layer not in self.layers:
            heads, _, width = keys_KND.shape
            both = keys_KND.new_empty(2, heads, self.room, width)
            self.layers[layer] = both[0], both[1]
        keys_KCD, values_KCD = self.layers[layer]
        end = self.length + keys_KND.shape[1]
        keys_KCD[:, self.length : end] = keys_KND
        values_KCD[:, self.length : end] = values_KND
        return keys_KCD[:, :end], values_KCD[:, :end]


class Packed(Forward):
    """A model's blocks over texts of at most `length` tokens each."""

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        super().__init__(model, length)
        self.config = model.config

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        config, every = self.config, self.config.num_attention_heads
        heads: int = getattr(config, "num_key_value_heads", None) or every
        width: int = getattr(config, "head_dim", None) or config.hidden_size // every
        return 2 * len(self.blocks) * heads * width * self.dtype.itemsize

    def read(self, texts: Sequence[tuple[Cached, Sequence[int]]]) -> Tensor:
        """Read new tokens of each text, one or more, for which it has room; `logits_RV` after the last of each."""
        ends = list(accumulate(len(new) for _, new in texts))
        ids_1T = torch.tensor([[token for _, new in texts for token in new]], device=self.device)
        places = [place for cached, new in texts for place in range(cached.length, cached.length + len(new))]
        positions_1T = torch.tensor([places], device=self.device)
        spans = [(cached, slice(*ends)) for (cached, _), ends in zip(texts, pairwise([0, *ends]), strict=True)]
        with torch.inference_mode(), self._attending():
            self.given = {"spans": spans}
            try:
                states_1TE = self.states(ids_1T, positions_1T, None)
            finally:
                self.given = {}
            logits_RV: Tensor = self.head(self.norm(states_1TE[0, [end - 1 for end in ends]]))
        for cached, new in texts:
            cached.length += len(new)
        return logits_RV

    def update(
        self, keys_BHTD: Tensor, values_BHTD: Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """New keys and values as they are: `attend` writes each where its text has it."""
        return keys_BHTD, values_BHTD

    @contextmanager
    def _attending(self) -> Iterator[None]:
        """While open, the model's attention is `attend`."""
        usual = self.config._attn_implementation
        self.config._attn_implementation = NAME
        try:
            yield
        finally:
            self.config._attn_implementation = usual


def attend(
    module: nn.Module, queries_1HTD: Tensor, keys_1KTD: Tensor, values_1KTD: Tensor, mask: object = None, *,
    scaling: float | None = None, spans: Sequence[tuple[Cached, slice]] = (), **kwargs: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of each text's new tokens to those of it that stand before; `spans` says where among T they are."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    mixed_1HTD = torch.empty_like(queries_1HTD)
    for cached, span in spans:
        queries_1HND = queries_1HTD[:, :, span]
        keys_KCD, values_KCD = cached.extended(layer, keys_1KTD[0, :, span], values_1KTD[0, :, span])
        count = queries_1HND.shape[2]
        mask_NC = None
        if count > 1 and cached.length:
            seen_NC = torch.ones(count, cached.length + count, dtype=torch.bool, device=queries_1HND.device)
            mask_NC = seen_NC.tril(cached.length)
        mixed_1HTD[:, :, span] = scaled_dot_product_attention(
            queries_1HND, keys_KCD[None], values_KCD[None], attn_mask=mask_NC, scale=scaling,
            is_causal=count > 1 and mask_NC is None, enable_gqa=keys_KCD.shape[0] != queries_1HND.shape[1],
        )  # fmt: skip
    return mixed_1HTD.transpose(1, 2), None


AttentionInterface.register(NAME, attend)

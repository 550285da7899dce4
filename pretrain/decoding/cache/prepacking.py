"""Prompts of unequal length share rows while their keys and values are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from transformers import Cache, DynamicCache

from pretrain.core.batch import Row, document_mask, rows_to_tensors
from pretrain.core.bounds import Whole
from pretrain.core.errors import PretrainError
from pretrain.core.generation.cache import layers_of
from pretrain.core.generation.rows import continue_rows, mask_of, stepper
from pretrain.core.models.families import attention_inputs, base, family, positions_of
from pretrain.corpus.packing import pack
from pretrain.decoding import Decoding

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedModel

    from pretrain.core.generation.options import Options
    from pretrain.corpus.packing import Plan


@dataclass(frozen=True)
class Prepacking(Decoding):
    """Prepacking: A Simple Method for Fast Prefilling and Increased Throughput in Large Language Models
    (arXiv:2404.09529).

    Prompts are packed into rows as long as the longest of them, longest first, each into the fullest row with room.
    Token i of prompt p stands at position i, and sees token j of prompt q if q = p and j <= i, so that one pass over
    the rows gives every prompt the keys, values and logits that it has alone. They are then sliced into a cache of one
    prompt a row, padded on the left, from which decoding goes on as usual. The cost of prefill falls from B rows to
    about the prompts' total length over the longest. `row` makes rows longer than the longest prompt: fewer of them,
    but attention takes the square of their length.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")
    samples: ClassVar[bool] = True
    lossless: ClassVar[bool] = True

    row: Whole = 0  # 0: as long as the longest prompt

    def prefill(self, model: PreTrainedModel, prompts: Sequence[Tensor]) -> tuple[Tensor, Cache]:
        """`logits_BV` after the last token of each prompt, and the cache of all, padded on the left.

        `prompts` are one-dimensional tensors of token ids. To go on, give the model the cache, an attention mask with
        0 on the padding, and positions that count a prompt's own tokens.
        """
        length_B = _lengths(prompts)
        entry = family(model)
        if entry.name not in self.families:
            raise PretrainError(f"prepacking: model family {entry.name!r}: accepted: {', '.join(self.families)}")
        if model.config._attn_implementation not in ("sdpa", "eager"):  # their caches are what can be unpacked
            raise PretrainError(f"prepacking: attention {model.config._attn_implementation!r}: accepted: sdpa, eager")
        limit = positions_of(model) if entry.positions else None
        if limit is not None and int(length_B.max()) > limit:
            raise PretrainError(
                f"prepacking: a prompt of {int(length_B.max())} tokens: accepted: up to the model's {limit} positions"
            )
        batch, row_B, start_B = self._rows(prompts, length_B)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        position_RL = batch["position_RL"].clamp(max=(limit or 2**31) - 1)  # those of a row's padding count on
        inputs = attention_inputs(model, document_mask(batch["document_RL"], causal=True), position_RL)
        cache = DynamicCache()  # not the model's own, which may forget what is outside a window
        with torch.no_grad():
            states_RLE = base(model)(
                input_ids=batch["tokens_RL"], past_key_values=cache, **inputs | {"use_cache": True}
            ).last_hidden_state
            head = model.get_output_embeddings()
            if head is None:
                raise PretrainError(f"prepacking: {type(model).__name__} predicts no next token; accepted: a causal LM")
            logits_BV = head(states_RLE[row_B, start_B + length_B - 1])
        _unpack(cache, row_B, start_B, length_B)
        return logits_BV, cache

    def _rows(self, prompts: Sequence[Tensor], length_B: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The packed rows as tensors; the row of each prompt, and where it starts there."""
        capacity = max(self.row, int(length_B.max()))
        plan: Plan = pack(length_B.numpy(), np.zeros(len(prompts), np.int64), capacity)
        row_B, start_B, rows = torch.zeros_like(length_B), torch.zeros_like(length_B), []
        for index in range(len(plan)):
            pieces = range(int(plan.first_R1[index]), int(plan.first_R1[index + 1]))
            members = plan.document_P[pieces.start : pieces.stop]
            starts_D = np.concatenate([[0], np.cumsum(plan.length_P[pieces.start : pieces.stop])])
            tokens_L = np.concatenate([prompts[int(p)].cpu().numpy() for p in members])
            rows.append(Row(tokens_L, starts_D[:-1], np.asarray(members), 0, index))
            row_B[members], start_B[members] = index, torch.from_numpy(starts_D[:-1])
        longest = max(len(row.tokens_L) for row in rows)
        made = rows_to_tensors(rows, longest, 0)
        return {f"{name[:-3]}_RL": tensor for name, tensor in made.items()}, row_B, start_B

    def decode(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        """Continue left-padded prompts, prefilled together; returns `tokens_BN`, padded with `pad` after the end."""
        mask_BL = mask_of(self.name, input_ids_BL, options.attention_mask_BL)
        length_B = mask_BL.sum(1)
        logits_BV, cache = self.prefill(
            model, [ids_L[-n:] for ids_L, n in zip(input_ids_BL, length_B.tolist(), strict=True)]
        )
        with torch.no_grad():
            return continue_rows(
                input_ids_BL, logits_BV, stepper(model, cache, mask_BL[:, -int(length_B.max()) :]), options
            )


def _lengths(prompts: Sequence[Tensor]) -> Tensor:
    length_B = torch.tensor([len(p) if p.ndim == 1 else 0 for p in prompts], dtype=torch.int64)
    if not len(length_B) or not bool(length_B.all()):
        shapes = [tuple(p.shape) for p in prompts]
        raise PretrainError(
            f"prepacking: prompts of shapes {shapes}: accepted: one or more, (tokens,) each, none empty"
        )
    return length_B


def _unpack(cache: Cache, row_B: Tensor, start_B: Tensor, length_B: Tensor) -> None:
    """Turn a cache of packed rows into one of a prompt a row, padded on the left with zeros.

    H heads, D width of a head, R packed rows.
    """
    longest = int(length_B.max())
    offset_BL = torch.arange(longest)[None] - (longest - length_B)[:, None]
    for layer in layers_of(cache):
        device = layer.keys.device
        row_B1, at_BL = row_B[:, None].to(device), (start_B[:, None] + offset_BL.clamp(min=0)).to(device)
        padding_B1L1 = (offset_BL < 0).to(device)[:, None, :, None]
        for name in ("keys", "values"):
            packed_RHLD = getattr(layer, name)
            # One index on each side of a slice: the indexed dimensions B, L come first.
            setattr(layer, name, packed_RHLD[row_B1, :, at_BL].transpose(1, 2).masked_fill(padding_B1L1, 0))

"""Keys and values of all but the newest tokens are stored in a few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import family
from pretrain.decoding import Decoding
from pretrain.decoding._tree import Sampler, alone

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from pretrain.core.generation.options import Options


@dataclass(frozen=True)
class KIVI(Decoding):
    """KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (arXiv:2402.02750).

    Keys are stored in `bits` by channel, over `group_size` tokens, values by token, over `group_size` channels, with
    the least number and the step of each group. Of the keys the newest, fewer than `residual_length`, are whole: as
    many as that go into bits together; of the values the newest `residual_length`. Attention sees the numbers that the
    bits stand for; the pass over the prompt sees its own, whole. Rows are decoded one by one. Checked against the
    authors' code (jy-yuan/KIVI, 876b4d2: its packing and unpacking).
    """

    families: ClassVar[tuple[str, ...]] = ("causal",)
    samples: ClassVar[bool] = True

    bits: Literal[2, 4, 8] = 2
    group_size: Count = 32
    residual_length: Count = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual_length % self.group_size or self.group_size * self.bits % 8:
            raise PretrainError(
                f"kivi: residual_length {self.residual_length}, group_size {self.group_size}: accepted: whole groups, "
                f"of a multiple of {8 // self.bits} numbers"
            )

    def cache(self, model: PreTrainedModel) -> DynamicCache:
        """An empty cache of one row for the model."""
        if not family(model).among(self.families):
            raise PretrainError(f"kivi: {type(model).__name__}: accepted: {', '.join(self.families)}")
        cache = DynamicCache(config=model.config)
        if odd := [layer for layer in cache.layers if type(layer) is not DynamicLayer]:
            raise PretrainError(
                f"kivi: {type(model).__name__} keeps a {type(odd[0]).__name__}: accepted: full attention"
            )
        cache.layers = [_Layer(self) for _ in cache.layers]
        return cache

    def decode(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        """Continue left-padded prompts, row by row; returns `tokens_BN`."""
        with torch.no_grad():
            return alone(input_ids_BL, options, lambda ids_1L, sampler: self._row(model, ids_1L, sampler))

    def _row(self, model: PreTrainedModel, ids_1L: Tensor, sampler: Sampler) -> list[int]:
        cache, prompt, new = self.cache(model), ids_1L[0].tolist(), list[int]()
        read_1T = ids_1L
        while True:
            logits_1V = model(input_ids=read_1T, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            new.append(sampler.token(logits_1V, prompt, new))
            if len(new) == sampler.options.max_new_tokens or sampler.options.at_end(new):
                return new
            read_1T = torch.tensor([new[-1:]], device=ids_1L.device)


class _Layer(DynamicLayer):
    """The keys and values of one layer: `keys` and `values` are the newest, whole."""

    keys: Tensor
    values: Tensor

    def __init__(self, method: KIVI) -> None:
        super().__init__()
        self.method = method
        self.keys, self.values = torch.empty(0), torch.empty(0)
        self.old_keys: list[Packed] = []
        self.old_values: list[Packed] = []
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Put in new keys and values; what attention is to see, before the newest go into bits."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
        self.length += key_states.shape[2]
        seen_keys = torch.cat([*(part.opened() for part in self.old_keys), self.keys], 2)
        seen_values = torch.cat([*(part.opened() for part in self.old_values), self.values], 2)
        newest, bits, group = self.method.residual_length, self.method.bits, self.method.group_size
        if whole := self.keys.shape[2] // newest * newest:
            self.old_keys.append(Packed.of(self.keys[:, :, :whole].transpose(2, 3), bits, group, turned=True))
            self.keys = self.keys[:, :, whole:].clone()
        if (over := self.values.shape[2] - newest) > 0:
            wide = self.values.shape[3]
            self.old_values.append(Packed.of(self.values[:, :, :over], bits, group if wide % group == 0 else wide))
            self.values = self.values[:, :, over:].clone()
        self.old_values = [Packed.joined(self.old_values)] if self.old_values else []
        return seen_keys, seen_values

    def get_seq_length(self) -> int:
        """How many tokens there are."""
        return self.length

    @property
    def nbytes(self) -> int:
        """What the layer takes."""
        return self.keys.nbytes + self.values.nbytes + sum(part.nbytes for part in (*self.old_keys, *self.old_values))


@dataclass(frozen=True)
class Packed:
    """Numbers in a few bits, along the last axis in groups with a least number and a step each."""

    codes: Tensor  # uint8, several numbers in each
    low: Tensor
    step: Tensor
    bits: int
    turned: bool  # whether the last two axes were exchanged

    @classmethod
    def of(cls, states: Tensor, bits: int, group: int, *, turned: bool = False) -> Packed:
        """Round to the nearest of 2^`bits` numbers from each group's least to its largest."""
        grouped = states.unflatten(-1, (-1, group))
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        step = (high - low) / (2**bits - 1)
        number = ((grouped - low) / step.where(step > 0, 1)).round().to(torch.uint8).flatten(-2)
        several = 8 // bits
        if number.shape[-1] % several:
            raise PretrainError(f"kivi: heads of {number.shape[-1]}: accepted: a multiple of {several} for {bits} bits")
        place = torch.arange(several, device=number.device, dtype=torch.uint8) * bits
        codes = (number.unflatten(-1, (-1, several)) << place).sum(-1, dtype=torch.uint8)
        return cls(codes, low, step, bits, turned)

    @classmethod
    def joined(cls, parts: list[Packed]) -> Packed:
        """Those of consecutive tokens as one; tokens are the axis before the last."""
        first = parts[0]
        codes, low, step = (torch.cat([getattr(p, name) for p in parts], 2) for name in ("codes", "low", "step"))
        return cls(codes, low, step, first.bits, first.turned)

    def opened(self) -> Tensor:
        """The numbers that the bits stand for."""
        several = 8 // self.bits
        place = torch.arange(several, device=self.codes.device, dtype=torch.uint8) * self.bits
        number = ((self.codes[..., None] >> place) & (2**self.bits - 1)).flatten(-2)
        groups = self.low.shape[-2]
        states = (number.unflatten(-1, (groups, -1)).to(self.low.dtype) * self.step + self.low).flatten(-2)
        return states.transpose(2, 3) if self.turned else states

    @property
    def nbytes(self) -> int:
        """What they take."""
        return self.codes.nbytes + self.low.nbytes + self.step.nbytes

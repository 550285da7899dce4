"""Caches that are pruned once, when a prompt has been read: of each layer and head of keys what scores highest stays.

The passes after it are the model's own, over fewer keys and values, each of which keeps the position that it had. A
method is one function: the scores of a layer's keys.

Shape letters: B rows, L tokens of a prompt, C of a cache, H heads, G heads of keys, D width of a head, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from pretrain.core.bounds import ProperShare
from pretrain.core.errors import PretrainError
from pretrain.core.generation.cache import layers_of
from pretrain.core.generation.options import Options
from pretrain.core.generation.rows import continue_rows, mask_of, stepper
from pretrain.core.models.families import base, blocks, family
from pretrain.decoding import Decoding

NAME = "pruned_cache"  # of the attention, and of the attribute by which a module finds what prunes
Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Read(NamedTuple):
    """What a layer has made of a prompt."""

    query_HLD: Tensor  # rotated to their positions, as the keys are
    key_GLD: Tensor
    value_GLD: Tensor
    scaling: float
    rotary: Rotary | None  # (states, positions_BL) -> cosines and sines `_BLD`

    @property
    def groups(self) -> int:
        """How many heads share a head of keys."""
        return len(self.query_HLD) // len(self.key_GLD)

    def weights(self, last: int) -> Tensor:
        """What the last queries attend to, `weight_HQL`, in float32."""
        length = self.key_GLD.shape[1]
        key_HLD = self.key_GLD.repeat_interleave(self.groups, 0)
        score_HQL = (self.query_HLD[:, -last:] @ key_HLD.transpose(1, 2)).float() * self.scaling
        seen_QL = torch.ones(last, length, dtype=torch.bool, device=score_HQL.device).tril(length - last)
        return score_HQL.masked_fill(~seen_QL, -torch.inf).softmax(-1)

    def by_key(self, score_HL: Tensor) -> Tensor:
        """The mean of the heads that share a head of keys, `score_GL`."""
        return score_HL.unflatten(0, (-1, self.groups)).mean(1)


@dataclass(frozen=True)
class Press(Decoding):
    """Base of the methods that prune a prompt's cache: of L tokens int(L (1 - `compression_ratio`)) stay."""

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")
    samples: ClassVar[bool] = True

    compression_ratio: ProperShare = 0.5

    @property
    def whole(self) -> int:
        """Prompts of so many tokens and fewer stay whole; of longer ones at least so many stay."""
        return 1

    @abstractmethod
    def scores(self, layer: Read, kept: int) -> Tensor:
        """`score_GL` of a prompt's keys, of which `kept` stay."""
        raise NotImplementedError

    def kept(self, length: int) -> int:
        """How many tokens of a prompt stay."""
        return min(length, max(self.whole, int(length * (1 - self.compression_ratio))))

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """A context in which a pass over one unpadded prompt leaves a pruned cache, `past_key_values`."""
        return _pruning(self, model)

    def decode(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        """Continue left-padded prompts with pruned caches; returns `tokens_BN`, padded with `pad` after the end."""
        mask_BL = mask_of(self.name, input_ids_BL, options.attention_mask_BL)
        caches: list[DynamicCache] = []
        logits: list[Tensor] = []
        with torch.no_grad():
            with self(model):
                for ids_L, kept_L in zip(input_ids_BL, mask_BL.bool(), strict=True):
                    caches.append(DynamicCache(config=model.config))
                    output = model(
                        input_ids=ids_L[kept_L][None], past_key_values=caches[-1], use_cache=True, logits_to_keep=1
                    )
                    logits.append(output.logits[:, -1])
            cache, mask_BC = _together(caches)
            step = stepper(model, cache, mask_BC, mask_BL.sum(1))
            return continue_rows(input_ids_BL, torch.cat(logits), step, options)


@contextmanager
def _pruning(method: Press, model: PreTrainedModel) -> Iterator[None]:
    entry, config = family(model), model.config
    if not entry.among(method.families):
        raise PretrainError(
            f"{method.name}: model family {config.model_type!r}: accepted: {', '.join(method.families)}"
        )
    check_full_attention(method.name, model)
    modules = [block.get_submodule(entry.attention) for block in blocks(model)]
    if any(hasattr(module, NAME) for module in modules):
        raise PretrainError(f"{method.name}: a cache is pruned on this model already; accepted: one at a time")
    before, state = config._attn_implementation, _State(method, getattr(base(model), "rotary_emb", None))
    hook = base(model).register_forward_pre_hook(state.begin, with_kwargs=True)
    try:
        model.set_attn_implementation(NAME)
        for number, module in enumerate(modules):
            state.number[module] = number
            setattr(module, NAME, state)
        yield
    finally:
        hook.remove()
        for module in modules:
            if hasattr(module, NAME):
                delattr(module, NAME)
        model.set_attn_implementation(before)


def check_full_attention(method: str, model: PreTrainedModel) -> None:
    """Refuse a model that attends within a window."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        window is not None and config.model_type == "mistral"
    ):
        raise PretrainError(f"{method}: sliding_window {window}: accepted: full attention")


class _State:
    """What prunes while a context is open."""

    def __init__(self, method: Press, rotary: Rotary | None) -> None:
        self.method, self.rotary = method, rotary
        self.number: dict[nn.Module, int] = {}
        self.cache: DynamicCache | None = None

    def begin(self, module: nn.Module, args: object, kwargs: dict[str, object]) -> None:
        cache = kwargs.get("past_key_values")
        self.cache = cache if isinstance(cache, DynamicCache) else None

    def prune(self, module: nn.Module, layer: Read) -> None:
        length = layer.key_GLD.shape[1]
        kept = self.method.kept(length)
        if self.cache is None or kept == length or layer.query_HLD.shape[1] != length:
            return
        place_GC = self.method.scores(layer, kept).topk(kept, -1).indices.sort(-1).values
        into = layers_of(self.cache)[self.number[module]]
        place_1GCD = place_GC[None, ..., None].expand(1, -1, -1, layer.key_GLD.shape[2])
        into.keys, into.values = into.keys.gather(2, place_1GCD), into.values.gather(2, place_1GCD)


def _attention(
    module: nn.Module, query_BHLD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention of one unpadded prompt; then its layer of the cache is pruned."""
    if len(query_BHLD) != 1:
        raise PretrainError(f"a cache is pruned of one prompt at a time; {len(query_BHLD)} rows were given")
    scale = query_BHLD.shape[-1] ** -0.5 if scaling is None else scaling
    out_BHLD = functional.scaled_dot_product_attention(
        query_BHLD, key_BGLD, value_BGLD, is_causal=True, scale=scale, enable_gqa=True
    )
    state: _State = getattr(module, NAME)
    state.prune(module, Read(query_BHLD[0], key_BGLD[0], value_BGLD[0], scale, state.rotary))
    return out_BHLD.transpose(1, 2).contiguous(), None


def _together(caches: list[DynamicCache]) -> tuple[DynamicCache, Tensor]:
    """Caches of single rows as one, padded on the left, and its mask."""
    lengths = [layers_of(cache)[0].keys.shape[2] for cache in caches]
    most, device = max(lengths), layers_of(caches[0])[0].keys.device
    mask_BC = torch.tensor([[0] * (most - length) + [1] * length for length in lengths], device=device)
    for layers in zip(*map(layers_of, caches), strict=True):
        for name in ("keys", "values"):
            padded = [functional.pad(t, (0, 0, most - t.shape[2], 0)) for t in (getattr(x, name) for x in layers)]
            setattr(layers[0], name, torch.cat(padded))
    return caches[0], mask_BC


AttentionInterface.register(NAME, _attention)

"""Later blocks that a token may pass by: a router decides, a small adapter stands in, keys and values are written.

Shape letters: B rows, L positions, C positions in the cache, E width, F width of an adapter, R positions of a row that
take a block, N tokens of all rows that do, H heads, D width of a head.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.families import additive, base, blocks, embeddings, family
from pretrain.core.fast import rotary
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._random import generator

EPS = 1e-5  # of the router's norm


class Router(nn.Module):
    """g = sigmoid(w · up(tanh(RMSNorm(down(x))))), one number a token."""

    def __init__(self, width: int, reduction: int, like: dict[str, Any]) -> None:
        super().__init__()
        narrow = width // reduction
        self.down = nn.Linear(width, narrow, bias=False, **like)
        self.norm = nn.RMSNorm(narrow, eps=EPS, **like)
        self.up = nn.Linear(narrow, width, bias=False, **like)
        self.head = nn.Linear(width, 1, bias=False, **like)

    def forward(self, x_BLE: Tensor) -> Tensor:
        """The gates, `gate_BL`, in float32 or wider."""
        logit_BL = self.head(self.up(self.norm(self.down(x_BLE)).tanh()))[..., 0]
        return logit_BL.to(torch.promote_types(logit_BL.dtype, torch.float32)).sigmoid()


class Adapter(nn.Module):
    """A gated feed-forward of a fraction of the width."""

    def __init__(self, width: int, narrow: int, activation: str, like: dict[str, Any]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, narrow, bias=False, **like)
        self.up_proj = nn.Linear(width, narrow, bias=False, **like)
        self.down_proj = nn.Linear(narrow, width, bias=False, **like)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        """One row a token."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class _Skippable(nn.Module):
    """What a block of the Llama family becomes; its own modules keep their names.

    Training computes both ways for every token, which costs the same at every step; evaluation computes one. The
    numbers are the same up to rounding.
    """

    router: Router
    adapter: Adapter
    threshold: float
    gate_BL: Tensor  # of the newest pass

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None,
        position_embeddings: Any = None, **more: Any,
    ) -> Tensor:  # fmt: skip
        """The block's output, `x_BLE`."""
        block: Any = self
        x_BLE, normed_BLE = hidden_states, block.input_layernorm(hidden_states)
        self.gate_BL = block.router(normed_BLE)
        run_BL = self.gate_BL > self.threshold
        given = {"attention_mask": attention_mask, "past_key_values": past_key_values} | more
        given |= {"position_embeddings": position_embeddings}
        if self.training:
            run_BL1, gate_BL1 = run_BL[..., None], self.gate_BL[..., None].to(x_BLE.dtype)
            attended_BLE, _ = block.self_attn(hidden_states=normed_BLE, **given)
            x_BLE = x_BLE + torch.where(run_BL1, attended_BLE, 0.0)
            normed_BLE = block.post_attention_layernorm(x_BLE)
            whole_BLE, narrow_BLE = gate_BL1 * block.mlp(normed_BLE), (1 - gate_BL1) * block.adapter(normed_BLE)
            return x_BLE + torch.where(run_BL1, whole_BLE, narrow_BLE)
        run_N, skip_N = run_BL.flatten().nonzero()[:, 0], (~run_BL).flatten().nonzero()[:, 0]
        x_NE = x_BLE.reshape(-1, x_BLE.shape[-1])
        attended_NE = _attended(block.self_attn, normed_BLE, run_BL, given)
        if len(run_N):
            x_NE = x_NE.index_add(0, run_N, attended_NE.to(x_NE.dtype))
        gate_N1 = self.gate_BL.reshape(-1, 1).to(x_NE.dtype)
        out_NE = x_NE
        for index_N, layer in ((run_N, block.mlp), (skip_N, block.adapter)):
            if len(index_N):
                share_N1 = gate_N1[index_N] if layer is block.mlp else 1 - gate_N1[index_N]
                part_NE = share_N1 * layer(block.post_attention_layernorm(x_NE[index_N]))
                out_NE = out_NE.index_add(0, index_N, part_NE.to(out_NE.dtype))
        return out_NE.view_as(x_BLE)


def _attended(attention: Any, normed_BLE: Tensor, run_BL: Tensor, given: dict[str, Any]) -> Tensor:
    """Attention's output for the tokens of `run_BL` in order, `x_NE`; keys and values of all are written."""
    mask = given["attention_mask"]
    if bool(run_BL.all()) or (mask is not None and mask.ndim != 4):
        return attention(hidden_states=normed_BLE, **given)[0][run_BL]
    length, cache = run_BL.shape[1], given["past_key_values"]
    cos_BLD, sin_BLD = (table.expand(len(run_BL), -1, -1) for table in given["position_embeddings"])
    keys_BHLD = _heads(attention, "k", normed_BLE)
    keys_BHCD, _ = rotary(keys_BHLD, keys_BHLD[:, :0], cos_BLD, sin_BLD)
    values_BHCD = _heads(attention, "v", normed_BLE)
    if cache is not None:
        keys_BHCD, values_BHCD = cache.update(keys_BHCD, values_BHCD, attention.layer_idx)
    most = int(run_BL.sum(1).max())
    if most == 0:
        return normed_BLE[run_BL]
    # Of each row the tokens that take the block, in order; rows that have fewer are filled up with others.
    place_BR = run_BL.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    real_BR = run_BL.gather(1, place_BR)
    queries_BHRD = _heads(attention, "q", _at(normed_BLE, place_BR))
    queries_BHRD, _ = rotary(queries_BHRD, queries_BHRD[:, :0], _at(cos_BLD, place_BR), _at(sin_BLD, place_BR))
    total = keys_BHCD.shape[2]
    if mask is None and length > 1:
        causal_LC = torch.ones(length, total, dtype=torch.bool, device=run_BL.device).tril(total - length)
        mask = additive(causal_LC[None, None], queries_BHRD.dtype)
    if mask is not None:
        mask_BLC = mask[:, 0, :, :total].expand(len(run_BL), length, -1)
        mask = _at(mask_BLC, place_BR)[:, None]
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    out_BRHD, _ = attend(
        attention, queries_BHRD, keys_BHCD, values_BHCD, mask, dropout=0.0, scaling=attention.scaling, is_causal=False
    )
    return attention.o_proj(out_BRHD[real_BR].flatten(1))


def _heads(attention: Any, which: str, x_BLE: Tensor) -> Tensor:
    """Queries, keys or values, `x_BHLD`, before they are turned."""
    x_BLHD = getattr(attention, f"{which}_proj")(x_BLE).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{which}_norm", None)
    return (x_BLHD if norm is None else norm(x_BLHD)).transpose(1, 2)


def _at(x_BLE: Tensor, place_BR: Tensor) -> Tensor:
    return x_BLE.gather(1, place_BR[..., None].expand(-1, -1, x_BLE.shape[-1]))


@functools.cache
def _skippable(kind: type) -> type:
    """A block's class with another `forward`: what looks for blocks of the old class finds these."""
    return type(f"Skippable{kind.__name__}", (_Skippable, kind), {})


def routed(model: nn.Module) -> list[Any]:
    """The blocks with a router, in order."""
    return [block for block in blocks(model) if isinstance(block, _Skippable)]


@torch.no_grad()
def depths(model: Any, input_ids_BL: Tensor, **inputs: Any) -> Tensor:
    """`depth_BL`: how many of the model's blocks each token takes; `inputs` are further arguments of the model."""
    base(model)(input_ids=input_ids_BL, use_cache=False, **inputs)
    skippable = routed(model)
    depth_BL = torch.full_like(input_ids_BL, len(blocks(model)) - len(skippable))
    for block in skippable:
        depth_BL = depth_BL + (block.gate_BL > block.threshold)
    return depth_BL


@dataclass(frozen=True)
class FlexiDepth(Surgery):
    """Adaptive Layer-skipping in Pre-trained LLMs (arXiv:2503.23798).

    The last `layers` blocks (by default the later half) get a router, g = sigmoid(w · W_up tanh(RMSNorm(W_down n))) of
    the normed input n, and an adapter, the block's feed-forward at 1 / `reduction` of its width. A token with
    g > `threshold` takes the block: u = x + attention(n), then u + g · FFN(norm(u)). Any other passes attention by and
    gets x + (1 - g) · adapter(norm(x)); its keys and values are written all the same, from n. All weights but those of
    routers and adapters are frozen, here and whenever the checkpoint is opened. In evaluation mode, generation
    included, what a token passes by is not computed. Train it with the objective `flexi_depth_lm`; `depths` tells how
    many blocks each token takes.
    """

    families: ClassVar[tuple[str, ...]] = ("llama",)

    layers: int | None = None
    reduction: int = 16
    threshold: float = 0.5

    def __post_init__(self) -> None:
        """Refuse numbers that make no gate."""
        if self.layers is not None and self.layers < 1:
            raise PretrainError(f"flexi_depth: layers {self.layers}: accepted: 1 or more, or none for the later half")
        if self.reduction < 1:
            raise PretrainError(f"flexi_depth: reduction {self.reduction}: accepted: 1 or more")
        if not 0 < self.threshold < 1:
            raise PretrainError(f"flexi_depth: threshold {self.threshold}: accepted: between 0 and 1")

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with routers and adapters, drawn as the configuration draws weights, and the rest frozen."""
        self._wrap(model)
        source, std = generator(self.name, inputs), getattr(model.config, "initializer_range", 0.02)
        with torch.no_grad():
            for block in routed(model):
                for layer in (*block.router.modules(), *block.adapter.modules()):
                    if isinstance(layer, nn.Linear):
                        layer.weight.copy_(torch.empty(layer.weight.shape).normal_(0, std, generator=source))
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """The same without drawing numbers."""
        self._wrap(model)
        return model

    def _wrap(self, model: PreTrainedModel) -> None:
        entry, config = family(model), model.config
        if entry.name not in self.families:
            raise PretrainError(f"flexi_depth: family {entry.name!r}: accepted: {', '.join(self.families)}")
        if routed(model):
            raise PretrainError("flexi_depth: this model has routers already; accepted: one flexi_depth")
        every, weight_VE = blocks(model), embeddings(model).weight
        width, narrow = weight_VE.shape[1], config.intermediate_size // self.reduction  # type: ignore[operator]
        count = len(every) // 2 if self.layers is None else self.layers
        if not 1 <= count <= len(every):
            raise PretrainError(f"flexi_depth: layers {count}: accepted: 1 to {len(every)}, the model's blocks")
        if min(width, narrow * self.reduction) < self.reduction:
            raise PretrainError(
                f"flexi_depth: reduction {self.reduction}: accepted: at most "
                f"{min(width, config.intermediate_size)}, the narrower of the model's two widths"  # type: ignore[type-var]
            )
        like = {"dtype": weight_VE.dtype, "device": weight_VE.device}
        model.requires_grad_(False)
        for block in every[-count:]:
            skippable: Any = block
            skippable.router = Router(width, self.reduction, like)
            skippable.adapter = Adapter(width, narrow, config.hidden_act, like)  # type: ignore[arg-type]
            skippable.threshold = self.threshold
            skippable.__class__ = _skippable(type(block))  # type: ignore[arg-type]
            block.train(model.training)

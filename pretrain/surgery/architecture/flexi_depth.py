"""Later blocks that a token may pass by: a router decides, a small adapter stands in, keys and values are written.

Shape letters: B rows, L positions, C positions in the cache, E width, F width of an adapter, R positions of a row that
take a block, N tokens of all rows that do, H heads, D width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.pytorch_utils import Conv1D

from pretrain.core.bounds import Count, OpenShare
from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import Family, additive, at, base, blocks, embeddings, family
from pretrain.core.models.fast import rotary
from pretrain.core.models.layers import Arguments, Attention, Like, like
from pretrain.dial.tuned import DOWN, Layers, Tuning
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._random import generator

EPS = 1e-5  # of the router's norm
EAGER = {"llama": modeling_llama.eager_attention_forward, "gpt2": modeling_gpt2.eager_attention_forward}


class Router(nn.Module):
    """g = sigmoid(w · up(tanh(RMSNorm(down(x))))), one number a token."""

    def __init__(self, width: int, reduction: int, alike: Like) -> None:
        super().__init__()
        narrow = width // reduction
        self.down = nn.Linear(width, narrow, bias=False, **alike)
        self.norm = nn.RMSNorm(narrow, eps=EPS, **alike)
        self.up = nn.Linear(narrow, width, bias=False, **alike)
        self.head = nn.Linear(width, 1, bias=False, **alike)

    def forward(self, x_BLE: Tensor) -> Tensor:
        """The gates, `gate_BL`, in float32 or wider."""
        logit_BL = self.head(self.up(self.norm(self.down(x_BLE)).tanh()))[..., 0]
        return logit_BL.to(torch.promote_types(logit_BL.dtype, torch.float32)).sigmoid()


class Adapter(nn.Module):
    """A feed-forward of a fraction of the width, like the block's own: gated, or with biases."""

    def __init__(self, width: int, narrow: int, activation: str, gated: bool, alike: Like) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, narrow, bias=False, **alike) if gated else None
        self.up_proj = nn.Linear(width, narrow, bias=not gated, **alike)
        self.down_proj = nn.Linear(narrow, width, bias=not gated, **alike)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        """One row a token."""
        up = self.up_proj(x)
        return self.down_proj(self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(x)) * up)


class _Skippable(nn.Module):
    """What a block becomes; its own modules keep their names.

    Training computes both ways for every token, which costs the same at every step; evaluation computes one. The
    numbers are the same up to rounding.
    """

    dense_mask: ClassVar[bool] = True  # of which rows are taken out
    router: Router
    adapter: Adapter
    threshold: float
    entry: Family
    gate_BL: Tensor  # of the newest pass

    def forward(
        self, hidden_states: Tensor, past_key_values: Cache | None = None, attention_mask: Tensor | None = None,
        encoder_hidden_states: None = None, **more: object,
    ) -> Tensor:  # fmt: skip
        """The block's output, `x_BLE`; arguments in the order in which GPT-2 gives them, Llama gives their names."""
        norm, ffn_norm, attention, ffn = (
            at(self, path) for path in (*self.entry.norms, self.entry.attention, self.entry.feed_forward)
        )
        x_BLE, normed_BLE = hidden_states, norm(hidden_states)
        self.gate_BL = self.router(normed_BLE)
        run_BL = self.gate_BL > self.threshold
        arguments: Arguments = {"attention_mask": attention_mask, "past_key_values": past_key_values} | more
        if self.training:
            run_BL1, gate_BL1 = run_BL[..., None], self.gate_BL[..., None].to(x_BLE.dtype)
            attended_BLE, _ = attention(hidden_states=normed_BLE, **arguments)
            x_BLE = x_BLE + torch.where(run_BL1, attended_BLE, 0.0)
            normed_BLE = ffn_norm(x_BLE)
            whole_BLE, narrow_BLE = gate_BL1 * ffn(normed_BLE), (1 - gate_BL1) * self.adapter(normed_BLE)
            return x_BLE + torch.where(run_BL1, whole_BLE, narrow_BLE)
        run_N, skip_N = run_BL.flatten().nonzero()[:, 0], (~run_BL).flatten().nonzero()[:, 0]
        x_NE = x_BLE.reshape(-1, x_BLE.shape[-1])
        attended_NE = _attended(self.entry, attention, normed_BLE, run_BL, arguments)
        if len(run_N):
            x_NE = x_NE.index_add(0, run_N, attended_NE.to(x_NE.dtype))
        gate_N1 = self.gate_BL.reshape(-1, 1).to(x_NE.dtype)
        out_NE = x_NE
        for index_N, layer, share_N1 in ((run_N, ffn, gate_N1), (skip_N, self.adapter, 1 - gate_N1)):
            if len(index_N):
                part_NE = share_N1[index_N] * layer(ffn_norm(x_NE[index_N]))
                out_NE = out_NE.index_add(0, index_N, part_NE.to(out_NE.dtype))
        return out_NE.view_as(x_BLE)


def _attended(entry: Family, attention: Attention, normed_BLE: Tensor, run_BL: Tensor, arguments: Arguments) -> Tensor:
    """Attention's output for the tokens of `run_BL` in order, `x_NE`; keys and values of all are written."""
    mask = arguments["attention_mask"]
    if bool(run_BL.all()) or (mask is not None and mask.ndim != 4):
        return attention(hidden_states=normed_BLE, **arguments)[0][run_BL]
    length, cache = run_BL.shape[1], arguments["past_key_values"]
    turns = [table.expand(len(run_BL), -1, -1) for table in arguments.get("position_embeddings", ())]
    keys_BHCD, values_BHCD = _heads(attention, "k", normed_BLE, turns), _heads(attention, "v", normed_BLE)
    if cache is not None:
        keys_BHCD, values_BHCD = cache.update(keys_BHCD, values_BHCD, attention.layer_idx)
    most = int(run_BL.sum(1).max())
    if most == 0:
        return normed_BLE[run_BL]
    # Of each row the tokens that take the block, in order; rows that have fewer are filled up with others.
    place_BR = run_BL.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    real_BR = run_BL.gather(1, place_BR)
    queries_BHRD = _heads(attention, "q", _at(normed_BLE, place_BR), [_at(table, place_BR) for table in turns])
    total = keys_BHCD.shape[2]
    if mask is None and length > 1:
        causal_LC = torch.ones(length, total, dtype=torch.bool, device=run_BL.device).tril(total - length)
        mask = additive(causal_LC[None, None], queries_BHRD.dtype)
    if mask is not None:
        mask_BLC = mask[:, 0, :, :total].expand(len(run_BL), length, -1)
        mask = _at(mask_BLC, place_BR)[:, None]
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, EAGER[entry.name])
    out_BRHD, _ = attend(
        attention, queries_BHRD, keys_BHCD, values_BHCD, mask, dropout=0.0, scaling=attention.scaling, is_causal=False
    )
    return at(attention, entry.output)(out_BRHD[real_BR].flatten(1))


def _heads(attention: Attention, which: str, x_BLE: Tensor, turns: Sequence[Tensor] = ()) -> Tensor:
    """Queries, keys or values, `x_BHLD`, turned by the cosines and sines `turns` if there are any."""
    x_BLHD = _projected(attention, which, x_BLE).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{which}_norm", None)
    x_BHLD = (x_BLHD if norm is None else norm(x_BLHD)).transpose(1, 2)
    if not turns:
        return x_BHLD
    cos, sin = turns
    return rotary(x_BHLD, x_BHLD[:, :0], cos, sin)[0]


def _projected(attention: Attention, which: str, x_BLE: Tensor) -> Tensor:
    fused = getattr(attention, "c_attn", None)
    if fused is None:
        return getattr(attention, f"{which}_proj")(x_BLE)
    start = "qkv".index(which) * attention.embed_dim
    part = slice(start, start + attention.embed_dim)
    if type(fused) is not Conv1D:  # what an adapter has wrapped is computed whole
        return fused(x_BLE)[..., part]
    return nn.functional.linear(x_BLE, fused.weight[:, part].T, fused.bias[part])


def _at(x_BLE: Tensor, place_BR: Tensor) -> Tensor:
    return x_BLE.gather(1, place_BR[..., None].expand(-1, -1, x_BLE.shape[-1]))


def _feed_forward(config: PreTrainedConfig) -> tuple[int, str, bool]:
    """Of a block's feed-forward: its width, its activation, whether it is gated."""
    if config.model_type == "gpt2":
        return config.n_inner or 4 * config.n_embd, config.activation_function, False
    return config.intermediate_size, config.hidden_act, True


@functools.cache
def _skippable(kind: type) -> type[_Skippable]:
    """A block's class with another `forward`: what looks for blocks of the old class finds these."""
    return cast("type[_Skippable]", type(f"Skippable{kind.__name__}", (_Skippable, kind), {}))


def routed(model: nn.Module) -> list[_Skippable]:
    """The blocks with a router, in order."""
    return [block for block in blocks(model) if isinstance(block, _Skippable)]


@torch.no_grad()
def depths(model: PreTrainedModel, input_ids_BL: Tensor, **inputs: object) -> Tensor:
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
    included, what a token passes by is not computed. Train it with the objective `flexi_depth_lm`; `depths` gives
    how many blocks each token takes. GPT-2's adapter is ungated and has biases, from zero, as its feed-forward does.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")

    layers: Count | None = None
    reduction: Count = 16
    threshold: OpenShare = 0.5

    def tuning(self, layers: Layers, before: Tuning | None) -> Tuning | None:
        """Routers and narrow feed-forwards in the last blocks; the first of these is not passed backwards itself."""
        shape, narrow = layers.shape, layers.shape.width // self.reduction
        count, inner = self.layers or shape.depth // 2, shape.intermediate // self.reduction
        router, adapter = 2 * shape.width * narrow, (3 if shape.gated else 2) * shape.width * inner
        beside = narrow + shape.width + (0 if shape.gated else inner + shape.width)  # the norm, the gate, biases
        read = narrow + (2 if shape.gated else 1) * inner  # by the first of them, of an input that needs no gradient
        flops = 6.0 * count * (router + adapter + shape.width) - 2.0 * shape.width * read
        spared = layers.before(DOWN, shape.depth - count)
        return replace(spared, trained=float(count * (router + adapter + beside)), flops=flops)

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with routers and adapters, drawn as the configuration draws weights, and the rest frozen."""
        self._wrap(model)
        source, std = generator(self.name, inputs), getattr(model.config, "initializer_range", 0.02)
        with torch.no_grad():
            for block in routed(model):
                for layer in (*block.router.modules(), *block.adapter.modules()):
                    if isinstance(layer, nn.Linear):
                        layer.weight.copy_(torch.empty(layer.weight.shape).normal_(0, std, generator=source))
                        if layer.bias is not None:
                            layer.bias.zero_()
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
        stack, weight_VE = blocks(model), embeddings(model).weight
        if hasattr(stack[0], "crossattention"):
            raise PretrainError("flexi_depth: the model has cross-attention: accepted: a model of text alone")
        (inner, activation, gated), width = _feed_forward(config), weight_VE.shape[1]
        count = len(stack) // 2 if self.layers is None else self.layers
        if not 1 <= count <= len(stack):
            raise PretrainError(f"flexi_depth: layers {count}: accepted: 1 to {len(stack)}, the model's blocks")
        if min(width, inner) < self.reduction:
            raise PretrainError(
                f"flexi_depth: reduction {self.reduction}: accepted: at most {min(width, inner)}, the narrower of the "
                "model's two widths"
            )
        alike = like(weight_VE)
        model.requires_grad_(False)
        for block in stack[-count:]:
            kind: type = type(block)
            block.__class__ = _skippable(kind)
            assert isinstance(block, _Skippable)
            block.router = Router(width, self.reduction, alike)
            block.adapter = Adapter(width, inner // self.reduction, activation, gated, alike)
            block.threshold, block.entry = self.threshold, entry
            block.train(model.training)

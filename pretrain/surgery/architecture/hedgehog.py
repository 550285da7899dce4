"""Hedgehog: the softmax attention of a trained model becomes linear attention with learnable features.

Shape letters: B rows, L positions, E width, H heads, D width of a head, F features (2 D).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import at, blocks, family, set_module
from pretrain.core.models.layers import Attention
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery.architecture._linear_attention import NAME, allowed, kept, quadratic, recurrent, state_of, weights

Tables = tuple[Tensor, Tensor]  # cosines and sines of rotary positions
LEAST = 1e-12  # of a feature, so that no query finds all keys at zero


class FeatureMap(nn.Module):
    """φ(x) = [f(Wx), f(-Wx)] with a W of its own for each head, at first the identity; in float32 or wider."""

    def __init__(self, heads: int, width: int, activation: str, like: Tensor) -> None:
        super().__init__()
        self.activation = activation
        eye_DD = torch.eye(width, dtype=like.dtype, device=like.device)
        self.weight = nn.Parameter(eye_DD.repeat(heads, 1, 1))

    def forward(self, x_BHLD: Tensor) -> Tensor:
        """`φ_BHLF`."""
        wide = torch.promote_types(x_BHLD.dtype, torch.float32)
        x_BHLD = x_BHLD.to(wide) @ self.weight.to(wide).transpose(-1, -2)
        signed = (x_BHLD, -x_BHLD)
        features = [x.softmax(-1) if self.activation == "softmax" else x.exp() for x in signed]
        return torch.cat(features, -1).clamp_min(LEAST)


@dataclass
class Comparison:
    """What attention layers hand over while they are distilled: per layer `cross_BL` and the teacher's `entropy_BL`."""

    learn: bool
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class HedgehogAttention(nn.Module):
    """Takes the place of an attention layer, whose projections it keeps under their names."""

    c_attn: nn.Module  # of GPT-2, as the next two
    c_proj: nn.Module
    resid_dropout: nn.Module
    q_proj: nn.Module  # of the others, as all that follow
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module  # of Qwen3, as the next
    k_norm: nn.Module

    def __init__(self, layer: Attention, kind: str, activation: str) -> None:
        super().__init__()
        self.layer_idx, self.head_dim, self.scaling, self.kind = layer.layer_idx, layer.head_dim, layer.scaling, kind
        for name, module in layer.named_children():
            self.add_module(name, module)
        if kind == "gpt2":
            self.heads, self.groups, like = layer.num_heads, 1, self.c_attn.get_parameter("weight")
        else:
            self.heads, self.groups = layer.config.num_attention_heads, layer.num_key_value_groups
            like = self.q_proj.get_parameter("weight")
        self.feature_q = FeatureMap(self.heads, self.head_dim, activation, like)
        self.feature_k = FeatureMap(self.heads, self.head_dim, activation, like)
        self.comparison: Comparison | None = None

    def forward(
        self, hidden_states: Tensor, position_embeddings: Tables | None = None, attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None, **_: object,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """The layer's output; the state of what came before is in `past_key_values`."""
        q_BHLD, k_BHLD, v_BHLD = self._project(hidden_states, position_embeddings)
        if self.comparison is not None:
            y_BHLD = self._teach(self.comparison, q_BHLD, k_BHLD, v_BHLD, attention_mask)
        else:
            y_BHLD = self._attend(q_BHLD, k_BHLD, v_BHLD, attention_mask, past_key_values)
        y_BLE = y_BHLD.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        if self.kind == "gpt2":
            return self.resid_dropout(self.c_proj(y_BLE)), None
        return self.o_proj(y_BLE), None

    def _project(self, x_BLE: Tensor, tables: Tables | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys after rotary positions and values, one of each a head."""
        split = (*x_BLE.shape[:2], -1, self.head_dim)
        if self.kind == "gpt2":
            q_BHLD, k_BHLD, v_BHLD = (x.view(split).transpose(1, 2) for x in self.c_attn(x_BLE).chunk(3, dim=-1))
            return q_BHLD, k_BHLD, v_BHLD
        q_BLHD, k_BLHD, v_BLHD = (project(x_BLE).view(split) for project in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q_BLHD, k_BLHD = self.q_norm(q_BLHD), self.k_norm(k_BLHD)
        assert tables is not None
        q_BHLD, k_BHLD = apply_rotary_pos_emb(q_BLHD.transpose(1, 2), k_BLHD.transpose(1, 2), *tables)
        return q_BHLD, repeat_kv(k_BHLD, self.groups), repeat_kv(v_BLHD.transpose(1, 2), self.groups)

    def _attend(
        self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Linear attention: the quadratic form under a mask of its own, else the recurrent one."""
        place = None if cache is None else state_of(cache, self.layer_idx)
        rows, _, length, _ = q_BHLD.shape
        with torch.autocast(q_BHLD.device.type, enabled=False):
            q_BHLF, k_BHLF = self.feature_q(q_BHLD), self.feature_k(k_BHLD)
            v_BHLD = v_BHLD.to(q_BHLF.dtype)
            if mask is not None and mask.ndim == 4:
                mask = allowed(mask, rows, length, mask.device)
                if place is None:
                    return quadratic(q_BHLF, k_BHLF, v_BHLD, mask)[0]
                mask = kept(mask)
            y_BHLD, after = recurrent(q_BHLF, k_BHLF, v_BHLD, mask, None if place is None else place.state())
        if place is not None:
            place.put(after, length)
        return y_BHLD

    def _teach(
        self, comparison: Comparison, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Softmax attention; beside it, how far the linear attention's weights are from its own."""
        allowed_B1LL = allowed(mask, len(q_BHLD), q_BHLD.shape[2], q_BHLD.device)
        with torch.set_grad_enabled(comparison.learn):
            arguments = (q_BHLD.detach(), k_BHLD.detach(), allowed_B1LL)
            # The backward pass makes the weights anew: kept, they would fill the memory.
            comparison.layers.append(
                checkpoint(self._compare, *arguments, use_reentrant=False, preserve_rng_state=False)
            )
        return nn.functional.scaled_dot_product_attention(
            q_BHLD, k_BHLD, v_BHLD.to(q_BHLD.dtype), attn_mask=allowed_B1LL, scale=self.scaling
        )

    def _compare(self, q_BHLD: Tensor, k_BHLD: Tensor, allowed_B1LL: Tensor) -> tuple[Tensor, Tensor]:
        """`cross_BL`, -Σ_j p_ij log a_ij, and `entropy_BL`, -Σ_j p_ij log p_ij, the means over heads."""
        with torch.autocast(q_BHLD.device.type, enabled=False):
            a_BHLL = weights(self.feature_q(q_BHLD), self.feature_k(k_BHLD), allowed_B1LL)
            wide = a_BHLL.dtype
            score_BHLL = q_BHLD.to(wide) @ k_BHLD.to(wide).transpose(-1, -2) * self.scaling
            p_BHLL = score_BHLL.masked_fill(~allowed_B1LL, -torch.inf).softmax(-1)
            log_BHLL = a_BHLL.masked_fill(~allowed_B1LL, 1.0).clamp_min(torch.finfo(wide).tiny).log()
            return -(p_BHLL * log_BHLL).sum(-1).mean(1), torch.special.entr(p_BHLL).sum(-1).mean(1)


def attentions(model: nn.Module) -> list[HedgehogAttention]:
    """The model's attention layers of this kind, in order."""
    return [module for module in model.modules() if isinstance(module, HedgehogAttention)]


@contextmanager
def distilling(model: nn.Module) -> Iterator[Comparison]:
    """While open, the layers attend by softmax, as the model that was operated on did, and compare the weights."""
    comparison, layers = Comparison(torch.is_grad_enabled()), attentions(model)
    try:
        for layer in layers:
            layer.comparison = comparison
        yield comparison
    finally:
        for layer in layers:
            layer.comparison = None


@dataclass(frozen=True)
class Hedgehog(Surgery):
    """The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry (arXiv:2402.04347).

    The weights exp(q·k / √d) of each attention layer become φ(q)·φ(k), normalised alike, with φ(x) = [f(Wx), f(-Wx)]:
    queries and keys (after rotary positions) have a W each for every head, the identity at first. f is the softmax
    over features, which no input overflows, or `exp`. What came before is then a state S = Σ φ(k) vᵀ, z = Σ φ(k), and
    generation takes the same memory and time for each token. The projections stay as they are. Train the W first with
    the objective `hedgehog_distillation`, which makes the weights like the softmax's, then the model with `causal_lm`.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")

    activation: Literal["softmax", "exp"] = "softmax"

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with every attention layer replaced."""
        model = self.restore(model)
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Replace the layers; the feature maps are as at first."""
        entry, config = family(model), model.config
        if entry.name not in self.families:
            raise PretrainError(f"hedgehog: family {entry.name!r}: accepted: {', '.join(self.families)}")
        sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        if sliding or (config.model_type == "mistral" and config.sliding_window is not None):
            raise PretrainError(f"hedgehog: sliding_window {config.sliding_window}: accepted: full attention")
        layers = [at(block, entry.attention) for block in blocks(model)]
        for layer in layers:
            if not type(layer).__module__.startswith("transformers.models."):
                raise PretrainError(f"hedgehog: attention {type(layer).__name__}: accepted: that of transformers")
        for block, layer in zip(blocks(model), layers, strict=True):
            made = HedgehogAttention(layer, entry.name, self.activation)
            set_module(block, entry.attention, made.train(model.training))
        model.set_attn_implementation(NAME)
        return model

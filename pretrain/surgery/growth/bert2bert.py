"""Width and depth: a larger model whose neurons are copies of a small one's, of the same block and of the next."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pretrain.core.bounds import Count
from pretrain.core.checkpoint import surgery_of
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import blocks, embeddings, family
from pretrain.dial.effort import Task, Work, through
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._growth import config_with_blocks, fresh
from pretrain.surgery._random import generator

# The axes of each weight as it is stored: E width, Q queries, K keys and values, 3 the two fused, F feed-forward, N a
# norm's, T that of the norm before the head, · one that does not grow; `/` before the axis that the layer sums over.
# A bias has the other axis.
_AXES = {
    "llama": {
        r"embed_tokens": "· E", r"lm_head": "· /E", r"q_proj": "Q /E", r"[kv]_proj": "K /E", r"o_proj": "E /Q",
        r"(gate|up)_proj": "F /E", r"down_proj": "E /F", r"(input|post_attention)_layernorm": "N", r"norm": "T",
        r"[qk]_norm": "·",
    },
    "gpt2": {
        r"wte|wpe": "· E", r"lm_head": "· /E", r"attn\.c_attn": "/E 3", r"attn\.c_proj": "/Q E",
        r"mlp\.c_fc": "/E F", r"mlp\.c_proj": "/F E", r"ln_[12]": "N", r"ln_f": "T",
    },
    "bert": {
        r"(word|position|token_type)_embeddings": "· E", r"decoder|seq_relationship": "· /E", r"predictions": "·",
        r"self\.(query|key|value)": "Q /E", r"attention\.output\.dense": "E /Q", r"intermediate\.dense": "F /E",
        r"output\.dense": "E /F", r"(transform|pooler)\.dense": "E /E", r"transform\.LayerNorm": "T",
        r"LayerNorm": "N",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """One dimension of the grown model: entry i is a copy of the small one's entry `source[i]`."""

    source: Tensor  # g(i)
    copies: Tensor  # C_g(i): how many entries have the same source
    new: Tensor  # whether the entry is beyond the small model's

    @classmethod
    def of(cls, source: Tensor, new: Tensor) -> Axis:
        """Count the copies."""
        return cls(source, torch.bincount(source)[source].double(), new)

    def each(self, size: int) -> Axis:
        """The axis of heads as one of their entries, `size` to a head."""
        inside = torch.arange(size).repeat(len(self.source))
        source, copies, new = (x.repeat_interleave(size) for x in (self.source * size, self.copies, self.new))
        return Axis(source + inside, copies, new)


@dataclass(frozen=True)
class Bert2BERT(Surgery):
    """bert2BERT: Towards Reusable Pretrained Language Models (arXiv:2110.07143).

    Each dimension grows by a map g, the identity on the first d entries and a random entry of them beyond. A weight's
    input axis is shared out among the copies, its output axis copied: Ũ_i* = W_g(i)* / C_g(i), U_*j = Ũ_*g(j) ("FPI").
    "AKI" takes the new columns j > d, and so the new heads and neurons, from Ũ of the next block. Attention grows by
    whole heads. Then the blocks are stacked: all of them as often as they fit, then the topmost.

    With "FPI" and the old depth the function is kept: always with RMSNorm, whose copies here are weighted by
    √(D'/(D·C)) so that the mean square stays; with LayerNorm where each of the `hidden_size` entries has the same
    number of copies (a multiple of the old width and `sampling: even`), else up to the mean and variance. A tied head
    sums over the copies of its embedding: the norm before it is divided by C. What is not given keeps its ratio to
    `hidden_size`; the number of blocks stays.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert")

    hidden_size: Count | None = None
    intermediate_size: Count | None = None
    num_hidden_layers: Count | None = None
    num_attention_heads: Count | None = None
    num_key_value_heads: Count | None = None
    initialisation: Literal["FPI", "AKI"] = "AKI"
    sampling: Literal["uniform", "even"] = "uniform"

    def work(self, task: Task) -> Work:
        """Each number of the grown model is drawn at first, and then made in float64 of an old one."""
        shape = task.layers.shape
        times = (self.hidden_size or shape.width) / shape.width * (self.num_hidden_layers or shape.depth) / shape.depth
        return through(task.numbers * times, 55)

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The grown model, a new one."""
        entry, small = family(model), len(blocks(model))
        self._check(model, entry.name)
        shape, order = _shape(model), _order(small, self.num_hidden_layers or small)
        wanted = self._wanted(shape, keeps_head=entry.name == "llama")
        config = config_with_blocks(model, order)
        _resize(config, wanted)
        axes = self._axes(shape, wanted, generator(self.name, inputs))
        tied = _head(model) is embeddings(model).weight
        scale = torch.sqrt(wanted["hidden_size"] / (shape["hidden_size"] * axes["E"].copies))
        if entry.name != "llama":  # LayerNorm, whose mean no weighting keeps
            scale = torch.ones_like(scale)
        factors = {"E": scale, "N": 1 / scale, "T": 1 / (scale**2 * axes["E"].copies) if tied else 1 / scale}

        grown, weights = fresh(model, config), dict(model.named_parameters())
        inside = re.compile(rf"((?:^|.*\.){re.escape(entry.blocks)}\.)(\d+)(\..*)")
        for name, parameter in grown.named_parameters():
            letters, match = _letters(entry.name, name, parameter.ndim), inside.match(name)
            if not match:
                value = _widen(weights[name], None, letters, axes, factors)
            else:
                source = order[int(match[2])]
                weight = weights[f"{match[1]}{source}{match[3]}"]
                ahead = weights.get(f"{match[1]}{source + 1}{match[3]}") if self.initialisation == "AKI" else None
                value = _widen(weight, ahead, letters, axes, factors)
            parameter.data.copy_(value)
        return grown

    def _check(self, model: PreTrainedModel, name: str) -> None:
        if name not in self.families:
            raise PretrainError(f"bert2bert: family {name!r}: accepted: {', '.join(self.families)}")
        if surgery_of(model):
            done = ", ".join(e["method"] for e in surgery_of(model))
            raise PretrainError(f"bert2bert: the model has been through {done}: accepted: grow first, then operate")
        if self.num_hidden_layers is not None and self.num_hidden_layers < len(blocks(model)):
            raise PretrainError(
                f"bert2bert: num_hidden_layers {self.num_hidden_layers}: accepted: {len(blocks(model))} or more"
            )

    def _wanted(self, shape: dict[str, int], keeps_head: bool) -> dict[str, int]:
        """The grown model's dimensions, what is not given by its ratio to the width."""
        width, wide = shape["hidden_size"], self.hidden_size or shape["hidden_size"]
        heads, shared, size = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
        grown = self.num_attention_heads or heads * wide // width
        if (not self.num_attention_heads and heads * wide % width) or (not keeps_head and grown * size != wide):
            raise PretrainError(
                f"bert2bert: hidden_size {wide} with {grown} attention heads of {size}: accepted: heads of the old "
                "size that fill the width" + (", or num_attention_heads" if keeps_head else "")
            )
        groups = heads // shared
        pairs = self.num_key_value_heads or (grown // groups if grown % groups == 0 else shared)
        wanted = {
            "hidden_size": wide, "num_attention_heads": grown, "num_key_value_heads": pairs, "head_dim": size,
            "intermediate_size": self.intermediate_size or shape["intermediate_size"] * wide // width,
        }  # fmt: skip
        for name, value in wanted.items():
            if value < shape[name]:
                raise PretrainError(f"bert2bert: {name} {value}: accepted: {shape[name]} or more")
        if grown % pairs or grown // pairs < groups:
            raise PretrainError(
                f"bert2bert: num_key_value_heads {pairs} for {grown} attention heads: accepted: a divisor that leaves "
                f"{groups} or more queries to each"
            )
        return wanted

    def _axes(self, shape: dict[str, int], wanted: dict[str, int], random: torch.Generator) -> dict[str, Axis]:
        def draw(old: int, new: int) -> Tensor:
            if self.sampling == "even":
                return torch.arange(new) % old
            return torch.cat([torch.arange(old), torch.randint(old, (new - old,), generator=random)])

        def simple(name: str) -> Axis:
            return Axis.of(draw(shape[name], wanted[name]), torch.arange(wanted[name]) >= shape[name])

        shared, grown_shared, size = shape["num_key_value_heads"], wanted["num_key_value_heads"], shape["head_dim"]
        groups, grown_groups = shape["num_attention_heads"] // shared, wanted["num_attention_heads"] // grown_shared
        pairs = simple("num_key_value_heads")
        # A query reads the copy of its own key; one from the next block only where its key is from there too.
        queries = pairs.source[:, None] * groups + draw(groups, grown_groups)
        heads = Axis.of(queries.flatten(), pairs.new.repeat_interleave(grown_groups))
        q, k = heads.each(size), pairs.each(size)
        step = shape["num_attention_heads"] * size
        fused = Axis(torch.cat([q.source + i * step for i in range(3)]), q.copies.repeat(3), q.new.repeat(3))
        return {"E": simple("hidden_size"), "F": simple("intermediate_size"), "Q": q, "K": k, "3": fused}


def _head(model: PreTrainedModel) -> Tensor | None:
    layer: nn.Linear | None = model.get_output_embeddings()
    return None if layer is None else layer.weight


def _shape(model: PreTrainedModel) -> dict[str, int]:
    config = model.config
    heads = config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    return {
        "hidden_size": config.hidden_size, "num_attention_heads": heads, "intermediate_size": inner,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }  # fmt: skip


def _resize(config: PreTrainedConfig, wanted: dict[str, int]) -> None:
    """Write the dimensions under the names that the configuration has for them."""
    for name, value in wanted.items():
        if name == "intermediate_size" and hasattr(config, "n_inner"):
            config.n_inner = value
        elif name in config.attribute_map or hasattr(config, name):
            setattr(config, name, value)
    if wanted["hidden_size"] != wanted["num_attention_heads"] * wanted["head_dim"]:
        config.head_dim = wanted["head_dim"]


def _order(small: int, large: int) -> list[int]:
    """Which block of the small model each block is from: all as often as they fit, then the topmost."""
    rest = large % small
    return [i % small for i in range(large - rest)] + [small - rest + i for i in range(rest)]


def _letters(family_name: str, name: str, ndim: int) -> list[str]:
    layer = name.rpartition(".")[0]
    for pattern, letters in _AXES[family_name].items():
        if re.search(rf"(^|\.)({pattern})$", layer):
            axes = letters.split()
            return axes if ndim == len(axes) else [axis for axis in axes if not axis.startswith("/")]
    raise PretrainError(f"bert2bert: no rule for the weight {name}; accepted: a plain {family_name} language model")


def _widen(
    weight: Tensor, ahead: Tensor | None, letters: list[str], axes: dict[str, Axis], factors: dict[str, Tensor]
) -> Tensor:
    """One weight of the grown model, from that of its block and, for the new outputs, of the next."""
    value = weight.detach().cpu().double()
    other = value if ahead is None else ahead.detach().cpu().double()

    def along(dim: int, numbers: Tensor) -> Tensor:
        return numbers.view([-1 if d == dim else 1 for d in range(value.ndim)])

    for dim, letter in enumerate(letters):
        if letter.startswith("/"):
            axis = axes[letter[1:]]
            value, other = (x.index_select(dim, axis.source) / along(dim, axis.copies) for x in (value, other))
    for dim, letter in enumerate(letters):
        if letter == "·" or letter.startswith("/"):
            continue
        axis = axes["E" if letter in "NT" else letter]
        value, other = (x.index_select(dim, axis.source) for x in (value, other))
        if letter not in "NT":
            value = torch.where(along(dim, axis.new), other, value)
        if letter in factors:
            value = value * along(dim, factors[letter])
    return value

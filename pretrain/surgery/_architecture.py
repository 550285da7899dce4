"""A model's size and work by arithmetic alone: bytes of its weights, FLOPs of one input, from a few numbers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
from transformers import PreTrainedConfig

from pretrain.core.errors import PretrainError
from pretrain.core.models.families import FAMILIES

FAMILY_OF = {kind: e.name for e in FAMILIES if e.name in ("llama", "gpt2", "bert") for kind in e.types}
GENES = ("feed_forward", "heads", "layers", "vocabulary", "width")  # what a search may change, in order


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that its size and its work depend on."""

    model_type: str
    vocabulary: int
    width: int
    layers: int
    heads: int
    feed_forward: int
    shared: int  # heads of keys and values
    head_width: int
    positions: int  # rows of the table of positions; 0: no table
    segments: int = 0
    labels: int = 0  # of a classifier of documents; 0: a language-model head
    tied: bool = True
    biases: tuple[bool, bool, bool] = (True, True, True)  # of queries, keys, values; attention's output; feed-forward
    itemsize: int = 4

    @property
    def family(self) -> str:
        """The family's name."""
        return FAMILY_OF[self.model_type]

    @property
    def valid(self) -> bool:
        """Whether there is such a model: heads divide the width, and rotary positions turn pairs."""
        divides = self.width == self.heads * self.head_width and self.heads % self.shared == 0
        return divides and (self.family != "llama" or self.head_width % 2 == 0)

    def changed(self, genes: Mapping[str, int]) -> Shape:
        """With other genes; heads share keys and values in the same proportion, as near as divides."""
        values: dict[str, Any] = dict(genes)
        made = replace(self, **values)
        shared = gcd(made.heads, max(1, made.heads * self.shared // self.heads))
        return replace(made, shared=shared, head_width=made.width // made.heads)


def shape_of(config: PreTrainedConfig, labels: int = 0) -> Shape:
    """The shape of a model with this configuration, a classifier of so many `labels` or (0) a language model."""
    kind = config.model_type
    if kind not in FAMILY_OF:
        raise PretrainError(f"compressor: model type {kind!r}: accepted: {', '.join(FAMILY_OF)}")
    width, heads = config.hidden_size, config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    biases = {
        "qwen2": (True, False, False), "mistral": (False, False, False), "gpt2": (True,) * 3, "bert": (True,) * 3,
    }.get(kind)  # fmt: skip
    if biases is None:
        attention = bool(config.attention_bias)
        biases = (attention, attention, bool(getattr(config, "mlp_bias", False)))
    return Shape(
        kind, config.vocab_size, width, config.num_hidden_layers, heads, inner,
        shared=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or width // heads,
        positions=0 if FAMILY_OF[kind] == "llama" else config.max_position_embeddings,
        segments=getattr(config, "type_vocab_size", 0), labels=labels, tied=bool(config.tie_word_embeddings),
        biases=biases, itemsize=_itemsize(config.dtype),
    )  # fmt: skip


def _itemsize(dtype: torch.dtype | str | None) -> int:
    """Bytes of a weight; a saved configuration names its type."""
    named = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return (named or torch.float32).itemsize


def parameters(shape: Shape) -> int:
    """How many weights the model has, tied ones counted once."""
    s = shape
    norm = s.width if s.family == "llama" else 2 * s.width
    queries, others = s.heads * s.head_width, 2 * s.shared * s.head_width
    block = s.width * (2 * queries + others) + 2 * norm
    block += s.biases[0] * (queries + others) + s.biases[1] * s.width
    gates = 2 if s.family == "llama" else 1
    block += (gates + 1) * s.width * s.feed_forward + s.biases[2] * (gates * s.feed_forward + s.width)
    block += 2 * s.head_width * (s.model_type == "qwen3")  # norms of queries and keys
    tables = (s.vocabulary + s.positions + s.segments) * s.width
    return tables + norm + s.layers * block + _head(s)


def _head(s: Shape) -> int:
    untied = 0 if s.tied else s.vocabulary * (s.width + (s.family == "bert"))  # BERT then has its bias twice
    if s.family != "bert":
        return s.width * s.labels if s.labels else untied
    dense = s.width * s.width + s.width
    return dense + (s.width + 1) * s.labels if s.labels else dense + 2 * s.width + s.vocabulary + untied


def size(shape: Shape) -> int:
    """Bytes of the weights in a safetensors file, without its header."""
    return parameters(shape) * shape.itemsize


def flops(shape: Shape, length: int) -> int:
    """FLOPs of the forward pass on one input of `length` tokens: matrix products and attention, two a multiply-add."""
    s = shape
    queries, others = s.heads * s.head_width, 2 * s.shared * s.head_width
    matrices = s.width * (2 * queries + others) + (3 if s.family == "llama" else 2) * s.width * s.feed_forward
    attention = 2 * length * queries  # scores and their sums, of each token with all
    total = 2 * length * s.layers * (matrices + attention)
    if s.family == "bert":
        dense = 2 * s.width * s.width
        return total + (dense + 2 * s.width * s.labels if s.labels else length * (dense + 2 * s.width * s.vocabulary))
    return total + 2 * length * s.width * (s.labels or s.vocabulary)


def configured(config: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
    """A copy of a configuration, of that shape."""
    made = copy.deepcopy(config)
    values = {
        "vocab_size": shape.vocabulary, "hidden_size": shape.width, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "n_inner" if shape.family == "gpt2" else "intermediate_size": shape.feed_forward,
    }  # fmt: skip
    if shape.family == "llama":
        values |= {"num_key_value_heads": shape.shared, "head_dim": shape.head_width}
    for name, value in values.items():
        setattr(made, name, value)
    kinds = getattr(made, "layer_types", None)
    if kinds:
        made.layer_types = [kinds[number % len(kinds)] for number in range(shape.layers)]
    return made

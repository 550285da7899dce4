"""A model's size from its configuration, as a recipe or `config.json` gives it: needs neither torch nor transformers.

What the configuration leaves out is what `transformers` takes by default. The families of `core.quick.table` are known
exactly; of other encoders (images, series, speech, proteins) the blocks and how many positions an example has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeGuard

from pretrain.core.quick.declared import declared
from pretrain.core.quick.table import FAMILIES
from pretrain.dial import kinds
from pretrain.dial.shapes import GATED, Shape

DROPOUTS = {"gpt2": "attn_pdrop", "bert": "attention_probs_dropout_prob", "t5": "dropout_rate"}
_INTERMEDIATE = ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "ffn_hidden_size", "hidden_dim")
_DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
_WIDTH = ("hidden_size", "n_embd", "d_model")


class Fields:
    """The numbers of a configuration by any of their names, given or by default."""

    def __init__(self, config: Mapping[str, object]) -> None:
        facts = declared(str(config.get("model_type")))
        self.aliases = dict(facts.aliases) if facts else {}
        given = {self.aliases.get(name, name): value for name, value in config.items()}
        self.values: Mapping[str, object] = {**(facts.defaults if facts else {}), **given}

    def get(self, *names: str) -> object:
        """The first of these that there is."""
        values = (self.values.get(self.aliases.get(name, name)) for name in names)
        return next((value for value in values if value is not None), None)

    def number(self, *names: str) -> int:
        """The first of these that is a number; 0 where none is."""
        value = self.get(*names)
        return int(value) if is_number(value) else 0


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def shape_from(config: Mapping[str, object]) -> Shape | None:
    """The shape that a configuration describes; None where it says too little, as before there is a tokenizer."""
    fields, kind = Fields(config), str(config.get("model_type"))
    width, depth, heads = fields.number(*_WIDTH), fields.number(*_DEPTH), fields.number(*_HEADS)
    family = next((entry for entry in FAMILIES if kind in entry.types), None)
    vocabulary = fields.number("vocab_size")
    untold = family is not None and "vocab_size" not in config
    if not width or not depth or not heads or untold or kind in kinds.OTHERS:
        return None
    intermediate = fields.number(*_INTERMEDIATE) or 4 * width
    queries = heads * (fields.number("head_dim", "d_kv") or width // heads)
    shared = 1 if fields.get("multi_query") is True else fields.number("num_key_value_heads") or heads
    keys = shared * queries // heads
    activation = str(fields.get("feed_forward_proj") or "")
    dropout = fields.get(DROPOUTS.get(kind, ""))
    alone = fields.get("mlp_only_layers")
    mixture = kinds.mixture_of(fields.number, len(alone) if isinstance(alone, list) else 0, width, depth, intermediate)
    gated = kind in GATED or kind in kinds.GATED or mixture is not None or activation.startswith("gated")
    tied = kind == "t5" or bool(fields.get("tie_word_embeddings"))
    dropped = kind == "t5" or (is_number(dropout) and dropout > 0)
    both = fields.get("is_encoder_decoder") is True
    decoder = (fields.number("num_decoder_layers", "decoder_layers") or depth) if both else 0
    beside = _beside(fields, kind, width, depth, intermediate, queries, keys, vocabulary, decoder)
    return Shape(
        width, depth, heads, mixture.intermediate if mixture else intermediate, vocabulary, gated, tied,
        queries=queries, keys=keys, decoder=decoder, transform=kind in ("bert", "modernbert", "esm", *kinds.ENCODERS),
        fused=not dropped, beside=beside + (mixture.dormant if mixture else 0),
    )  # fmt: skip


def _beside(
    fields: Fields, kind: str, width: int, depth: int, intermediate: int, queries: int, keys: int, entries: int,
    decoder: int,
) -> int:  # fmt: skip
    """Norms, biases and tables of positions."""
    positions = fields.number("max_position_embeddings", "n_positions", "max_sequence_length") * width
    if kind == "gpt2":
        return positions + depth * (9 * width + intermediate) + 2 * width
    if kind == "bert" or kind in kinds.ENCODERS:
        positions = positions if kind in ("bert", *kinds.POSITIONS) else 0
        return (
            positions
            + fields.number("type_vocab_size") * width
            + depth * (9 * width + intermediate)
            + 5 * width
            + entries
        )
    if kind == "modernbert":
        return (2 * depth + 2) * width + entries
    if kind == "t5":
        biases = 2 * fields.number("relative_attention_num_buckets") * fields.number("num_heads")
        return (2 * depth + 3 * decoder + 2) * width + biases
    biases = depth * (queries + 2 * keys) if kind == "qwen2" else 0
    norms = 2 * depth * (queries // max(1, fields.number("num_attention_heads"))) if kind == "qwen3" else 0
    tables = (2 if decoder else 1) if kind in kinds.POSITIONS else 0
    return (2 * depth + 1) * width + biases + norms + tables * positions


def reconstructor(config: Mapping[str, object]) -> tuple[Shape, float] | None:
    """Of a masked autoencoder the decoder that is trained with it, which sees every patch, and how many those are."""
    fields = Fields(config)
    width, depth = fields.number("decoder_hidden_size"), fields.number("decoder_num_hidden_layers")
    patch, image = fields.number("patch_size"), fields.number("image_size")
    if not (width and depth and patch and image):
        return None
    heads, channels = fields.number("decoder_num_attention_heads") or 1, fields.number("num_channels") or 3
    shape = Shape(width, depth, heads, fields.number("decoder_intermediate_size"), patch**2 * channels, gated=False)
    return shape, (image // patch) ** 2 + 1


def convolutions(config: Mapping[str, object], length: int) -> float:
    """FLOPs of training what makes frames of `length` samples, and of the convolution that gives them positions."""
    fields = Fields(config)
    sizes = [fields.get(name) for name in ("conv_dim", "conv_kernel", "conv_stride")]
    if not all(isinstance(each, list | tuple) for each in sizes):
        return 0.0
    flops, channels, frames = 0.0, 1, float(length)
    for wide, kernel, stride in zip(*sizes, strict=True):  # type: ignore[arg-type]
        frames /= stride
        flops += 6.0 * frames * kernel * channels * wide
        channels = wide
    width, groups = fields.number(*_WIDTH), fields.number("num_conv_pos_embedding_groups") or 1
    return flops + 6.0 * frames * fields.number("num_conv_pos_embeddings") * width**2 / groups


def positions_of(config: Mapping[str, object], length: int) -> float:
    """How many positions the blocks see of an example of at most `length` tokens or samples."""
    fields = Fields(config)
    patch = fields.number("patch_size")
    if image := fields.number("image_size"):
        shown = fields.get("mask_ratio")
        return (image // max(1, patch)) ** 2 * (1 - (shown if is_number(shown) else 0)) + 1
    if series := fields.number("context_length"):
        stride = fields.number("patch_stride", "patch_length") or 1
        return (series - fields.number("patch_length")) // stride + 1
    strides = fields.get("conv_stride")
    return length / math.prod(strides) if isinstance(strides, list | tuple) else float(length)

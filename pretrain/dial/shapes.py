"""A decoder's size in numbers: its weights and what a token of training costs, known without building it.

The widths go in small steps, the depth follows from the width: 2 blocks at 64, 3 at 128, 5 at 256, 9 at 512, 12 at 768,
24 at 2048, between what small machines run fast and the shapes of published models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_USUAL = {
    "width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
    "positions": "max_position_embeddings", "intermediate": "intermediate_size",
}  # fmt: skip
FIELDS = {  # what the fields of a new model's configuration are called, by family
    "gpt2": {"width": "n_embd", "depth": "n_layer", "heads": "n_head", "positions": "n_positions"},
    **{family: _USUAL for family in ("llama", "mistral", "qwen2", "qwen3", "bert", "modernbert")},
}
GATED = ("llama", "mistral", "qwen2", "qwen3", "modernbert")  # three matrices in a feed-forward, else two
CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
SMALLEST, LARGEST = 32, 8192  # widths


@dataclass(frozen=True)
class Shape:
    """A transformer's size; `intermediate` is the width of a feed-forward, which has a third matrix where `gated`."""

    width: int
    depth: int
    heads: int
    intermediate: int
    vocabulary: int
    gated: bool = True
    tied: bool = True  # whether the head shares the embeddings

    @property
    def body(self) -> int:
        """Weights of the matrices between embeddings and head."""
        return self.depth * self.width * (4 * self.width + (3 if self.gated else 2) * self.intermediate)

    @property
    def weights(self) -> int:
        """All weights, without positions and biases."""
        norms = (2 * self.depth + 1) * self.width
        return self.body + norms + self.vocabulary * self.width * (1 if self.tied else 2)

    def flops(self, length: int) -> float:
        """FLOPs of training on one token in rows of `length`, as the meter counts them.

        Six a weight of the body and the head; of attention four products of `length` by `width` forwards, and ten
        backwards, where the fused kernels make the scores again.
        """
        return 6.0 * (self.body + self.vocabulary * self.width) + 14.0 * self.depth * self.width * length

    def memory(self, tokens: int) -> float:
        """Bytes of training on `tokens` at a time, in float32 with two moments: about.

        Weights, gradients and moments; what a block keeps for the backward pass; the logits and their gradient.
        """
        kept = self.depth * (10 * self.width + (4 if self.gated else 2) * self.intermediate)
        return 16.0 * self.weights + 4.0 * tokens * (kept + 3 * self.vocabulary)


def depth_of(width: int) -> int:
    """How many blocks go with a width."""
    return max(2, round(width**0.75 / 12.5))


def shape_of(width: int, vocabulary: int, *, depth: int | None = None, gated: bool = True, tied: bool = True) -> Shape:
    """The usual shape of a width: heads of 32, from 512 on of 64; feed-forwards of 8 · width² weights in all."""
    head = 64 if width >= 512 else 32
    intermediate = -(-width * 8 // 3 // 16) * 16 if gated else 4 * width
    return Shape(width, depth or depth_of(width), max(1, width // head), intermediate, vocabulary, gated, tied)


def widths() -> Iterator[int]:
    """All widths the dial may choose, up to a half apart where they are small, then an eighth to a quarter."""
    width = SMALLEST
    while width <= LARGEST:
        yield width
        width += max(32, 2 ** (width.bit_length() - 3) // 32 * 32) if width >= 64 else 16


def fields(shape: Shape, family: str, positions: int) -> dict[str, object]:
    """The configuration of a new model of `family` in this shape, for rows of up to `positions` tokens."""
    names: Mapping[str, str] = FIELDS[family]
    sizes: dict[str, object] = {
        names["width"]: shape.width, names["depth"]: shape.depth, names["heads"]: shape.heads,
        names["positions"]: positions,
    }  # fmt: skip
    if "intermediate" in names:
        sizes[names["intermediate"]] = shape.intermediate
    if family in ("mistral", "qwen2", "qwen3"):  # whose default is a number of its own
        sizes["num_key_value_heads"] = shape.heads
    if family == "qwen3":
        sizes["head_dim"] = shape.width // shape.heads
    return sizes | {"tie_word_embeddings": shape.tied, "initializer_range": deviation(shape.width)}


def deviation(width: int) -> float:
    """Of the new weights: 0.7 / √width, with which a block hands on about what it is given (measured at 32 to 256)."""
    return round(0.7 / width**0.5, 4)

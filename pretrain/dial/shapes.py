"""A decoder's size in numbers: its weights and what a token of training costs, known without building it.

The widths go in small steps, the depth follows from the width: 2 blocks at 64, 3 at 128, 5 at 256, 9 at 512, 12 at 768,
24 at 2048, between what small machines run fast and the shapes of published models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

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
    """A transformer's size; `intermediate` is the width of a feed-forward, which has a third matrix where `gated`.

    What a plain decoder does not have is nothing by default. An encoder-decoder counts the decoder's blocks in
    `decoder`: they attend twice.
    """

    width: int
    depth: int
    heads: int
    intermediate: int
    vocabulary: int
    gated: bool = True
    tied: bool = True  # whether the head shares the embeddings
    queries: int = 0  # the width of all heads' queries, where it is not the model's
    keys: int = 0  # that of keys, and of values, where heads share them
    decoder: int = 0
    transform: bool = False  # whether a square matrix stands before the head
    density: float = 1.0  # the share of the matrices' weights that there are
    beside: int = (
        -1
    )  # weights outside matrices and embeddings; -1: a norm before each half of a block and one at the end
    fused: bool = True  # whether attention's kernel makes the scores again backwards, as it does without dropout

    @property
    def body(self) -> int:
        """Weights of the matrices between embeddings and head."""
        queries = self.queries or self.width
        attention = 2 * self.width * (queries + (self.keys or queries))
        feed_forward = (3 if self.gated else 2) * self.width * self.intermediate
        blocks = (self.depth + self.decoder) * (attention + feed_forward) + self.decoder * attention
        return round(blocks * self.density) + (self.width**2 if self.transform else 0)

    @property
    def weights(self) -> int:
        """All weights, without a decoder's positions and biases unless `beside` has them."""
        beside = (2 * self.depth + 1) * self.width if self.beside < 0 else self.beside
        return self.body + beside + self.vocabulary * self.width * (1 if self.tied else 2)

    def forward(self, length: int, targets: float = 1.0) -> float:
        """FLOPs a token of a forward pass on rows of `length`, with a target at a share `targets` of the positions."""
        head = targets * self.vocabulary * self.width
        return 2.0 * (self.body + head) + 4.0 * self.attending * length

    def flops(self, length: int, targets: float = 1.0, passes: float = 3.0) -> float:
        """FLOPs of training on one token in rows of `length`, as the meter counts them.

        Six a weight of the body and, at the share `targets` of positions, of the head; of attention four products of
        `length` by the queries' width forwards, and ten backwards, where the fused kernels make the scores again. With
        frozen weights, of which no gradient is made, a body is gone through not three times (`passes`) but twice.
        """
        head = 6.0 * targets * self.vocabulary * self.width
        return 2.0 * passes * self.body + head + (14.0 if self.fused else 12.0) * self.attending * length

    @property
    def chunk(self) -> int:
        """Positions whose logits are made at once."""
        return max(256, 2**21 // max(1, self.vocabulary))

    def with_blocks(self, share: float) -> Shape:
        """With so many times the weights in its blocks: more blocks, or matrices with fewer weights."""
        whole = max(1, round(share))
        return replace(self, depth=self.depth * whole, density=self.density * share / whole)

    @property
    def attending(self) -> int:
        """The width of all heads' queries in all blocks: what each position of a row costs attention goes by it."""
        return (self.depth + 2 * self.decoder) * (self.queries or self.width)

    def memory(self, tokens: int, length: int, trained: float = 1.0) -> float:
        """Bytes of training on `tokens` at a time in rows of `length`, in float32 with two moments: about.

        Weights, and of the share that is `trained` gradients and moments; what a block keeps for the backward pass, the
        scores of attention too where no fused kernel makes them again; a chunk of the logits.
        """
        queries = self.queries or self.width
        kept = (8 if self.fused else 12) * self.width + 3 * queries + (4 if self.gated else 2) * self.intermediate
        scores = 0 if self.fused else 3 * self.heads * length
        blocks = self.depth + 1.5 * self.decoder
        logits = 4.0 * self.vocabulary * min(tokens, self.chunk)
        return (4.0 + 12.0 * trained) * self.weights + 4.0 * tokens * blocks * (kept + scores) + logits


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
    """Of the new weights: 0.7 / √width, 0.0875 at 64."""
    return round(0.7 / width**0.5, 4)

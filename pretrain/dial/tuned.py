"""What is trained beside a frozen model, from the model's configuration: how many weights, and what a token costs.

An adapter's surgery says where it stands and of what rank it is (`Surgery.tuning`); the numbers are made here, without
building the model. A gradient goes backwards as far as the first thing that is trained, and no further: the blocks
before it, and in its block what stands before it, are only read.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from pretrain.core.quick.table import FAMILIES, listed
from pretrain.dial.shapes import Shape

QUERIES, OUTPUT, UP, DOWN = range(4)  # the matrices of a block in the order in which a token passes them


@dataclass(frozen=True)
class Matrix:
    """A linear layer that each block has: its name, its two sides, and where in the block it stands."""

    path: str  # from its block
    outputs: int
    inputs: int
    place: int
    blocks: int  # that have it; the attention of an encoder-decoder's decoder, which attends twice, counts twice


@dataclass(frozen=True)
class Tuning:
    """What a model trains where its weights are frozen.

    `trained` weights and `kept` numbers (that are drawn or computed once) stand beside the model's own. What is beside
    them costs `flops` a token, forwards and backwards, `attending` that of attention's heads there (as
    `Shape.attending`), and `batch` FLOPs for each batch, whatever its tokens. `unreached` of the frozen matrices'
    weights, and the attention of `blind` blocks, are passed forwards and never backwards.
    """

    trained: float
    flops: float = 0.0
    kept: float = 0.0
    attending: float = 0.0
    batch: float = 0.0
    unreached: float = 0.0
    blind: float = 0.0
    rank: int = 0  # of low-rank factors


@dataclass(frozen=True)
class Layers:
    """The linear layers of a model's blocks."""

    shape: Shape
    kind: str  # its model_type

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All of them; a model type that is not listed is taken to name them as Llama does."""
        shape, family = self.shape, listed(self.kind) or FAMILIES[0]
        queries = shape.queries or shape.width
        keys = shape.keys or queries
        projected: tuple[int, ...] = (queries, keys, keys)
        attending, others = shape.depth + 2 * shape.decoder, shape.depth + shape.decoder
        if len(family.queries) == 1:
            projected = (queries + 2 * keys,)
        up = list(family.up)
        if family.decoder_blocks:  # `wi`, or `wi_0` and `wi_1` where it is gated
            up = up[1:] if shape.gated else up[:1]
        inner = shape.intermediate * (2 if shape.gated and len(up) == 1 else 1)
        first, last = f"{family.attention}.", f"{family.feed_forward}."
        return (
            *(
                Matrix(first + name, wide, shape.width, QUERIES, attending)
                for name, wide in zip(family.queries, projected, strict=True)
            ),
            Matrix(first + family.output, shape.width, queries, OUTPUT, attending),
            *(Matrix(last + name, inner, shape.width, UP, others) for name in up),
            Matrix(last + family.down, shape.width, shape.intermediate, DOWN, others),
        )

    @property
    def biases(self) -> int:
        """Of a block: its layers' and its norms'."""
        projected = sum(each.outputs for each in self.matrices if each.place == QUERIES)
        others = sum(each.outputs for each in self.matrices) + 2 * self.shape.width
        return {"gpt2": others, "bert": others, "qwen2": projected}.get(self.kind, 0)

    def chosen(self, where: str, names: Collection[str] = ()) -> list[Matrix]:
        """Those of `query_value`, `attention`, `feed_forward` or `all`; with `names` only what is called so."""
        matrices = self.matrices
        if where == "query_value":
            ends = [each.path.rpartition(".")[2] for each in matrices if each.place == QUERIES]
            names, where = names or {ends[0], ends[-1]}, "all"
        places = {"attention": (QUERIES, OUTPUT), "feed_forward": (UP, DOWN)}.get(where, range(4))
        wanted = [f".{name}" for name in names]

        def named(path: str) -> bool:  # by its end, or by the whole name that it has in a model
            return not wanted or any(path.endswith(name) or name.endswith(path) for name in wanted)

        return [each for each in matrices if each.place in places and named(f".{each.path}")]

    def before(self, place: int, blocks: float = 0.0) -> Tuning:
        """What no gradient reaches where the first thing that is trained stands at a `place`, after so many blocks."""
        spared = sum(each.outputs * each.inputs for each in self.matrices if each.place <= place)
        whole = sum(each.outputs * each.inputs for each in self.matrices)
        return Tuning(0.0, unreached=whole * blocks + spared, blind=blocks + (place > QUERIES))

    def low_rank(
        self, where: str, names: Collection[str], rank: int | None, *, blocks: float | None = None, learnt: bool = True
    ) -> Tuning:
        """Of BA beside each of the chosen matrices, of `rank` or of the smaller side, in the last so many `blocks`.

        `learnt`: both are trained; else they are only passed, in both directions.
        """
        last = self.shape.depth if blocks is None else blocks
        share, trained, flops = last / max(1, self.shape.depth), 0.0, 0.0
        chosen = self.chosen(where, names)
        for each in chosen:
            sides = (each.outputs + each.inputs) * (rank or min(each.outputs, each.inputs))
            trained += sides * each.blocks * share
            flops += (6.0 if learnt else 4.0) * sides * each.blocks * share
        place = min((each.place for each in chosen), default=QUERIES)
        for each in chosen:  # whose inputs in the first of the blocks need no gradient
            flops -= 2.0 * each.inputs * (rank or min(each.outputs, each.inputs)) * (each.place == place)
        return replace(self.before(place, self.shape.depth - last), trained=trained, flops=flops, rank=rank or 0)

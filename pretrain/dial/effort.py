"""What a surgery has to do on a model, in FLOPs and in the seconds of work that is no product of matrices.

Constants are seconds on one core at about 3 GHz, measured on numbers that no cache holds, with the meter looking at
each operation as it does while a surgery runs. Decompositions go by the machine's rate for products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.core.quick.machine import likely_rate
from pretrain.dial.tuned import DOWN, OUTPUT, QUERIES, UP, Layers, Matrix

CALL = 12e-6  # of an operation, on however few numbers
NUMBER = 1e-9  # a number that one operation goes through
DRAWN = 13e-9  # a number that is drawn
CHOSEN = 45e-9  # a number among which the greatest are sought
SORTED = 4.3e-9  # a number that is sorted, for each doubling of how many there are
MADE = 11e-9  # a number of a new model, drawn and then written over
ENTRY, AVERAGED = (
    2.5e-6,
    14e-9,
)  # of a tokenizer that is copied and listed; a number of a table of which the mean is taken
INVERTED = 7.0  # FLOPs' worth of time for each n³ of a damped inverse's Cholesky factor, in float64
EIGENVECTORS = 25.0  # the same of a symmetric matrix's eigenvectors, in float64


@dataclass(frozen=True)
class Work:
    """What something computes: FLOPs, as the meter counts them, and the seconds of all else."""

    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.seconds + other.seconds)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.seconds * times)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Task:
    """What a surgery is given: the layers of a model, and of the rows of calibration their tokens and their FLOPs.

    `forward` are those of one pass of all rows through the blocks.
    """

    layers: Layers
    tokens: float = 0.0
    forward: float = 0.0

    @property
    def numbers(self) -> float:
        """All weights of the model."""
        return float(self.layers.shape.weights)

    @property
    def linear(self) -> float:
        """The weights of the blocks' linear layers."""
        return sum(each.outputs * each.inputs * each.blocks for each in self.layers.matrices)

    @property
    def inner(self) -> list[Matrix]:
        """The linear layers of a block."""
        return list(self.layers.matrices)

    def made(self, growth: float = 1.0) -> Work:
        """A new model with so many times the blocks, in place of this one."""
        shape = self.layers.shape
        return Work(seconds=MADE * (shape.weights + (growth - 1) * shape.body))

    def listed(self) -> Work:
        """A tokenizer with other entries, and rows for them by the mean of the old ones."""
        shape = self.layers.shape
        tables = shape.vocabulary * shape.width * (1 if shape.tied else 2)
        return Work(seconds=ENTRY * shape.vocabulary + AVERAGED * tables)

    def second_moments(self) -> float:
        """FLOPs of `x xᵀ` of what enters the blocks' linear layers: those that share an input share the product."""
        sides = {each.place: (each.inputs, each.blocks) for each in self.layers.matrices}
        return sum(2.0 * self.tokens * inputs**2 * blocks for inputs, blocks in sides.values())

    def part(self, *places: int) -> float:
        """The weights of the linear layers that stand at these places of the blocks."""
        return sum(each.outputs * each.inputs * each.blocks for each in self.layers.matrices if each.place in places)

    def attention(self) -> float:
        """The weights of the attentions' linear layers."""
        return self.part(QUERIES, OUTPUT)

    def feed_forward(self) -> float:
        """The weights of the feed-forwards' linear layers."""
        return self.part(UP, DOWN)


def singular(each: Matrix) -> Work:
    """Singular values and vectors of a matrix, once in each block: 6 m n² + 20 n³ FLOPs."""
    small, large = sorted((each.outputs, each.inputs))
    return Work((6.0 * large * small**2 + 20.0 * small**3) * each.blocks)


def orthogonal(each: Matrix, columns: int) -> Work:
    """Orthonormal columns of a matrix of so many, once in each block, as the meter counts them: 8/3 n³ FLOPs."""
    return Work(8.0 * columns**3 / 3 * each.blocks)


def by_columns(each: Matrix, calls: float) -> Work:
    """A matrix whose columns change one after another, each the later ones, after the factor of a damped inverse.

    `calls` are the operations on each column.
    """
    products = float(each.outputs) * each.inputs**2
    inverse = INVERTED * float(each.inputs) ** 3 / likely_rate()
    one_by_one = each.inputs * (calls * CALL + 80 * NUMBER * each.outputs)
    return Work(products * each.blocks, (inverse + one_by_one) * each.blocks)


def decomposed(size: float) -> Work:
    """Eigenvectors of a symmetric matrix in float64, where the meter does not see them."""
    return Work(seconds=EIGENVECTORS * size**3 / likely_rate())


def sorting(count: float, times: float = 1.0) -> Work:
    """So many numbers in order, `times` over."""
    return Work(seconds=SORTED * count * math.log2(max(2.0, count)) * times)


def through(count: float, operations: float = 1.0) -> Work:
    """So many operations on each of so many numbers."""
    return Work(seconds=NUMBER * count * operations)

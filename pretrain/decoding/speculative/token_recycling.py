"""A draft tree from the tokens that the model once found likely after each token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import PreTrainedModel

from pretrain.core.bounds import Count
from pretrain.core.generation.options import Options
from pretrain.core.models.families import embeddings
from pretrain.decoding import Decoding
from pretrain.decoding._tree import Shape, speculate

# The paper's tree: a node's path of ranks and how many children it has; 80 nodes on six levels below the root.
_TREE = (
    ":8 0:8 1:4 2:3 3:2 4:1 5:1 6:1 7:1 "
    "00:8 01:3 02:2 03:1 04:1 05:1 06:1 07:1 10:2 11:1 20:1 30:1 40:1 50:1 "
    "000:5 001:2 002:1 003:1 004:1 010:1 020:1 100:1 200:1 300:1 "
    "0000:3 0001:1 0002:1 0010:1 0100:1 1000:1 00000:2 00010:1"
)
_CPU_NODES = 15  # where each node costs time of its own


@dataclass(frozen=True)
class TokenRecycling(Decoding):
    """Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling
    (arXiv:2408.08696).

    A matrix M of |V| × k tokens keeps for each token the k likeliest ones after it when the model last read it. From
    the last token, breadth first, child r of a node x is M[x, r], over a fixed tree of 80 nodes on six levels that is
    denser where ranks are high. One pass verifies the tree, and M[x] ← top-k of the logits after x for every node x,
    the rejected ones too. The tokens are those of plain decoding. M is kept from prompt to prompt. `nodes` takes that
    many of the tree, those of least Σ (rank + 1); None is all 80, and 15 on a CPU, where a node costs time of its own.
    """

    k: Count = 8
    nodes: Count | None = None

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")
    samples: ClassVar[bool] = True
    lossless: ClassVar[bool] = True

    @cached_property
    def _matrices(self) -> WeakKeyDictionary[PreTrainedModel, dict[int, list[int]]]:
        """By model, the rows of its matrix that are written; the others are zeros."""
        return WeakKeyDictionary()

    def decode(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        """Continue left-padded prompts, row by row; returns `tokens_BN`."""
        weight_VE = embeddings(model).weight
        count = self.nodes or (_CPU_NODES if weight_VE.device.type == "cpu" else len(tree(self.k)))
        paths = sorted(sorted(tree(self.k), key=lambda path: (sum(path) + len(path), len(path)))[:count])
        shape = Shape([0, *_parents(paths)], weight_VE.device, weight_VE.dtype)
        ranks, k = [path[-1] for path in paths], min(self.k, len(weight_VE))
        matrix = self._matrices.setdefault(model, {})
        return speculate(
            model,
            input_ids_BL,
            lambda tokens, _: _Recycled(matrix, shape, ranks, k, tokens[-1]),
            options,
            room=len(paths) + 1,
        )


def tree(k: int) -> list[tuple[int, ...]]:
    """The paths of ranks of the paper's tree, with at most `k` children a node."""
    paths: list[tuple[int, ...]] = []
    for item in _TREE.split():
        path, _, count = item.partition(":")
        above = tuple(map(int, path))
        paths += [(*above, rank) for rank in range(min(int(count), k)) if all(r < k for r in above)]
    return paths


def _parents(paths: list[tuple[int, ...]]) -> list[int]:
    """Each path's parent, among paths that begin after the root's 0."""
    place = {(): 0} | {path: number for number, path in enumerate(paths, 1)}
    return [place[path[:-1]] for path in paths]


class _Recycled:
    """The draft of one prompt."""

    def __init__(self, matrix: dict[int, list[int]], shape: Shape, ranks: list[int], k: int, last: int) -> None:
        self.matrix, self.shape, self.k, self.last = matrix, shape, k, last
        self.places = list(zip(shape.parents[1:], ranks, strict=True))
        self.zeros = [0] * k

    def tree(self) -> tuple[list[int], Shape]:
        tokens, matrix, zeros = [self.last], self.matrix, self.zeros
        for parent, rank in self.places:
            tokens.append(matrix.get(tokens[parent], zeros)[rank])
        return tokens, self.shape

    def learn(self, tokens: list[int], logits_TV: Tensor, new: list[int]) -> None:
        self.last = new[-1]
        self.matrix.update(zip(tokens, logits_TV.topk(self.k, -1).indices.tolist(), strict=True))

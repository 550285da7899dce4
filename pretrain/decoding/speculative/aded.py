"""A draft tree searched in a matrix of tri-grams that follows the model."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cached_property
from math import log, sqrt
from random import Random
from typing import Annotated, ClassVar
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import PreTrainedModel

from pretrain.core.bounds import Count, Ge, NonNegative, Positive
from pretrain.core.generation.options import Options
from pretrain.core.models.families import embeddings
from pretrain.decoding import Decoding
from pretrain.decoding._tree import Shape, speculate

TriGrams = dict[tuple[int, int], dict[int, float]]
_CPU = (8, 24)  # sequences and iterations where each node, and each microsecond of a search, costs


@dataclass(frozen=True)
class ADED(Decoding):
    """Adaptive Draft-Verification for Efficient Large Language Model Decoding (arXiv:2407.12021).

    A matrix p(c | a, b) of tri-grams stands in for the model. Before each pass a Monte Carlo tree search from the last
    two tokens visits the child that maximises Q + (c1 + ln((N + c2 + 1) / c2)) · p · √N / (1 + n): N and n are visits
    of the node and of the child, Q the child's mean of 1 + Σ p along the searched sequences, which go on from a node
    that is new with tokens drawn by p (of the same text the same ones). The `sequences` most
    visited nodes, each with its likeliest next token, are the draft tree, which one pass verifies. Then the tri-grams
    of the last `window` tokens gain `step`, up to `limit`. The tokens are those of plain decoding. The matrix begins
    with the prompt's tri-grams, without a corpus of its own, and is kept from prompt to prompt. `sequences` and
    `iterations`: None is the paper's 24 and 150, on a CPU 8 and 24.
    """

    version: ClassVar[int] = 2  # sequences that are searched go on with drawn tokens

    sequences: Count | None = None
    iterations: Count | None = None
    length: Annotated[int, Ge(2)] = 4
    successors: Count = 12
    c1: NonNegative = 32.0
    c2: Positive = 8.0
    window: Annotated[int, Ge(3)] = 16
    step: Positive = 0.04
    limit: Positive = 3.0

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")
    samples: ClassVar[bool] = True
    lossless: ClassVar[bool] = True

    @cached_property
    def _matrices(self) -> WeakKeyDictionary[PreTrainedModel, TriGrams]:
        return WeakKeyDictionary()

    def decode(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        """Continue left-padded prompts, row by row; returns `tokens_BN`."""
        weight_VE = embeddings(model).weight
        usual = _CPU if weight_VE.device.type == "cpu" else (24, 150)
        size = (self.sequences or usual[0], self.iterations or usual[1])
        trigrams = self._matrices.setdefault(model, {})
        return speculate(
            model,
            input_ids_BL,
            lambda tokens, _: _Searched(self, trigrams, size, tokens, weight_VE),
            options,
            room=2 * size[0] + 1,
        )

    def search(self, trigrams: TriGrams, last: tuple[int, int], iterations: int) -> _Node:
        """The tree of a search from the last two tokens; of nodes with equal claims the likelier goes first."""
        root, random = _Node(*last, 0.0), Random(0)
        for _ in range(iterations):
            node, path, score, end = root, [root], 1.0, False
            while not end:
                fresh = node.children is None
                if node.children is None:
                    successors = trigrams.get((node.before, node.token), {}).items()
                    likeliest = heapq.nlargest(self.successors, successors, key=lambda item: item[1])
                    node.children = [_Node(node.token, token, p) for token, p in likeliest]
                if not node.children:
                    break
                node = self._select(node)
                score += node.p
                path.append(node)
                end = fresh or len(path) == self.length
            score += _rollout(trigrams, node, self.length - len(path), random)
            for node in path:
                node.visits += 1
                node.score += score
        return root

    def _select(self, node: _Node) -> _Node:
        """The child to visit: one that has not been yet, else that of the highest score."""
        children = node.children or []
        if node.tried < len(children):
            node.tried += 1
            return children[node.tried - 1]
        explore = (self.c1 + log((node.visits + self.c2 + 1) / self.c2)) * sqrt(node.visits)
        best, chosen = -1.0, children[0]
        for child in children:
            score = child.score / child.visits + explore * child.p / (1 + child.visits)
            if score > best:
                best, chosen = score, child
        return chosen


class _Node:
    """A token after `before`: its probability, visits, sum of scores, children and how many of them were tried."""

    __slots__ = ("before", "children", "p", "score", "token", "tried", "visits")

    def __init__(self, before: int, token: int, p: float) -> None:
        self.before, self.token, self.p = before, token, p
        self.visits, self.tried, self.score = 0, 0, 0.0
        self.children: list[_Node] | None = None


def _rollout(trigrams: TriGrams, node: _Node, more: int, random: Random) -> float:
    """Σ p of a continuation of at most `more` tokens, each drawn in proportion to p."""
    before, token, total = node.before, node.token, 0.0
    for _ in range(more):
        row = trigrams.get((before, token))
        if not row:
            break
        (following,) = random.choices([*row], [*row.values()])
        before, token = token, following
        total += row[token]
    return total


class _Searched:
    """The draft of one prompt."""

    def __init__(
        self, method: ADED, trigrams: TriGrams, size: tuple[int, int], tokens: list[int], weight_VE: Tensor
    ) -> None:
        self.method, self.trigrams, self.size, self.tokens = method, trigrams, size, tokens
        self.place = (weight_VE.device, weight_VE.dtype)
        self._count(tokens)

    def tree(self) -> tuple[list[int], Shape]:
        root = self.method.search(self.trigrams, (self.tokens[-2], self.tokens[-1]), self.size[1])
        tokens, parents, best = [root.token], [0], self._most_visited(root)
        self._add(root, 0, tokens, parents, best)
        return tokens, Shape(parents, *self.place)

    def learn(self, tokens: list[int], logits_TV: Tensor, new: list[int]) -> None:
        self.tokens += new
        self._count(self.tokens[-self.method.window :])

    def _count(self, tokens: list[int]) -> None:
        step, limit, trigrams = self.method.step, self.method.limit, self.trigrams
        for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
            row = trigrams.setdefault((before, token), {})
            row[after] = min(limit, row.get(after, 0.0) + step)

    def _most_visited(self, root: _Node) -> set[int]:
        nodes, waiting = [], [root]
        while waiting:
            inside = [child for child in waiting.pop().children or () if child.visits]
            nodes += inside
            waiting += inside
        return {id(node) for node in heapq.nlargest(self.size[0], nodes, key=lambda node: node.visits)}

    def _add(self, node: _Node, place: int, tokens: list[int], parents: list[int], best: set[int]) -> None:
        """Append a node's chosen children, and its likeliest next token where that is none of them, below `place`."""
        inside = [child for child in node.children or () if id(child) in best]
        for child in inside:
            tokens.append(child.token)
            parents.append(place)
            self._add(child, len(tokens) - 1, tokens, parents, best)
        row = self.trigrams.get((node.before, node.token))
        likeliest = max(row, key=row.__getitem__) if row else None
        if likeliest is not None and likeliest not in [child.token for child in inside]:
            tokens.append(likeliest)
            parents.append(place)

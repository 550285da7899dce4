"""Drafts that are a tree of how the text went on wherever its last tokens stood before, in this answer or in others."""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Annotated, ClassVar
from weakref import WeakKeyDictionary

from pretrain.core.bounds import Ge, NonNegative, Share, Whole
from pretrain.core.models.families import embeddings
from pretrain.decoding import Decoding
from pretrain.decoding._tree import Shape, speculate

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from pretrain.core.generation.options import Options

Place = tuple[int, int]  # a text and how many of its tokens stand before


@dataclass(frozen=True)
class SuffixDecoding(Decoding):
    """SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications (arXiv:2411.04975).

    Of the last p tokens, for each p as long as they stand earlier, a tree of at most `factor` · p + `offset` tokens is
    grown from what followed there, the likeliest token first: a token's probability is that of its parent times the
    share of the parent's places that it follows, and none below `least` is taken. Of the trees of all p the one with
    the largest sum of probabilities is the draft, which one pass verifies, of equal ones that of the longest match. So
    much is drafted where much has matched. Trees are grown from the prompt with the answer so far, and from the last
    `answers` answers of this model, which are kept from prompt to prompt; the latter are taken where they sum to more.
    `depth` bounds a match with its draft. The tokens are those of plain decoding. What the authors keep in suffix trees
    is looked up here in lists of each token's places, with equal counts.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")
    samples: ClassVar[bool] = True
    lossless: ClassVar[bool] = True

    depth: Annotated[int, Ge(2)] = 64
    factor: NonNegative = 1.0
    offset: NonNegative = 0.0
    least: Share = 0.1
    answers: Whole = 1000

    @cached_property
    def _answers(self) -> WeakKeyDictionary[PreTrainedModel, Texts]:
        return WeakKeyDictionary()

    @property
    def most(self) -> int:
        """Tokens of a draft at most."""
        return min(self.depth - 1, int((self.depth - 1) * self.factor + self.offset))

    def decode(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        """Continue left-padded prompts, row by row; returns `tokens_BN`."""
        weight_VE = embeddings(model).weight
        answers = self._answers.setdefault(model, Texts())
        return speculate(
            model, input_ids_BL, lambda tokens, _: _Matched(self, tokens, answers, weight_VE), options,
            room=self.most + 1,
        )  # fmt: skip


@dataclass(frozen=True)
class Guess:
    """A tree of tokens: `parents` are places in it, -1 for the last token of the text; `score` sums probabilities."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    score: float = 0.0


class Texts:
    """Texts of tokens, and where each token stands in them."""

    def __init__(self) -> None:
        self.texts: dict[int, list[int]] = {}
        self.places: dict[int, dict[int, list[int]]] = {}
        self.made = 0

    def begin(self) -> int:
        """A new text, which is empty; returns its number."""
        self.made += 1
        self.texts[self.made], self.places[self.made] = [], defaultdict(list)
        return self.made

    def extend(self, number: int, tokens: list[int]) -> None:
        """Go on with a text."""
        text, places = self.texts[number], self.places[number]
        for token in tokens:
            text.append(token)
            places[token].append(len(text))

    def forget(self, most: int) -> None:
        """Keep the latest texts alone."""
        for number in list(self.texts)[: max(0, len(self.texts) - most)]:
            del self.texts[number], self.places[number]

    def guess(self, context: list[int], method: SuffixDecoding) -> Guess:
        """The best tree of the matches of all lengths."""
        best = Guess()
        context = context[-method.depth :]
        places = [(n, place) for n, where in self.places.items() for place in where.get(context[-1], ())]
        for length in range(1, len(context)):
            token = context[-length]
            places = [(n, at) for n, at in places if at >= length and self.texts[n][at - length] == token]
            if not places:
                break
            most = min(int(length * method.factor + method.offset + 1e-6), method.depth - length, method.most)
            grown = self.grow(places, most, method.depth - length, method.least)
            if grown.score >= best.score:
                best = grown
        return best

    def grow(self, places: list[Place], most: int, depth: int, least: float) -> Guess:
        """The tree of at most `most` tokens after some places, the likeliest first."""
        score, tokens, parents, order = 0.0, list[int](), list[int](), count()
        heap: list[tuple[float, int, int, list[Place], int, int]] = []

        def branch(p: float, places: list[Place], parent: int, level: int) -> None:
            after: dict[int, list[Place]] = defaultdict(list)
            for number, place in places:
                if place < len(self.texts[number]):
                    after[self.texts[number][place]].append((number, place + 1))
            for token, there in after.items():
                if (share := p * len(there) / len(places)) >= least and level <= depth:
                    heapq.heappush(heap, (-share, next(order), token, there, parent, level))

        branch(1.0, places, -1, 1)
        while heap and len(tokens) < most:
            p, _, token, there, parent, level = heapq.heappop(heap)
            tokens.append(token)
            parents.append(parent)
            score -= p
            branch(-p, there, len(tokens) - 1, level + 1)
        return Guess(tokens, parents, score)


class _Matched:
    """The draft of one prompt."""

    def __init__(self, method: SuffixDecoding, tokens: list[int], answers: Texts, weight_VE: Tensor) -> None:
        self.method, self.place, self.answers = method, (weight_VE.device, weight_VE.dtype), answers
        self.text = Texts()
        self.own = self.text.begin()
        self.text.extend(self.own, tokens)
        self.number = answers.begin() if method.answers else 0
        answers.forget(method.answers)
        self._answered(tokens[-1:])
        self.shapes: dict[tuple[int, ...], Shape] = {}

    def tree(self) -> tuple[list[int], Shape]:
        """The last token and the better of both trees after it."""
        tokens = self.text.texts[self.own]
        guess, before = self.text.guess(tokens, self.method), self.answers.guess(tokens, self.method)
        guess = before if before.score > guess.score else guess
        parents = (0, *(parent + 1 for parent in guess.parents))
        if parents not in self.shapes:
            self.shapes[parents] = Shape(list(parents), *self.place)
        return [tokens[-1], *guess.tokens], self.shapes[parents]

    def learn(self, tokens: list[int], logits_TV: Tensor, new: list[int]) -> None:
        """Take up what was decided."""
        self.text.extend(self.own, new)
        self._answered(new)

    def _answered(self, tokens: list[int]) -> None:
        if self.number:
            self.answers.extend(self.number, tokens)

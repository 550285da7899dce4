"""Drafts copied from where the last tokens stand earlier in the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pretrain.core.bounds import Count
from pretrain.core.models.families import embeddings
from pretrain.decoding import Decoding
from pretrain.decoding._tree import Chain, speculate

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from pretrain.core.generation.options import Options


@dataclass(frozen=True)
class PromptLookup(Decoding):
    """Inference with Reference: Lossless Acceleration of Large Language Models (arXiv:2304.04487).

    Where the last `match` tokens, or the most of them that do, stand earlier in the prompt or in what has been written,
    the `copy` tokens after the latest such place are the draft, which one pass verifies; without such a place one token
    is read. The tokens are those of plain decoding. Summaries, edits and answers from a text repeat much of their
    prompt. (The paper's reference is a set of documents given beside the prompt; with the prompt itself it is known as
    prompt lookup.)
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")
    samples: ClassVar[bool] = True
    lossless: ClassVar[bool] = True

    match: Count = 3
    copy: Count = 10

    def decode(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        """Continue left-padded prompts, row by row; returns `tokens_BN`."""
        weight_VE = embeddings(model).weight
        return speculate(
            model, input_ids_BL, lambda tokens, _: _Lookup(self, tokens, weight_VE), options, room=self.copy + 1
        )


class _Lookup(Chain):
    """The draft of one prompt."""

    def __init__(self, method: PromptLookup, tokens: list[int], weight_VE: Tensor) -> None:
        super().__init__(weight_VE)
        self.method, self.tokens = method, tokens
        self.after: dict[tuple[int, ...], int] = {}  # by run of tokens, the place after its latest one
        self.indexed = 0
        self._index()

    def draft(self) -> list[int]:
        """The copied tokens, after the last one."""
        for length in range(min(self.method.match, len(self.tokens)), 0, -1):
            place = self.after.get(tuple(self.tokens[-length:]))
            if place is not None:
                return [self.tokens[-1], *self.tokens[place : place + self.method.copy]]
        return self.tokens[-1:]

    def learn(self, tokens: list[int], logits_TV: Tensor, new: list[int]) -> None:
        """Take up what was decided."""
        self.tokens += new
        self._index()

    def _index(self) -> None:
        """Note the runs that end before the last token: those that it ends stand nowhere else yet."""
        for end in range(self.indexed + 1, len(self.tokens)):
            for length in range(1, min(self.method.match, end) + 1):
                self.after[tuple(self.tokens[end - length : end])] = end
        self.indexed = max(self.indexed, len(self.tokens) - 1)

"""Drafts of a small model, verified by the large one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from pretrain.core.bounds import Count
from pretrain.core.generation.forward import Forward
from pretrain.core.method import Ref
from pretrain.core.models.families import embeddings
from pretrain.decoding import Decoding
from pretrain.decoding._beside import beside
from pretrain.decoding._tree import Chain, Sampler, speculate

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from pretrain.core.generation.options import Options


KEPT = 0.6  # of the draft's tokens, as plans take it: each is the model's own at about this share of places


@dataclass(frozen=True)
class SpeculativeDecoding(Decoding):
    """Fast Inference from Transformers via Speculative Decoding (arXiv:2211.17192).

    `draft`, a smaller causal checkpoint of the same vocabulary, writes `gamma` tokens, and one pass of the model
    verifies them: the tokens before the first that is not the model's own stay, and the model's own follows. The tokens
    are those of plain decoding, sampled ones too: the draft samples with the same random number as the model at each
    place, which keeps a draft wherever both come to one token (the paper's rejection keeps a few more and gives the
    model's distribution, but other tokens than plain sampling).
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")
    samples: ClassVar[bool] = True
    lossless: ClassVar[bool] = True
    shares_vocabulary: ClassVar[tuple[str, ...]] = ("draft",)

    draft: Ref
    gamma: Count = 5

    def computed(self, reference: str = "") -> float:
        """Of the model the draft and its own token, of `draft` what it writes, for those that stay of a round."""
        stay = (1 - KEPT ** (self.gamma + 1)) / (1 - KEPT)  # the paper's formula 1
        return (self.gamma if reference else self.gamma + 1) / stay

    def decode(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        """Continue left-padded prompts, row by row; returns `tokens_BN`."""

        def start(tokens: list[int], sampler: Sampler) -> _Written:
            (draft,) = beside(self.name, model, draft=self.draft)
            return _Written(draft, self.gamma, tokens, sampler, embeddings(model).weight)

        return speculate(model, input_ids_BL, start, options, room=self.gamma + 1)


class _Written(Chain):
    """The draft of one prompt, with a cache of its own of the tokens that are decided."""

    def __init__(
        self, model: PreTrainedModel, gamma: int, tokens: list[int], sampler: Sampler, weight_VE: Tensor
    ) -> None:
        super().__init__(weight_VE)
        self.rows = len(weight_VE)
        self.gamma, self.sampler, self.prompt, self.new = gamma, sampler, tokens[:-1], tokens[-1:]
        self.forward = Forward(model, len(self.prompt) + sampler.options.max_new_tokens)
        self.forward.prefill(torch.tensor([self.prompt], device=self.forward.device))

    def draft(self) -> list[int]:
        """The last token and what the draft model writes after it, as far as the model's next tokens are asked for."""
        unread = [*self.prompt, *self.new][self.forward.length :]
        count = min(self.gamma, self.sampler.options.max_new_tokens - len(self.new))
        new = list(self.new)
        for _ in range(count):
            for token in unread:
                logits_1V = self.forward.step(torch.tensor([[token]], device=self.forward.device))
            unread = [self.sampler.token(logits_1V[:, : self.rows], self.prompt, new)]
            new += unread
        return new[len(self.new) - 1 :]

    def learn(self, tokens: list[int], logits_TV: Tensor, new: list[int]) -> None:
        """Take up what was decided; of what the draft model has read the tokens that were its own stay."""
        self.new += new
        self.forward.length = min(self.forward.length, len(self.prompt) + len(self.new) - 1)

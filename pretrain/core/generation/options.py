"""How to continue prompts: what every way of decoding is given, in one object.

Shape letters: B rows, L prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from pretrain.core.bounds import Count, NonNegative, PositiveShare, check_fields


class OptionFields(TypedDict, total=False):
    """The fields of `Options` as keywords."""

    attention_mask_BL: Tensor | None
    max_new_tokens: int
    temperature: float
    top_p: float
    eos: int | None
    pad: int
    generator: torch.Generator | None


@dataclass(frozen=True)
class Options:
    """Greedy where the temperature is 0; prompts are padded on the left, as `attention_mask_BL` says."""

    attention_mask_BL: Tensor | None = None
    max_new_tokens: Count = 64
    temperature: NonNegative = 0.0
    top_p: PositiveShare = 1.0
    eos: int | None = None  # ends a row; None: nothing does
    pad: int = 0  # what stands after the end of a row
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_fields(self, "")

    def draws(self, rows: int) -> Tensor | None:
        """`uniform_NB`, the number that decides each new token; None for greedy decoding."""
        if self.temperature == 0:
            return None
        device = self.generator.device if self.generator is not None else "cpu"
        return torch.rand(self.max_new_tokens, rows, generator=self.generator, device=device)

    def pick(self, logits_BV: Tensor, uniform_B: Tensor | None) -> Tensor:
        """The next token of each row: the likeliest, or the one that a uniform number stands for.

        Tokens are of softmax(logits / temperature) within the nucleus, the likeliest that together reach `top_p`.
        """
        if uniform_B is None:
            return logits_BV.argmax(-1)
        uniform_B = uniform_B.to(logits_BV.device)
        probabilities_BV = (logits_BV.float() / self.temperature).softmax(-1)
        order_BV = None
        if self.top_p < 1:
            probabilities_BV, order_BV = probabilities_BV.sort(-1, descending=True)
        sums_BV = probabilities_BV.double().cumsum(-1)
        total_B = sums_BV[:, -1]
        if self.top_p < 1:
            inside_BV = sums_BV - probabilities_BV < self.top_p
            total_B = sums_BV.gather(1, inside_BV.sum(-1, keepdim=True) - 1)[:, 0]
        place_B1 = torch.searchsorted(sums_BV, (uniform_B.double() * total_B)[:, None], right=True)
        place_B1 = place_B1.clamp_(max=logits_BV.shape[-1] - 1)
        return (place_B1 if order_BV is None else order_BV.gather(1, place_B1))[:, 0]

    def stacked(self, input_ids_BL: Tensor, rows: list[list[int]]) -> Tensor:
        """`tokens_BN`: the prompts, and after each its new tokens, padded."""
        width = max(map(len, rows))
        new_BN = torch.tensor([new + [self.pad] * (width - len(new)) for new in rows], device=input_ids_BL.device)
        return torch.cat([input_ids_BL, new_BN], dim=1)

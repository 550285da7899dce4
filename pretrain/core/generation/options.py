"""How to continue prompts: what every way of decoding is given, in one object.

Shape letters: B rows, L prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypedDict

import torch
from torch import Tensor

from pretrain.core.bounds import Count, NonNegative, Share, check_fields
from pretrain.core.generation.finite import check_logits
from pretrain.core.generation.healing import Healing

FIRST = 1024  # tokens in which the nucleus is looked for before all are sorted, which takes many times as long
COLDEST = 1e-30  # below it float32 has no number for logits / temperature, whose softmax is the likeliest token's


class SettingFields(TypedDict, total=False):
    """The fields of `Options` that do not change from prompt to prompt, as keywords."""

    max_new_tokens: int
    temperature: float
    top_p: float
    eos: int | Collection[int] | None
    pad: int
    stop: Callable[[Sequence[int]], bool] | None
    processors: Callable[[Tensor, Tensor], Tensor] | None
    healing: Healing | None


class OptionFields(SettingFields, total=False):
    """The fields of `Options` as keywords."""

    attention_mask_BL: Tensor | None
    generator: torch.Generator | None


@dataclass(frozen=True)
class Options:
    """Greedy where top_p or the temperature is 0, or that is below `COLDEST`.

    Prompts are padded on the left: `attention_mask_BL`.

    `core.generation.settings` makes those that a checkpoint's `generation_config` asks for.
    """

    attention_mask_BL: Tensor | None = None
    max_new_tokens: Count = 64
    temperature: NonNegative = 0.0
    top_p: Share = 1.0  # of the probability, the likeliest tokens first: 0 is the likeliest alone, as in transformers
    eos: int | Collection[int] | None = None  # a token that ends a row, or several; None: none does
    pad: int = 0  # what stands after the end of a row
    generator: torch.Generator | None = None
    stop: Callable[[Sequence[int]], bool] | None = None  # whether a row of new tokens is at its end
    processors: Callable[[Tensor, Tensor], Tensor] | None = None  # (tokens_BN, logits_BV), in place of top_p and such
    healing: Healing | None = None  # of one prompt's last word, before all others

    def __post_init__(self) -> None:
        check_fields(self, "")
        if self.temperature < COLDEST or self.top_p == 0:
            object.__setattr__(self, "temperature", 0.0)
            object.__setattr__(self, "top_p", self.top_p or 1.0)

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end a row."""
        return frozenset(() if self.eos is None else (self.eos,) if isinstance(self.eos, int) else self.eos)

    @property
    def by_logits(self) -> bool:
        """Whether a token is of the logits alone, whatever stands before it."""
        return self.processors is None and self.healing is None

    def after(self, length: int) -> Options:
        """These for one prompt that has been made another, of so many tokens."""
        healing = None if self.healing is None else replace(self.healing, length=length)
        return replace(self, healing=healing)

    def at_end(self, new: Sequence[int]) -> bool:
        """Whether a row of new tokens ends with its last."""
        return new[-1] in self.ends or (self.stop is not None and self.stop(new))

    def ended(self, new_BN: Tensor) -> Tensor:
        """`ended_B`: `at_end` of each row."""
        if self.stop is not None:
            return torch.tensor([self.at_end(row) for row in new_BN.tolist()], device=new_BN.device)
        ended_B = torch.zeros_like(new_BN[:, -1], dtype=torch.bool)
        for end in self.ends:
            ended_B |= new_BN[:, -1] == end
        return ended_B

    def cut(self, new: list[int], checked: int = 0) -> list[int]:
        """A row of new tokens up to and with its end, which is not among the first `checked`."""
        places = range(checked + 1, len(new) + 1)
        return new[: next((place for place in places if self.at_end(new[:place])), len(new))]

    def draws(self, rows: int) -> Tensor | None:
        """`uniform_NB`, the number that decides each new token; None for greedy decoding."""
        if self.temperature == 0:
            return None
        device = self.generator.device if self.generator is not None else "cpu"
        return torch.rand(self.max_new_tokens, rows, generator=self.generator, device=device)

    def pick(self, logits_BV: Tensor, uniform_B: Tensor | None, tokens_BN: Tensor) -> Tensor:
        """The next token of each row after `tokens_BN`: the likeliest, or the one that a uniform number stands for.

        Tokens are of softmax(logits / temperature) within the nucleus, the likeliest that together reach `top_p`; with
        `processors` of the softmax of what those make of the logits, temperature and nucleus included.
        """
        temperature, top_p = self.temperature, self.top_p
        check_logits(logits_BV, "model")
        if self.healing is not None:
            logits_BV = self.healing(tokens_BN, logits_BV)
        if self.processors is not None:
            temperature, top_p = 1.0, 1.0
            logits_BV = self.processors(tokens_BN.to(logits_BV.device), logits_BV.float())
            check_logits(logits_BV, "model's generation_config")
        if uniform_B is None:
            return logits_BV.argmax(-1)
        uniform_B = uniform_B.to(logits_BV.device)
        probabilities_BV = (logits_BV.float() / temperature).softmax(-1)
        order_BV = None
        if top_p < 1:
            probabilities_BV, order_BV = _likeliest(probabilities_BV, top_p)
        sums_BV = probabilities_BV.double().cumsum(-1)
        total_B = sums_BV[:, -1]
        if top_p < 1:
            inside_BV = sums_BV - probabilities_BV < top_p
            total_B = sums_BV.gather(1, inside_BV.sum(-1, keepdim=True) - 1)[:, 0]
        place_B1 = torch.searchsorted(sums_BV, (uniform_B.double() * total_B)[:, None], right=True)
        place_B1 = place_B1.clamp_(max=sums_BV.shape[-1] - 1)
        return (place_B1 if order_BV is None else order_BV.gather(1, place_B1))[:, 0]

    def stacked(self, input_ids_BL: Tensor, rows: list[list[int]]) -> Tensor:
        """`tokens_BN`: the prompts, and after each its new tokens, padded."""
        width = max(map(len, rows))
        new_BN = torch.tensor([new + [self.pad] * (width - len(new)) for new in rows], device=input_ids_BL.device)
        return torch.cat([input_ids_BL, new_BN], dim=1)


def _likeliest(probabilities_BV: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities in descending order, in each row enough of them to be more than `top_p`, and whose they are."""
    if probabilities_BV.shape[-1] > 4 * FIRST:
        first = probabilities_BV.topk(FIRST)
        if bool((first.values.double().sum(-1) > top_p).all()):
            return first.values, first.indices
    return probabilities_BV.sort(-1, descending=True)

"""Greedy decoding and sampling, one token a pass; what the decoding methods give the same tokens as.

Sampling turns one uniform number a token into the token, by the inverse of the distribution's cumulative sum. The
numbers are drawn before the first pass: place n of row b has the number u[n, b] however the token is found, so a
method that verifies several tokens a pass samples what this loop samples.

Shape letters: B rows, L prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.core.errors import PretrainError
from pretrain.core.generation.forward import Forward, pads


def decode(
    model: Any, input_ids_BL: Tensor, *, attention_mask_BL: Tensor | None = None, max_new_tokens: int = 64,
    temperature: float = 0.0, top_p: float = 1.0, eos: int | None = None, pad: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Continue left-padded prompts greedily, or by sampling where the temperature is positive; returns `tokens_BN`."""
    kept_BL = pads(input_ids_BL, attention_mask_BL)
    rows, length = input_ids_BL.shape
    uniform_NB = draws(max_new_tokens, rows, temperature, top_p, generator)
    with torch.inference_mode():
        forward = Forward(model, length + max_new_tokens)
        logits_BV = forward.prefill(input_ids_BL, kept_BL)
        tokens_BN = torch.full((rows, length + max_new_tokens), pad, device=forward.device)
        tokens_BN[:, :length] = input_ids_BL
        going_B = torch.ones(rows, dtype=torch.bool, device=forward.device)
        end = length
        for place in range(max_new_tokens):
            if uniform_NB is None:
                token_B = logits_BV.argmax(-1)
            else:
                token_B = pick(logits_BV, uniform_NB[place].to(forward.device), temperature, top_p)
            if eos is not None and rows > 1:
                token_B = torch.where(going_B, token_B, pad)
                going_B &= token_B != eos
            tokens_BN[:, end] = token_B
            end += 1
            if eos is not None and (not bool(going_B.any()) if rows > 1 else token_B.item() == eos):
                break
            if place + 1 < max_new_tokens:
                logits_BV = forward.step(token_B[:, None])
    return tokens_BN[:, :end].clone()


def draws(
    max_new_tokens: int, rows: int, temperature: float, top_p: float, generator: torch.Generator | None
) -> Tensor | None:
    """`uniform_NB`, the number that decides each new token; None for greedy decoding. Refuses what cannot be done."""
    if max_new_tokens < 1:
        raise PretrainError(f"max_new_tokens {max_new_tokens}: accepted: at least 1")
    if temperature < 0:
        raise PretrainError(f"temperature {temperature}: accepted: 0, which is greedy, or more")
    if not 0 < top_p <= 1:
        raise PretrainError(f"top_p {top_p}: accepted: more than 0, at most 1")
    if temperature == 0:
        return None
    device = generator.device if generator is not None else "cpu"
    return torch.rand(max_new_tokens, rows, generator=generator, device=device)


def pick(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """Tokens of softmax(logits / temperature) within the nucleus: the likeliest tokens that together reach `top_p`."""
    probabilities_BV = (logits_BV.float() / temperature).softmax(-1)
    order_BV = None
    if top_p < 1:
        probabilities_BV, order_BV = probabilities_BV.sort(-1, descending=True)
    sums_BV = probabilities_BV.double().cumsum(-1)
    whole_B = sums_BV[:, -1]
    if top_p < 1:
        inside_BV = sums_BV - probabilities_BV < top_p
        whole_B = sums_BV.gather(1, inside_BV.sum(-1, keepdim=True) - 1)[:, 0]
    place_B1 = torch.searchsorted(sums_BV, (uniform_B.double() * whole_B)[:, None], right=True)
    place_B1 = place_B1.clamp_(max=logits_BV.shape[-1] - 1)
    return (place_B1 if order_BV is None else order_BV.gather(1, place_B1))[:, 0]

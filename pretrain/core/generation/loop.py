"""Greedy decoding and sampling, one token a pass; what the decoding methods give the same tokens as.

Sampling turns one uniform number a token into the token, by the inverse of the distribution's cumulative sum. The
numbers are drawn before the first pass: place n of row b has the number u[n, b] however the token is found, so a
method that verifies several tokens a pass samples what this loop samples.

Shape letters: B rows, L prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pretrain.core.generation.forward import Forward, pads
from pretrain.core.generation.options import OptionFields, Options


def decode(model: PreTrainedModel, input_ids_BL: Tensor, **given: Unpack[OptionFields]) -> Tensor:
    """Continue left-padded prompts greedily, or by sampling where the temperature is positive; returns `tokens_BN`.

    `given` are the fields of `Options`.
    """
    options = Options(**given)
    kept_BL, eos, pad = pads(input_ids_BL, options.attention_mask_BL), options.eos, options.pad
    rows, length = input_ids_BL.shape
    uniform_NB = options.draws(rows)
    with torch.inference_mode():
        forward = Forward(model, length + options.max_new_tokens)
        logits_BV = forward.prefill(input_ids_BL, kept_BL)
        tokens_BN = torch.full((rows, length + options.max_new_tokens), pad, device=forward.device)
        tokens_BN[:, :length] = input_ids_BL
        going_B = torch.ones(rows, dtype=torch.bool, device=forward.device)
        end = length
        for place in range(options.max_new_tokens):
            token_B = options.pick(logits_BV, None if uniform_NB is None else uniform_NB[place])
            if eos is not None and rows > 1:
                token_B = torch.where(going_B, token_B, pad)
                going_B &= token_B != eos
            tokens_BN[:, end] = token_B
            end += 1
            if eos is not None and (not bool(going_B.any()) if rows > 1 else token_B.item() == eos):
                break
            if place + 1 < options.max_new_tokens:
                logits_BV = forward.step(token_B[:, None])
    return tokens_BN[:, :end].clone()

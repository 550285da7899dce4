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
from pretrain.core.generation.rows import continue_rows


def decode(model: PreTrainedModel, input_ids_BL: Tensor, **given: Unpack[OptionFields]) -> Tensor:
    """Continue left-padded prompts greedily, or by sampling where the temperature is positive; returns `tokens_BN`.

    `given` are the fields of `Options`.
    """
    options = Options(**given)
    kept_BL, length = pads(input_ids_BL, options.attention_mask_BL), input_ids_BL.shape[1]
    with torch.inference_mode():
        forward = Forward(model, length + options.max_new_tokens)
        logits_BV = forward.prefill(input_ids_BL, kept_BL)
        ids_BL = input_ids_BL.to(forward.device)
        tokens_BN = continue_rows(ids_BL, logits_BV, lambda token_B: forward.step(token_B[:, None]), options)
    return tokens_BN.clone()

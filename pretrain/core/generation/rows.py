"""What decoding methods share that change what a model computes: passes through its own `forward`, and the loop.

Tokens are chosen as `loop.decode` chooses them, so that equal logits and an equal generator give equal tokens.

Shape letters: B rows, L positions of the prompts, N of the whole, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from pretrain.core.errors import PretrainError
from pretrain.core.generation.options import Options


def mask_of(name: str, input_ids_BL: Tensor, attention_mask_BL: Tensor | None) -> Tensor:
    """The mask of left-padded prompts, ones by default; padding elsewhere or an empty prompt is an error."""
    if attention_mask_BL is None:
        attention_mask_BL = torch.ones_like(input_ids_BL)
    mask_BL = attention_mask_BL.long()
    if mask_BL.shape != input_ids_BL.shape or mask_BL.shape[1] == 0 or not bool((mask_BL[:, -1] == 1).all()):
        raise PretrainError(
            f"{name}: attention_mask_BL of shape {tuple(mask_BL.shape)} for prompts of shape "
            f"{tuple(input_ids_BL.shape)}: accepted: the same shape, padding on the left, one token or more in a row"
        )
    if bool((mask_BL[:, 1:] < mask_BL[:, :-1]).any()):
        raise PretrainError(f"{name}: attention_mask_BL has padding after a token; accepted: padding on the left")
    return mask_BL


def prefill(model: PreTrainedModel, input_ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Cache]:
    """`logits_BV` after left-padded prompts, and the model's cache of them."""
    output = model(
        input_ids=input_ids_BL, attention_mask=mask_BL, position_ids=(mask_BL.cumsum(1) - 1).clamp(min=0),
        use_cache=True, logits_to_keep=1,
    )  # fmt: skip
    return output.logits[:, -1], kept(model, output)


def kept(model: PreTrainedModel, output: Any) -> Cache:
    """The keys and values of what a model has read; a clear error of one that keeps something else or more."""
    cache: Cache | None = getattr(output, "past_key_values", None)
    layers = getattr(cache, "layers", ())
    if cache is None or any(type(layer).__name__.startswith("LinearAttention") for layer in layers):
        name = type(model).__name__
        raise PretrainError(f"{name} keeps more than keys and values of a text; accepted: a model with attention alone")
    return cache


def stepper(
    model: PreTrainedModel, cache: Cache, mask_BL: Tensor, at_B: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """`step(token_B) -> logits_BV`: the next token of each row, after the cache of left-padded prompts.

    `at_B` is the next token's position where the cache does not hold all before it.
    """
    mask_BN, position_B = mask_BL, mask_BL.sum(1) if at_B is None else at_B

    def step(token_B: Tensor) -> Tensor:
        nonlocal mask_BN, position_B
        mask_BN = torch.cat([mask_BN, torch.ones_like(mask_BN[:, :1])], 1)
        output = model(
            input_ids=token_B[:, None], attention_mask=mask_BN, position_ids=position_B[:, None],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        position_B = position_B + 1
        return output.logits[:, -1]

    return step


def continue_rows(
    input_ids_BL: Tensor, logits_BV: Tensor, step: Callable[[Tensor], Tensor], options: Options,
    uniform_NB: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The prompts and their continuations, `pad` after the end of each: `step(token_B) -> logits_BV` of the next.

    `uniform_NB` are these rows' own of `options.draws`, where they are drawn already.
    """
    rows, length = input_ids_BL.shape
    tokens_BN = input_ids_BL.new_full((rows, length + options.max_new_tokens), options.pad)
    tokens_BN[:, :length] = input_ids_BL
    done_B = torch.zeros(rows, dtype=torch.bool, device=input_ids_BL.device)
    uniform_NB = options.draws(rows) if uniform_NB is None else uniform_NB
    for number in range(options.max_new_tokens):
        end = length + number + 1
        token_B = options.pick(logits_BV, None if uniform_NB is None else uniform_NB[number], tokens_BN[:, : end - 1])
        token_B = token_B.to(tokens_BN.device).masked_fill(done_B, options.pad)
        tokens_BN[:, end - 1] = token_B
        if options.ends or options.stop is not None:
            done_B |= options.ended(tokens_BN[:, length:end])
            if bool(done_B.all()):
                break
        if number + 1 < options.max_new_tokens:
            logits_BV = step(token_B)
    return tokens_BN[:, :end]

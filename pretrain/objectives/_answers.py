"""Answers of a language model to a batch of prompts, as objectives that learn from answers measure them.

Shape letters: B prompts, L their tokens, N all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain.core.encoding import text_of
from pretrain.core.generation.forward import why_not
from pretrain.core.generation.loop import decode
from pretrain.core.generation.options import Options
from pretrain.core.generation.settings import generate, options_of
from pretrain.core.models.families import family
from pretrain.objectives._fine_tuning import filled

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prompts_of(inputs: Sequence[Sequence[int]], fill: int, width: int) -> tuple[Tensor, Tensor]:
    """`prompt_BL`, filled on the left up to `width`, and its `mask_BL`."""
    lengths_B = torch.tensor([len(ids) for ids in inputs])
    prompt_BL = filled([ids[::-1] for ids in inputs], fill, width).flip(1)
    return prompt_BL, (torch.arange(width) >= width - lengths_B[:, None]).long()


def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids_BL: Tensor, mask_BL: Tensor, most: int
) -> list[str]:
    """The greedy answer of at most `most` tokens to each prompt, as text without its end."""
    options = options_of(model, tokenizer, ids_BL.shape[1], max_new_tokens=most)
    first = 1 if family(model).decoder_blocks is not None else ids_BL.shape[1]
    if why_not(model, ids_BL.shape[1] + most) is None:
        output_BN = decode(model, ids_BL, attention_mask_BL=mask_BL, **options)
    else:
        output_BN = generate(model, ids_BL, mask_BL, options)
    end = Options(**options).ends
    answers = []
    for ids in output_BN[:, first:].tolist():
        ids = ids[: next((place for place, token in enumerate(ids) if token in end), len(ids))]
        answers.append(text_of(tokenizer, ids, skip_special_tokens=True).strip())
    return answers

"""What a causal model makes of a prompt: continuations that it samples, and how likely it finds given ones.

Shape letters: B rows, L tokens, N targets, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from transformers import PreTrainedModel

from pretrain.core.errors import PretrainError
from pretrain.core.generation.options import OptionFields, Options
from pretrain.core.generation.rows import continue_rows, prefill, stepper
from pretrain.core.models.families import hidden
from pretrain.core.models.features import evaluating
from pretrain.core.models.likelihood import judged

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Judgement:
    """Of a continuation: the sum of its tokens' log-probabilities, whether each was the likeliest, how many."""

    logp: float
    greedy: bool
    tokens: int


def judge(model: PreTrainedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Judgement]:
    """What the model says of each continuation after its prompt, which has one token or more; in batches."""
    for prompt, _ in pairs:
        if not len(prompt):
            raise PretrainError("a prompt without tokens; accepted: a token or more, such as the one that begins texts")
    sizes = [len(prompt) + len(after) for prompt, after in pairs]
    order, judgements, start = (
        sorted(range(len(pairs)), key=lambda i: sizes[i]),
        [Judgement(0.0, True, 0)] * len(pairs),
        0,
    )
    with evaluating(model):
        while start < len(order):
            end = start + 1
            while end < len(order) and (end + 1 - start) * sizes[order[end]] <= BATCH_TOKENS:
                end += 1
            chosen, start = order[start:end], end
            width = max(sizes[i] for i in chosen) - 1
            input_BL = torch.zeros(len(chosen), max(width, 1), dtype=torch.long)
            wanted_BL = torch.zeros(input_BL.shape, dtype=torch.bool)
            targets: list[int] = []
            for b, i in enumerate(chosen):
                prompt, after = pairs[i]
                input_BL[b, : sizes[i] - 1] = torch.tensor([*prompt, *after][:-1], dtype=torch.long)
                wanted_BL[b, len(prompt) - 1 : sizes[i] - 1] = True
                targets += after
            if not targets:
                continue
            # Padding stands at the end, where a causal model's predictions do not see it.
            states_BLE = hidden(model, input_ids=input_BL.to(model.device), use_cache=False)
            target_N = torch.tensor(targets, device=model.device)
            nll_N, _, right_N = judged(model, states_BLE[wanted_BL.to(model.device)], target_N)
            counts = [len(pairs[i][1]) for i in chosen]
            for i, nll_T, right_T in zip(chosen, nll_N.cpu().split(counts), right_N.cpu().split(counts), strict=True):
                judgements[i] = Judgement(-float(nll_T.sum()), bool(right_T.all()), len(nll_T))
    return judgements


def sample(
    model: PreTrainedModel, prompt: Sequence[int], count: int, *, rows: int = 64, **given: Unpack[OptionFields]
) -> list[list[int]]:
    """`count` continuations of a prompt, each up to and with its end; the prompt is read once for each lot of `rows`.

    `given` are the fields of `Options`.
    """
    options = Options(**given)
    continuations: list[list[int]] = []
    with evaluating(model):
        for start in range(0, count, rows):
            lot = min(rows, count - start)
            ids_1L = torch.tensor([list(prompt)], device=model.device)
            logits_1V, cache = prefill(model, ids_1L, torch.ones_like(ids_1L))
            cache.batch_repeat_interleave(lot)
            ids_BL = ids_1L.expand(lot, -1)
            step = stepper(model, cache, torch.ones_like(ids_BL))
            tokens_BN = continue_rows(ids_BL, logits_1V.expand(lot, -1), step, options)
            new = tokens_BN[:, len(prompt) :].tolist()
            continuations += [options.cut(row) for row in new]
    return continuations

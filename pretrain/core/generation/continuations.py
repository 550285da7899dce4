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
    """What the model says of each continuation after its prompt, which has one token or more; in batches.

    Continuations of one token after the same prompt, as the letters of choices are, are read once.
    """
    for prompt, _ in pairs:
        if not len(prompt):
            raise PretrainError("a prompt without tokens; accepted: a token or more, such as the one that begins texts")
    judgements, start = [Judgement(0.0, True, 0)] * len(pairs), 0
    members: dict[tuple[int, ...], list[int]] = {}  # by what the model reads for them
    for number, (prompt, after) in enumerate(pairs):
        if len(after):
            members.setdefault((*prompt, *after)[:-1], []).append(number)
    rows = sorted(members, key=len)
    with evaluating(model):
        while start < len(rows):
            end = start + 1
            while end < len(rows) and (end + 1 - start) * (len(rows[end]) + 1) <= BATCH_TOKENS:
                end += 1
            chosen, start = rows[start:end], end
            input_BL = torch.zeros(len(chosen), len(chosen[-1]), dtype=torch.long)
            for b, row in enumerate(chosen):
                input_BL[b, : len(row)] = torch.tensor(row)
            # Padding stands at the end, where a causal model's predictions do not see it.
            states_BLE = hidden(model, input_ids=input_BL.to(model.device), use_cache=False)
            asked = [(b, len(row), i) for b, row in enumerate(chosen) for i in members[row]]
            counts = [len(pairs[i][1]) for _, _, i in asked]
            states_NE = torch.cat(
                [states_BLE[b, stop - n : stop] for (b, stop, _), n in zip(asked, counts, strict=True)]
            )
            target_N = torch.tensor([token for _, _, i in asked for token in pairs[i][1]], device=model.device)
            nll_N, _, right_N = judged(model, states_NE, target_N)
            each = zip(asked, nll_N.cpu().split(counts), right_N.cpu().split(counts), strict=True)
            for (_, _, i), nll_T, right_T in each:
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

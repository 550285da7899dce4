"""How likely a model finds a target after a source, in batches of pairs of about the same size.

Shape letters: B pairs of a batch, L tokens of source and target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.core.models.cross_entropy import IGNORE, linear_cross_entropy
from pretrain.core.models.families import head, hidden, softcap
from pretrain.core.models.features import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pair: TypeAlias = tuple[list[int], list[int]]  # tokens of a source, and of its target
BATCH_TOKENS = 4096


def summed_nll(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    nll: Callable[[PreTrainedModel, Sequence[Pair], torch.device], Sequence[float]],
) -> NDArray[np.float64]:
    """Each target's -log p after its source, in nats, by `nll` of a batch."""
    size = [len(x) + len(y) for x, y in pairs]
    order, sums, start = sorted(range(len(pairs)), key=lambda i: size[i]), np.zeros(len(pairs)), 0
    with evaluating(model):
        while start < len(order):
            end = start + 1
            while end < len(order) and (end + 1 - start) * size[order[end]] <= BATCH_TOKENS:
                end += 1
            chosen, start = order[start:end], end
            sums[chosen] = nll(model, [pairs[i] for i in chosen], next(model.parameters()).device)
    return sums


def filled_up(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> torch.Tensor:
    """The rows as one tensor, the shorter ones filled up at their end."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)


def causal_nll(model: PreTrainedModel, pairs: Sequence[Pair], device: torch.device) -> list[float]:
    """The same of a batch and a causal model, which reads the one after the other."""
    input_BL = filled_up([[*x, *y][:-1] for x, y in pairs], 0, device)
    target_BL = filled_up([[*[IGNORE] * (len(x) - 1), *y] for x, y in pairs], IGNORE, device)
    states_BLE = hidden(model, input_ids=input_BL, use_cache=False)
    weight_VE, bias_V = head(model, capped=True)
    nll_BL = linear_cross_entropy(states_BLE, weight_VE, target_BL, bias_V=bias_V, softcap=softcap(model))[1]
    return nll_BL.double().sum(-1).tolist()

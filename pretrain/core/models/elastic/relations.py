"""What a block's queries, keys and values relate: products of each with itself, and how far two models' are apart.

Shape letters: B rows, L positions, E width, R relation heads, D a relation head's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pretrain.core.models.families import at, blocks

PROJECTIONS = ("attention.self.query", "attention.self.key", "attention.self.value")  # of a block of a BERT-like model


@contextmanager
def projections(model: nn.Module) -> Iterator[list[Tensor]]:
    """While open, a forward pass leaves the last block's queries, keys and values, `x_BLE` each."""
    seen: list[Tensor] = []
    last = blocks(model)[-1]
    handles = [at(last, path).register_forward_hook(lambda _, __, out: seen.append(out)) for path in PROJECTIONS]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def scores(x_BLE: Tensor, heads: int) -> Tensor:
    """x xᵀ / √D of each relation head, `scores_BRLL`.

    A head has the next ⌊E / R⌋ entries, whatever head of attention they are of; what remains of E has no part.
    """
    size = x_BLE.shape[-1] // heads
    x_BRLD = x_BLE[..., : heads * size].unflatten(-1, (heads, size)).transpose(1, 2)
    return (x_BRLD @ x_BRLD.mT).float() / size**0.5


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor], mask_BLL: Tensor, kind: str) -> Tensor:
    """`distance_BL`: of each position, the sum over relations of the mean over heads of how far their scores are apart.

    `mse` is the mean squared difference over the positions that it may see, `kl` KL(softmax(theirs) ‖ softmax(ours))
    over them; `mask_BLL` is True there. Each position sees itself.
    """
    total_BL = torch.zeros(mask_BLL.shape[:-1], device=mask_BLL.device)
    for s_BRLL, t_BRLL in zip(ours, theirs, strict=True):
        if kind == "mse":
            apart_BLL = (s_BRLL - t_BRLL).square().mean(1).masked_fill(~mask_BLL, 0.0)
            total_BL = total_BL + apart_BLL.sum(-1) / mask_BLL.sum(-1)
        else:
            lowest = torch.finfo(s_BRLL.dtype).min
            q, p = (z.masked_fill(~mask_BLL[:, None], lowest).log_softmax(-1) for z in (s_BRLL, t_BRLL))
            total_BL = total_BL + (p.exp() * (p - q)).sum(-1).mean(1)
    return total_BL

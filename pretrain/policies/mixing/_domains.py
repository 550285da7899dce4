"""What a step lost on each domain."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pretrain.core.batch import Batch
from pretrain.core.errors import PretrainError
from pretrain.objectives import Loss
from pretrain.policies import Training


def domain_losses(
    method: str, training: Training, batches: Sequence[Batch], losses: Sequence[Loss]
) -> dict[str, tuple[float, float]]:
    """The summed loss and the number of targets of each domain that the step has seen, over all processes."""
    names = list(training.loader.shards.domain_names)
    sums, counts = [0.0] * len(names), [0.0] * len(names)
    rows = []
    for batch, loss in zip(batches, losses, strict=True):
        if loss.nll_BL is None:
            raise PretrainError(
                f"{method}: the objective gives no loss for each token; accepted: causal_lm, masked_lm, …"
            )
        each_B = loss.nll_BL.sum(-1, dtype=torch.float64)
        rows.append(torch.stack([batch["domain_B"].to(each_B), each_B, (loss.nll_BL != 0).sum(-1).to(each_B)], 1))
    # Waits for the device, once a step: the domains are weighed here, and the losses of all processes are needed.
    for domain, value, count in torch.cat(rows).tolist() if rows else ():
        sums[int(domain)] += value
        counts[int(domain)] += count
    totals = training.world.sum(sums + counts)
    by_domain = zip(names, totals[: len(names)], totals[len(names) :], strict=True)
    return {name: (total, count) for name, total, count in by_domain if count}

"""What a step lost on each domain."""

from __future__ import annotations

from collections.abc import Sequence

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
    for batch, loss in zip(batches, losses, strict=True):
        if loss.nll_BL is None:
            raise PretrainError(
                f"{method}: the objective gives no loss for each token; accepted: causal_lm, masked_lm, …"
            )
        each_B, targets_B = loss.nll_BL.sum(-1).tolist(), (loss.nll_BL != 0).sum(-1).tolist()
        for domain, value, count in zip(batch["domain_B"].tolist(), each_B, targets_B, strict=True):
            sums[domain] += value
            counts[domain] += count
    totals = training.world.sum(sums + counts)
    by_domain = zip(names, totals[: len(names)], totals[len(names) :], strict=True)
    return {name: (total, count) for name, total, count in by_domain if count}

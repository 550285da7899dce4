"""The held-out value of any objective: its loss on the same batches of a split each time."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from pretrain.core.batch import to_device
from pretrain.objectives import Objective


@torch.no_grad()
def objective_loss(
    model: nn.Module, modules: nn.Module | None, objective: Objective, loader: Any, max_tokens: int
) -> dict[str, float]:
    """`loss` and the objective's parts, over about `max_tokens` tokens and at most one epoch of `loader`.

    The loader begins anew each time and the corruption is drawn by its seed, so that two evaluations differ by the
    model only.
    """
    device = next(model.parameters()).device
    start = loader.state()
    totals: dict[str, float] = defaultdict(float)
    seen, weight, step = 0, 0.0, loader.next_step
    while seen < max_tokens and step * loader.batch_rows < max(len(loader.plan), loader.batch_rows):
        for (batch,) in loader.step(step, 0.0):
            torch.manual_seed(step)
            found, share = objective.loss(model, to_device(batch, device), modules), float(batch["weight"])
            for name, value in {"loss": found.value, **found.parts}.items():
                totals[name] += float(value) * share
            seen, weight = seen + int(batch["tokens"]), weight + share
        step += 1
    loader.load_state(start)
    return {name: total / max(weight, 1.0) for name, total in totals.items()}

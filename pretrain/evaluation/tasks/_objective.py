"""The held-out value of any objective: its loss on the same batches of a split each time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence, Sized
from typing import Protocol, TypeVar

import torch
from torch import nn

from pretrain.core.batch import Batch, counts, to_device
from pretrain.objectives import Objective, share

State = TypeVar("State")  # where a loader stands, as it says it itself


class Batches(Protocol[State]):
    """What gives the batches: the loader of a training."""

    next_step: int
    batch_rows: int

    @property
    def plan(self) -> Sized:
        """The rows of an epoch."""

    def step(self, step: int, progress: float) -> Sequence[Sequence[Batch]]:
        """The micro-batches of a step, each one batch an objective."""

    def state(self) -> State:
        """Where it stands."""

    def load_state(self, state: State) -> None:
        """Go on from there."""


@torch.no_grad()
def objective_loss(
    model: nn.Module, modules: nn.Module | None, objective: Objective, loader: Batches[State], max_tokens: int
) -> dict[str, float]:
    """`loss` and the objective's parts, over about `max_tokens` tokens and at most one epoch of `loader`.

    The loader begins anew each time and the corruption is drawn by its seed, so that two evaluations differ by the
    model only.
    """
    device = next(model.parameters()).device
    start = loader.state()
    totals: dict[tuple[str, str], float] = defaultdict(float)
    weights: dict[tuple[str, str], float] = defaultdict(float)
    seen, step = 0, loader.next_step
    while seen < max_tokens and step * loader.batch_rows < max(len(loader.plan), loader.batch_rows):
        for (batch,) in loader.step(step, 0.0):
            torch.manual_seed(step)
            loss, numbers = objective.loss(model, to_device(batch, device), modules), counts(batch)
            terms = {("term", name): value for name, value in loss.logged.items()}
            for key, value in (terms | {("part", name): value for name, value in loss.parts.items()}).items():
                totals[key] += float(value) * share(key[1], numbers)
                weights[key] += share(key[1], numbers)
            seen += int(batch["tokens"])
        step += 1
    loader.load_state(start)
    means = {key: total / max(weights[key], 1.0) for key, total in totals.items()}
    parts = {name: mean for (kind, name), mean in means.items() if kind == "part"}
    return {"loss": sum(mean for (kind, _), mean in means.items() if kind == "term")} | parts

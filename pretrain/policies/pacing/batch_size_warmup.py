"""Small batches first, doubled on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.core.batch import Batch
from pretrain.core.bounds import OpenShare
from pretrain.core.errors import PretrainError
from pretrain.objectives import Loss
from pretrain.policies import Policy, State, Training


@dataclass(frozen=True)
class BatchSizeWarmup(Policy):
    """Critical Batch Size Revisited: A Simple Empirical Approach to Large-Batch Language Model Training
    (arXiv:2505.23971).

    The largest batch that wastes no tokens is small at first and grows while a model is trained. So training begins
    with `batch_rows` / 2^k rows a step and doubles them at each of the k shares of the budget in `at`; with `scale_lr`
    the rate is that of the full batch times √(rows / batch_rows). The paper doubles where it measures that the batch
    may grow; these shares are a guess.
    """

    at: tuple[OpenShare, ...] = (0.05, 0.2)
    scale_lr: bool = True

    def start(self, training: Training, state: State) -> None:
        """Begin with the smallest batch, or go on with the one that was reached."""
        full = training.loader.batch_rows
        if full % 2 ** len(self.at):
            raise PretrainError(f"{self.name}: batch_rows {full}: accepted: a multiple of {2 ** len(self.at)}")
        for doublings in range(len(self.at), -1, -1):  # micro-batches must divide each
            training.loader.batch_rows = full >> doublings
        if not state:
            state |= {"full": full, "rows": full}
            self._set(training, state, full >> len(self.at))
        training.loader.batch_rows = state["rows"]

    def after_step(self, training: Training, state: State, batches: Sequence[Batch], losses: Sequence[Loss]) -> None:
        """Double where a share is reached; the rows hold from the next step on."""
        left = sum(training.progress < share for share in self.at)
        if state["full"] >> left != state["rows"]:
            self._set(training, state, state["full"] >> left)

    def _set(self, training: Training, state: State, rows: int) -> None:
        if self.scale_lr:
            for group in training.optimizer.param_groups:
                group["peak_lr"] *= math.sqrt(rows / state["rows"])
        training.loader.batch_rows = state["rows"] = rows

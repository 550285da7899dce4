"""Go back to earlier weights where the loss diverges, and on from there at a lower learning rate."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch
from pretrain.core.bounds import Count, OpenShare, Positive, Whole
from pretrain.core.errors import PretrainError, warn
from pretrain.objectives import Loss
from pretrain.policies import Policy, State, Training
from pretrain.policies._weights import trained

OF_TRAINING = ("params", "lr", "peak_lr", "total_steps")  # of a group: what is no memory of the optimiser's


@dataclass(frozen=True)
class Restart(Policy):
    """OPT: Open Pre-trained Transformer Language Models (arXiv:2205.01068).

    Where the loss diverged, the authors went back to a checkpoint from before and on from there at a lower rate (by a
    tenth, later to two thirds). So here: after each `every`-th step the weights and the optimiser's memory are copied.
    When the mean loss of the last `window` steps lies `rise` nats above the lowest such mean so far, or `skips` steps
    in a row were not finite, the newest copy comes back that was made a window ago or earlier, and the peak rate
    is multiplied by `factor` for the rest of the training; at most `most` times. What was spent stays spent: the
    schedule, the budget and the rows go on as if nothing had been taken back. The metrics say how many `restarts` there
    were. It needs the memory of three more states.
    """

    every: Count = 100
    window: Count = 20
    rise: Positive = 0.5
    factor: OpenShare = 0.67
    skips: Count = 3
    most: Whole = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < self.window:
            raise PretrainError(f"restart: every {self.every}: accepted: {self.window}, the window, or more")

    @property
    def remembered(self) -> float:
        """Three copies of the weights and of two moments."""
        return 9.0

    def start(self, training: Training, state: State) -> None:
        """Copy what training begins with; sharded weights are refused."""
        trained(training.model, self.name)
        if not state:
            state |= {"losses": [], "lowest": None, "restarts": 0, "made": training.step}
            state["copies"] = [_copy(training)]

    def before_step(self, training: Training, state: State, batches: Sequence[Batch]) -> None:
        """Go back where the newest steps were not finite."""
        skipped = training.step - state["made"]
        if skipped >= self.skips:
            self._back(training, state, f"{skipped} steps in a row were not finite")

    def after_step(self, training: Training, state: State, batches: Sequence[Batch], losses: Sequence[Loss]) -> None:
        """Note the loss; go back where it has risen, else copy when it is time to."""
        total, count = training.world.sum([float(sum(float(loss.value) for loss in losses)), float(len(losses))])
        state["made"], state["losses"] = training.step, [*state["losses"], total / count][-self.window :]
        if len(state["losses"]) == self.window:
            mean = sum(state["losses"]) / self.window
            lowest = state["lowest"] = mean if state["lowest"] is None else min(mean, state["lowest"])
            if mean > lowest + self.rise:
                self._back(training, state, f"the loss has risen from {lowest:.3g} to {mean:.3g}")
        if training.step % self.every == 0:
            # Two, and what training began with: the newest may already be of what is about to diverge.
            copies = [*state["copies"], _copy(training)]
            state["copies"] = [copies[0], *copies[1:][-2:]]

    def on_evaluation(self, training: Training, state: State, metrics: dict[str, float]) -> None:
        """Say how often it went back."""
        metrics["restarts"] = state["restarts"]

    def _back(self, training: Training, state: State, reason: str) -> None:
        """Put a copy from before back, and lower the peak rate."""
        if state["restarts"] >= self.most:
            return
        first, *later = state["copies"]
        good = [first, *(each for each in later if each["step"] <= training.step - self.window)]
        _put_back(training.optimizer, good[-1])
        for group in training.optimizer.param_groups:
            group["peak_lr"] *= self.factor
        state |= {"copies": good, "losses": [], "restarts": state["restarts"] + 1, "made": training.step}
        warn(
            f"restart: after step {training.step} {reason}: back to the weights of step {good[-1]['step']}, with "
            f"{self.factor:g} of the learning rate"
        )


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _copy(training: Training) -> State:
    """The weights that the optimiser moves, and its memory."""
    optimizer = training.optimizer
    parameters = _parameters(optimizer)
    groups = [{k: v for k, v in group.items() if k not in OF_TRAINING} for group in optimizer.param_groups]
    return {
        "step": training.step,
        "weights": [parameter.detach().clone() for parameter in parameters],
        "memory": [copy.deepcopy(dict(optimizer.state.get(parameter, {}))) for parameter in parameters],
        "groups": copy.deepcopy(groups),
    }


@torch.no_grad()
def _put_back(optimizer: torch.optim.Optimizer, saved: State) -> None:
    """The weights and the optimiser's memory as they were copied."""
    for parameter, weight, memory in zip(_parameters(optimizer), saved["weights"], saved["memory"], strict=True):
        parameter.copy_(weight)
        now = optimizer.state.pop(parameter, {})
        if memory:
            optimizer.state[parameter] = {key: _like(now.get(key), value) for key, value in memory.items()}
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in copy.deepcopy(values).items()})


def _like(now: object, value: object) -> object:
    """A copy of a value, on the device of that which it replaces."""
    if isinstance(now, Tensor) and isinstance(value, Tensor):
        return value.to(now.device, copy=True)
    return copy.deepcopy(value)

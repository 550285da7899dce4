"""Keep the best weights, and stop when they get no better."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pretrain.core.bounds import Whole
from pretrain.core.errors import PretrainError
from pretrain.policies import Policy, State, Training
from pretrain.policies._weights import by_parameter, copies, trained


@dataclass(frozen=True)
class KeepBest(Policy):
    """Early Stopping - But When? (Neural Networks: Tricks of the Trade, 1998).

    A stage ends with the weights, and the metrics, of the evaluation whose `metric` was best, in the direction that
    `better` says; the earliest of equal ones. Where it has got no better in `patience` evaluations one after the other,
    training ends before its budget does (0: never). Beside a policy that averages, these are averages. How often is
    evaluated says the stage's `evaluate_every`.
    """

    metric: str = "loss"
    better: Literal["lower", "higher"] = "lower"
    patience: Whole = 0

    @property
    def remembered(self) -> float:
        """The best weights."""
        return 1.0

    def start(self, training: Training, state: State) -> None:
        """Refuse weights that are sharded; a training that was to end does not go on."""
        trained(training.model, self.name)
        training.enough = state.get("since", 0) >= self.patience > 0

    def on_evaluation(self, training: Training, state: State, metrics: dict[str, float]) -> None:
        """Copy the weights if they are the best so far, else count towards the end."""
        if self.metric not in metrics:
            raise PretrainError(f"keep_best: metric {self.metric!r}: accepted: {', '.join(sorted(metrics))}")
        value, sign = metrics[self.metric], 1 if self.better == "higher" else -1
        if value * sign > state.get("best", -math.inf * sign) * sign:  # what is no number is never better
            state |= {"best": value, "step": training.step, "since": 0, "metrics": dict(metrics)}
            state["weights"] = copies(trained(training.model, self.name))
        else:
            state["since"] = state.get("since", 0) + 1
        training.enough = state["since"] >= self.patience > 0

    def finish(self, training: Training, state: State) -> None:
        """Put the best weights into the model, and say what they reach."""
        if "best" not in state:
            return
        parameters = trained(training.model, self.name)
        for parameter, value in by_parameter(parameters, state["weights"]).items():
            parameter.data.copy_(value)
        training.metrics = state["metrics"] | {"best_step": state["step"]}

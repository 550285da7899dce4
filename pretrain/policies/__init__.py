"""Policies: what acts on training while it runs (mixes domains, weighs samples, prunes, samples ranks).

The hooks get the running `Training` (see `pretrain.training.loop`): its `model`, `optimizer`, `loader` (whose
`mixture` may be set), `step`, `progress`, and `state[policy]`, a dict of JSON values and tensors that is saved with
the training state and is all that a policy may remember.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pretrain.core.method import Method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pretrain.core.batch import Batch
    from pretrain.objectives import Loss
    from pretrain.training.loop import Training


def due(training: Training, state: dict[str, Any], every: float) -> bool:
    """Whether something is to be done after this step: each `every` steps or, below 1, each such share of training."""
    if every >= 1:
        return training.step % round(every) == 0
    times = int(training.progress / every + 1e-9)
    ripe, state["times"] = times > state.get("times", 0), times
    return ripe


class Policy(Method):
    """Base of the policies. Override what is needed."""

    def start(self, training: Training, state: dict[str, Any]) -> None:
        """Once, before the first step and again after a resume (then `state` holds what was saved)."""

    def before_step(self, training: Training, state: dict[str, Any], batches: Sequence[Batch]) -> None:
        """Before the forward passes of a step; may write `token_weight_BL` into its micro-batches."""

    def zeros(self, training: Training, state: dict[str, Any]) -> dict[str, float]:
        """The share of zeros in linear layers (by their names in `families.linears`) that this step computes with.

        Their part of these layers' FLOPs is not counted: what hardware spends that skips zeros. The log keeps the dense
        number beside it.
        """
        return {}

    def after_step(
        self, training: Training, state: dict[str, Any], batches: Sequence[Batch], losses: Sequence[Loss]
    ) -> None:
        """After the optimiser's step."""

    def on_evaluation(self, training: Training, state: dict[str, Any], metrics: dict[str, float]) -> None:
        """After each held-out evaluation; may add `metrics` of its own."""

"""Policies: what acts on training while it runs (mixes domains, weighs samples, prunes, samples ranks).

The hooks get the running `Training`, and `state`, a dict of JSON values and tensors that is saved with the training
state and is all that a policy may remember.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pretrain.core.method import Method

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from pretrain.core.batch import Batch
    from pretrain.core.meter import Meter
    from pretrain.objectives import Loss
    from pretrain.optim import Schedule


State = dict[str, Any]  # JSON values and tensors


class Plan(Protocol):
    """Which rows there are."""

    def __len__(self) -> int:
        """How many."""

    def rows_of_domain(self, domain: int) -> NDArray[np.int64]:
        """The numbers of a domain's rows."""


class Shards(Protocol):
    """The corpus in training."""

    @property
    def domain_names(self) -> Sequence[str]:
        """Its domains, by their numbers."""


class Loader(Protocol):
    """What draws the rows (`pretrain.training.loader.Loader`); what is no property may be set."""

    batch_rows: int
    cuts: int
    spread: int
    mixture: dict[str, float] | None

    @property
    def length(self) -> int:
        """Tokens of a row that is not cut."""

    @property
    def plan(self) -> Plan:
        """Its rows."""

    @property
    def shards(self) -> Shards:
        """Its corpus."""

    def restrict(self, domain: str, rows: int) -> None:
        """Draw from the first `rows` of a domain alone."""


class Budget(Protocol):
    """When training stops."""

    def total_steps(self, spent: dict[str, float]) -> int:
        """How many steps it makes, estimated from what is spent."""


class Settings(Protocol):
    """How a training trains (`pretrain.training.loop.Settings`)."""

    @property
    def budget(self) -> Budget:
        """When it stops."""

    @property
    def seed(self) -> int:
        """Of all that is random."""

    @property
    def strategy(self) -> str:
        """How several processes share the work."""


class Processes(Protocol):
    """The processes of a training."""

    @property
    def size(self) -> int:
        """How many there are."""

    def sum(self, values: list[float]) -> list[float]:
        """The sums of some numbers over all processes."""


class Training(Protocol):
    """What a policy sees of a running training (`pretrain.training.loop.Training`)."""

    optimizer: torch.optim.Optimizer
    schedule: Schedule
    step: int
    flops: int
    dense_flops: int
    metrics: dict[str, float]
    enough: bool

    @property
    def loader(self) -> Loader:
        """Where its rows come from."""

    @property
    def settings(self) -> Settings:
        """How it trains."""

    @property
    def meter(self) -> Meter:
        """What counts its FLOPs."""

    @property
    def world(self) -> Processes:
        """Its processes."""

    @property
    def model(self) -> nn.Module:
        """The model in training."""

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, 0 to 1."""

    @property
    def spent(self) -> dict[str, float]:
        """What the budget counts: tokens, steps, flops, seconds."""


def due(training: Training, state: State, every: float) -> bool:
    """Whether something is to be done after this step: each `every` steps or, below 1, each such share of training."""
    if every >= 1:
        return training.step % round(every) == 0
    times = int(training.progress / every + 1e-9)
    reached, state["times"] = times > state.get("times", 0), times
    return reached


class Policy(Method):
    """Base of the policies. Override what is needed."""

    kind: ClassVar[str] = "policy"
    weighs_tokens: ClassVar[bool] = False  # whether it writes `token_weight_BL`, which not every objective follows
    averages_weights: ClassVar[bool] = False  # whether it has `averages`
    domain_fields: ClassVar[tuple[str, ...]] = ()  # fields that name domains of the corpus

    @property
    def remembered(self) -> float:
        """How many numbers of float32 it remembers for each weight that is trained, for plans of memory and disk."""
        return 0.0

    def added(self, model: nn.Module) -> Callable[[Loss, Batch], Loss] | None:
        """What it makes of each objective's loss on a micro-batch, right after the model's pass; None: nothing.

        Asked once, before training. Held-out losses are without it.
        """
        return None

    def attended(self) -> float:
        """The mean length of rows over the budget, next to that of whole ones, for plans."""
        return 1.0

    def start(self, training: Training, state: State) -> None:
        """Once, before the first step and again after a resume (then `state` holds what was saved)."""

    def before_step(self, training: Training, state: State, batches: Sequence[Batch]) -> None:
        """Before the forward passes of a step; may write `token_weight_BL` into its micro-batches."""

    def zeros(self, training: Training, state: State) -> dict[str, float]:
        """The share of zeros in linear layers (by their names in `families.linears`) that this step computes with.

        Their part of these layers' FLOPs is not counted: what hardware spends that skips zeros. The log keeps the dense
        number beside it.
        """
        return {}

    def after_backward(self, training: Training, state: State, shares: Sequence[Mapping[str, float]]) -> None:
        """After each micro-batch's backward pass, its gradient added to those before it.

        `shares` are, of each objective, the shares of the step's targets that its loss was multiplied by. A policy may
        take the gradient away, and put it back in `before_update`.
        """

    def before_update(self, training: Training, state: State) -> None:
        """When the step's gradient is whole, before it is clipped: take away that of weights that may not move.

        Else the norm that the gradient is clipped by would be of more than what is trained.
        """

    def after_step(self, training: Training, state: State, batches: Sequence[Batch], losses: Sequence[Loss]) -> None:
        """After the optimiser's step."""

    def on_evaluation(self, training: Training, state: State, metrics: dict[str, float]) -> None:
        """After each held-out evaluation, the weights that were evaluated in place; may add `metrics` of its own."""

    def averages(self, training: Training, state: State) -> Mapping[nn.Parameter, Tensor]:
        """What stands for the weights in training, by parameter, in evaluations and at the end."""
        return {}

    def finish(self, training: Training, state: State) -> None:
        """Once, when training is over and its last state is saved; may change the weights that it ends with."""

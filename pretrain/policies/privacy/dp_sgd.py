"""DP-SGD: each example's gradient is clipped, and noise is added to their sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch
from pretrain.core.bounds import NonNegative, OpenShare, Positive
from pretrain.core.errors import PretrainError
from pretrain.policies import Policy, State, Training
from pretrain.policies.privacy._accountant import Accountant, epsilon, noise_for
from pretrain.policies.privacy._edgeworth import estimated_epsilon

ACCOUNTANTS: dict[str, Accountant] = {"renyi": epsilon, "edgeworth": estimated_epsilon}


@dataclass(frozen=True)
class DPSGD(Policy):
    """Deep Learning with Differential Privacy (arXiv:1607.00133).

    A step's gradient is, over its B examples and with C the `clip_norm` and σ the noise multiplier,

        g = 1/B · (Σ g_i · min(1, C / ‖g_i‖) + N(0, σ² C² I)),

    g_i being the gradient of the mean over the targets of example i: `micro_rows: 1`, and one process. σ is
    `noise_multiplier` or, without one, the least by which the steps of the budget keep to `target_epsilon`, which a
    budget of steps alone can know. The optimiser is any. Evaluations have `epsilon` at `delta` after the steps until
    then beside their metrics, with `noise_multiplier` and `sampling_rate`, and so has the lineage of the checkpoint.
    `accountant: renyi` proves it; `edgeworth` (`ew_tune`) estimates it, mostly closer, and `epsilon_renyi` stands there
    as well.

    What is proved: about one row, not one document, where rows are packed of documents; under Poisson sampling at the
    rate B / rows, whereas the loader takes a shuffled epoch row by row, for which this accounting is the custom and not
    a proof; and as long as nobody knows the recipe's seed, which the noise follows from. The learning rate, and all
    else that is tuned on the same data, is not counted, nor is what the tokenizer or earlier stages have seen.
    """

    clip_norm: Positive = 1.0
    delta: OpenShare = 1e-5
    target_epsilon: Positive = 8.0
    noise_multiplier: NonNegative | None = None
    accountant: Literal["renyi", "edgeworth"] = "renyi"

    def start(self, training: Training, state: State) -> None:
        """Settle the noise."""
        if training.world.size > 1:
            raise PretrainError(f"{self.name}: {training.world.size} processes: accepted: one")
        state["sampling_rate"] = min(1.0, training.loader.batch_rows / len(training.loader.plan))
        if self.noise_multiplier is not None:
            state["noise_multiplier"] = self.noise_multiplier
        elif "noise_multiplier" not in state:
            unit = getattr(training.settings.budget, "unit", "")
            if unit != "steps":
                raise PretrainError(f"{self.name}: a budget of {unit}: accepted: one of steps, or a noise_multiplier")
            steps = training.settings.budget.total_steps(training.spent)
            spent = ACCOUNTANTS[self.accountant]
            state["noise_multiplier"] = noise_for(self.target_epsilon, state["sampling_rate"], steps, self.delta, spent)

    def before_step(self, training: Training, state: State, batches: Sequence[Batch]) -> None:
        """Refuse micro-batches of several examples, whose gradients are no longer told apart."""
        rows = max(len(batch["row_B"]) for batch in batches)
        if rows > 1:
            raise PretrainError(f"{self.name}: micro-batches of {rows} examples: accepted: micro_rows: 1")

    def after_backward(self, training: Training, state: State, shares: Sequence[Mapping[str, float]]) -> None:
        """Clip the example's gradient, and add it to the sum of the step's."""
        if len(shares) > 1 or len(shares[0]) > 1:
            raise PretrainError(f"{self.name}: a loss of several means: accepted: one objective whose loss is one mean")
        parameters = _trained(training.model)
        share = shares[0]["weight"]  # of the step's targets, which the loss was multiplied by
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        if share:
            total = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])) / share
            factor = (self.clip_norm / total.clamp(min=1e-30)).clamp(max=1.0) / share
            gradients = [g * factor for g in gradients]
        before: list[Tensor] | None = state.get("sum")
        state["sum"] = gradients if before is None else [a + g for a, g in zip(before, gradients, strict=True)]
        for p in parameters:
            p.grad = None

    def before_update(self, training: Training, state: State) -> None:
        """The mean of the clipped gradients with noise."""
        deviation = state["noise_multiplier"] * self.clip_norm
        for p, total in zip(_trained(training.model), state.pop("sum"), strict=True):
            # The loop seeds the device by seed and step, so that a resumed training draws the same.
            noisy = total + deviation * torch.randn_like(total) if deviation else total
            p.grad = noisy / training.loader.batch_rows

    def on_evaluation(self, training: Training, state: State, metrics: dict[str, float]) -> None:
        """What is spent so far."""
        sigma, rate = state["noise_multiplier"], state["sampling_rate"]
        metrics |= {"delta": self.delta, "noise_multiplier": sigma, "sampling_rate": rate}
        names = {"epsilon": self.accountant} | ({} if self.accountant == "renyi" else {"epsilon_renyi": "renyi"})
        for name, accountant in names.items():
            spent = ACCOUNTANTS[accountant](sigma, rate, training.step, self.delta)
            if spent < float("inf"):  # without noise nothing is proved
                metrics[name] = spent

    def finish(self, training: Training, state: State) -> None:
        """What is spent, of a training without held-out documents as well."""
        self.on_evaluation(training, state, training.metrics)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]

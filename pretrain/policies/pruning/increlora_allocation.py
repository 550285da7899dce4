"""Give the components of a growing low-rank adapter to the layers that need them.

Shape letters: R components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from pretrain.core.batch import Batch
from pretrain.core.bounds import Count, Ge, NonNegative, OpenShare, Positive, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.files import digest
from pretrain.core.meter import Work
from pretrain.objectives import Loss
from pretrain.policies import Policy, State, Training, due
from pretrain.surgery.adapters.increlora import RESERVED, GrowingAdapter, growing


@dataclass(frozen=True)
class IncreLoRAAllocation(Policy):
    """IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning (arXiv:2308.12043).

    For a model that the surgery `increlora` adapted. Each step scores each layer by s = Σ |ΔW ⊙ ∂ΔW| / √(entries),
    smoothed as S ← beta1 S + (1 - beta1) s, with the uncertainty U ← beta2 U + (1 - beta2) |s - S|. After
    `init_warmup`, every `incre_interval` (steps, or shares of training below 1) the `top_h` layers of the largest S · U
    get `incre_rank_num` components each (0: half the target rank), until the ranks' mean is `target_rank`, and never
    more. A layer holds its next components in reserve, whose directions A and B learn beforehand at a scale of 1e-5.
    What is new begins the learning rate's schedule anew, over the steps that are left (each step's change of it is
    scaled, so the optimiser's must be proportional to the rate). `reg_orth_coef` weighs the mean of ‖AAᵀ - I‖ and
    ‖BᵀB - I‖.
    """

    target_rank: Annotated[float, Ge(1)] = 2.0
    init_warmup: NonNegative = 1000
    incre_interval: Positive = 1000
    top_h: Count = 2
    incre_rank_num: Whole = 0
    beta1: OpenShare = 0.85
    beta2: OpenShare = 0.85
    reg_orth_coef: NonNegative = 0.1

    def start(self, training: Training, state: State) -> None:
        """Fill the reserves, or go on; make the optimiser scale the changes of what is new."""
        layers = growing(training.model)
        self._check(training, layers)
        if not state:
            state |= {"scores": {name: [0.0, 0.0] for name in layers}, "born": {name: [[], []] for name in layers}}
            for name, layer in layers.items():
                active, _ = layer.counts
                layer.resize(active, 0)
                state["born"][name] = [[0] * active, [0] * active]  # of A and B, of E
            if self._total(layers) < self._target(layers):
                self._reserve(training, state, layers)
        _restart_schedules(training, state, layers)

    def before_step(self, training: Training, state: State, batches: Sequence[Batch]) -> None:
        """Begin the step's scores; leave the regulariser's gradient, to which those of the losses are added.

        A tensor of as many entries as there are components gives the meter the size of the step.
        """
        layers = growing(training.model)
        total = self._total(layers)
        for layer in layers.values():
            layer.scoring, layer.score = total < self._target(layers), torch.zeros_like(layer.score)
        for batch in batches:
            batch["increlora_R"] = torch.zeros(total)
        if self.reg_orth_coef:

            def work() -> None:
                (self.reg_orth_coef * orthogonality(list(layers.values()))).backward()

            _, flops = training.meter.run(Work(f"increlora {total}"), work)
            training.flops, training.dense_flops = training.flops + flops, training.dense_flops + flops

    def after_step(self, training: Training, state: State, batches: Sequence[Batch], losses: Sequence[Loss]) -> None:
        """Smooth the scores; when it is time, hand out components."""
        layers = growing(training.model)
        if self._total(layers) >= self._target(layers):
            return
        # Waits for the device, once a step, as the smoothed scores are kept here.
        scores = torch.stack([layer.score for layer in layers.values()]).tolist()
        for name, score in zip(layers, scores, strict=True):
            state["scores"][name] = self.smoothed(state["scores"][name], score)
        spent = training.progress if self.init_warmup < 1 else training.step
        if due(training, state, self.incre_interval) and spent > self.init_warmup:
            self._grow(training, state, layers)

    def on_evaluation(self, training: Training, state: State, metrics: dict[str, float]) -> None:
        """`adapter_rank`, the sum over the layers, and `adapter_parameters`, of the active components."""
        layers = growing(training.model).values()
        metrics["adapter_rank"] = sum(layer.counts[0] for layer in layers)
        sizes = [layer.counts[0] * (layer.out_features + layer.in_features + 1) for layer in layers]
        metrics["adapter_parameters"] = sum(sizes)

    def smoothed(self, before: Sequence[float], score: float) -> list[float]:
        """The sensitivity and the uncertainty after a step of this score."""
        sensitivity = self.beta1 * before[0] + (1 - self.beta1) * score
        return [sensitivity, self.beta2 * before[1] + (1 - self.beta2) * abs(score - sensitivity)]

    @property
    def _added(self) -> int:
        """How many components a chosen layer gets."""
        return self.incre_rank_num or max(1, int(self.target_rank) // 2)

    def _total(self, layers: dict[str, GrowingAdapter]) -> int:
        return sum(layer.counts[0] for layer in layers.values())

    def _target(self, layers: dict[str, GrowingAdapter]) -> int:
        """The sum of the ranks in the end."""
        return math.floor(self.target_rank * len(layers) + 1e-9)

    def _check(self, training: Training, layers: dict[str, GrowingAdapter]) -> None:
        if not layers:
            raise PretrainError("increlora_allocation: accepted: a model that the surgery increlora adapted")
        if training.world.size > 1:
            raise PretrainError(f"increlora_allocation: {training.world.size} processes: accepted: one")
        room = sum(layer.max_rank for layer in layers.values())
        if not self._total(layers) <= self._target(layers) <= room:
            least, most = self._total(layers) / len(layers), room / len(layers)
            raise PretrainError(
                f"increlora_allocation: target_rank {self.target_rank}: accepted: from {least:g}, the mean rank now, "
                f"to {most:g}, the surgery's max_rank"
            )

    def _grow(self, training: Training, state: State, layers: dict[str, GrowingAdapter]) -> None:
        """Make reserved components of the best layers active; without a reserve once the budget is spent."""
        left = self._target(layers) - self._total(layers)
        value = {name: math.prod(state["scores"][name]) for name in layers}
        best = sorted((name for name in layers if layers[name].counts[1]), key=lambda name: (-value[name], name))
        for name in best[: self.top_h]:
            active, reserved = layers[name].counts
            number = min(self._added, reserved, left)
            layers[name].resize(active + number, reserved - number)
            state["born"][name][1] += [training.step] * number
            left -= number
        if left:
            self._reserve(training, state, layers)
            return
        for name, layer in layers.items():
            layer.resize(layer.counts[0], 0)
            del state["born"][name][0][layer.counts[0] :]

    def _reserve(self, training: Training, state: State, layers: dict[str, GrowingAdapter]) -> None:
        """Fill up the reserves."""
        for name, layer in layers.items():
            active, reserved = layer.counts
            number = min(self._added, layer.max_rank - active) - reserved
            seed = int(digest([self.name, training.settings.seed, training.step, name])[:15], 16)
            layer.resize(active, reserved + number)
            layer.initialise(active + reserved, number, RESERVED, torch.Generator().manual_seed(seed))
            state["born"][name][0] += [training.step] * number


def orthogonality(layers: Sequence[GrowingAdapter]) -> Tensor:
    """The mean of ‖AAᵀ - I‖ and ‖BᵀB - I‖ over the layers, of their active and reserved components."""
    parts = []
    for layer in layers:
        number = sum(layer.counts)
        A_RI, B_OR = torch.cat([*layer.A[:number]]), torch.cat([*layer.B[:number]], 1)
        eye_RR = torch.eye(number, dtype=A_RI.dtype, device=A_RI.device)
        parts += [torch.linalg.matrix_norm(A_RI @ A_RI.T - eye_RR), torch.linalg.matrix_norm(B_OR.T @ B_OR - eye_RR)]
    return torch.stack(parts).mean()


def _restart_schedules(training: Training, state: State, layers: dict[str, GrowingAdapter]) -> None:
    """Scale each step's change of what was born late from the run's learning rate to that of its own schedule."""
    saved: list[tuple[Tensor, Tensor, float]] = []

    def ratio(born: int) -> float:
        number, total = training.step - 1, training.settings.budget.total_steps(training.spent)
        factor = training.schedule.factor(number, total)
        return training.schedule.factor(number - born, total - born) / factor if factor else 0.0

    def hold(*_: object) -> None:
        for name, layer in layers.items():
            of_parts, of_scales = state["born"][name]
            for parameters, births in ((layer.A, of_parts), (layer.B, of_parts), (layer.E, of_scales)):
                saved.extend((parameters[i], parameters[i].detach().clone(), b) for i, b in enumerate(births) if b)

    @torch.no_grad()
    def scale(*_: object) -> None:
        for parameter, before, born in saved:
            parameter.copy_(torch.lerp(before, parameter, ratio(int(born))))
        saved.clear()

    training.optimizer.register_step_pre_hook(hold)
    training.optimizer.register_step_post_hook(scale)

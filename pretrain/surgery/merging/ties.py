"""A merge of fine-tuned models in which small changes and minorities of signs do not interfere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.dial.effort import CHOSEN, Task, Work
from pretrain.surgery.merging._streams import Density, Place, at_place, check_settings, for_each
from pretrain.surgery.merging._task_vectors import TaskVectors


@dataclass(frozen=True)
class Ties(TaskVectors):
    """TIES-Merging: Resolving Interference When Merging Models (arXiv:2306.01708).

    Of each task vector τ_k = θ_k - θ_0, with the checkpoint as θ_0, the `density` numbers of largest magnitude are kept
    (trim); each number's sign is that of Σ w_k τ'_k (elect); and the mean is over the models that agree with it:
    θ = θ_0 + scale · Σ_agreeing w_k τ'_k / Σ_agreeing w_k (disjoint merge). The paper keeps 20% and searches `scale`,
    around 1. `weights` and `density` are one for all models or one for each; each is a number, a list of numbers spread
    over the blocks, or a mapping from parts of weights' names to either (`*`: all others). Trimmed is each weight by
    itself, as mergekit does; the authors trim over all of a model. At least one number is kept. Sums are in float64
    and rounded once; the models are read weight by weight, so that one tensor of each is in memory. Checked against
    mergekit 0.1.5 (arcee-ai/mergekit) on whole checkpoints.
    """

    normalize: bool = True
    elect: bool = True
    density: tuple[Density, ...] = (0.2,)

    def __post_init__(self) -> None:
        """Refuse densities that do not fit the models."""
        super().__post_init__()
        check_settings(self.name, "density", self.density, len(self.models))

    def thinning(self, task: Task) -> Work:
        """The greatest are sought."""
        return Work(seconds=CHOSEN * task.numbers)

    def thin(self, vector: Tensor, number: int, place: Place, source: torch.Generator) -> Tensor:
        """The numbers of largest magnitude."""
        count = max(1, int(at_place(for_each(self.density, number), place) * vector.numel()))
        kept = torch.zeros(vector.numel(), dtype=torch.bool, device=vector.device)
        kept[vector.abs().flatten().topk(count).indices] = True
        return vector * kept.view_as(vector)

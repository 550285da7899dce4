"""A merge of fine-tuned models without their largest and their smallest changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.core.bounds import ProperShare
from pretrain.dial.effort import CHOSEN, Task, Work
from pretrain.surgery.merging._streams import Density, Place, at_place, check_settings, for_each
from pretrain.surgery.merging._task_vectors import TaskVectors


@dataclass(frozen=True)
class Breadcrumbs(TaskVectors):
    """Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks (arXiv:2312.06795).

    Of each weight's task vector τ_k = θ_k - θ_0, with the checkpoint as θ_0, the share `gamma` of largest magnitude is
    dropped as outliers and the smallest, until the share `density` is left: θ = θ_0 + scale · Σ w_k τ'_k. Where too
    little would be left fewer of the largest go. With `elect` disagreeing signs are dropped as in TIES (mergekit's
    `breadcrumbs_ties`). `weights` and `density` are one for all models or one for each; each is a number, a list of
    numbers spread over the blocks, or a mapping from parts of weights' names to either (`*`: all others). Sums are in
    float64 and rounded once; the models are read weight by weight. Checked against mergekit 0.1.5
    (arcee-ai/mergekit) on whole checkpoints, but that it drops the whole of a weight of which it should
    drop no outlier (fewer than 1 / gamma numbers), from which the `density` largest are kept here.
    """

    density: tuple[Density, ...] = (0.1,)
    gamma: ProperShare = 0.01

    def __post_init__(self) -> None:
        """Refuse densities that do not fit the models."""
        super().__post_init__()
        check_settings(self.name, "density", self.density, len(self.models))

    def thinning(self, task: Task) -> Work:
        """Those in the middle are sought."""
        return Work(seconds=CHOSEN * task.numbers)

    def thin(self, vector: Tensor, number: int, place: Place, source: torch.Generator) -> Tensor:
        """The numbers of middling magnitude."""
        density, count = at_place(for_each(self.density, number), place), vector.numel()
        if density == 1:
            return vector
        left = max(1, int(density * count))
        smallest = max(0, count - left - int(self.gamma * count))
        kept = torch.zeros(count, dtype=torch.bool, device=vector.device)
        kept[vector.abs().flatten().argsort()[smallest : smallest + left]] = True
        return vector * kept.view_as(vector)

"""A merge of fine-tuned models whose small changes are dropped at random more often than large ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.core.bounds import ProperShare
from pretrain.core.errors import PretrainError
from pretrain.dial.effort import DRAWN, Task, Work, sorting
from pretrain.surgery.merging._streams import Density, Place, at_place, check_settings, for_each, numbers_in
from pretrain.surgery.merging._task_vectors import Rescale, TaskVectors, draw, rescaled


@dataclass(frozen=True)
class Della(TaskVectors):
    """DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling (arXiv:2406.11617).

    Of each task vector τ_k = θ_k - θ_0, with the checkpoint as θ_0, a number is kept with a probability that rises
    evenly with the rank of its magnitude in its row (MagPrune), from `density` - `epsilon` of the smallest to
    `density` + `epsilon` of the largest, and divided by that probability; then signs are elected and those that agree
    averaged as in TIES. The paper's ε is that whole range, 2 · `epsilon`, which is mergekit's. `rescale: l1` scales
    what is kept to the L1 norm of the weight's task vector, as mergekit does; `none` does not. Without `elect` and
    `normalize` it is mergekit's `della_linear`. `weights` and `density` are one for all models or one for each; each is
    a number, a list of numbers spread over the blocks, or a mapping from parts of weights' names to either (`*`: all
    others). A density of 1 keeps all. What is drawn follows from the run's seed. Sums are in float64 and rounded once;
    the models are read weight by weight. Checked against mergekit 0.1.5 (arcee-ai/mergekit) on whole
    checkpoints with the same numbers drawn.
    """

    normalize: bool = True
    elect: bool = True
    density: tuple[Density, ...] = (0.3,)
    epsilon: ProperShare = 0.15
    rescale: Rescale = "density"

    def __post_init__(self) -> None:
        """Refuse densities that do not fit the models, and probabilities that are none."""
        super().__post_init__()
        check_settings(self.name, "density", self.density, len(self.models))
        for density in numbers_in(self.density):
            if density < 1 and not self.epsilon < min(density, 1 - density):
                raise PretrainError(
                    f"della: epsilon {self.epsilon}: accepted: below {min(density, 1 - density):g} with density "
                    f"{density:g}, so that probabilities are between 0 and 1",
                    place=("epsilon",),
                )

    def thinning(self, task: Task) -> Work:
        """Each row in order, and each number is drawn for."""
        width = task.layers.shape.width
        return sorting(width) * (task.numbers / width) + Work(seconds=DRAWN * task.numbers)

    def thin(self, vector: Tensor, number: int, place: Place, source: torch.Generator) -> Tensor:
        """The numbers that are drawn, larger."""
        density = at_place(for_each(self.density, number), place)
        if density == 1:
            return vector
        rows = vector.reshape(-1, vector.shape[-1] if vector.ndim else 1)
        order = rows.abs().argsort(dim=1)
        numbers = torch.arange(rows.shape[1], device=rows.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, numbers).float()
        share = rank / (rows.shape[1] - 1) if rows.shape[1] > 1 else torch.full_like(rank, 0.5)
        kept = (density - self.epsilon + 2 * self.epsilon * share).view_as(vector)
        return rescaled(vector, draw(kept.cpu(), source, vector), self.rescale, kept)

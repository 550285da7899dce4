"""A merge of fine-tuned models of whose changes most are dropped at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.dial.effort import DRAWN, Task, Work
from pretrain.surgery.merging._streams import Density, Place, at_place, check_settings, for_each
from pretrain.surgery.merging._task_vectors import Rescale, TaskVectors, draw, rescaled


@dataclass(frozen=True)
class Dare(TaskVectors):
    """Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch (arXiv:2311.03099).

    Of each task vector τ_k = θ_k - θ_0, with the checkpoint as θ_0, each number is kept with probability `density`
    (1 - p in the paper, which drops up to 0.9 and more) and divided by it: θ = θ_0 + scale · Σ w_k m_k τ_k / density.
    `rescale: l1` scales what is kept to the L1 norm of the weight's task vector, as mergekit does; `none` does not.
    With `elect` disagreeing signs are dropped as in TIES (mergekit's `dare_ties`), else it is its `dare_linear`.
    `weights` and `density` are one for all models or one for each; each is a number, a list of numbers spread over the
    blocks, or a mapping from parts of weights' names to either (`*`: all others). What is drawn follows from the run's
    seed. Sums are in float64 and rounded once; the models are read weight by weight. Checked against mergekit 0.1.5
    (arcee-ai/mergekit) on whole checkpoints with the same numbers drawn.
    """

    density: tuple[Density, ...] = (0.1,)
    rescale: Rescale = "density"

    def __post_init__(self) -> None:
        """Refuse densities that do not fit the models."""
        super().__post_init__()
        check_settings(self.name, "density", self.density, len(self.models))

    def thinning(self, task: Task) -> Work:
        """Each number is drawn for."""
        return Work(seconds=DRAWN * task.numbers)

    def thin(self, vector: Tensor, number: int, place: Place, source: torch.Generator) -> Tensor:
        """The numbers that a coin keeps, larger."""
        density = at_place(for_each(self.density, number), place)
        if density == 1:
            return vector
        return rescaled(vector, draw(torch.full(vector.shape, density), source, vector), self.rescale, density)

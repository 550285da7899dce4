"""A model between two, on the arc instead of the chord."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pretrain.core.method import Ref
from pretrain.dial.effort import Task, Work
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery.merging._streams import Between, Place, at_place, check_settings, merge, streamed

TINY = 1e-8  # a norm up to which a weight has no direction
PARALLEL = 0.9995  # the cosine above which the arc is taken for the chord


@dataclass(frozen=True)
class Slerp(Surgery):
    """Animating Rotation with Quaternion Curves (SIGGRAPH 1985).

    As mergekit applies it to weights: from each weight a of the checkpoint to b of the `other` model, at the angle Ω
    between them as vectors, sin((1 - t)Ω) / sin Ω · a + sin(tΩ) / sin Ω · b; of nearly parallel ones (the cosine's size
    above 0.9995) (1 - t) a + t b. A weight of zeros is at a right angle to all. `t` is 0 at the checkpoint and 1 at the
    other model: a number, a list of numbers spread over the blocks, or a mapping from parts of weights' names to either
    (`*`: all others), such as `{self_attn: [0, 0.5, 0.3, 0.7, 1], mlp: [1, 0.5, 0.7, 0.3, 0], "*": 0.5}`. Sums are in
    float64 and rounded once; the other model is read weight by weight. Checked against mergekit 0.1.5
    (arcee-ai/mergekit) on whole checkpoints.
    """

    shares_vocabulary: ClassVar[tuple[str, ...]] = ("other",)

    other: Ref
    t: Between = 0.5

    def __post_init__(self) -> None:
        """Refuse settings that leave gaps."""
        super().__post_init__()
        check_settings(self.name, "t", (self.t,))

    def work(self, task: Task) -> Work:
        """One pass over all weights of the models."""
        return streamed(task, 1)

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model, merged."""

        def combine(place: Place, start: Tensor, others: Iterator[Tensor]) -> Tensor:
            return on_the_arc(start, next(others), at_place(self.t, place))

        return merge(self.name, model, {"other": self.other}, combine, inputs)


def on_the_arc(start: Tensor, end: Tensor, t: float) -> Tensor:
    """The point at t, 0 to 1, of the arc from one tensor to another of its shape."""
    norms = [norm if norm > TINY else 1.0 for norm in (float(start.norm()), float(end.norm()))]
    cosine = float((start * end).sum()) / (norms[0] * norms[1])
    if abs(cosine) > PARALLEL:
        return torch.lerp(start, end, t)
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * start + math.sin(t * angle) * end) / math.sin(angle)

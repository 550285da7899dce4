"""Orthogonal growth of a mixture of experts: each block doubled in place, each expert with its row of the router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pretrain.core.bounds import Count, NonNegative, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.experts.places import mixtures, number_of_experts
from pretrain.core.models.families import blocks
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._growth import with_blocks
from pretrain.surgery._random import generator
from pretrain.surgery.experts._experts import with_experts


@dataclass(frozen=True)
class OrthogonalGrowth(Surgery):
    """Recycling Pretrained Checkpoints: Orthogonal Growth of Mixture-of-Experts for Efficient
    Large Language Model Pre-Training (arXiv:2510.08008).

    A converged mixture of experts grows in depth by interposition, l1 l1 l2 l2 … ln ln, which keeps the rise of the
    weights' norms along the blocks that stacking breaks, the `first` and `last` blocks being left single; and in width
    by `width` copies of each expert and of its row of the router, of which a token sees `width` times as many. All
    copies but the first get noise of `noise` times the deviation of the weight that they copy, so that they part in the
    training that follows. The values are those of the authors' code: an expert's deviation is that of each of its
    matrices, a router's that of the whole.

    Without noise the width alone changes no logit: each probability is divided by `width` and summed over as many
    copies, whether the router's probabilities are normalised over the chosen experts or over all. The depth changes
    them, unless what a doubled block adds to its input is nothing.
    """

    families: ClassVar[tuple[str, ...]] = (
        "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "granitemoe", "minimax",
    )  # fmt: skip

    depth: Count = 2
    width: Count = 2
    noise: NonNegative = 0.01
    first: Whole = 2
    last: Whole = 2

    @property
    def growth_of_blocks(self) -> float:
        """At most: blocks left single are few of many."""
        return float(self.depth * self.width)

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The deeper and wider model: new block numbers go along the old ones, new experts after all old ones."""
        mixtures(model, self.name, self.families)
        count = len(blocks(model))
        inner = range(self.first, count - self.last)
        if self.depth > 1 and not inner:
            raise PretrainError(
                f"{self.name}: first {self.first} and last {self.last} of {count} blocks leave none to copy: accepted: "
                "fewer, or depth 1"
            )
        if self.depth > 1:
            order = [i for i in range(count) for _ in range(self.depth if i in inner else 1)]
            model = with_blocks(model, order, self.name)
        if self.width == 1:
            return model
        numbers, places = generator(self.name, inputs), mixtures(model, self.name, self.families)
        routers = {*places.values()}

        def wider(name: str, weight: Tensor) -> Tensor:
            whole = name.rpartition(".")[0] in routers
            copies = [self._noisy(weight, numbers, whole=whole) for _ in range(self.width - 1)]
            return torch.cat([weight, *copies])

        experts, top_k = (self.width * n for n in (number_of_experts(model), model.config.num_experts_per_tok))
        return with_experts(model, experts, top_k, [*places, *routers], wider)

    def _noisy(self, weight: Tensor, numbers: torch.Generator, *, whole: bool) -> Tensor:
        """A copy with noise, one expert's numbers at a time."""
        made = weight.clone()
        for part in made[None] if whole else made:
            if self.noise:
                noise = torch.randn(part.shape, generator=numbers).to(part.device)
                part += (noise * (self.noise * part.float().std())).to(part.dtype)
        return made

"""LoRA whose rank is drawn anew at each training step, so that it can be cut to any rank afterwards.

Shape letters: O outputs, I inputs, R the highest rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from pretrain.core.bounds import Count, OpenShare, Positive
from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.models.layers import Linear
from pretrain.dial.tuned import Layers, Tuning
from pretrain.surgery import Inputs, PeftFormat, Surgery
from pretrain.surgery._random import generator
from pretrain.surgery.adapters._adapters import LowRankAdapter, Where, adapt, adapters_of, peft_lora, targets


@lru_cache(64)
def rank_of(seed: int, lowest: int, highest: int, p: float | None) -> int:
    """The rank that belongs to a seed: each of them equally likely, or rank b by p (1 - p)^b."""
    ranks = np.arange(lowest, highest + 1)
    weights = np.ones(len(ranks)) if p is None else (1 - p) ** (ranks - lowest)
    return int(np.random.default_rng((seed, 0xD1)).choice(ranks, p=weights / weights.sum()))


class DynamicLowRank(LowRankAdapter):
    """In training the change (alpha / b) · B[:, :b] A[:b], b that of the step; otherwise that of the highest rank.

    What is left out is multiplied by zero: each step costs the same FLOPs, those that the meter counts, and a compiled
    block is compiled once.
    """

    def __init__(self, layer: Linear, method: DyLoRA, source: torch.Generator | None) -> None:
        super().__init__(layer, method.rank, method.alpha / method.rank, source)
        self.alpha, self.frozen = method.alpha, method.frozen
        self.range = (method.lowest, method.rank, method.p if method.distribution == "geometric" else None)

    @torch.compiler.disable
    def step_rank(self) -> Tensor:
        """The rank of the step, by the seed that torch's generator has: the training loop gives each step its own."""
        return torch.tensor(rank_of(torch.initial_seed(), *self.range))

    def forward(self, x: Tensor) -> Tensor:
        """The frozen layer's outputs plus the change's."""
        if not self.training:
            return super().forward(x)
        A_RI: Tensor = self.A
        B_OR: Tensor = self.B
        b = self.step_rank()
        number_R, b = torch.arange(A_RI.shape[0], device=x.device), b.to(x.device)
        if self.frozen:
            newest_R = number_R == b - 1
            A_RI = torch.where(newest_R[:, None], A_RI, A_RI.detach())
            B_OR = torch.where(newest_R, B_OR, B_OR.detach())
        scale_R = (number_R < b) * (self.alpha / b)
        return self.layer(x) + F.linear(F.linear(x, A_RI) * scale_R.to(x.dtype), B_OR)


@dataclass(frozen=True)
class DyLoRA(Surgery):
    """DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation
    (arXiv:2210.07558).

    LoRA, W + (alpha / b) · B[:, :b] A[:b], whose rank b is drawn for each training step from `lowest` to `rank`
    (`uniform`, or `geometric`: rank b by p (1 - p)^b) and is the same in all layers, in all micro-batches of the step
    and where activations are recomputed. So the first components matter most, and `dylora_truncate` cuts the trained
    adapter to any of the ranks. `frozen`: a step sends a gradient to the b-th component only. Evaluation is at the
    highest rank. The rank follows from torch's seed, which the training loop sets at each step (and differs between
    processes); a loop of one's own calls `torch.manual_seed` before each step.
    """

    adapts: ClassVar[bool] = True

    rank: Count = 8
    alpha: Positive = 16.0
    lowest: Count = 1
    distribution: Literal["uniform", "geometric"] = "uniform"
    p: OpenShare = 0.15
    frozen: bool = False
    where: Where = "attention"
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lowest > self.rank:
            raise PretrainError(f"dylora: lowest {self.lowest}, rank {self.rank}: accepted: lowest <= rank")

    def tuning(self, layers: Layers, before: Tuning | None) -> Tuning | None:
        """Both factors at the highest rank, which each step computes."""
        return layers.low_rank(self.where, self.targets, self.rank)

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The adapted model: only the adapter, and a classifier's last layer, are trained from now on."""
        model = self._adapted(model, generator(self.name, inputs))
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """The same layers, with weights yet to be loaded."""
        return self._adapted(model, None)

    def adapter(self, model: PreTrainedModel) -> PeftFormat:
        """The adapter at its highest rank, as a LoRA of `peft`."""
        adapters = adapters_of(model, DynamicLowRank)
        return peft_lora(model, {name: (module.B * module.scale, module.A) for name, module in adapters.items()})

    def _adapted(self, model: PreTrainedModel, source: torch.Generator | None) -> PreTrainedModel:
        layers = targets(model, self.name, self.where, self.targets)
        return adapt(model, layers, lambda name, layer: DynamicLowRank(layer, self, source).train(layer.training))

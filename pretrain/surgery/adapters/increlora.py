"""Low-rank adapters that begin at rank one and grow while they are trained.

Shape letters: O outputs, I inputs, R components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pretrain.core.bounds import Count, Positive
from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.models.layers import Linear, like
from pretrain.dial.tuned import Layers, Tuning
from pretrain.surgery import Inputs, PeftFormat, Surgery
from pretrain.surgery._random import generator
from pretrain.surgery.adapters._adapters import Adapter, Where, adapt, adapters_of, peft_lora, targets

RESERVED = 1e-5  # the scale of a reserved component
DEVIATION = 0.02  # of the numbers that a component begins with


class GrowingAdapter(Adapter):
    """The change (alpha / r) · B diag(E) A of r active components, each with parameters of its own.

    After the active ones stand the reserved ones: in training they count too, at a scale of 1e-5 that is not trained.
    The rest are zeros that nothing is computed with, so they get no gradient, and an optimiser passes over them.
    """

    sizes: Tensor  # active, reserved

    def __init__(self, layer: Linear, method: IncreLoRA) -> None:
        super().__init__(layer)
        alike = like(layer.weight)
        shapes: tuple[tuple[int, ...], ...] = ((1, self.in_features), (1,), (self.out_features, 1))
        self.A, self.E, self.B = (
            nn.ParameterList([nn.Parameter(torch.zeros(*shape, **alike)) for _ in range(method.max_rank)])
            for shape in shapes
        )
        self.alpha, self.max_rank = method.alpha, method.max_rank
        self.register_buffer("sizes", torch.tensor([method.rank, 0], device=layer.weight.device))
        self._read: tuple[tuple[int, int] | None, tuple[int, int]] = (None, (0, 0))
        self.scoring, self.score = False, torch.zeros((), device=layer.weight.device)

    @property
    @torch.compiler.disable
    def counts(self) -> tuple[int, int]:
        """How many components are active, and how many reserved; read from the device after a change only."""
        key = (id(self.sizes), self.sizes._version)
        if self._read[0] != key:
            active, reserved = self.sizes.tolist()
            self._read = (key, (active, reserved))
        return self._read[1]

    def factors(self, reserved: bool) -> tuple[Tensor, Tensor]:
        """`B_OR`, scaled, and `A_RI` of the active components, and of those in reserve if wanted."""
        active, spare = self.counts
        number = active + (spare if reserved else 0)
        E_R = torch.cat([*self.E[:active], *(e.detach() for e in self.E[active:number])])
        B_OR, A_RI = torch.cat([*self.B[:number]], 1), torch.cat([*self.A[:number]])
        return B_OR * (E_R * (self.alpha / active)), A_RI

    def change(self) -> Tensor:
        """(alpha / r) · B diag(E) A of the active components."""
        B_OR, A_RI = self.factors(reserved=False)
        return B_OR @ A_RI

    def forward(self, x: Tensor) -> Tensor:
        """The frozen layer's outputs plus the change's."""
        B_OR, A_RI = self.factors(reserved=self.training)
        if not (self.scoring and torch.is_grad_enabled()):
            return self.layer(x) + F.linear(F.linear(x, A_RI), B_OR)
        change_OI = B_OR @ A_RI
        change_OI.register_hook(self._add_score)
        return self.layer(x) + F.linear(x, change_OI)

    @torch.no_grad()
    def _add_score(self, grad_OI: Tensor) -> None:
        """Σ |ΔW ⊙ ∂ΔW| / √(OI)."""
        B_OR, A_RI = self.factors(reserved=True)
        part = ((B_OR @ A_RI) * grad_OI).abs().sum() / math.sqrt(grad_OI.numel())
        self.score = self.score.to(part.device) + part.float()

    @torch.no_grad()
    def initialise(self, first: int, number: int, scale: float, source: torch.Generator) -> None:
        """Begin `number` components, from the one of number `first` on: A and B normal, E a constant."""
        for index in range(first, first + number):
            for parameter in (self.A[index], self.B[index]):
                parameter.copy_(torch.empty(parameter.shape).normal_(0, DEVIATION, generator=source))
            self.E[index].fill_(scale)

    @torch.no_grad()
    def resize(self, active: int, reserved: int) -> None:
        """So many components are active and so many reserved from now on; what falls out is zeros again."""
        for index in range(active + reserved, sum(self.counts)):
            for parameter in (self.A[index], self.B[index], self.E[index]):
                parameter.zero_()
        self.sizes.copy_(torch.tensor([active, reserved]))


@dataclass(frozen=True)
class IncreLoRA(Surgery):
    """IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning (arXiv:2308.12043).

    The blocks' linear layers are frozen and become W + (alpha / r) · B diag(E) A, of r components that are trained;
    r is `rank` at first, with E zero, so nothing changes. The policy `increlora_allocation` adds components to the
    layers that need them. A layer has room for `max_rank` (the paper knows no bound; the rest of the room is zeros that
    nothing is computed with). A classifier's last layer is trained too.
    """

    adapts: ClassVar[bool] = True

    rank: Count = 1
    max_rank: Count = 16
    alpha: Positive = 16.0
    where: Where = "all"
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank > self.max_rank:
            given = f"rank {self.rank}, max_rank {self.max_rank}"
            raise PretrainError(f"increlora: {given}: accepted: rank <= max_rank")

    def tuning(self, layers: Layers, before: Tuning | None) -> Tuning | None:
        """As many components as there is room for, of which the first are computed."""
        tuning = layers.low_rank(self.where, self.targets, self.rank)
        components = sum(each.blocks for each in layers.chosen(self.where, self.targets)) * self.max_rank
        return replace(tuning, trained=tuning.trained * self.max_rank / self.rank + components)

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The adapted model: only the adapter, and a classifier's last layer, are trained from now on."""
        model, source = self.restore(model), generator(self.name, inputs)
        for module in growing(model).values():
            module.initialise(0, self.rank, 0.0, source)
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """The same layers, with weights and sizes yet to be loaded."""
        layers = targets(model, self.name, self.where, self.targets)
        return adapt(model, layers, lambda name, layer: GrowingAdapter(layer, self).train(layer.training))

    def adapter(self, model: PreTrainedModel) -> PeftFormat:
        """The active components as a LoRA of `peft`, each layer with its rank."""
        return peft_lora(model, {name: module.factors(reserved=False) for name, module in growing(model).items()})


def growing(model: nn.Module) -> dict[str, GrowingAdapter]:
    """The growing adapters by qualified name."""
    return adapters_of(model, GrowingAdapter)

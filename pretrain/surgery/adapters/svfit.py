"""Fine-tuning of the largest singular values of each weight, and of nothing else.

Shape letters: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pretrain.core.bounds import Count
from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.models.layers import Linear, like
from pretrain.dial.effort import Task, Work, singular
from pretrain.dial.tuned import Layers, Tuning
from pretrain.surgery import Inputs, PeftFormat, Surgery, report
from pretrain.surgery.adapters._adapters import Adapter, Where, adapt, adapters_of, peft_lora, targets


class SingularValues(Adapter):
    """The change U diag(s - s0) Vh: s is trained, s0 is what it was; U, s0 and Vh stay."""

    s0: Tensor
    U: Tensor
    Vh: Tensor

    def __init__(self, layer: Linear, rank: int) -> None:
        super().__init__(layer)
        self.s = nn.Parameter(torch.zeros(rank, **like(layer.weight)))
        self.register_buffer("s0", torch.zeros(rank, **like(layer.weight)))
        self.register_buffer("U", torch.zeros(self.out_features, rank, **like(layer.weight)))
        self.register_buffer("Vh", torch.zeros(rank, self.in_features, **like(layer.weight)))

    @torch.no_grad()
    def fill(self) -> float:
        """The layer's own decomposition; returns the share of the squared singular values that is in the first R."""
        weight = self.layer.weight
        U, s, Vh = torch.linalg.svd((weight.T if self.conv1d else weight).float(), full_matrices=False)
        rank = len(self.s)
        for target, value in ((self.s, s[:rank]), (self.s0, s[:rank]), (self.U, U[:, :rank]), (self.Vh, Vh[:rank])):
            target.copy_(value)
        energy = s.double().square()
        return float(energy[:rank].sum() / energy.sum().clamp(min=1e-30))

    def factors(self) -> tuple[Tensor, Tensor]:
        """U diag(s - s0) and Vh: the change as a LoRA."""
        return self.U * (self.s - self.s0), self.Vh

    def change(self) -> Tensor:
        """U diag(s - s0) Vh."""
        B_OR, A_RI = self.factors()
        return B_OR @ A_RI

    def forward(self, x: Tensor) -> Tensor:
        """Through the rank, without ever making the change."""
        inner = F.linear(x, self.Vh) * (self.s - self.s0)
        return self.layer(x) + F.linear(inner, self.U)

    def extra_repr(self) -> str:
        """What `print` says."""
        return f"{self.in_features}, {self.out_features}, rank={len(self.s)}"


@dataclass(frozen=True)
class SVFit(Surgery):
    """SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values (arXiv:2409.05926).

    W = U diag(s) Vᵀ + E, the best approximation of rank `rank` and what is left. The s alone are trained: `rank`
    numbers a matrix, with nothing changed at first. No `rank`: all singular values, the smaller side of the matrix
    (768 for each of RoBERTa-base, a 16th of LoRA's numbers at rank 8). The layer is kept whole and the change U diag(s
    - s0) Vᵀ is added to it, which is the same and is a LoRA in `peft`'s format. `where`: query_value, attention,
    feed_forward or all; `targets`: the ends of other layers' names. Metrics: `energy_kept`, the mean share of the
    squared singular values among the trained ones (the paper wants over 0.99), and `energy_kept_least`.
    """

    adapts: ClassVar[bool] = True

    rank: Count | None = None
    where: Where = "query_value"
    targets: tuple[str, ...] = ()

    def tuning(self, layers: Layers, before: Tuning | None) -> Tuning | None:
        """A number for each rank; what the layers' own directions are stays, and is passed both ways."""
        tuning = layers.low_rank(self.where, self.targets, self.rank, learnt=False)
        chosen = layers.chosen(self.where, self.targets)
        values = sum((self.rank or min(each.outputs, each.inputs)) * each.blocks for each in chosen)
        return replace(tuning, trained=float(values), kept=tuning.trained + values)

    def work(self, task: Task) -> Work:
        """A singular value decomposition of each chosen matrix."""
        return sum((singular(each) for each in task.layers.chosen(self.where, self.targets)), Work())

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The adapted model: only the singular values, and a classifier's last layer, are trained from now on."""
        model = self.restore(model)
        kept = [module.fill() for module in adapters_of(model, SingularValues).values()]
        record(model, self)
        report(inputs, energy_kept=sum(kept) / len(kept), energy_kept_least=min(kept))
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """The same layers, with numbers yet to be loaded."""
        layers = targets(model, self.name, self.where, self.targets)
        for name, layer in layers.items():
            if self.rank is not None and self.rank > min(layer.weight.shape):
                most = min(layer.weight.shape)
                raise PretrainError(f"svfit: rank {self.rank}: accepted: at most {most}, the smaller side of {name}")
        return adapt(model, layers, lambda name, layer: self._adapted(layer).train(layer.training))

    def adapter(self, model: PreTrainedModel) -> PeftFormat:
        """The change as a LoRA of `peft`."""
        adapters = adapters_of(model, SingularValues)
        return peft_lora(model, {name: module.factors() for name, module in adapters.items()})

    def _adapted(self, layer: Linear) -> SingularValues:
        return SingularValues(layer, self.rank or min(layer.weight.shape))

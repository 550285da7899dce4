"""Low-rank weights from a trained model: each matrix of the blocks becomes the product of two thin ones.

Shape letters: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pretrain.core.bounds import Ge
from pretrain.core.checkpoint import forget, record
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import set_module
from pretrain.core.models.layers import Linear, like, sides
from pretrain.dial.effort import Task, Work, singular
from pretrain.surgery import Inputs, Surgery, report
from pretrain.surgery._calibration import plain_layer, plain_linears, weight_of


class LowRank(nn.Module):
    """A linear layer of weight BA, as two; takes the place of `layer`, whose bias it keeps."""

    linear_like = True
    factors = ("first", "second")  # what other surgeries may take as layers of their own

    def __init__(self, layer: Linear, rank: int) -> None:
        super().__init__()
        self.conv1d = isinstance(layer, Conv1D)
        self.out_features, self.in_features = sides(layer)
        with torch.device("meta"):
            self.first, self.second = (
                nn.Linear(self.in_features, rank, False),
                nn.Linear(rank, self.out_features, False),
            )
        self.first.weight = nn.Parameter(torch.zeros(rank, self.in_features, **like(layer.weight)))
        self.second.weight = nn.Parameter(torch.zeros(self.out_features, rank, **like(layer.weight)))
        self.second.register_parameter("bias", layer.bias)

    @property
    def A(self) -> Tensor:
        """`A_RI`, the first factor."""
        return self.first.weight

    @property
    def B(self) -> Tensor:
        """`B_OR`, the second factor."""
        return self.second.weight

    @torch.no_grad()
    def fill(self, weight_OI: Tensor) -> Tensor:
        """The nearest BA to a weight, √S in each factor; returns all singular values."""
        U, s, Vh = torch.linalg.svd(weight_OI, full_matrices=False)
        rank = self.A.shape[0]
        root_R = s[:rank].sqrt()
        self.A.copy_(root_R[:, None] * Vh[:rank])
        self.B.copy_(U[:, :rank] * root_R)
        return s

    def dense(self) -> Tensor:
        """The weight as one matrix."""
        return self.B @ self.A

    @torch.no_grad()
    def merged(self) -> Linear:
        """The plain layer of the same weight."""
        return plain_layer(self.dense(), self.second.bias, conv1d=self.conv1d)

    def forward(self, x: Tensor) -> Tensor:
        """x Aᵀ Bᵀ + bias."""
        return self.second(self.first(x))

    def extra_repr(self) -> str:
        """What `print` says."""
        return f"{self.in_features}, {self.out_features}"


@dataclass(frozen=True)
class PELA(Surgery):
    """PELA: Learning Parameter-Efficient Models with Low-Rank Approximation (arXiv:2310.10700).

    Each linear layer of the blocks, O × I, becomes two of rank ⌊OI / (compression · (O + I))⌋, with about 1 /
    `compression` of its numbers (the rank is at least 1 and at most the matrix's own: 0.5 keeps all). They are the best
    approximation: with W = USVᵀ truncated, B = U√S and A = √SVᵀ. The paper then trains the model by `pela_pretraining`;
    its compressions are from 1.5 to 3. `merge: true`, after training, gives the plain model of the same weights.
    Metrics: `energy_kept`, the kept share of all squared singular values; `energy_kept_least`, that of the layer that
    loses most; `linear_parameters` and `linear_parameters_before`.
    """

    families: ClassVar[tuple[str, ...]] = ("causal", "masked")

    compression: Annotated[float, Ge(0.5)] = 3.0

    def work(self, task: Task) -> Work:
        """A singular value decomposition of each matrix; to merge, a product of each one's factors."""
        if self.merge:
            return Work(2.0 * task.linear * task.layers.shape.width / self.compression)
        return sum((singular(each) for each in task.inner), Work())

    @property
    def growth_of_blocks(self) -> float:
        """What the factors keep."""
        return 1 / self.compression

    merge: bool = False

    def rank(self, outputs: int, inputs: int) -> int:
        """The rank of a layer."""
        rank = int(outputs * inputs / (self.compression * (outputs + inputs)))
        return max(1, min(rank, outputs, inputs))

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with its linear layers factorised, or, with `merge`, plain again."""
        if self.merge:
            return self._merged(model)
        kept, energies, sizes = [], [], []
        for name, layer in plain_linears(model, self.name, self.families).items():
            low = self._low_rank(layer)
            energy_R = low.fill(weight_of(layer)).double().square()
            set_module(model, name, low.train(model.training))
            kept.append(energy_R[: low.A.shape[0]].sum().item())
            energies.append(energy_R.sum().item())
            sizes.append((low.A.numel() + low.B.numel(), layer.weight.numel()))
        record(model, self)
        after, before = (sum(numbers) for numbers in zip(*sizes, strict=True))
        report(
            inputs,
            energy_kept=sum(kept) / max(sum(energies), 1e-30),
            energy_kept_least=min(k / max(e, 1e-30) for k, e in zip(kept, energies, strict=True)),
            linear_parameters=after,
            linear_parameters_before=before,
        )
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Replace the layers; their numbers are zero."""
        for name, layer in plain_linears(model, self.name, self.families).items():
            set_module(model, name, self._low_rank(layer).train(model.training))
        return model

    def _low_rank(self, layer: Linear) -> LowRank:
        return LowRank(layer, self.rank(*sides(layer)))

    def _merged(self, model: PreTrainedModel) -> PreTrainedModel:
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LowRank)]
        if not layers:
            raise PretrainError("pela: merge True: accepted: a model of pela; this one has none of its layers")
        for name, module in layers:
            set_module(model, name, module.merged().train(model.training))
        forget(model, self.name)
        return model

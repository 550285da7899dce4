"""Fine-tuning in a random subspace: a few numbers, spread over all weight matrices by a fixed random transform.

Shape letters: O outputs, I inputs, D numbers that move a matrix, P entries of a matrix up to a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from transformers import PreTrainedModel

from pretrain.core.bounds import Count, Whole
from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.files import digest
from pretrain.core.models.layers import Like, Linear, like
from pretrain.dial.tuned import Layers, Tuning
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery.adapters._adapters import Adapter, Where, adapt, targets


class _Hadamard(torch.autograd.Function):
    """H x by the fast Walsh-Hadamard transform; H is symmetric, so the gradient is H g."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_P: Tensor) -> Tensor:
        return _transformed(x_P)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Tensor:
        (grad_P,) = grads
        return _transformed(grad_P)


def _transformed(x_P: Tensor) -> Tensor:
    size, step = x_P.shape[-1], 1
    while step < size:
        first, second = x_P.view(-1, size // (2 * step), 2, step).unbind(2)
        x_P, step = torch.stack([first + second, first - second], 2).view(x_P.shape), 2 * step
    return x_P


class Subspace(nn.Module):
    """θ of D numbers, and a scale for each matrix where `layers` says how many there are."""

    def __init__(self, dimension: int, layers: int, like: Like) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(dimension - layers, **like))
        self.scales = nn.Parameter(torch.ones(layers, **like)) if layers else None


class Projected(Adapter):
    """The change λ_i · H G Π H B θ, cut to the matrix, of a `subspace` that all matrices share.

    The first matrix holds the subspace's numbers. B, Π and G are drawn again from the seed when the model is opened.
    Where θ is longer than the transform, its pieces each have a transform, and these are added.
    """

    signs_NP: Tensor
    order_NP: Tensor
    gauss_NP: Tensor

    def __init__(self, layer: Linear, number: int, subspace: Subspace, seed: int) -> None:
        super().__init__(layer)
        self.number, self.shared = number, [subspace]  # in a list, so that it is registered once
        if number == 0:
            self.subspace = subspace
        size, count = self.out_features * self.in_features, len(subspace.theta)
        power = 1 << (size - 1).bit_length()
        pieces = -(-count // power)
        source = torch.Generator().manual_seed(seed)
        drawn: dict[str, Tensor] = {
            "signs_NP": torch.randint(0, 2, (pieces, power), generator=source, dtype=torch.int8) * 2 - 1,
            "order_NP": torch.stack([torch.randperm(power, generator=source).int() for _ in range(pieces)]),
            "gauss_NP": torch.randn(pieces, power, generator=source),
        }
        # Each of a transform's columns has length 1, but for the rows that are cut off.
        length_N1 = (power * drawn["gauss_NP"].square().sum(1, keepdim=True)).sqrt() * (size / power) ** 0.5
        drawn["gauss_NP"] = (drawn["gauss_NP"] / length_N1).to(layer.weight.dtype)
        for name, tensor in drawn.items():
            self.register_buffer(name, tensor.to(layer.weight.device), persistent=False)

    def change(self) -> Tensor:
        """`change_OI`."""
        theta_D, (pieces, power) = self.shared[0].theta, self.signs_NP.shape
        theta_NP = F.pad(theta_D, (0, pieces * power - len(theta_D))).view(pieces, power)
        first_NP = _Hadamard.apply(theta_NP * self.signs_NP)  # int32 is enough for the order, and half of its memory
        mixed_NP = torch.stack(
            [x_P.index_select(0, order_P) for x_P, order_P in zip(first_NP, self.order_NP, strict=True)]
        )
        spread_P = _Hadamard.apply(mixed_NP * self.gauss_NP).sum(0)
        change_OI = spread_P[: self.out_features * self.in_features].view(self.out_features, self.in_features)
        scales = self.shared[0].scales
        return change_OI if scales is None else change_OI * scales[self.number]

    def extra_repr(self) -> str:
        """What `print` says."""
        return f"{self.in_features}, {self.out_features}, dimension={len(self.shared[0].theta)}"


@dataclass(frozen=True)
class IntrinsicDimension(Surgery):
    """Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning (arXiv:2012.13255).

    All weight matrices of the blocks (or of query_value, attention or feed_forward, by `where`) move in one random
    subspace,

        W_i = W_i(0) + lambda_i · P_i θ,    P_i = H G Π H B (Fastfood),

    with θ zero at first, H the Hadamard matrix, B random signs, Π a permutation, G a Gaussian diagonal, cut to the
    matrix's entries and scaled to columns of length 1. P is never made, and is drawn again from `seed` and the matrix's
    name when a checkpoint is opened. `dimension` numbers are trained: with `said` θ and the scale lambda_i of each
    matrix, 1 at first, else θ alone. A classifier's last layer is trained beside them. `merge_adapters` folds it in.
    """

    adapts: ClassVar[bool] = True

    dimension: Count = 200
    said: bool = True
    where: Where = "all"
    seed: Whole = 0

    def tuning(self, layers: Layers, before: Tuning | None) -> Tuning | None:
        """The subspace's numbers; the change of each matrix is made whole, as large as the matrix."""
        chosen = layers.chosen(self.where)
        sizes = [(each.outputs * each.inputs, each.blocks) for each in chosen]
        place = min(each.place for each in chosen)
        unread = sum(each.outputs * each.inputs for each in chosen if each.place == place)
        drawn = sum(9 / 4 * (1 << (size - 1).bit_length()) * blocks for size, blocks in sizes)  # of a number's 4 bytes
        flops = 6.0 * sum(size * blocks for size, blocks in sizes) - 2.0 * unread
        return replace(layers.before(place), trained=float(self.dimension), flops=flops, kept=drawn)

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with the subspace, which changes nothing at first."""
        model = self.restore(model)
        record(model, self)
        return model

    def scales(self, model: PreTrainedModel) -> int:
        """How many of the numbers are scales of a model's matrices; `dimension` must be above it."""
        return len(targets(model, self.name, self.where)) if self.said else 0

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """The same: what is drawn comes from `seed`."""
        layers = targets(model, self.name, self.where)
        scales = self.scales(model)
        if self.dimension <= scales:
            raise PretrainError(
                f"intrinsic_dimension: dimension {self.dimension}: accepted: above {scales}, "
                "the number of matrices, each of which has a scale; or said: false"
            )
        first = next(iter(layers.values()))
        subspace = Subspace(self.dimension, scales, like(first.weight))
        numbers = {name: number for number, name in enumerate(layers)}

        def make(name: str, layer: Linear) -> Projected:
            seed = int(digest([self.name, self.seed, name])[:15], 16)
            return Projected(layer, numbers[name], subspace, seed).train(layer.training)

        return adapt(model, layers, make)

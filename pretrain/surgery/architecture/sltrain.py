"""Sparse plus low-rank weights: fewer parameters, gradients and optimiser states while pretraining.

Shape letters: N tokens, O outputs, I inputs, R rank, K non-zero entries of the sparse part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pretrain.core.bounds import Gt, Positive, ProperShare
from pretrain.core.checkpoint import forget, record
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import embeddings, linears, set_module
from pretrain.core.models.layers import Linear, Saved, like, sides
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._calibration import plain_layer, plain_linears
from pretrain.surgery._random import generator


def dense(B_OR: Tensor, A_RI: Tensor, values_K: Tensor, indices_K: Tensor, scale: float) -> Tensor:
    """scale · BA + S, S with `values_K` at the places `indices_K` of the flattened matrix."""
    weight_OI = (B_OR * scale) @ A_RI
    weight_OI.view(-1).index_add_(0, indices_K, values_K)
    return weight_OI


class _Context(Saved):
    scale: float


class _Product(torch.autograd.Function):
    """y = x Wᵀ + b. Only x and the parts of W are kept for the backward pass, which makes W anew.

    With G = gᵀx, the gradient of the dense W: ∂B = scale · G Aᵀ, ∂A = scale · Bᵀ G, ∂values = G at the support.
    """

    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, B_OR: Tensor, A_RI: Tensor, values_K: Tensor, bias_O: Tensor | None,
        indices_K: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, B_OR, A_RI, values_K, indices_K)
        ctx.scale = scale
        return F.linear(x, dense(B_OR, A_RI, values_K, indices_K, scale), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, B_OR, A_RI, values_K, indices_K = ctx.saved_tensors
        x_NI, grad_NO = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        of_x: Tensor | None = None
        of_B: Tensor | None = None
        of_A: Tensor | None = None
        of_values: Tensor | None = None
        of_bias: Tensor | None = None
        if ctx.needs_input_grad[0]:
            of_x = (grad_NO @ dense(B_OR, A_RI, values_K, indices_K, ctx.scale)).view_as(x)
        if any(ctx.needs_input_grad[1:4]):
            of_weight_OI = grad_NO.T @ x_NI
            of_B = (of_weight_OI @ A_RI.T).mul_(ctx.scale)
            of_A = (B_OR.T @ of_weight_OI).mul_(ctx.scale)
            of_values = of_weight_OI.view(-1).index_select(0, indices_K)
        if ctx.needs_input_grad[4]:
            of_bias = grad_NO.sum(0)
        return of_x, of_B, of_A, of_values, of_bias, None, None


class SparseLowRank(nn.Module):
    """A linear layer of weight scale · BA + S, the support of S fixed; takes the place of `layer`."""

    linear_like = True
    indices: Tensor

    def __init__(self, layer: Linear, rank: int, nonzero: int, scale: float) -> None:
        super().__init__()
        self.conv1d, self.scale = isinstance(layer, Conv1D), scale
        self.out_features, self.in_features = sides(layer)
        places, alike = layer.weight.numel(), like(layer.weight)
        self.B = nn.Parameter(torch.zeros(self.out_features, rank, **alike))
        self.A = nn.Parameter(torch.zeros(rank, self.in_features, **alike))
        self.values = nn.Parameter(torch.zeros(nonzero, **alike), requires_grad=nonzero > 0)
        self.bias = layer.bias
        narrow = torch.int32 if places < 2**31 else torch.int64
        self.register_buffer("indices", torch.arange(nonzero, dtype=narrow, device=layer.weight.device))

    @torch.no_grad()
    def initialise(self, source: torch.Generator) -> None:
        """A uniform as Kaiming's with a = √5 and the values alike, within ±1/√inputs; B zero; a random support.

        Without a sparse part B is uniform in ±1/√rank: were all products zero, no gradient would ever move them.
        """
        bound, places = 1 / math.sqrt(self.in_features), self.out_features * self.in_features
        self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=source))
        self.values.copy_(torch.empty(self.values.shape).uniform_(-bound, bound, generator=source))
        if not self.values.numel():
            bound = 1 / math.sqrt(self.B.shape[1])
            self.B.copy_(torch.empty(self.B.shape).uniform_(-bound, bound, generator=source))
        chosen = torch.randperm(places, generator=source)[: self.values.numel()]
        self.indices.copy_(chosen.sort().values)

    def dense(self) -> Tensor:
        """The weight as one matrix."""
        return dense(self.B, self.A, self.values, self.indices, self.scale)

    @torch.no_grad()
    def merged(self) -> Linear:
        """The plain layer of the same weight."""
        return plain_layer(self.dense(), self.bias, conv1d=self.conv1d)

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias; under autocast all of it in the narrower type, as an `nn.Linear` would."""
        if not self.values.numel():  # plain low rank is cheaper without the dense weight
            return F.linear(F.linear(x, self.A), self.B * self.scale, self.bias)
        parts: list[Tensor | None] = [x, self.B, self.A, self.values, self.bias]
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return _Product.apply(*parts, self.indices, self.scale)
        dtype = torch.get_autocast_dtype(device)
        parts = [part if part is None else part.to(dtype) for part in parts]
        with torch.autocast(device, enabled=False):
            return _Product.apply(*parts, self.indices, self.scale)

    def extra_repr(self) -> str:
        """What `print` says."""
        return f"{self.in_features}, {self.out_features}, rank={self.A.shape[0]}, nonzero={self.values.numel()}"


@dataclass(frozen=True)
class SLTrain(Surgery):
    """SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining (arXiv:2406.02214).

    Each linear layer of the blocks, O × I, gets the weight W = (alpha / rank) · BA + S. S has ⌊delta · OI⌋ entries at
    places drawn uniformly and then fixed: (O + I) · rank + delta · OI numbers are trained instead of OI. W is made for
    each product and never kept. For a model about to be trained: the dense weights are dropped, A and the entries of S
    start uniform in ±1/√I and B at zero. A delta of 0 is plain low rank; its B starts uniform in ±1/√rank. `merge:
    true`, after training, gives the plain model of the same weights. A `rank` below 1 is a share of the model's width:
    the paper takes a quarter (a third for 130M), and alpha from 32 (60M) down to 8 (1B and more).
    """

    families: ClassVar[tuple[str, ...]] = ("causal", "masked")

    rank: Annotated[int | float, Gt(0)] = 0.25
    delta: ProperShare = 0.03
    alpha: Positive = 32.0
    merge: bool = False

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with its linear layers replaced, or, with `merge`, put back."""
        if self.merge:
            return self._merged(model)
        model, source = self.restore(model), generator(self.name, inputs)
        for module in linears(model).values():
            assert isinstance(module, SparseLowRank)
            module.initialise(source)
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Replace the layers; their numbers are zero."""
        width = embeddings(model).embedding_dim
        rank = round(self.rank * width) if self.rank < 1 else self.rank
        layers = plain_linears(model, self.name, self.families)
        for name, layer in layers.items():
            most = min(layer.weight.shape)
            if not 1 <= rank <= most or rank != int(rank):
                raise PretrainError(
                    f"sltrain: rank {self.rank}: accepted: 1 to {most}, the smaller side of {name}, or a share of "
                    f"the width {width}"
                )
        for name, layer in layers.items():
            nonzero = int(self.delta * layer.weight.numel())
            replaced = SparseLowRank(layer, int(rank), nonzero, self.alpha / rank)
            set_module(model, name, replaced.train(model.training))
        return model

    def _merged(self, model: PreTrainedModel) -> PreTrainedModel:
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, SparseLowRank)]
        if not layers:
            raise PretrainError("sltrain: merge True: accepted: a model of sltrain; this one has none of its layers")
        for name, module in layers:
            set_module(model, name, module.merged().train(model.training))
        forget(model, self.name)
        return model

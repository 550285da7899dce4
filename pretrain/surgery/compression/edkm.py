"""Weights that are drawn to a few values while they are trained, by a k-means that has gradients.

Shape letters: N tokens, O outputs, I inputs, U values that differ, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pretrain.core.bounds import Count, Ge, Le, Positive
from pretrain.core.checkpoint import record
from pretrain.core.models.families import set_module
from pretrain.core.models.layers import Linear, Saved, sides
from pretrain.dial.effort import Task, Work, through
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._calibration import plain_linears
from pretrain.surgery._random import generator
from pretrain.surgery.compression._clusters import Initialisation, assign, clustering, kmeans

PATTERNS = 2**16  # that 16 bits have
NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def attention(value_U: Tensor, centroids_K: Tensor, tau: float) -> Tensor:
    """How far each value belongs to each cluster: softmax of -(w - c)² / τ."""
    return torch.softmax(-(value_U[:, None] - centroids_K).square() / tau, dim=1)


def clustered(
    value_U: Tensor, count_U: Tensor, centroids_K: Tensor, tau: float, iterations: int, moving_U: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What differentiable k-means makes of values that occur `count_U` times, and the centroids that it ends at.

    `moving_U` are the same values where gradients through the centroids are kept apart from those through the last
    assignment.
    """
    moving_U = value_U if moving_U is None else moving_U
    before_K = centroids_K
    for _ in range(iterations):
        before_K, share_UK = centroids_K, attention(moving_U, centroids_K, tau) * count_U[:, None]
        mass_K = share_UK.sum(0)
        mean_K = moving_U @ share_UK / torch.where(mass_K > 0, mass_K, 1)
        centroids_K = torch.where(mass_K > 0, mean_K, before_K)
    return attention(value_U, before_K, tau) @ centroids_K, centroids_K


class Patterns:
    """A tensor of 16-bit values as those that differ, how often each occurs, and each place's pattern of bits."""

    def __init__(self, narrow: Tensor, wide: torch.dtype) -> None:
        self.shape = narrow.shape
        self.pattern_N = (narrow.contiguous().view(torch.int16).to(torch.int32) & PATTERNS - 1).flatten()
        every = torch.bincount(self.pattern_N, minlength=PATTERNS)
        self.present_U = every.nonzero()[:, 0]
        signed_U = torch.where(self.present_U >= PATTERNS // 2, self.present_U - PATTERNS, self.present_U)
        self.value_U = signed_U.to(torch.int16).view(narrow.dtype).to(wide)
        self.count_U = every[self.present_U].to(wide)

    def spread(self, table_U: Tensor) -> Tensor:
        """Each place's number of the table."""
        table = table_U.new_zeros(PATTERNS).index_copy_(0, self.present_U, table_U)
        return table.index_select(0, self.pattern_N).view(self.shape)

    def gathered(self, number: Tensor) -> Tensor:
        """For each value the sum over its places."""
        sums = number.new_zeros(PATTERNS).index_add_(0, self.pattern_N, number.flatten())
        return sums[self.present_U]


class _Context(Saved):
    layer: ClusteredLinear


class _Product(torch.autograd.Function):
    """y = x W̃ᵀ + b. Kept for the backward pass are x, the parameter itself and K centroids; all else is made anew.

    With G the gradient of W̃, that of a weight w is G · ∂w̃/∂w at fixed centroids, which all weights of one value
    share, and what comes through the centroids, which they share too: Σ G over the weights of each value is enough.
    """

    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, bias_O: Tensor | None, layer: ClusteredLinear) -> Tensor:
        start_K = layer.centroids.clone()
        ctx.save_for_backward(x, weight, start_K)
        ctx.layer = layer
        patterns = Patterns(layer.narrow(weight), layer.wide(weight))
        table_U, _ = clustered(
            patterns.value_U, patterns.count_U, start_K.to(patterns.value_U), layer.tau, layer.iterations
        )
        return F.linear(x, layer.turned(patterns.spread(table_U.to(x.dtype))), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, start_K = ctx.saved_tensors
        layer = ctx.layer
        patterns = Patterns(layer.narrow(weight), layer.wide(weight))
        x_NI, grad_NO = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        with torch.enable_grad():
            value_U, moving_U = (patterns.value_U.clone().requires_grad_() for _ in range(2))
            start_K = start_K.to(value_U)
            table_U, end_K = clustered(value_U, patterns.count_U, start_K, layer.tau, layer.iterations, moving_U)
        of_x: Tensor | None = None
        of_weight: Tensor | None = None
        of_bias: Tensor | None = None
        if ctx.needs_input_grad[0]:
            of_x = (grad_NO @ layer.turned(patterns.spread(table_U.detach().to(x.dtype)))).view_as(x)
        if ctx.needs_input_grad[1]:
            of_made = layer.turned(grad_NO.T @ x_NI).to(table_U.dtype)
            (slope_U,) = torch.autograd.grad(table_U, value_U, torch.ones_like(table_U), retain_graph=True)
            (pull_U,) = torch.autograd.grad(table_U, moving_U, patterns.gathered(of_made))
            of_weight = (of_made * patterns.spread(slope_U) + patterns.spread(pull_U / patterns.count_U)).to(
                weight.dtype
            )
        if ctx.needs_input_grad[2]:
            of_bias = grad_NO.sum(0)
        layer.move(end_K)
        return of_x, of_weight, of_bias, None


class ClusteredLinear(nn.Module):
    """A linear layer whose weights are clustered in each pass; takes the place of `layer`.

    In training softly; each backward pass leaves its centroids to the next step. Else each weight is the centroid next
    to it, as it will be when stored.
    """

    linear_like = True
    centroids: Tensor

    def __init__(self, layer: Linear, method: EDKM) -> None:
        super().__init__()
        self.conv1d = isinstance(layer, Conv1D)
        self.bits, self.tau, self.iterations = method.bits, method.tau, method.iterations
        self.uniquify, self.narrowed = method.uniquify, NARROW[method.dtype]
        self.weight, self.bias = layer.weight, layer.bias
        self.out_features, self.in_features = sides(layer)
        self.register_buffer("centroids", torch.zeros(2**method.bits, device=layer.weight.device))

    def turned(self, weight: Tensor) -> Tensor:
        """From the weight's own orientation to O × I, and back."""
        return weight.T if self.conv1d else weight

    def wide(self, weight: Tensor) -> torch.dtype:
        """What clusters are computed in."""
        return torch.promote_types(weight.dtype, torch.float32)

    def narrow(self, weight: Tensor) -> Tensor:
        """The weights in 16 bits: themselves, where they have no more."""
        return weight if weight.dtype in NARROW.values() else weight.to(self.narrowed)

    @torch.no_grad()
    def move(self, centroids_K: Tensor) -> None:
        """Begin at these centroids the next time."""
        self.centroids.copy_(centroids_K)

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """Each weight's cluster, `code_OI`, and the centroids in ascending order."""
        sorted_K = self.centroids.float().sort().values
        return assign(self.turned(self.narrow(self.weight)).float(), sorted_K), sorted_K

    def soft(self) -> Tensor:
        """What training sees as the weight, O × I, by plain gradients: every weight has a row of its own."""
        wide = self.weight.to(self.wide(self.weight))
        rounded = self.narrow(self.weight.detach()).to(wide.dtype) - wide.detach()  # added, it leaves the gradient wide
        value_U = (wide + rounded).flatten()
        start_K = self.centroids.to(value_U, copy=True)
        made_U, end_K = clustered(value_U, torch.ones_like(value_U), start_K, self.tau, self.iterations)
        if made_U.requires_grad:
            made_U.register_hook(lambda _: self.move(end_K))
        return self.turned(made_U.view_as(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        """x W̃ᵀ + bias; under autocast the product is in the narrower type, the clusters are not."""
        device = x.device.type
        bias_O: Tensor | None = self.bias
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, bias_O = x.to(dtype), bias_O if bias_O is None else bias_O.to(dtype)
        with torch.autocast(device, enabled=False):
            if not self.training:
                code_OI, sorted_K = self.codes()
                return F.linear(x, sorted_K.to(x.dtype)[code_OI], bias_O)
            if self.uniquify:
                return _Product.apply(x, self.weight, bias_O, self)
            return F.linear(x, self.soft().to(x.dtype), bias_O)

    def extra_repr(self) -> str:
        """What `print` says."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, tau={self.tau}"


@dataclass(frozen=True)
class EDKM(Surgery):
    """eDKM: An Efficient and Accurate Train-time Weight Clustering for Large Language Models (arXiv:2309.00964).

    For the surgeries of a training stage: in each step the weights w of every linear layer of the blocks are drawn to
    2^`bits` centroids c by `iterations` of differentiable k-means, A = softmax(-(w - c)² / `tau`), c = Aᵀw / Aᵀ1, and
    the layer multiplies by W̃ = A c, with gradients through all of it; the centroids go on from step to step. The map A
    of all weights is never kept: weights of 16 bits have at most 65,536 values (`dtype`: what wider ones are rounded
    to, their gradient as without), so that A has a row for each value, and each weight is a pattern of 16 bits. For the
    backward pass a layer keeps its input, these patterns and the centroids, nothing twice. `uniquify: false` is plain
    DKM, for comparison. Outside of training each weight is its nearest centroid. Then `palettise` stores codebooks and
    indices.
    """

    families: ClassVar[tuple[str, ...]] = ("causal", "masked")

    bits: Annotated[int, Ge(1), Le(8)] = 3
    tau: Positive = 1e-4
    iterations: Count = 3
    initialisation: Initialisation = "kmeans++"
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    uniquify: bool = True

    def work(self, task: Task) -> Work:
        """K-means of each layer's weights."""
        return clustering(task, 2**self.bits, 1) + through(task.linear, 5)

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with its linear layers replaced, the centroids by plain k-means."""
        model, source = self.restore(model), generator(self.name, inputs)
        for module in model.modules():
            if isinstance(module, ClusteredLinear):
                narrow = module.narrow(module.weight)
                module.move(kmeans(narrow, 2**self.bits, way=self.initialisation, source=source))
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Replace the layers; their centroids are zero."""
        for path, layer in plain_linears(model, self.name, self.families).items():
            set_module(model, path, ClusteredLinear(layer, self).train(model.training))
        return model

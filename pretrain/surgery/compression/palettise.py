"""Weights stored as a codebook of a few values and an index of a few bits for each weight.

Shape letters: O outputs, I inputs, K clusters, R words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pretrain.core.bounds import Count, Ge, Le
from pretrain.core.checkpoint import forget, record
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import linears, set_module
from pretrain.core.models.layers import Linear, sides
from pretrain.dial.effort import Task, Work, through
from pretrain.surgery import Inputs, Surgery, report
from pretrain.surgery._calibration import plain_linears, weight_of
from pretrain.surgery._random import generator
from pretrain.surgery.compression._clusters import Initialisation, assign, clustering, kmeans
from pretrain.surgery.compression._grid import pack, unpack, words
from pretrain.surgery.compression.edkm import ClusteredLinear


class PalettisedLinear(nn.Module):
    """A linear layer of weights `codebook_K[code]`; takes the place of `layer`.

    `codes` are the weights' numbers, row by row of O × I, as one stream of bits, the lowest first, in words of 32.
    """

    linear_like = True
    codebook: Tensor
    codes: Tensor

    def __init__(self, layer: Linear | ClusteredLinear, bits: int) -> None:
        super().__init__()
        weight, self.bits = layer.weight, bits
        outputs, inputs = (
            (layer.out_features, layer.in_features) if isinstance(layer, ClusteredLinear) else sides(layer)
        )
        self.out_features, self.in_features = outputs, inputs
        self.register_buffer("codebook", torch.zeros(2**bits, device=weight.device))
        rows = words(weight.numel(), bits)
        self.register_buffer("codes", torch.zeros(rows, dtype=torch.int32, device=weight.device))
        self.bias = layer.bias

    def fill(self, code_OI: Tensor, codebook_K: Tensor) -> None:
        """Take the numbers."""
        self.codes.copy_(pack(code_OI.reshape(-1, 1), self.bits)[:, 0])
        self.codebook.copy_(codebook_K)

    def dense(self) -> Tensor:
        """The weight as one matrix O × I."""
        code_N = unpack(self.codes[:, None], self.bits, self.out_features * self.in_features)[:, 0]
        return self.codebook.index_select(0, code_N).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias; W is made for the call and not kept."""
        return F.linear(x, self.dense().to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """What `print` says."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"


@dataclass(frozen=True)
class Palettise(Surgery):
    """eDKM: An Efficient and Accurate Train-time Weight Clustering for Large Language Models (arXiv:2309.00964).

    What is stored after training: each linear layer of the blocks becomes a codebook of 2^`bits` numbers and an index
    of `bits` bits for each weight. A model of `edkm` hands over its own centroids and gives the logits that it gave;
    its `bits` must be these. Any other model is clustered after training by plain k-means (Lloyd's, of `restarts`
    starts the best), the paper's baseline. Embeddings, head and norms stay as they are.
    """

    families: ClassVar[tuple[str, ...]] = ("causal", "masked")

    bits: Annotated[int, Ge(1), Le(8)] = 3
    initialisation: Initialisation = "kmeans++"
    restarts: Count = 4

    def work(self, task: Task) -> Work:
        """K-means of each layer's weights, their assignment and packing."""
        starts = self.restarts if self.initialisation == "kmeans++" else 1
        return clustering(task, 2**self.bits, starts) + through(task.linear, 30)

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with codebooks and indices for weights."""
        source = generator(self.name, inputs)
        layers: dict[str, Linear | ClusteredLinear] = {
            path: layer for path, layer in linears(model).items() if isinstance(layer, Linear | ClusteredLinear)
        }
        if not any(isinstance(layer, ClusteredLinear) for layer in layers.values()):
            layers = dict(plain_linears(model, self.name, self.families))
        stored = weights = error = square = 0.0
        for path, layer in layers.items():
            code_OI, codebook_K, dense_OI = self._clustered(path, layer, source)
            made = PalettisedLinear(layer, self.bits)
            made.fill(code_OI, codebook_K)
            set_module(model, path, made.train(model.training))
            stored += made.codes.nbytes + made.codebook.nbytes
            weights += code_OI.numel()
            error += (codebook_K[code_OI] - dense_OI).square().sum().item()
            square += dense_OI.square().sum().item()
        forget(model, "edkm")
        record(model, self)
        report(inputs, **{"palettise/bits_per_weight": 8 * stored / weights, "palettise/error": error / (square or 1)})
        return model

    def _clustered(
        self, path: str, layer: Linear | ClusteredLinear, source: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A layer's codes, its codebook and its weights as they were."""
        if isinstance(layer, ClusteredLinear):
            if layer.bits != self.bits:
                raise PretrainError(
                    f"palettise: bits {self.bits}: accepted: {layer.bits}, as edkm trained {path}", place=("bits",)
                )
            return *layer.codes(), layer.turned(layer.weight).float()
        weight_OI = weight_of(layer)
        codebook_K = kmeans(
            weight_OI, 2**self.bits, way=self.initialisation, source=source, restarts=self.restarts
        )  # fmt: skip
        return assign(weight_OI.float(), codebook_K), codebook_K, weight_OI.float()

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Replace the layers; their numbers are zero."""
        for path, layer in plain_linears(model, self.name, self.families).items():
            set_module(model, path, PalettisedLinear(layer, self.bits).train(model.training))
        return model

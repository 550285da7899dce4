"""Squared ReLU as the activation of the feed-forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.core.checkpoint import record
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._feed_forward import replace_activations
from pretrain.surgery._random import generator


class SquaredReLU(nn.Module):
    """max(x, 0)²."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return x.relu().square()


@dataclass(frozen=True)
class ReLU2(Surgery):
    """Primer: Searching for Efficient Transformers for Language Modeling (arXiv:2109.08668).

    The activation of each feed-forward becomes max(x, 0)². The paper has no gate, and neither have the speed-run
    records: a gated feed-forward of width f becomes a plain one of width 3f/2, which has as many weights, its matrices
    drawn anew, normal with the standard deviation of those they replace: for a model about to be trained. With `gate`
    it stays, down(max(gate(x), 0)² · up(x)), and no weight changes. The configuration still names f and the old
    activation.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert", "modernbert", "t5")

    gate: bool = False

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with its activations replaced."""
        self._replace(model, generator(self.name, inputs))
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """The same without drawing numbers."""
        self._replace(model, None)
        return model

    def _replace(self, model: PreTrainedModel, source: torch.Generator | None) -> None:
        replace_activations(model, self.name, self.families, lambda _: SquaredReLU(), source, gate=self.gate)

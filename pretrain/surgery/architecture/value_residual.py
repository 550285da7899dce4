"""The first block's values, mixed into those of all others.

Shape letters: B rows, L positions, C width of the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from pretrain.core.bounds import Share
from pretrain.core.checkpoint import record
from pretrain.core.models.families import set_module
from pretrain.core.models.layers import Linear
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._passing import Reader, Values, inform, value_projections


class FirstValues(Reader):
    """The first block's projection, which leaves its values, the last `width` outputs, to the others."""

    def __init__(self, linear: Linear, width: int) -> None:
        super().__init__()
        self.linear, self.width = linear, width

    def forward(self, x: Tensor) -> Tensor:
        """The projection's outputs as they are."""
        out: Tensor = self.linear(x)
        self.reads().values_BLC = out[..., -self.width :]
        return out


class LaterValues(Values):
    """a V + b V₁, both trained."""

    def mixed(self, values_BLC: Tensor) -> Tensor:
        """With the first block's values of the same tokens."""
        first_BLC = self.reads().values_BLC
        assert first_BLC is not None, "the first block comes first"
        return self.share[0] * values_BLC + self.share[1] * first_BLC


@dataclass(frozen=True)
class ValueResidual(Surgery):
    """Value Residual Learning (arXiv:2410.17897).

    ResFormer: the values of every block but the first are V ← (1 - mix) V + mix V₁ with V₁ those of the first block for
    the same tokens, which later blocks would else have lost. The two numbers are trained, a pair for each block, as in
    the paper's learnable variant, and begin at `mix`; at 0 nothing is changed at first. Keys and values are kept in
    the cache as they are mixed, so decoding costs no more.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")

    mix: Share = 0.5

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with other projections to values, changed in place."""
        model = self.restore(model)
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Put in the mixing, at its start."""
        inform(model, self.name)
        for number, (attention, path, layer, width) in enumerate(value_projections(model, self.name)):
            made = LaterValues(layer, width, 1 - self.mix, self.mix) if number else FirstValues(layer, width)
            set_module(attention, path, made.train(model.training))
        return model

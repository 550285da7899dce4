"""The embedding of the tokens, added again before each block.

Shape letters: B rows, L positions, E width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.core.bounds import AnyNumber
from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import embeddings
from pretrain.core.models.layers import Like, like
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._passing import ENTRANCE, Reader, inform


class Skip(Reader):
    """a x + b x₀, both trained."""

    def __init__(self, start: float, alike: Like) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor([1.0, start], **alike))

    def forward(self, x_BLE: Tensor) -> Tensor:
        """What the block is given."""
        embedded_BLE = self.reads().embedded_BLE
        assert embedded_BLE is not None, "an embedding comes before the blocks"
        return (self.share[0] * x_BLE + self.share[1] * embedded_BLE).to(x_BLE.dtype)


@dataclass(frozen=True)
class InputSkip(Surgery):
    """DenseFormer: Enhancing Information Flow in Transformers via Depth Weighted Averaging (arXiv:2402.02622).

    Each block is given x ← a x + b x₀ in place of x, x₀ being the token's embedding, so that what the token is need not
    be carried through all blocks. The paper averages all blocks' outputs so; this is what the speed-run records keep of
    it. The two numbers are trained, a pair for each block; a begins at 1 and b at `start`, and at 0 nothing is changed
    at first.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")

    start: AnyNumber = 0.1

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with other inputs of its blocks, changed in place."""
        model = self.restore(model)
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Put in the skips, at their start."""
        every = inform(model, self.name)
        if any(hasattr(block, ENTRANCE) for block in every):
            raise PretrainError(f"{self.name}: this model has such skips already; accepted: one input_skip")
        for block in every:
            made = Skip(self.start, like(embeddings(model).weight))
            block.add_module(ENTRANCE, made.train(model.training))
        return model

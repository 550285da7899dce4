"""Logits that cannot leave a range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.core.bounds import Positive
from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import family
from pretrain.surgery import Inputs, Surgery


class CappedHead(nn.Linear):
    """c · tanh(z / c) of a linear layer's outputs z, in float32 or wider."""

    softcap: float

    def forward(self, x: Tensor) -> Tensor:
        """The logits, in the type in which the layer itself would give them."""
        logits = super().forward(x)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (self.softcap * torch.tanh(wide / self.softcap)).to(logits.dtype)


@dataclass(frozen=True)
class LogitSoftcap(Surgery):
    """Gemma 2: Improving Open Language Models at a Practical Size (arXiv:2408.00118).

    The logits become cap · tanh(logits / cap), so that none is beyond ±cap and a token that is sure already has hardly
    a gradient. Gemma 2 caps them at 30, the speed-run records at 15. Gemma 2 caps attention's scores too, which its
    fused kernels cannot: that is left out. For text's likelihood, its decoding and causal training; objectives that
    take the output layer apart refuse the model. Surgeries that change the vocabulary come before.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")
    keeps_vocabulary: ClassVar[bool] = True

    cap: Positive = 30.0

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model with capped logits."""
        model = self.restore(model)
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Cap the output layer; its weight stays what it is, tied or not."""
        name, head = family(model).name, model.get_output_embeddings()
        if name not in self.families:
            raise PretrainError(f"{self.name}: family {name!r}: accepted: {', '.join(self.families)}")
        if type(head) is not nn.Linear:
            raise PretrainError(f"{self.name}: the head is a {type(head).__name__}: accepted: a plain linear layer")
        head.__class__ = CappedHead
        vars(head)["softcap"] = self.cap
        return model

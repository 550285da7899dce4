"""Depthwise stacking: a deeper model from copies of a small one's blocks."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from pretrain.core.errors import PretrainError
from pretrain.core.families import blocks, family
from pretrain.surgery import Inputs, Surgery


@dataclass(frozen=True)
class GStack(Surgery):
    """Stacking Your Transformers: A Closer Look at Model Growth for Efficient LLM Pre-Training (arXiv:2405.15319).

    The operator that the paper finds best: the whole stack of a small, briefly trained model's blocks is copied
    `growth` times, M∘M∘…∘M, and training goes on. Embeddings, final norm and head are kept. The paper's guideline is a
    growth of 4, after about 10 billion tokens for models of billions of weights.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert")

    growth: int = 4

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """A model of `growth` times as many blocks, block i a copy of block i mod n."""
        entry = family(model)
        if entry.name not in self.families:
            raise PretrainError(f"g_stack: family {entry.name!r}: accepted: {', '.join(self.families)}")
        if self.growth < 1:
            raise PretrainError(f"g_stack: growth {self.growth}: accepted: 1 or more")
        small = len(blocks(model))
        config: Any = copy.deepcopy(model.config)
        config.num_hidden_layers = small * self.growth
        if getattr(config, "layer_types", None):
            config.layer_types = list(config.layer_types) * self.growth
        with torch.random.fork_rng(devices=[]):
            grown = type(model)(config)
        weights = model.state_dict()
        inside = re.compile(rf"(^|.*\.){re.escape(entry.blocks)}\.(\d+)\.")
        for name, value in grown.state_dict().items():
            found = inside.match(name)
            source = name
            if found:
                begin, end = found.span(2)
                source = f"{name[:begin]}{int(found[2]) % small}{name[end:]}"
            value.copy_(weights[source])
        return grown.to(model.dtype).train(model.training)

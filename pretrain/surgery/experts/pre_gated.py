"""Each mixture's router reads what the mixture before it is given, so that its experts are known one mixture earlier.

Shape letters: N tokens, H width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.experts.places import Ahead, Routing, mixtures
from pretrain.core.models.families import at
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._passing import Reader, inform


class PreGate(Reader, Ahead):
    """A router that chooses by what the mixture before it was given: mixed into the router's own class."""

    number: int  # of its mixture

    def forward(self, x_NH: Tensor) -> Routing:
        """The routing of the tokens; what its own mixture is given, `x_NH`, is left for the next router."""
        inputs = self.reads().mixture_inputs
        inputs[self.number] = x_NH
        earlier_NH = inputs[max(0, self.number - 1)]
        if not torch.is_grad_enabled():  # else a block that is computed again reads it again
            inputs.pop(self.number - 1, None)
        answer: Routing | None = vars(self).pop("answer", None)
        return self.route(earlier_NH) if answer is None else answer


_KINDS: dict[type[nn.Module], type[nn.Module]] = {}


@dataclass(frozen=True)
class PreGated(Surgery):
    """Pre-gated MoE: An Algorithm-System Co-Design for Fast and Scalable Mixture-of-Expert Inference
    (arXiv:2308.12066).

    The router of mixture n + 1 reads what mixture n is given and not what its own is, so that the experts of the next
    mixture are known while this one computes, and can be fetched meanwhile (`expert_store`). The first mixture, which
    has none before it, is routed by its own input. There are as many routers as before, each with the weights that it
    was trained with: the model is another one at first, and the paper fine-tunes it. Train it after this: its
    checkpoint is one of the same weights and configuration, with the surgery in its record.
    """

    families: ClassVar[tuple[str, ...]] = (
        "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "granitemoe", "minimax",
    )  # fmt: skip

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with routers that read earlier states, changed in place."""
        model = self.restore(model)
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Have the routers read earlier states."""
        routers = [at(model, router) for router in mixtures(model, self.name, self.families).values()]
        if any(isinstance(router, PreGate) for router in routers):
            raise PretrainError(f"{self.name}: this model is pre-gated already; accepted: one pre_gated")
        inform(model, self.name, self.families)
        for number, router in enumerate(routers):
            kind = type(router)
            if kind not in _KINDS:
                _KINDS[kind] = type(kind.__name__, (PreGate, kind), {"__module__": kind.__module__})
            router.__class__ = _KINDS[kind]
            router.number = number
        return model

"""Adapters: frozen linear layers with something small that is trained beside them.

Shape letters: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pretrain.core.checkpoint import recorded, surgery_of
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import family, linears, set_module
from pretrain.core.models.heads import new_modules, output
from pretrain.core.models.layers import Linear, like, sides
from pretrain.surgery import PeftFormat

Where = Literal["query_value", "attention", "feed_forward", "all"]
A = TypeVar("A", bound="Adapter")


class Adapter(nn.Module):
    """A frozen linear `layer` and a change of its weight; a subclass says what the change is."""

    linear_like = True
    layer: Linear

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        self.layer, self.conv1d = layer, isinstance(layer, Conv1D)
        self.out_features, self.in_features = sides(layer)

    @property
    def weight(self) -> Tensor:
        """The frozen weight: some models ask their layers for its type."""
        return self.layer.weight

    def change(self) -> Tensor:
        """The change of the weight, `change_OI`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The frozen layer's outputs plus the change's."""
        return self.layer(x) + F.linear(x, self.change())

    @torch.no_grad()
    def merged(self) -> Linear:
        """The frozen layer with the change in its weight."""
        change_OI = self.change().to(self.layer.weight.dtype)
        self.layer.weight.add_(change_OI.T if self.conv1d else change_OI)
        return self.layer


class LowRankAdapter(Adapter):
    """The change scale · BA, with A uniform as Kaiming's with a = √5 and B zero."""

    def __init__(self, layer: Linear, rank: int, scale: float, source: torch.Generator | None) -> None:
        super().__init__(layer)
        self.scale = scale
        A_RI = torch.zeros(rank, self.in_features)
        if source is not None:
            bound = 1 / math.sqrt(self.in_features)
            A_RI.uniform_(-bound, bound, generator=source)
        self.A = nn.Parameter(A_RI.to(**like(layer.weight)))
        self.B = nn.Parameter(torch.zeros(self.out_features, rank, **like(layer.weight)))

    def change(self) -> Tensor:
        """scale · BA."""
        return (self.B * self.scale) @ self.A

    def forward(self, x: Tensor) -> Tensor:
        """Through the rank, without ever making the change."""
        return self.layer(x) + F.linear(F.linear(x, self.A), self.B) * self.scale


def freeze(model: PreTrainedModel) -> None:
    """Nothing is trained but the last layer of a classifier, which knows nothing yet."""
    model.requires_grad_(False)
    last = output(model)
    if last is not None:
        last[1].requires_grad_(True)


def targets(model: PreTrainedModel, method: str, where: Where, names: Sequence[str] = ()) -> dict[str, Linear]:
    """The blocks' linear layers of `attention`, `feed_forward` or `all`, only those whose name ends in one of `names`.

    `query_value` is many papers' choice: the projections to queries and values, whole where fused; with `names`, those
    of any layers. Raises `PretrainError` where there is none, and where one is no plain linear layer any more.
    """
    if any(recorded(entry).adapts for entry in surgery_of(model)):
        raise PretrainError(
            f"{method}: the model is adapted already: accepted: a plain one; merge_adapters makes it so"
        )
    if where == "query_value":
        projections = family(model).queries
        if not projections:
            raise PretrainError(
                f"{method}: model type {family(model).name!r} has no projections to queries and values by a known "
                "name; accepted: attention, feed_forward, all, or names of layers"
            )
        where, names = "all", names or [path.rpartition(".")[2] for path in (projections[0], projections[-1])]
    candidates = linears(model, where)
    if names:
        last = sorted({name.rpartition(".")[2] for name in candidates})
        ends = tuple(f".{name}" for name in names)
        candidates = {name: layer for name, layer in candidates.items() if name.endswith(ends)}
        if not candidates:
            raise PretrainError(f"{method}: targets {', '.join(names)}: accepted: names of layers ({', '.join(last)})")
    layers: dict[str, Linear] = {}
    for name, layer in candidates.items():
        if not isinstance(layer, Linear):
            raise PretrainError(
                f"{method}: {name} is a {type(layer).__name__}: accepted: a plain linear layer; merge first"
            )
        layers[name] = layer
    if not layers:
        raise PretrainError(
            f"{method}: where {where!r}: model type {family(model).name!r} has no such linear layers by a known name; "
            "accepted: feed_forward, all, or names of layers"
        )
    return layers


def adapt(
    model: PreTrainedModel, layers: dict[str, Linear], make: Callable[[str, Linear], nn.Module]
) -> PreTrainedModel:
    """Freeze the model and put `make(name, layer)` in the place of each layer."""
    freeze(model)
    for name, layer in layers.items():
        set_module(model, name, make(name, layer))
    return model


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters by qualified name."""
    return adapters_of(model, Adapter)


def adapters_of(model: nn.Module, kind: type[A]) -> dict[str, A]:
    """The adapters of a class by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def peft_lora(model: PreTrainedModel, factors: dict[str, tuple[Tensor, Tensor]]) -> PeftFormat:
    """An adapter in `peft`'s format from `{layer: (B_OR, A_RI)}`, scaled already, of whatever ranks.

    What is new in a classifier goes with it.
    """
    used = {name: (B_OR, A_RI) for name, (B_OR, A_RI) in factors.items() if A_RI.shape[0]}
    ranks = {name: A_RI.shape[0] for name, (_, A_RI) in used.items()}
    rank, new = max(ranks.values(), default=1), new_modules(model)
    pattern = {f"^{name}$".replace(".", r"\."): r for name, r in ranks.items() if r != rank}
    config: dict[str, object] = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(used), "bias": "none",
        "lora_dropout": 0.0, "rank_pattern": pattern, "alpha_pattern": dict(pattern),
        "fan_in_fan_out": model.config.model_type == "gpt2", "inference_mode": True, "base_model_name_or_path": None,
        "task_type": None if new or not model.can_generate() else "CAUSAL_LM",
    }  # fmt: skip
    tensors = {}
    for name, (B_OR, A_RI) in used.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A_RI.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B_OR.detach().contiguous()
    if new:
        config["modules_to_save"] = list(new)
    for name, module in new.items():
        for part, tensor in module.state_dict().items():
            tensors[f"base_model.model.{name}.{part}"] = tensor.detach().contiguous()
    return config, tensors

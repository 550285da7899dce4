"""Adapters: frozen linear layers with something small that is trained beside them.

Shape letters: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pretrain.core.checkpoint import recorded, surgery_of
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import family, linears, set_module
from pretrain.core.models.heads import new_modules, output

Where = Literal["query_value", "attention", "feed_forward", "all"]
PLACES = get_args(Where)


class Adapter(nn.Module):
    """A frozen linear `layer` and a change of its weight; a subclass says what the change is."""

    linear_like = True

    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        super().__init__()
        self.layer, self.conv1d = layer, isinstance(layer, Conv1D)
        shape = layer.weight.T.shape if self.conv1d else layer.weight.shape
        self.out_features, self.in_features = shape

    @property
    def weight(self) -> Tensor:
        """The frozen weight: some models ask their layers for its type."""
        return self.layer.weight  # type: ignore[return-value]

    def change(self) -> Tensor:
        """The change of the weight, `change_OI`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The frozen layer's outputs plus the change's."""
        return self.layer(x) + F.linear(x, self.change())

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The frozen layer with the change in its weight."""
        change_OI = self.change().to(self.layer.weight.dtype)  # type: ignore[union-attr]
        self.layer.weight += change_OI.T if self.conv1d else change_OI  # type: ignore[union-attr, operator]
        return self.layer


class LowRankAdapter(Adapter):
    """The change scale · BA, with A uniform as Kaiming's with a = √5 and B zero."""

    def __init__(self, layer: nn.Linear | Conv1D, rank: int, scale: float, source: torch.Generator | None) -> None:
        super().__init__(layer)
        self.scale = scale
        like: dict[str, Any] = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        A_RI = torch.zeros(rank, self.in_features)
        if source is not None:
            bound = 1 / math.sqrt(self.in_features)
            A_RI.uniform_(-bound, bound, generator=source)
        self.A = nn.Parameter(A_RI.to(**like))
        self.B = nn.Parameter(torch.zeros(self.out_features, rank, **like))

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


def targets(model: PreTrainedModel, method: str, where: str, names: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The blocks' linear layers of `attention`, `feed_forward` or `all`, only those whose name ends in one of `names`.

    `query_value` is many papers' choice: the projections to queries and values, whole where fused; with `names`, those
    of any layers. Raises `PretrainError` where there is none, and where one is no plain linear layer any more.
    """
    if where not in PLACES:
        raise PretrainError(f"{method}: where {where!r}: accepted: {', '.join(PLACES)}")
    if any(recorded(entry).adapts for entry in surgery_of(model)):
        raise PretrainError(
            f"{method}: the model is adapted already: accepted: a plain one; merge_adapters makes it so"
        )
    if where == "query_value":
        projections = family(model).queries
        where, names = "all", names or [path.rpartition(".")[2] for path in (projections[0], projections[-1])]
    found = linears(model, where)
    if names:
        last = sorted({name.rpartition(".")[2] for name in found})
        found = {name: layer for name, layer in found.items() if name.endswith(tuple(f".{n}" for n in names))}
        if not found:
            raise PretrainError(f"{method}: targets {', '.join(names)}: accepted: names of layers ({', '.join(last)})")
    for name, layer in found.items():
        if not isinstance(layer, nn.Linear | Conv1D):
            raise PretrainError(
                f"{method}: {name} is a {type(layer).__name__}: accepted: a plain linear layer; merge first"
            )
    return found


def adapt(
    model: PreTrainedModel, layers: dict[str, nn.Module], make: Callable[[str, Any], nn.Module]
) -> PreTrainedModel:
    """Freeze the model and put `make(name, layer)` in the place of each layer."""
    freeze(model)
    for name, layer in layers.items():
        set_module(model, name, make(name, layer))
    return model


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def peft_lora(
    model: PreTrainedModel, factors: dict[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter in `peft`'s format from `{layer: (B_OR, A_RI)}`, scaled already, of whatever ranks.

    What is new in a classifier goes with it.
    """
    used = {name: (B_OR, A_RI) for name, (B_OR, A_RI) in factors.items() if A_RI.shape[0]}
    ranks = {name: A_RI.shape[0] for name, (_, A_RI) in used.items()}
    rank, new = max(ranks.values(), default=1), new_modules(model)
    config: dict[str, Any] = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(used), "bias": "none",
        "lora_dropout": 0.0, "rank_pattern": {f"^{n}$".replace(".", r"\."): r for n, r in ranks.items() if r != rank},
        "fan_in_fan_out": model.config.model_type == "gpt2", "inference_mode": True, "base_model_name_or_path": None,
        "task_type": None if new or not model.can_generate() else "CAUSAL_LM",
    }  # fmt: skip
    config["alpha_pattern"] = dict(config["rank_pattern"])
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

"""Co-training and co-distillation: two models learn the same batches and each other's predictions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pretrain.core.batch import Batch
from pretrain.core.bounds import NonNegative, Positive, PositiveShare
from pretrain.core.checkpoint import load
from pretrain.core.errors import PretrainError
from pretrain.core.files import JSONObject
from pretrain.core.folders import checkpoint_of
from pretrain.core.method import Ref
from pretrain.core.models.families import at, config_fields, head, new_model
from pretrain.core.models.fast import accelerate
from pretrain.objectives import Loss
from pretrain.objectives._distil import (
    Side,
    Taught,
    in_chunks,
    kl,
    same_vocabulary,
    scattered,
    states,
    targets,
)

Fields = JSONObject  # of a model's configuration


@dataclass(frozen=True)
class CTCD(Taught):
    """Co-training and Co-distillation for Quality Improvement and Compression of Language Models (arXiv:2311.02849).

    The model m and a companion c, larger or smaller, learn the same batches from random weights. With p the
    predictions at `temperature` T and sg no gradient:

        L = hard · CE_m + companion_hard · CE_c
            + from_companion · T² KL(sg p_c ‖ p_m) + to_companion · T² KL(sg p_m ‖ p_c)

    `companion` holds the fields of its configuration that differ from the model's; or it goes on from `companion_init`,
    a checkpoint with the same tokenizer. The stage writes the companion's checkpoint too, in its folder `companion`.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert", "modernbert")
    shares_vocabulary: ClassVar[tuple[str, ...]] = ("companion_init",)

    companion: Fields = field(default_factory=dict)
    companion_init: Ref | None = None
    objective: Literal["causal_lm", "masked_lm"] = "causal_lm"
    rate: PositiveShare = 0.15  # of masked_lm
    hard: NonNegative = 1.0
    companion_hard: NonNegative = 1.0
    from_companion: NonNegative = 1.0
    to_companion: NonNegative = 1.0
    temperature: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.companion and self.companion_init:
            raise PretrainError("ctcd: companion and companion_init: accepted: one of them")

    def modules(self, model: nn.Module) -> nn.Module:
        """The companion."""
        if self.companion_init is not None:
            companion, _ = load(checkpoint_of(Path(self.companion_init)), dtype=torch.float32)
        else:
            config = at(model, "config")
            fields = companion_fields(config, self.companion)
            seed = int(torch.randint(2**31, ()))
            companion = new_model(config.model_type, fields, task=self.task, seed=seed)
        same_vocabulary(self.name, "companion", companion, model)
        accelerate(companion)
        return companion

    def export(self, modules: nn.Module | None) -> dict[str, PreTrainedModel]:
        """The companion."""
        assert isinstance(modules, PreTrainedModel), "ctcd trains a companion beside the model: see `modules`"
        return {"companion": modules}

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The four losses; parts `model`, `companion`, `from_companion`, `to_companion`, the KLs without T²."""
        assert modules is not None, "ctcd trains a companion beside the model: see `modules`"
        has_target_BL, target_N, weight_N = targets(batch)
        ours, theirs = (
            (states(m, batch, causal=self.task == "causal")[has_target_BL], *head(m)) for m in (model, modules)
        )
        losses_4N = in_chunks(self._losses, ours, theirs, target_N)
        mean_4 = (losses_4N * weight_N).sum(-1) / max(len(target_N), 1)
        scale = self.temperature**2
        weights = (self.hard, self.companion_hard, scale * self.from_companion, scale * self.to_companion)
        # A term of weight 0 stays in the sum, so that every parameter has a gradient on every process.
        value = sum(w * mean for w, mean in zip(weights, mean_4, strict=True))
        names = ("model", "companion", "from_companion", "to_companion")
        parts = dict(zip(names, mean_4.detach(), strict=True))
        return Loss(torch.as_tensor(value), parts, scattered(losses_4N[0], has_target_BL))

    def _losses(self, ours: Side, theirs: Side, target_N: Tensor) -> Tensor:
        """`losses_4N`: both cross-entropies, KL(companion ‖ model), KL(model ‖ companion)."""
        x_NV, y_NV = (nn.functional.linear(*side).float() for side in (ours, theirs))
        model_N, companion_N = (nn.functional.cross_entropy(z_NV, target_N, reduction="none") for z_NV in (x_NV, y_NV))
        p_NV, q_NV = (z_NV.div(self.temperature).log_softmax(-1) for z_NV in (x_NV, y_NV))
        return torch.stack([model_N, companion_N, kl(q_NV.detach(), p_NV), kl(p_NV.detach(), q_NV)])


def companion_fields(config: PreTrainedConfig, changed: Fields) -> Fields:
    """The fields of the model's configuration, some changed; those that followed from these follow anew.

    What its file holds beside the fields of its type, as one converted from GGUF does, is not the companion's.
    """
    known = config_fields(config.model_type)
    fields = {name: value for name, value in config.to_dict().items() if name in known}
    names = [config.attribute_map.get(name, name) for name in ("hidden_size", "num_attention_heads")]
    changed = {config.attribute_map.get(name, name): value for name, value in changed.items()}

    def derived(of: Fields) -> dict[str, int]:
        width, heads = (of[name] for name in names)
        for name, value in zip(names, (width, heads), strict=True):
            if not isinstance(value, int) or value < 1:
                raise PretrainError(f"ctcd: companion: {name} {value!r}: accepted: a whole number from 1")
        return {"head_dim": width // heads, "num_key_value_heads": heads}

    before, after = derived(fields), derived(fields | changed)
    fields |= {name: after[name] for name in before if name in fields and fields[name] == before[name]}
    if len(fields.get("layer_types") or ()) != changed.get("num_hidden_layers", config.num_hidden_layers):
        fields.pop("layer_types", None)  # made by the configuration from the number of layers
    return fields | changed

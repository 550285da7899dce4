"""LoRA and its variants, by `peft`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from transformers import PreTrainedModel

from pretrain.core.bounds import Count, Positive, ProperShare
from pretrain.dial.effort import Task, Work, orthogonal, singular
from pretrain.dial.tuned import Layers, Tuning
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery.adapters._adapters import Where, targets
from pretrain.surgery.adapters.peft_adapter import PeftAdapter


@dataclass(frozen=True)
class LoRA(Surgery):
    """LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685).

    The blocks' linear layers are frozen and become W + (alpha / rank) · BA, of which A and B alone are trained; B
    begins at zero, so nothing changes at first. The layers are `peft`'s own; `dora`, `rslora` and `init` are its
    variants (`olora` not on GPT-2, whose Conv1D `peft` takes for a linear layer). `where` picks the layers:
    query_value, attention, feed_forward or all; `targets` the ends of their names (`q_proj`).
    """

    adapts: ClassVar[bool] = True

    rank: Count = 8
    alpha: Positive = 16.0
    dropout: ProperShare = 0.0
    where: Where = "attention"
    targets: tuple[str, ...] = ()
    dora: bool = False
    rslora: bool = False
    init: Literal["kaiming", "gaussian", "pissa", "olora", "orthogonal"] = "kaiming"

    def tuning(self, layers: Layers, before: Tuning | None) -> Tuning | None:
        """Both factors of each layer; with `dora` its magnitudes, and the change's length once a batch."""
        tuning, chosen = layers.low_rank(self.where, self.targets, self.rank), layers.chosen(self.where, self.targets)
        if not self.dora:
            return tuning
        sides = sum(each.inputs * (each.inputs + each.outputs) * each.blocks for each in chosen)
        magnitudes = sum(each.outputs * each.blocks for each in chosen)
        return replace(tuning, trained=tuning.trained + magnitudes, batch=2.0 * self.rank * sides)

    def work(self, task: Task) -> Work:
        """A decomposition of each chosen matrix, where the factors begin at its own."""
        chosen = task.layers.chosen(self.where, self.targets)
        if self.init == "pissa":
            return sum((singular(each) for each in chosen), Work())
        return sum((orthogonal(each, each.inputs) for each in chosen if self.init == "olora"), Work())

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The adapted model: only the adapter, and a classifier's last layer, are trained from now on."""
        layers = targets(model, self.name, self.where, self.targets)
        config = {
            "r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout, "target_modules": sorted(layers),
            "use_dora": self.dora, "use_rslora": self.rslora,
            "init_lora_weights": True if self.init == "kaiming" else self.init,
        }  # fmt: skip
        return PeftAdapter("LORA", config)(model, inputs)

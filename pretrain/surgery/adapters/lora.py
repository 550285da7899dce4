"""LoRA and its variants, by `peft`."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from pretrain.core.errors import PretrainError
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery.adapters._adapters import targets
from pretrain.surgery.adapters.peft_adapter import PeftAdapter

INITS = ("kaiming", "gaussian", "pissa", "olora", "orthogonal")


@dataclass(frozen=True)
class LoRA(Surgery):
    """LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685).

    The blocks' linear layers are frozen and become W + (alpha / rank) · BA, of which A and B alone are trained; B
    begins at zero, so nothing changes at first. The layers are `peft`'s own; `dora`, `rslora` and `init` are its
    variants. `where` picks the layers: query_value, attention, feed_forward or all; `targets` the ends of their names
    (`q_proj`).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    where: str = "attention"
    targets: tuple[str, ...] = ()
    dora: bool = False
    rslora: bool = False
    init: str = "kaiming"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise PretrainError(f"lora: rank {self.rank}: accepted: 1 or more")
        if not 0 <= self.dropout < 1:
            raise PretrainError(f"lora: dropout {self.dropout}: accepted: 0 to below 1")
        if self.init not in INITS:
            raise PretrainError(f"lora: init {self.init!r}: accepted: {', '.join(INITS)}")

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The adapted model: only the adapter, and a classifier's last layer, are trained from now on."""
        layers = targets(model, self.name, self.where, self.targets)
        config = {
            "r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout, "target_modules": sorted(layers),
            "use_dora": self.dora, "use_rslora": self.rslora,
            "init_lora_weights": True if self.init == "kaiming" else self.init,
        }  # fmt: skip
        return PeftAdapter("LORA", config)(model, inputs)

"""Frozen first blocks, biases in the middle ones, LoRA and biases in the last ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from pretrain.core.bounds import Count, Ge, Positive
from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import blocks, family
from pretrain.core.models.layers import Linear
from pretrain.dial.tuned import OUTPUT, QUERIES, Layers, Tuning
from pretrain.surgery import Inputs, PeftFormat, Surgery, report
from pretrain.surgery._random import generator
from pretrain.surgery.adapters._adapters import LowRankAdapter, Where, adapt, adapters_of, peft_lora, targets

Blocks = Annotated[int | float, Ge(0)]  # how many or, below 1, which share of them


@dataclass(frozen=True)
class SPAFIT(Surgery):
    """SPAFIT: Stratified Progressive Adaptation Fine-tuning for Pre-trained Large Language Models (arXiv:2405.00201).

    The blocks 1 to N1 are frozen; of N1 + 1 to N2 the biases are trained (BitFit, with those of the norms); the others
    get LoRA, W + (alpha / rank) · BA, in the layers of `where` (query_value, attention, feed_forward or all; `targets`:
    the ends of other names), and train their biases too, unless `last_biases: false`. `n1` and `n2` are numbers of
    blocks or, below 1, shares of them, rounded: the paper's SPAFIT 4-9 of 24 blocks is the default, 4-14 is its other.
    `reverse` counts the blocks from the last: LoRA in the first ones, the last ones frozen. Llama, Mistral and Qwen3
    have no biases (Qwen2 has those of queries, keys and values), ModernBERT none by default: such a model is refused,
    unless `scales: true` trains the norms' scales beside whatever biases there are. Biases and scales are changed where
    they are, so the merged model keeps them; in `peft`'s format all biases go with the LoRA (`bias: all`).
    """

    adapts: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert", "modernbert")

    n1: Blocks = 4 / 24
    n2: Blocks = 9 / 24
    rank: Count = 8
    alpha: Positive = 16.0
    where: Where = "query_value"
    targets: tuple[str, ...] = ()
    last_biases: bool = True
    scales: bool = False
    reverse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("n1", self.n1), ("n2", self.n2)):
            if value >= 1 and value != int(value):
                raise PretrainError(
                    f"spafit: {name} {value}: accepted: a number of blocks, or a share of them from 0 to below 1"
                )

    def groups(self, number: int) -> tuple[range, range, range]:
        """The blocks (from 0) that are frozen, that train biases, and that get LoRA, of `number` blocks."""
        first, second = (int(value if value >= 1 else value * number + 0.5) for value in (self.n1, self.n2))
        if not first <= second < number:
            raise PretrainError(
                f"spafit: n1 {self.n1}, n2 {self.n2}: accepted: n1 <= n2 < {number}, the number of blocks; "
                f"these are {first} and {second}"
            )
        order = range(number)[::-1] if self.reverse else range(number)
        return order[:first], order[first:second], order[second:]

    def tuning(self, layers: Layers, before: Tuning | None) -> Tuning | None:
        """LoRA in the last blocks, and the biases (or scales) that the middle ones train beside."""
        shape = layers.shape
        _, middle, last = (len(group) for group in self.groups(shape.depth))
        tuning = layers.low_rank(self.where, self.targets, self.rank, blocks=last)
        small = layers.biases + (2 * shape.width if self.scales else 0)
        tuned = middle + (last if self.last_biases else 0)
        first = 0 if self.reverse else shape.depth - middle - last
        bare = layers.kind == "modernbert" and not first  # its first block has no norm before the queries
        reached = layers.before(OUTPUT if bare and tuned else QUERIES, first)
        spared = reached.unreached
        if tuned and self.scales and not bare and layers.kind != "bert":  # a norm before the queries is trained
            spared -= layers.before(QUERIES).unreached
        return replace(tuning, trained=tuning.trained + tuned * small, unreached=spared, blind=reached.blind)

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The adapted model: only LoRA, the chosen biases and a classifier's last layer are trained from now on.

        Metrics: `trained_parameters`, and how many of them are `lora_parameters`.
        """
        model = self._adapted(model, generator(self.name, inputs))
        record(model, self)
        adapters = adapters_of(model, LowRankAdapter)
        report(
            inputs,
            trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            lora_parameters=sum(module.A.numel() + module.B.numel() for module in adapters.values()),
        )
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """The same layers, with weights yet to be loaded, and the same parameters to be trained."""
        return self._adapted(model, None)

    def adapter(self, model: PreTrainedModel) -> PeftFormat:
        """A LoRA of `peft` with all biases of the model, and the scales where those are trained."""
        adapters = adapters_of(model, LowRankAdapter)
        config, tensors = peft_lora(model, {n: (module.B * module.scale, module.A) for n, module in adapters.items()})
        config["bias"] = "all"
        scales = {name for name, p in model.named_parameters() if p.requires_grad and _scale(model, name)}
        for name, tensor in model.state_dict().items():
            if _bias(name) or name in scales:
                owner, _, last = name.rpartition(".layer.")
                peft_name = f"{owner}.base_layer.{last}" if owner in adapters else name
                tensors[f"base_model.model.{peft_name}"] = tensor.detach().clone()  # tied ones may not share memory
        return config, tensors

    def _adapted(self, model: PreTrainedModel, source: torch.Generator | None) -> PreTrainedModel:
        if family(model).name not in self.families:
            raise PretrainError(f"spafit: family {family(model).name!r}: accepted: {', '.join(self.families)}")
        all_blocks = blocks(model)
        _, middle, last = self.groups(len(all_blocks))
        inside = {id(module) for number in last for module in all_blocks[number].modules()}
        layers = {n: m for n, m in targets(model, self.name, self.where, self.targets).items() if id(m) in inside}
        tuned = [all_blocks[number] for number in (*middle, *(last if self.last_biases else ()))]
        small = [p for block in tuned for name, p in block.named_parameters() if self._small(block, name)]
        if tuned and not small:
            raise PretrainError(
                f"spafit: scales False: this {model.config.model_type} has no biases in its blocks: accepted: a model "
                "with biases (bert, gpt2, qwen2), or scales: true, the norms' scales in their place"
            )
        adapt(model, layers, lambda _, layer: self._lora(layer, source))
        for parameter in small:
            parameter.requires_grad_(True)
        return model

    def _lora(self, layer: Linear, source: torch.Generator | None) -> nn.Module:
        return LowRankAdapter(layer, self.rank, self.alpha / self.rank, source).train(layer.training)

    def _small(self, block: nn.Module, name: str) -> bool:
        return _bias(name) or (self.scales and _scale(block, name))


def _bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"


def _scale(model: nn.Module, name: str) -> bool:
    """Whether a parameter is the scale of a norm."""
    owner, _, last = name.rpartition(".")
    return last == "weight" and type(model.get_submodule(owner)).__name__.endswith("Norm")

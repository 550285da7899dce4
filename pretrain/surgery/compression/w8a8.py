"""Weights, and activations as they come, of eight bits: integers or floats, in compressed-tensors' format.

Shape letters: N tokens, O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import family, set_module
from pretrain.core.models.layers import Linear, sides
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._calibration import plain_linears, weight_of

Format = Literal["fp8", "int8"]
FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0  # of these floats


def scales(x_NI: Tensor, kind: Format) -> Tensor:
    """`scale_N1` with which the greatest of a row is the greatest that eight bits hold."""
    most_N1 = x_NI.abs().amax(-1, keepdim=True)
    half = LARGEST if kind == "fp8" else 127.5
    return (most_N1 / half).clamp(min=torch.finfo(torch.float32).eps)


def rounded(x_NI: Tensor, scale_N1: Tensor, kind: Format) -> Tensor:
    """The row's eight bits, as floats or integers."""
    if kind == "fp8":
        return (x_NI / scale_N1).clamp(-LARGEST, LARGEST).to(FLOAT8)
    return (x_NI / scale_N1).round().clamp(-128, 127).to(torch.int8)


class EightBitLinear(nn.Module):
    """A linear layer whose weight is `weight`, O × I in eight bits, times `weight_scale`, O × 1; replaces `layer`."""

    linear_like = True
    bits = 8
    weight: Tensor
    weight_scale: Tensor

    def __init__(self, layer: Linear, kind: Format, *, dynamic: bool) -> None:
        super().__init__()
        self.kind, self.dynamic = kind, dynamic
        self.out_features, self.in_features = sides(layer)
        device, eight = layer.weight.device, FLOAT8 if kind == "fp8" else torch.int8
        self.register_buffer("weight", torch.zeros(self.out_features, self.in_features, dtype=eight, device=device))
        self.register_buffer("weight_scale", torch.zeros(self.out_features, 1, device=device))
        self.bias = layer.bias

    def fill(self, weight_OI: Tensor) -> None:
        """Take the numbers."""
        self.weight_scale.copy_(scales(weight_OI, self.kind))
        self.weight.copy_(rounded(weight_OI, self.weight_scale, self.kind))

    def dense(self) -> Tensor:
        """The weight as one matrix O × I, in float32."""
        return self.weight.float() * self.weight_scale.float()

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias; where activations are rounded too, each token with a scale of its own."""
        if self.dynamic:
            wide = x.detach().float()
            scale = scales(wide, self.kind)
            x = x + (rounded(wide, scale, self.kind).float() * scale - wide).to(x.dtype)  # gradients pass
        return F.linear(x, self.dense().to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """What `print` says."""
        return f"{self.in_features}, {self.out_features}, {self.kind}{', dynamic' if self.dynamic else ''}"


@dataclass(frozen=True)
class W8A8(Surgery):
    """FP8 Formats for Deep Learning (arXiv:2209.05433).

    Each linear layer of the blocks gets weights of eight bits with a scale for each output, the greatest of its weights
    over the greatest number that there is: floats E4M3 (`format: fp8`, up to 448) or integers (`int8`). `activations:
    dynamic` rounds what enters a layer in the same way as it comes, each token with a scale of its own; `none`, of
    floats, leaves it. Products are computed in the model's own type, of the same numbers as on hardware that has such
    units. Checkpoints are in compressed-tensors' format, as llm-compressor's schemes FP8_DYNAMIC and W8A8 with dynamic
    activations are, which vLLM runs. Embeddings and head stay as they are. It needs no text; `smooth_quant` before it
    makes activations easier to round.
    """

    families: ClassVar[tuple[str, ...]] = ("causal", "masked")
    calibration: ClassVar[float] = 0.0

    format: Format = "fp8"
    activations: Literal["dynamic", "none"] = "dynamic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format == "int8" and self.activations == "none":
            raise PretrainError(
                "w8a8: activations none: accepted: with format fp8; integers of weights alone are gptq's, bits 8",
                place=("activations",),
            )

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with its linear layers in eight bits."""
        for name, layer in plain_linears(model, self.name, self.families, inside=True).items():
            made = self._put(model, name, layer)
            made.fill(weight_of(layer))
        model.config.quantization_config = self.quantization_config()
        # Of Llama's weights it was checked that others open them to the same logits.
        record(model, self, foreign=family(model).name != "llama")
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Replace the layers; their numbers are zero."""
        for name, layer in plain_linears(model, self.name, self.families, inside=True).items():
            self._put(model, name, layer)
        return model

    def _put(self, model: PreTrainedModel, name: str, layer: Linear) -> EightBitLinear:
        made = EightBitLinear(layer, self.format, dynamic=self.activations == "dynamic")
        set_module(model, name, made.train(model.training))
        return made

    def quantization_config(self) -> dict[str, object]:
        """What `transformers`, vLLM and llm-compressor read in `config.json` of such weights."""
        kind = {"num_bits": 8, "type": "float" if self.format == "fp8" else "int", "symmetric": True}
        dynamic = kind | {"strategy": "token", "dynamic": True}
        return {
            "quant_method": "compressed-tensors", "quantization_status": "compressed",
            "format": "float-quantized" if self.format == "fp8" else "int-quantized", "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"], "weights": kind | {"strategy": "channel", "dynamic": False},
                    "input_activations": dynamic if self.activations == "dynamic" else None,
                    "output_activations": None,
                },
            },
        }  # fmt: skip

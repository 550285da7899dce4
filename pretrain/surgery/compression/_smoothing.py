"""Scales that move from the inputs of linear layers into what makes those inputs; the model computes the same.

Shape letters: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pretrain.core.models.families import at, family
from pretrain.core.models.layers import Linear, sides
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._calibration import Blocks, batches_of, parts, plain_linears


@dataclass(frozen=True)
class Scaled:
    """Layers of one input and what makes it, as paths in a block: a norm, or the last outputs of another layer."""

    before: str
    layers: tuple[str, ...]
    inside: str = ""  # the module that the layers are part of, where its output tells their error
    norm: bool = False


def stack_of(method: Surgery, model: PreTrainedModel, inputs: Inputs | None) -> Blocks:
    """The blocks in evaluation mode on the method's text; an error where family, layers or text do not fit it."""
    plain_linears(model, method.name, method.families)
    batches = batches_of(inputs, method.name)
    return Blocks(model.eval(), batches)


def places(model: PreTrainedModel, block: nn.Module) -> list[Scaled]:
    """The pairs of one block, of a family whose norms stand before the layers and multiply by their weight."""
    entry, where = family(model), parts(model)
    attention, feed_forward = entry.attention, entry.feed_forward
    pairs: list[Scaled] = []
    behind = ((where["queries"], attention), (where["up"], feed_forward))
    for norm, (layers, inside) in zip(entry.norms, behind, strict=True):
        if isinstance(getattr(at(block, norm), "weight", None), Tensor):  # not the identity, as in a first block
            pairs.append(Scaled(norm, layers, inside, norm=True))
    (output,), (down,) = where["output"], where["down"]
    values, parts_fused = where["queries"][-1], 3 if len(where["queries"]) == 1 else 1  # with queries and keys
    if sides(_linear(block, values))[0] == parts_fused * sides(_linear(block, output))[1]:
        pairs.append(Scaled(values, (output,)))
    if entry.name != "gpt2":  # there an activation stands between the two, through which no scale passes
        pairs.append(Scaled(where["up"][-1], (down,)))
    return pairs


def _linear(block: nn.Module, path: str) -> Linear:
    layer = at(block, path)
    assert isinstance(layer, Linear)
    return layer


@torch.no_grad()
def fold(block: nn.Module, place: Scaled, scale_I: Tensor) -> None:
    """Multiply the layers' weights by the scales, input by input, and divide by them what makes the inputs."""
    before = at(block, place.before)
    if place.norm:
        for parameter in before.parameters():
            parameter.div_(scale_I.to(parameter))
    else:
        rows = slice(-len(scale_I), None)  # of a fused layer the last: values, or what the gate multiplies
        weight = before.weight.T if isinstance(before, Conv1D) else before.weight
        weight[rows] /= scale_I.to(weight)[:, None]
        if before.bias is not None:
            before.bias[rows] /= scale_I.to(before.bias)
    for path in place.layers:
        layer = _linear(block, path)
        scaled = scale_I.to(layer.weight)
        layer.weight.mul_(scaled[:, None] if isinstance(layer, Conv1D) else scaled)

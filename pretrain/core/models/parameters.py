"""What each parameter of a model is, by the module that reads it; optimisers treat matrices, tables and vectors apart.

A shape does not tell: the biases that T5 adds to its attention are a table, IA³'s scales a matrix of one column, and a
table of positions looks like any matrix.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from pretrain.core.models.heads import output
from pretrain.core.models.layers import Linear

Role = Literal["matrix", "head", "table", "vector"]
_MARK = "role"  # the attribute of a parameter that says what it is


def described(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters by name, each marked with its role: what an optimiser is built of.

    - `matrix`: the weights of linear layers and convolutions, and the factors of such weights;
    - `head`: the matrix that gives the logits or a classifier's answers;
    - `table`: what is looked up, of tokens or of positions, also where the head shares it;
    - `vector`: biases, norms, scales, single tokens, and biases of attention that are looked up.
    """
    roles = _roles(model)
    named = list(model.named_parameters())
    for _, parameter in named:
        setattr(parameter, _MARK, roles[id(parameter)])
    return named


def role(parameter: nn.Parameter) -> Role:
    """Its role; one that is not `described` goes by its number of dimensions."""
    marked: Role | None = getattr(parameter, _MARK, None)
    return marked or ("matrix" if parameter.ndim >= 2 else "vector")


def _roles(model: nn.Module) -> dict[int, Role]:
    """The roles by the parameters' identities."""
    roles: dict[int, Role] = {}
    inside = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    heads = {id(parameter) for part in inside for parameter in _head(part)}
    for around, name, parameter in _walk(model, ()):
        role = _role(around, name, parameter)
        if role == "matrix" and id(parameter) in heads:
            role = "head"
        if roles.get(id(parameter)) != "table":  # it is one wherever else it is used
            roles[id(parameter)] = role
    return roles


def _walk(
    module: nn.Module, around: tuple[nn.Module, ...]
) -> Iterator[tuple[tuple[nn.Module, ...], str, nn.Parameter]]:
    """Each parameter with its name and the modules that it is in, the innermost last."""
    around = (*around, module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield around, name, parameter
    for child in module._modules.values():
        if child is not None:
            yield from _walk(child, around)


def _head(model: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters of the layers that give the model's answers."""
    last = output(model)
    layers = [model.get_output_embeddings(), last[1] if last is not None else None]
    return [parameter for layer in layers if layer is not None for parameter in layer.parameters()]


def _role(around: tuple[nn.Module, ...], name: str, parameter: nn.Parameter) -> Role:
    """What it is beside a head."""
    wide = [size for size in parameter.shape if size > 1]
    held = [module for module in around if not isinstance(module, nn.ParameterList | nn.ParameterDict)]
    if parameter.ndim < 2 or name == "bias" or getattr(parameter, "_no_weight_decay", False):
        return "vector"
    if isinstance(held[-1], nn.Embedding):
        return "vector" if parameter.shape[-1] in _attention_heads(around) else "table"
    if isinstance(held[-1], Linear | nn.modules.conv._ConvNd):
        return "matrix"
    scaling, adapting = _of_peft()
    if any(hasattr(module, "linear_like") for module in held):
        return "matrix"
    if isinstance(held[-1], adapting):
        return "vector" if isinstance(held[-1], scaling) else "matrix"
    if len(wide) < 2 or parameter.shape[-1] in _attention_heads(around):
        return "vector"
    return "table" if any(word in type(held[-1]).__name__ for word in ("Embed", "Position")) else "matrix"


def _attention_heads(around: tuple[nn.Module, ...]) -> set[int]:
    """How many heads attention may have here: a table as wide as that is added to its scores."""
    configs = [config for module in around if (config := getattr(module, "config", None)) is not None]
    counts = [getattr(config, "num_attention_heads", None) for config in configs[-1:]]
    heads = {count for many in counts for count in (many if isinstance(many, list | tuple) else [many])}
    width = {getattr(config, "hidden_size", None) for config in configs[-1:]}
    return {count for count in heads - width if isinstance(count, int) and count > 1}


def _of_peft() -> tuple[tuple[type, ...], tuple[type, ...]]:
    """The layers of `peft` that scale, and all of them, where it is in use."""
    if "peft" not in sys.modules:
        return (), ()
    from peft.tuners.ia3 import IA3Layer
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (IA3Layer,), (BaseTunerLayer,)

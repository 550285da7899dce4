"""Models that a configuration of others describes: built without memory, and held against the files of weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from pretrain.core.errors import PretrainError
from pretrain.core.files import read_object
from pretrain.core.foreign.code import consented
from pretrain.core.foreign.configs import check_count, check_layers, check_types
from pretrain.core.foreign.parsing import reason
from pretrain.core.foreign.weights import Stored
from pretrain.core.processors import quiet


def check_built(
    folder: Path, model_class: type[PreTrainedModel], config: PreTrainedConfig, stored: Mapping[str, Stored], *,
    surgical: bool,
) -> None:  # fmt: skip
    """Refuse a configuration that does not go with the weights, by a model that is built without any memory."""
    path = folder / "config.json"
    raw = read_object(path)
    check_layers(path, raw, stored)
    if raw.get("quantization_config") is not None:
        return  # what is packed into whole numbers has other types and counts than its model
    try:
        with quiet(), torch.device("meta"):
            built = model_class(config)
    except Exception as error:
        if "meta" in str(error):  # a constructor that looks at values, of which there are none here
            return
        raise PretrainError(f"{path}: {reason(error)}; accepted: the configuration of a model") from error
    check_count(path, sum(parameter.numel() for parameter in built.parameters()), stored, surgical=surgical)
    if not surgical:
        kinds = {name: tensor.is_floating_point() for name, tensor in built.state_dict().items()}
        check_types(folder, kinds, stored)


def class_of(folder: Path, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `architectures` names, of transformers or of code that is consented to, for this configuration."""
    named = config.architectures[0] if isinstance(config.architectures, list) and config.architectures else None
    code = consented(folder)
    made: object = code.model_class(str(named)) if code is not None else None
    made = made or getattr(transformers, str(named), None)
    if not (isinstance(made, type) and issubclass(made, PreTrainedModel) and made.config_class is type(config)):
        whose = f"the class in transformers of a {config.model_type!r} model" if code is None else "a class of its code"
        raise PretrainError(f"{folder / 'config.json'}: architectures {config.architectures!r}: accepted: {whose}")
    return made

"""Which model a folder of weights is of, where its `config.json` does not say: by its tensors' names and shapes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

from pretrain.core.errors import PretrainError, nearest
from pretrain.core.files import JSONObject
from pretrain.core.foreign.configs import check_config
from pretrain.core.processors import quiet

DECODER = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
HEADS = (  # the tables of transformers that name a class for a type; of those that fit alike the first is taken
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES", DECODER,
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "MODEL_MAPPING_NAMES",
)  # fmt: skip
MOST = 24  # types that are tried
_PREFIX = re.compile(r"base_model_prefix = \"(\w+)\"")
Shapes = Mapping[str, tuple[int, ...]]


def named(path: Path, config: JSONObject, shapes: Shapes, model_type: str | None = None) -> JSONObject:
    """The configuration with the `model_type` and `architectures` that go with the tensors.

    A type fits where a class of it has a place for most of the tensors and finds all of its own among them. Raises
    `PretrainError` where none fits, and where several do: then the user says `model_type`.
    """
    given = model_type or config.get("model_type")
    if given is not None and given not in CONFIG_MAPPING:
        raise PretrainError(
            f"model_type {given!r}{nearest(str(given), CONFIG_MAPPING)}: accepted: a type that transformers "
            f"{transformers.__version__} knows"
        )
    tried = [str(given)] if given else list(_candidates(shapes))
    if len(tried) > MOST or not tried:
        many = f"{len(tried)} types name their tensors so" if tried else "no type names its tensors so"
        raise PretrainError(f"{path}: no model_type, and {many}; accepted: --model-type TYPE")
    check_config(path, config)
    fits = {kind: fit for kind in tried if (fit := _best(kind, config, shapes)) is not None}
    if not fits:
        raise PretrainError(
            f"{path}: no model of {given or 'a type that names its tensors so'} has these tensors by this "
            "configuration; accepted: --model-type TYPE, and a config.json that goes with the weights"
        )
    left = min(count for count, _ in fits.values())
    best = [kind for kind, (count, _) in fits.items() if count == left]
    if len(best) > 1:
        raise PretrainError(f"{path}: no model_type, and {', '.join(best)} fit alike; accepted: --model-type TYPE")
    return config | {"model_type": best[0], "architectures": [fits[best[0]][1]]}


def _candidates(shapes: Shapes) -> Iterator[str]:
    """The types whose source in transformers has a model under such a first word, and all other words of the names.

    Tensors of a bare model begin with no such word.
    """
    first = {name.partition(".")[0] for name in shapes}
    words = {word for name in shapes for word in name.split(".") if not word.isdigit()}
    for kind in CONFIG_MAPPING:
        module = model_type_to_module_name(kind)
        path = Path(transformers.__file__).parent / "models" / module / f"modeling_{module}.py"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if first & set(_PREFIX.findall(text)) and all(word in text for word in words):
            yield kind


def _best(kind: str, config: JSONObject, shapes: Shapes) -> tuple[int, str] | None:
    """How many tensors the best fitting class of a type has no place for, and its name; None where none fits."""
    fits: list[tuple[int, str]] = []
    for name in _classes(kind, config):
        made = getattr(transformers, name, None)
        if not (inspect.isclass(made) and issubclass(made, PreTrainedModel)):
            continue
        try:
            model = outlined(made, kind, config)
        except Exception:  # of whatever a configuration of another type makes it stumble at
            continue
        theirs = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        lacking = [key for key, shape in theirs.items() if key not in tied and shapes.get(key) != shape]
        spare = sum(key not in theirs for key in shapes)
        if not lacking and 2 * spare < len(shapes):
            fits.append((spare, name))
    return min(fits, key=lambda fit: fit[0], default=None)


def outlined(made: type[PreTrainedModel], kind: str, config: JSONObject) -> PreTrainedModel:
    """A model without memory."""
    fields = {key: value for key, value in config.items() if key != "architectures"}
    with quiet(), torch.device("meta"):
        return made(CONFIG_MAPPING[kind].from_dict(fields))


def _classes(kind: str, config: JSONObject) -> list[str]:
    """The classes of a type, those first that the model is most likely of."""
    tables = (DECODER, *HEADS) if config.get("is_decoder") else HEADS
    given = config.get("architectures")
    names = [tuple(map(str, given)) if isinstance(given, list) else None]
    names += [getattr(modeling_auto, table, {}).get(kind) for table in tables]
    flat = [each for name in names for each in (name if isinstance(name, tuple) else (name,)) if each]
    return list(dict.fromkeys(flat))

"""What is wrong with the fields of a new model, in our words, with the field as the place.

`transformers` checks types, some of it sizes; a size of 0 or a name that it does not know shows much later, as whatever
error a constructor happens to make of it. So the fields that are given are looked at first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pretrain.core.errors import PretrainError
from pretrain.core.foreign.configs import LAYERS, MOST_LAYERS

SIZE = re.compile(
    r"(.*_)?(size|dim|heads|n_head|n_layer|layers|n_embd|n_inner|n_positions|d_model|d_ff|d_kv|experts|channels|embeddings)"
)
FROM_ZERO = re.compile(r"(.*layers|type_vocab_size|.*(adapter|shared|padding).*)")
BLOCKS = ("num_hidden_layers", "num_layers", "num_encoder_layers", "num_decoder_layers", "encoder_layers", "n_layers")
SHARE = re.compile(r"(.*_)?(dropout|drop|pdrop|drop_rate|dropout_rate|dropout_prob)")
LARGEST = 1 << 31  # of a size
NAMED = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "NoneType": "null",
    "list": "a list", "dict": "a mapping",
}  # fmt: skip


def check_values(model_type: str, fields: Mapping[str, object]) -> None:
    """Refuse sizes below 1 and dropouts that are no shares."""
    for name, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        least = 0 if FROM_ZERO.fullmatch(name) and name not in BLOCKS else 1
        if LAYERS.fullmatch(name) and value > MOST_LAYERS:
            raise misfit(model_type, name, value, f"at most {MOST_LAYERS:,}")
        if SIZE.fullmatch(name) and value > LARGEST:
            raise misfit(model_type, name, value, f"at most {LARGEST:,}")
        if SIZE.fullmatch(name) and value < least:
            raise misfit(model_type, name, value, f"{least} or more")
        if SHARE.fullmatch(name) and not 0 <= value < 1:
            raise misfit(model_type, name, value, "from 0 to below 1")


def misfit(model_type: str, name: str, value: object, accepted: str, hint: str = "") -> PretrainError:
    """The error of one field."""
    return PretrainError(f"model family {model_type!r}: {name} {value!r}{hint}: accepted: {accepted}", place=(name,))


def in_our_words(model_type: str, fields: Mapping[str, object], error: Exception) -> PretrainError:
    """What `transformers` says of a configuration, with the field that it is about where one can be made out."""
    text = " ".join(str(error).split())
    if match := re.search(r"Field '(\w+)' expected (.+?), got \w+ \(value: (.*)\)", text):
        name, kinds, value = match.groups()
        words = dict.fromkeys(NAMED.get(kind.strip().partition("[")[0], kind.strip()) for kind in kinds.split("|"))
        return misfit(model_type, name, fields.get(name, value), ", or ".join(words))
    text = re.sub(r"(Class v|V)alidation error for (validator|field) '\w+': (\w+: )?", "", text)
    if match := re.search(r"hidden size \((\d+)\) is not a multiple of the number of attention heads \((\d+)\)", text):
        return misfit(model_type, "hidden_size", int(match[1]), f"a multiple of num_attention_heads {match[2]}")
    name = next((name for name in fields if re.search(rf"\b{re.escape(name)}\b", text)), None)
    plain = isinstance(error, ValueError | TypeError) or type(error).__name__.startswith("StrictDataclass")
    kind = "" if plain else f"{type(error).__name__}: "
    odd = {key: value for key, value in fields.items() if not isinstance(value, int | float)} or fields
    shown = ", ".join(f"{key}: {value!r}" for key, value in odd.items())
    return PretrainError(
        f"model family {model_type!r}: {kind}{text[:300]}; accepted: other values of {name or shown}",
        place=() if name is None else (name,),
    )


def check_heads(model_type: str, width: object, heads: object, shared: object, names: tuple[str, str]) -> None:
    """Refuse widths that the heads do not divide."""
    if isinstance(width, int) and isinstance(heads, int) and (heads < 1 or width % heads):
        raise misfit(model_type, names[0], width, f"a multiple of {names[1]} {heads}")
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise misfit(model_type, "num_key_value_heads", shared, f"a divisor of num_attention_heads {heads}")

"""Where the blocks of a model are that no entry of the table describes, and their projections.

Its lists of modules that no other holds are its stacks of blocks; inside a block, attention is what its class's name
calls so, or another mixer of positions. Each list is asked of the model alone, so that a new type needs no entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakKeyDictionary

from torch import nn

from pretrain.core.foreign.code import brought
from pretrain.core.models.layers import at
from pretrain.core.models.unlisted.layout import causal
from pretrain.core.quick.table import Family

MIXERS = ("Attention", "Attn", "Mixer", "DeltaNet", "TimeMix", "Recurrent", "Conv")  # in a class's name
QUERIES = (  # names of projections to queries, keys and values
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"),
    ("query_key_value",), ("qkv_proj",), ("Wqkv",), ("c_attn",), ("q_b_proj", "kv_b_proj"), ("in_proj",), ("in_layer",),
)  # fmt: skip


_known: WeakKeyDictionary[nn.Module, Family] = WeakKeyDictionary()


def derived(model: nn.Module) -> Family:
    """The entry that the table would have for the model, as far as its modules tell; what they do not is empty."""
    if model not in _known:
        _known[model] = _derived(model)
    return _known[model]


def _derived(model: nn.Module) -> Family:
    inner, kind = getattr(model, "base_model", model), at(model, "config.model_type")
    kind = f"{kind} of a checkpoint's code" if brought(model) else kind  # which may have taken a name that others have
    stacks = list(_stacks(inner))
    pair = getattr(at(model, "config"), "is_encoder_decoder", False) and len(stacks) > 1
    blocks = stacks[0] if pair or not stacks else max(stacks, key=lambda path: _weights(at(inner, path)))
    attention = next((name for block in at(inner, blocks) for name in mixers(block)), "") if blocks else ""
    names = {name.rpartition(".")[2] for name, m in inner.named_modules() if not list(m.children())}
    queries = next((each for each in QUERIES if {*each} <= names), ())
    return Family(
        kind, (kind,), blocks, attention, queries, "", "", (), "", (), None,
        causal=not pair and causal(model), decoder_blocks=stacks[1] if pair else None,
    )  # fmt: skip


def _stacks(inner: nn.Module) -> Iterator[str]:
    """The paths of the lists of blocks, none inside another, in the model's order."""
    paths: list[str] = []
    for name, module in inner.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{path}.") for path in paths):
            continue
        if any(list(block.children()) for block in module):  # a list of norms or of projections is none
            paths.append(name)
            yield name


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def mixers(block: nn.Module) -> list[str]:
    """The paths in a block of what mixes positions: its attention, or what stands in its place."""
    paths: list[str] = []
    for name, module in block.named_modules():
        inside = any(name.startswith(f"{path}.") for path in paths)
        if name and not inside and any(word in type(module).__name__ for word in MIXERS) and list(module.children()):
            paths.append(name)
    return paths

"""A checkpoint opened without its experts, which stay in its files: each is read from there when it is wanted.

safetensors maps files into memory: what is read for an expert is its own bytes, and the system may keep them cached.

Shape letters: X experts, H a router's inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from pretrain.core.checkpoint import Facts, inspected, record, recorded
from pretrain.core.errors import PretrainError
from pretrain.core.experts.places import mixtures, number_of_experts
from pretrain.core.experts.store import WEIGHTS, Rows
from pretrain.core.files import read_object
from pretrain.core.foreign.parsing import parsing
from pretrain.core.foreign.weights import Stored, header
from pretrain.core.models.families import at
from pretrain.core.models.storage import finite
from pretrain.core.processors import Processor, load_processor, quiet
from pretrain.core.weights import align

_COUNTS = ("num_experts", "num_local_experts")  # of a configuration
_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PARTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))  # of an expert that is stored by itself
# What the files of a type's makers call otherwise than its model does.
_RENAMED = {
    "mixtral": ((r"\.mlp\.", ".block_sparse_moe."),),
    "minimax": ((r"\.mlp\.", ".block_sparse_moe."),),
    "granitemoe": (
        (r"\.experts\.gate_up_proj$", ".input_linear.weight"), (r"\.experts\.down_proj$", ".output_linear.weight"),
        (r"\.router\.weight$", ".router.layer.weight"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A matrix in a file: a tensor, or one row of the tensor of all experts."""

    path: Path
    name: str
    row: int | None = None


Expert = tuple[tuple[Piece, ...], tuple[Piece, ...]]  # what makes gate and up, and what makes down


class Files:
    """Experts in safetensors files, by mixture and expert."""

    def __init__(self, experts: Sequence[Sequence[Expert]], like: Rows) -> None:
        self.experts, self._like = experts, like
        self.handles: dict[Path, safe_open] = {}

    def read(self, mixture: int, expert: int, into: Rows) -> None:
        """Read an expert's matrices."""
        for part, pieces in zip(into, self.experts[mixture][expert], strict=True):
            for place, piece in zip(part.chunk(len(pieces)), pieces, strict=True):
                place.copy_(self._tensor(piece))

    def _tensor(self, piece: Piece) -> Tensor:
        with parsing(f"{piece.path}: {piece.name} cannot be read", "a whole safetensors file"):
            if piece.path not in self.handles:
                self.handles[piece.path] = safe_open(piece.path, framework="pt")
            file = self.handles[piece.path]
            tensor: Tensor = file.get_tensor(piece.name) if piece.row is None else file.get_slice(piece.name)[piece.row]
        return tensor

    def like(self) -> Rows:
        """Of the shapes and the type that the model computes with."""
        return self._like


def open_without_experts(
    folder: Path, name: str, families: Sequence[str]
) -> tuple[PreTrainedModel, Processor | None, Files]:  # fmt: skip
    """A checkpoint's model with no numbers in its experts, its processor, and its experts in files.

    The errors are those of `load`, and one of files that hold experts in another way. Experts' numbers, which `load`
    looks at, are not read.
    """
    facts = inspected(folder)
    stored = {each: (path, row) for path in facts.files for each, row in header(path).items()}
    surgical = any(entry.get("foreign", True) for entry in facts.record.get("surgery", []))
    renamed = () if surgical else _RENAMED.get(facts.config.model_type, ())
    in_files = partial(_renamed, renamed)
    named = None if surgical else facts.config.dtype  # as `load` has it
    named = torch.float32 if facts.record.get("dtype") == "float32" else named
    dtype: torch.dtype | None = getattr(torch, named) if isinstance(named, str) else named
    with parsing(f"{folder}: a model of config.json", "the configuration as it was written"):
        model = _built(facts, dtype, name, families)
    if not surgical:
        model.config._name_or_path = str(folder)
    places = list(mixtures(model, name, families))
    count = number_of_experts(model)
    experts = [[_expert(stored, in_files, place, n, folder) for n in range(count)] for place in places]
    inside = {f"{place}.{weight}" for place in places for weight in WEIGHTS}
    _read(model, {each: in_files(each) for each in model.state_dict() if each not in inside}, stored, dtype, folder)
    kind = stored[experts[0][0][1][0].name][1].dtype
    if kind not in _TYPES:
        raise PretrainError(f"{folder}: experts of {kind}; accepted: {', '.join(_TYPES)}")
    first = [model.get_parameter(f"{places[0]}.{weight}")[0].detach().to(dtype or _TYPES[kind]) for weight in WEIGHTS]
    if (path := folder / "generation_config.json").exists():
        with parsing(str(path), "a generation configuration"), quiet():
            model.generation_config = GenerationConfig.from_dict(read_object(path))
    return align(model).eval(), load_processor(folder), Files(experts, (first[0], first[1]))


def _renamed(pairs: Sequence[tuple[str, str]], name: str) -> str:
    for pattern, words in pairs:
        name = re.sub(pattern, words, name)
    return name


def _built(facts: Facts, dtype: torch.dtype | None, name: str, families: Sequence[str]) -> PreTrainedModel:
    """The model with one expert in each mixture, and routers and configuration for all of them."""
    config, before = facts.config, torch.get_default_dtype()
    counts = {each: getattr(config, each) for each in _COUNTS if hasattr(config, each)}
    for each in counts:
        setattr(config, each, 1)
    torch.set_default_dtype(dtype or before)  # for buffers, as `from_pretrained` makes them
    try:
        with torch.random.fork_rng(devices=[]):
            model = facts.model_class(config)
    finally:
        torch.set_default_dtype(before)
    for entry in facts.record.get("surgery", []):
        method = recorded(entry)
        model = method.restore(model)
        record(model, method, foreign=entry.get("foreign", True))
    routers = mixtures(model, name, families).values()
    for each, count in counts.items():
        setattr(model.config, each, count)
    every = number_of_experts(model)
    for module in model.modules():
        if "num_experts" in vars(module):
            vars(module)["num_experts"] = every
    for router in routers:
        weight_1H = model.get_parameter(f"{router}.weight")
        at(model, router).weight = nn.Parameter(weight_1H.new_empty(every, weight_1H.shape[1]))
    return model


def _expert(
    stored: Mapping[str, tuple[Path, Stored]], in_files: Callable[[str], str], place: str, number: int, folder: Path
) -> Expert:  # fmt: skip
    """Where the files hold an expert: in a row of two tensors, or by itself in three."""
    up, down = (in_files(f"{place}.{weight}") for weight in WEIGHTS)
    if up in stored and down in stored:
        return (_piece(stored, up, number),), (_piece(stored, down, number),)
    for parts in _PARTS:
        gate, up, down = (in_files(f"{place}.{number}.{part}.weight") for part in parts)
        if {gate, up, down} <= stored.keys():
            return (_piece(stored, gate), _piece(stored, up)), (_piece(stored, down),)
    raise PretrainError(
        f"{folder}: no expert {number} of {place} in its files; accepted: {WEIGHTS[0]} and {WEIGHTS[1]} of all, or of "
        f"each {' or '.join(', '.join(parts) for parts in _PARTS)}"
    )


def _piece(stored: Mapping[str, tuple[Path, Stored]], name: str, row: int | None = None) -> Piece:
    return Piece(stored[name][0], name, row)


def _read(
    model: PreTrainedModel, names: Mapping[str, str], stored: Mapping[str, tuple[Path, Stored]],
    dtype: torch.dtype | None, folder: Path,
) -> None:  # fmt: skip
    """Give the model the numbers of these weights; tied ones are stored under one of their names."""
    known = model.state_dict(keep_vars=True)
    given = {id(known[name]) for name, in_file in names.items() if in_file in stored}
    missing = [name for name in names if id(known[name]) not in given]
    if missing:
        raise PretrainError(f"{folder}: {len(missing)} weights do not fit config.json, first: {missing[0]} is missing")
    for path in sorted({path for path, _ in stored.values()}):
        with parsing(f"{path} is truncated or damaged", "a whole safetensors file"), safe_open(path, "pt") as file:
            for name, in_file in names.items():
                if in_file not in stored or stored[in_file][0] != path:
                    continue
                tensor = file.get_tensor(in_file)
                if tensor.shape != known[name].shape or not tensor.is_floating_point() or not finite(tensor):
                    raise PretrainError(
                        f"{folder}: {in_file} of {tuple(tensor.shape)}, {tensor.dtype}; accepted: finite floats of "
                        f"{tuple(known[name].shape)}"
                    )
                known[name].data = tensor.to(dtype or tensor.dtype)

"""A folder of packed 4-bit weights in AWQ's layout: the same numbers are packed anew as checkpoints here hold them.

Nothing is rounded: what comes of it is as if the surgery `gptq` had made these codes, scales and zeros.

Shape letters: W words, O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError, brief, warn
from pretrain.core.exchange.awq_out import BITS, Layer, Matrix, unpack
from pretrain.core.exchange.gguf_in import ORIGIN
from pretrain.core.files import JSONObject, atomic_folder, digest, file_digest, read_object, write_json
from pretrain.core.folders import verify
from pretrain.core.foreign.models import class_of
from pretrain.core.foreign.parsing import parsing
from pretrain.core.foreign.weights import headers
from pretrain.core.method import method_class
from pretrain.core.models.families import family
from pretrain.core.processors import load_processor, quiet
from pretrain.core.quick import hub
from pretrain.core.quick.trust import check_trust

VERSION = 1  # of what is made of a folder
ACCEPTED = {"bits": (BITS,), "version": ("gemm",), "zero_point": (True,)}  # of `quantization_config`


class Packing(checkpoint.Recorded, Protocol):
    """The surgery whose layers hold the numbers."""

    def quantization_config(self) -> JSONObject:
        """What `config.json` says of its layout."""


class Filled(Protocol):
    """A layer that takes numbers."""

    def fill(self, matrix: Matrix) -> None:
        """Take them."""


@dataclass
class Codes:
    """A matrix on its grid, as `Matrix` has it."""

    code_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    group_I: Tensor


def key(folder: Path) -> str:
    """What tells a folder from another, and from itself after a change."""
    states = [(str(path.resolve()), path.stat()) for path in sorted(folder.glob("*")) if path.is_file()]
    return digest([VERSION, [[name, state.st_size, state.st_mtime_ns] for name, state in states]])


def convert(folder: Path, target: Path) -> None:
    """Write the checkpoint as the folder `target`; an error for what is packed otherwise, or of other sizes."""
    check_trust(folder)
    hub.fetch_weights(folder, warn)
    verify(folder)
    size = _group_size(folder)
    config = checkpoint.load_config(folder)
    vars(config).pop("quantization_config", None)
    files = checkpoint.weight_files(folder, "model")
    headers(files)
    with parsing(str(folder), "packed weights in AWQ's layout, and the configuration of their model"):
        stored = {name: tensor for path in files for name, tensor in load_file(path).items()}
        with quiet():
            model = class_of(folder, config)(config).half()
        surgery = _surgery(size)
        model = surgery.restore(model)
        _fill(model, stored, size)
    model.config.quantization_config = surgery.quantization_config()
    checkpoint.record(model, surgery, foreign=family(model).name != "llama")
    path = folder / "generation_config.json"
    if path.exists():
        with parsing(str(path), "a generation configuration"), quiet():
            model.generation_config = GenerationConfig.from_dict(read_object(path))
    sha256 = digest([file_digest(each) for each in (folder / "config.json", *files)])
    made_by = {"name": folder.name, "stage": "convert", "address": f"awq {sha256}", "methods": {}, "format": "AWQ"}
    before = checkpoint.lineage(folder)
    stages = [stage for stage in (*before.get("stages", []), before.get("made_by")) if stage]
    with atomic_folder(target) as work:
        lineage = before | {"stages": stages, "made_by": made_by}
        checkpoint.save(model.eval(), load_processor(folder), work, lineage, folder)
        write_json(work / ORIGIN, {"format": "awq", "file": str(folder), "sha256": sha256})


def _surgery(size: int) -> Packing:
    made = cast("Callable[..., Packing]", method_class("gptq", "surgery"))
    return made(bits=BITS, group_size=size, solver="rtn")


def _group_size(folder: Path) -> int:
    """The inputs of a group, by `config.json`; an error for a layout that is another."""
    path = folder / "config.json"
    given = cast("JSONObject", read_object(path)["quantization_config"])
    facts = {"bits": given.get("bits", given.get("w_bit", BITS)), "zero_point": given.get("zero_point", True)}
    facts["version"] = str(given.get("version", given.get("format", "gemm"))).lower()
    for name, value in facts.items():
        if value not in ACCEPTED[name]:
            words = str(ACCEPTED[name][0]).lower()
            raise PretrainError(f"{path}: quantization_config.{name} {brief(value)}: accepted, of AWQ: {words}")
    size = given.get("group_size", given.get("q_group_size", 128))
    if type(size) is not int or not (size == -1 or size >= 1):
        raise PretrainError(f"{path}: quantization_config.group_size {brief(size)}: accepted: -1, or 1 or more")
    return size


def _fill(model: PreTrainedModel, stored: dict[str, Tensor], size: int) -> None:
    """Put the numbers into the packed layers, and the other weights where they belong; all must have a place."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "quantised")}
    named = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}
    if named != {*layers}:
        raise ValueError(f"{min(named ^ {*layers})} is packed, or is not, otherwise than all layers of the blocks are")
    for name, module in layers.items():
        layer = Layer(*(stored.pop(f"{name}.{part}") for part in Layer._fields))
        cast("Filled", module).fill(_codes(layer, size))
    lacking, stray = model.load_state_dict(stored, strict=False)
    packed = {f"{name}.{part}" for name in layers for part in (*Layer._fields, "g_idx")}
    tied = {name for name, _ in model.named_parameters()}  # of tied ones the first alone
    wrong = [*stray, *({*lacking} & tied - packed)]
    if wrong:
        raise ValueError(f"{wrong[0]} has no place in the model, or is missing")


def _codes(layer: Layer, size: int) -> Codes:
    code_IO, zero_GO = unpack(layer.qweight), unpack(layer.qzeros)
    inputs = len(code_IO)
    group_I = torch.arange(inputs) // (inputs if size == -1 else size)
    if not len(zero_GO) == len(layer.scales) == int(group_I[-1]) + 1:
        raise ValueError(f"{len(layer.scales)} rows of scales, of {inputs} inputs in groups of {size}")
    return Codes(code_IO.T.to(torch.uint8), layer.scales.float().T, zero_GO.T.float(), group_I)

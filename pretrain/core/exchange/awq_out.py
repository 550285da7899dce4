"""A model of packed 4-bit weights in AWQ's own layout, as vLLM and transformers read it, from what `awq` has packed.

Of a linear layer `qweight` (I, O/8) and `qzeros` (G, O/8) are words of eight neighbouring outputs, in the order of the
kernel that they were made for, `scales` (G, O) float16: the weight is scale · (code - zero). GPTQ's layout, in which
checkpoints here hold the same numbers, packs along the inputs. All else is float16. Layout and order are those of
AutoAWQ 0.2 (casper-hansen/AutoAWQ, `WQLinear_GEMM`).

Shape letters: N rows, O outputs, W words, I inputs, G groups of inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.exchange.card import accompany
from pretrain.core.exchange.task import Export
from pretrain.core.files import JSONObject, read_object, write_json

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs the four bits of a word hold, the lowest first
BITS, MOST = 4, torch.finfo(torch.float16).max
NAME = "model.safetensors"
PROBE, LENGTH = 4, 32  # rows and tokens on which logits are compared


class Matrix(Protocol):
    """A matrix on its grid: scale_OG · (code_OI - zero_OG), `group_I` the group of each input."""

    code_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    group_I: Tensor


class Packed(Protocol):
    """A linear layer of packed integers (`surgery.compression.gptq.PackedLinear`)."""

    bits: int
    offset: int  # 1 of symmetric grids
    in_features: int
    out_features: int

    def quantised(self) -> Matrix:
        """Its numbers."""


class Layer(NamedTuple):
    """The tensors of a layer in AWQ's layout."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor


def write(given: Export, work: Path) -> JSONObject:
    """Write the folder, unpack what was written, and compare each matrix, and the logits of a few random rows."""
    model = given.model.float()
    layers = _layers(given.source, model)
    plain = _plain(given.source, model, layers)
    ids_BL = torch.randint(0, model.config.vocab_size, (PROBE, LENGTH), generator=torch.Generator())
    whole_BLV = _logits(model, ids_BL)
    tensors: dict[str, Tensor] = {}
    for name, tensor in _others(given.source, model, layers):
        tensors[name] = tensor.half().contiguous()
    for name, layer in layers.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in _laid_out(layer)._asdict().items()}
    save_file(tensors, work / NAME, metadata={"format": "pt"})
    _describe(given, plain, layers, work)
    again = _read(plain, layers, work / NAME)
    for name, layer in layers.items():
        matrix = layer.quantised()
        scale_OI, zero_OI = matrix.scale_OG[:, matrix.group_I], matrix.zero_OG[:, matrix.group_I]
        if not torch.equal(again.get_parameter(f"{name}.weight"), scale_OI * (matrix.code_OI - zero_OI)):
            raise PretrainError(f"{given.source}: {name} is another matrix in the file")
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    rounded_BLV, read_BLV = _logits(model, ids_BL), _logits(again, ids_BL)
    off, span = float((rounded_BLV - read_BLV).abs().max()), float(rounded_BLV.abs().max())
    if not off <= 64 * torch.finfo(torch.float32).eps * max(1.0, span):
        raise PretrainError(f"{given.source}: the folder answers otherwise: logits are off by {off:.3g}")
    rounding = float((whole_BLV - read_BLV).abs().max())
    return {"matrices": len(layers), "logits_off": off, "logits_span": span, "logits_off_by_rounding": rounding}


def pack(code_NO: Tensor) -> Tensor:
    """`word_NW`, int32: eight neighbouring columns of 4-bit codes to a word."""
    word_NW = torch.zeros(len(code_NO), code_NO.shape[1] // len(ORDER), dtype=torch.int32, device=code_NO.device)
    for place, column in enumerate(ORDER):
        word_NW |= code_NO[:, column :: len(ORDER)].to(torch.int32) << BITS * place
    return word_NW


def unpack(word_NW: Tensor) -> Tensor:
    """`code_NO`, int32: what `pack` was given."""
    places = [ORDER.index(column) for column in range(len(ORDER))]
    shifts = torch.tensor([BITS * place for place in places], dtype=torch.int32, device=word_NW.device)
    return (word_NW[:, :, None] >> shifts & 2**BITS - 1).flatten(1)


def _laid_out(layer: Packed) -> Layer:
    matrix = layer.quantised()
    return Layer(pack(matrix.code_OI.T), pack(matrix.zero_OG.T), matrix.scale_OG.T.half().contiguous())


def _layers(source: Path, model: PreTrainedModel) -> dict[str, Packed]:
    """The packed layers; an error where there are none, and for what the layout cannot hold."""
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "quantised")}
    layers = cast("dict[str, Packed]", modules)
    if not layers:
        raise PretrainError(f"{source} holds no packed weights; accepted, for AWQ: a checkpoint of the surgery awq")
    for name, layer in layers.items():
        if wrong := _unfit(layer):
            raise PretrainError(f"{source}: {name} {wrong}, for AWQ; in GPTQ's layout the checkpoint is already")
    if _group_size(layers) is None:
        raise PretrainError(f"{source}: groups of several sizes; accepted, for AWQ: one size that divides all inputs")
    return layers


def _group_size(layers: dict[str, Packed]) -> int | None:
    """The inputs of a group; -1 where each layer is one group, None where layers differ otherwise."""
    groups = {name: layer.quantised().scale_OG.shape[1] for name, layer in layers.items()}
    sizes = {layer.in_features // groups[name] for name, layer in layers.items()}
    return sizes.pop() if len(sizes) == 1 else -1 if {*groups.values()} == {1} else None


def _unfit(layer: Packed) -> str:
    """What AWQ's layout cannot hold of a layer, and what it can; empty where it holds it."""
    if layer.bits != BITS:
        return f"has {layer.bits} bits: accepted: bits 4"
    if layer.offset:
        return "has a symmetric grid, without zeros: accepted: symmetric false"
    if layer.out_features % len(ORDER):
        return f"has {layer.out_features} outputs: accepted: a multiple of {len(ORDER)}"
    matrix = layer.quantised()
    if bool((matrix.group_I.diff() < 0).any()):
        return "has groups of scattered inputs: accepted: desc_act false"
    if layer.in_features % int((matrix.group_I == 0).sum()):
        groups = matrix.scale_OG.shape[1]
        return f"has {layer.in_features} inputs in {groups} groups: accepted: groups that are all of one size"
    return ""


def _plain(source: Path, model: PreTrainedModel, layers: dict[str, Packed]) -> PreTrainedModel:
    """The model of plain layers, in float32, whose weights are yet to be loaded."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    config.dtype = torch.float16
    plain = type(model)(config).float().eval()
    odd = next((name for name in layers if not isinstance(plain.get_submodule(name), nn.Linear)), None)
    if odd is not None:
        kind = type(plain.get_submodule(odd)).__name__
        raise PretrainError(f"{source}: {odd} is a {kind}; accepted, for AWQ: models of nn.Linear layers, as llama")
    return plain


def _others(source: Path, model: PreTrainedModel, layers: dict[str, Packed]) -> Iterator[tuple[str, Tensor]]:
    """The other tensors, tied ones once; an error for what float16 cannot hold."""
    packed = {f"{name}.{part}" for name in layers for part in (*Layer._fields, "g_idx")}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in packed or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if tensor.is_floating_point() and float(tensor.detach().abs().max()) > MOST:
            raise PretrainError(f"{source}: {name} has numbers beyond {MOST:g}; accepted, for AWQ: those of float16")
        yield name, tensor.detach()


def _describe(given: Export, plain: PreTrainedModel, layers: dict[str, Packed], work: Path) -> None:
    """Write `config.json`, what the model generates by, its processor, and what lay beside it."""
    plain.config.save_pretrained(work)
    left = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    quantisation = {
        "quant_method": "awq", "version": "gemm", "bits": BITS, "zero_point": True,
        "group_size": _group_size(layers), "modules_to_not_convert": left or None,
    }  # fmt: skip
    raw = read_object(work / "config.json")
    fields = {"architectures": [type(plain).__name__], "dtype": "float16", "quantization_config": quantisation}
    write_json(work / "config.json", raw | fields)
    settings = getattr(given.model, "generation_config", None)
    if settings is not None:
        settings.to_json_file(work / "generation_config.json", keys_to_pop=["compile_config"])
    if given.processor is not None:
        given.processor.save_pretrained(work)
    accompany(work, checkpoint.lineage(given.source), given.source)


def _read(plain: PreTrainedModel, layers: dict[str, Packed], path: Path) -> PreTrainedModel:
    """The plain model with the weights of a file in AWQ's layout, unpacked."""
    stored = load_file(path)
    for name in layers:
        layer = Layer(*(stored.pop(f"{name}.{part}") for part in Layer._fields))
        code_IO, zero_GO, scale_GO = unpack(layer.qweight), unpack(layer.qzeros), layer.scales.float()
        size = len(code_IO) // len(zero_GO)
        zero_IO, scale_IO = (each.repeat_interleave(size, 0) for each in (zero_GO, scale_GO))
        stored[f"{name}.weight"] = (scale_IO * (code_IO - zero_IO)).T.contiguous()
    lacking, stray = plain.load_state_dict({name: tensor.float() for name, tensor in stored.items()}, strict=False)
    plain.tie_weights()
    tied = {name for name, _ in plain.named_parameters()}
    if stray or tied & set(lacking):
        raise PretrainError(f"{path}: {[*stray, *lacking][0]} has no place, or no weight")
    return plain


@torch.no_grad()
def _logits(model: PreTrainedModel, ids_BL: Tensor) -> Tensor:
    logits: Tensor = model.eval()(input_ids=ids_BL, use_cache=False).logits
    return logits

"""From a checkpoint to another program's format: written beside, read back, compared, then put in its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.exchange import awq_out, gguf_out, onnx_out, peft_out, sentences_out
from pretrain.core.exchange.task import PACKED, Export
from pretrain.core.files import JSONObject, atomic_folder
from pretrain.core.foreign.code import brought

NUMBERS, POOLINGS = ("f32", "f16", "bf16", "q8_0"), ("mean", "cls", "lasttoken")
Writer = Callable[[Export, Path], JSONObject]  # writes into a folder, reads it back, and tells what it has compared
WRITERS: dict[str, Writer] = {
    "gguf": gguf_out.write, "onnx": onnx_out.write, "sentence-transformers": sentences_out.write,
    "peft": peft_out.write, "awq": awq_out.write,
}  # fmt: skip
ANY = ("onnx", "peft")  # formats that ask nothing of a model's type
ADAPTED = ("peft",)  # formats that take what plain transformers cannot open


def export(source: Path, target: Path, to: str, numbers: str = "f16", pooling: str = "mean") -> JSONObject:
    """Write a checkpoint in a format as the folder `target`; returns what was compared and how far it is off.

    Raises `PretrainError` for a model that the format cannot hold, and where what is read back is not the same model;
    then nothing is written. An existing `target` is replaced.
    """
    for name, value, known in (("format", to, WRITERS), ("numbers", numbers, NUMBERS), ("pooling", pooling, POOLINGS)):
        if value not in known:
            raise PretrainError(f"{name} {value!r}: accepted: {', '.join(known)}")
    source = checkpoint.checkpoint_of(source)
    model, processor = checkpoint.load(source)
    foreign = [entry["method"] for entry in checkpoint.surgery_of(model) if entry.get("foreign", True)]
    if foreign and to not in ADAPTED:
        raise PretrainError(
            f"{source}: {foreign[-1]} has put in what {to} cannot hold; accepted: a checkpoint that transformers opens "
            "(adapters are folded in by the surgery merge_adapters)"
        )
    if brought(model) is not None and to not in ANY:
        raise PretrainError(
            f"{source}: {to} knows models of transformers, and this is made of code that its checkpoint brings; "
            f"accepted: {', '.join(ANY)}"
        )
    if to == "onnx" and any(hasattr(module, "bits") and not hasattr(module, "weight") for module in model.modules()):
        raise PretrainError(f"{source}: {PACKED}")
    with atomic_folder(target) as work:
        facts = WRITERS[to](Export(model, processor, source, numbers, pooling), work)
        size = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    return {"format": to, "bytes": size} | facts

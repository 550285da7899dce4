"""From a format that is not read, or only half: GGUF, pickled weights, a `config.json` without a model type.

Nothing that a folder brings is run. What is written is a checkpoint as all stages read it, whole or not at all.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.exchange.beside import WEIGHTS
from pretrain.core.exchange.opening import opened
from pretrain.core.exchange.types import named, outlined
from pretrain.core.files import JSONObject, digest, file_digest, read_object, write_json
from pretrain.core.folders import cache_folder, verify
from pretrain.core.foreign import json
from pretrain.core.foreign.paths import strays
from pretrain.core.foreign.pickles import pickled, read_pickled
from pretrain.core.foreign.reading import read_bytes
from pretrain.core.foreign.weights import headers

OLD = ((".gamma", ".weight"), (".beta", ".bias"))  # how the first BERT named its layer norms
DROPPED = ("auto_map", "dtype", "torch_dtype", "eos_token_ids")
ONNX = ".onnx"


def convert(source: Path, target: Path, model_type: str | None = None) -> JSONObject:
    """Write what `source` holds as a checkpoint to `target`; returns how it came about, as the lineage has it.

    Raises `PretrainError` for a target that is there, and for what is no model that transformers has.
    """
    if target.exists():
        raise PretrainError(f"{target} is there already; accepted: a new folder")
    if not source.exists():
        raise PretrainError(f"{source}: there is no such file or folder; accepted: a GGUF file, a folder with weights")
    folder = opened(source, cache_folder())
    if folder != source:
        model, processor = checkpoint.load(folder)
        lineage = checkpoint.lineage(folder)
        checkpoint.save(model, processor, target, lineage, folder)
        return lineage
    folder = source if source.is_dir() else source.parent
    if not (folder / "config.json").exists():
        raise PretrainError(f"{source}: {_why_not(source)}")
    with tempfile.TemporaryDirectory(prefix="pretrain-convert-") as work:
        made_by = _prepared(folder, Path(work), model_type)
        model, processor = checkpoint.load(Path(work))
        lineage = {"made_by": made_by}
        checkpoint.save(model, processor, target, lineage, folder)
    return lineage


def _why_not(source: Path) -> str:
    if source.suffix == ONNX or (source.is_dir() and any(source.glob(f"*{ONNX}"))):
        return (
            "ONNX holds a graph, of which no model of transformers can be made; accepted: the checkpoint it was "
            "exported from"
        )
    return "it has no config.json; accepted: a GGUF file, or a folder with config.json and weights"


def _prepared(folder: Path, work: Path, model_type: str | None) -> JSONObject:
    """The folder in a form that opens, in `work`; returns what was done."""
    verify(folder)
    stored = sorted(folder.glob("*.safetensors"))
    pickles = [] if stored else pickled(folder)
    if not stored and not pickles:
        raise PretrainError(
            f"{folder} holds neither safetensors nor pytorch_model.bin; accepted: a folder with weights"
        )
    out = strays(folder)
    for path in folder.iterdir():
        if not path.is_file() or path in pickles or path.name.endswith((".bin", ".pt", ".pth", ".py", ".h5")):
            continue
        if path.name.endswith(WEIGHTS):
            (work / path.name).symlink_to(path.absolute())
        elif path.name not in out:
            shutil.copyfile(path, work / path.name)
    raw = read_object(folder / "config.json")
    tensors: dict[str, torch.Tensor] = {}
    for path in pickles:
        tensors |= {_renamed(name): tensor for name, tensor in read_pickled(path).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes |= {name: each.shape for name, each in headers(stored).items()}
    whole = named(folder / "config.json", raw, shapes, model_type)
    if not pickles and whole == raw:
        raise PretrainError(f"{folder} opens as it is; accepted: a folder that does not")
    (work / "config.json").unlink(missing_ok=True)
    write_json(work / "config.json", _plain(whole))
    _name_tokenizer(work)
    left_out = _write(whole, tensors, work / "model.safetensors") if pickles else []
    return {
        "name": folder.name, "stage": "convert", "methods": {}, "format": "pickles" if pickles else "safetensors",
        "address": f"convert {digest([file_digest(path) for path in pickles or stored])}",
        "model_type": whole["model_type"], "inferred": raw.get("model_type") is None and model_type is None,
        "left_out": left_out,
    }  # fmt: skip


def _renamed(name: str) -> str:
    for old, new in OLD:
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name


def _name_tokenizer(work: Path) -> None:
    """Say of a `vocab.txt` that it is BERT's, and cased where an entry is: other types would not look at it."""
    words, facts = work / "vocab.txt", work / "tokenizer_config.json"
    held = read_object(facts) if facts.exists() else {}
    if not words.exists() or (work / "tokenizer.json").exists() or "tokenizer_class" in held:
        return
    entries = read_bytes(words, json.MOST).decode(errors="replace").splitlines()
    cased = any(entry != entry.lower() for entry in entries if not entry.startswith("["))
    facts.unlink(missing_ok=True)
    write_json(facts, {"do_lower_case": not cased} | held | {"tokenizer_class": "BertTokenizer"})


def _plain(config: JSONObject) -> JSONObject:
    """The configuration without code, without a type of numbers, which the weights tell, and what is refused today."""
    return {key: value for key, value in config.items() if key not in DROPPED}


def _write(config: JSONObject, tensors: dict[str, torch.Tensor], path: Path) -> list[str]:
    """Write the tensors that the model has a place for, tied ones once; the names of the others are returned."""
    model = outlined(getattr(transformers, config["architectures"][0]), config["model_type"], config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    kept = {name: tensors[name].contiguous().clone() for name in model.state_dict() if name in tensors.keys() - tied}
    save_file(kept, path, {"format": "pt"})
    return sorted(tensors.keys() - kept.keys() - tied)

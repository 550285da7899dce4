"""Checkpoints: a folder in Hugging Face format, plus `pretrain.json`.

`config.json`, `model.safetensors`, the tokenizer's files: plain `from_pretrained` opens it. `pretrain.json` adds the
lineage (what was done, tokens, FLOPs, metrics), the weights' checksum, and, where a surgery put in modules that plain
`transformers` cannot build, the record from which `load` rebuilds them. Such a checkpoint carries a `model_type` that
`transformers` refuses, so that nobody opens it to silently wrong weights.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pretrain.core.errors import PretrainError
from pretrain.core.files import atomic_folder, file_digest, read_json, write_json
from pretrain.core.method import method_class

transformers.utils.logging.disable_progress_bar()

if TYPE_CHECKING:
    from pretrain.core.method import Method

RECORD = "pretrain.json"
FORMAT = 1
FOREIGN = "pretrain_"  # before the model type of a checkpoint that only `load` can open


def record(model: PreTrainedModel, method: Method) -> None:
    """Note on the model a surgery whose `restore` must be run before the weights are loaded."""
    entry = {"method": method.name, "config": dataclasses.asdict(method)}  # type: ignore[call-overload]
    model.pretrain_surgery = [*surgery_of(model), entry]  # type: ignore[assignment]


def surgery_of(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The surgeries that plain `transformers` cannot express, in order."""
    return list(getattr(model, "pretrain_surgery", []))


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path | str,
    lineage: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint atomically: `folder` is the old one until the new one is whole."""
    folder = Path(folder)
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise PretrainError(f"checkpoint {folder} is not written: {name} holds NaN or infinity")
    with atomic_folder(folder) as work:
        model.save_pretrained(work, max_shard_size="5GB")
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        surgery = surgery_of(model)
        if surgery:
            config = read_json(work / "config.json")
            config["model_type"] = FOREIGN + config["model_type"]
            write_json(work / "config.json", config)
        sums = {path.name: file_digest(path) for path in sorted(work.glob("*.safetensors"))}
        write_json(work / RECORD, {"format": FORMAT, "lineage": lineage or {}, "surgery": surgery, "checksums": sums})


def read_record(folder: Path | str) -> dict[str, Any]:
    """`pretrain.json`; empty for a checkpoint from elsewhere."""
    path = Path(folder) / RECORD
    return read_json(path) if path.exists() else {}


def lineage(folder: Path | str) -> dict[str, Any]:
    """How the checkpoint came to be; empty when it is not known."""
    return read_record(folder).get("lineage", {})


def load_config(folder: Path | str) -> Any:
    """The model's configuration, the true type of a surgical checkpoint included."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise PretrainError(f"{folder} is not a checkpoint: it has no config.json")
    raw = read_json(path)
    kind = str(raw.pop("model_type", "")).removeprefix(FOREIGN)
    try:
        config = AutoConfig.for_model(kind, **raw)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PretrainError(f"{path}: model_type {kind!r} cannot be built: {reason}") from error
    config.architectures = raw.get("architectures")
    return config


def load(
    folder: Path | str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Open a checkpoint, ours or from elsewhere: the model (in evaluation mode) and its tokenizer, if it has one.

    Raises `PretrainError` for a missing, truncated or damaged file, for weights that do not fit the configuration, and
    for pickled weights, which are never read.
    """
    folder = Path(folder)
    config, entry = load_config(folder), read_record(folder)
    files = _weight_files(folder)
    for path in files:
        _check(path, entry.get("checksums", {}).get(path.name))
    architecture = (config.architectures or [None])[0]
    if architecture is None or not hasattr(transformers, architecture):
        raise PretrainError(
            f"{folder}/config.json: architectures {config.architectures}: accepted: one of transformers'"
        )
    model_class = getattr(transformers, architecture)
    if entry.get("surgery"):
        model = _restore(model_class, config, entry["surgery"], files)
    else:
        model = _load_plain(model_class, folder, config)
    if dtype is not None:
        model = model.to(dtype)  # type: ignore[arg-type]
    return model.to(device or "cpu").eval(), _load_tokenizer(folder)  # type: ignore[arg-type]


def _load_plain(model_class: Any, folder: Path, config: Any) -> PreTrainedModel:
    try:
        model, report = model_class.from_pretrained(
            folder, config=config, dtype="auto", output_loading_info=True, use_safetensors=True, local_files_only=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise PretrainError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report.get(what):
            first = sorted(map(str, report[what]))[0]
            raise PretrainError(f"{folder}: weights do not fit config.json: {what.replace('_', ' ')}, first {first}")
    return model


def _restore(model_class: Any, config: Any, surgery: list[dict[str, Any]], files: list[Path]) -> PreTrainedModel:
    """Build from the configuration, repeat the recorded surgeries' changes of structure, load the weights strictly."""
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor] = {}
    for path in files:
        weights |= load_file(path)
    model = model_class(config)
    for entry in surgery:
        method: Any = method_class(entry["method"], "surgery")(**_tuples(entry["config"]))
        model = method.restore(model)
        record(model, method)
    model = model.to(next((w.dtype for w in weights.values() if w.is_floating_point()), torch.float32))
    shared = {id(p): name for name, p in model.state_dict(keep_vars=True).items() if name in weights}
    known = model.state_dict(keep_vars=True)
    missing = [n for n, p in known.items() if n not in weights and id(p) not in shared]
    unexpected = [n for n in weights if n not in known]
    if missing or unexpected:
        raise PretrainError(f"weights do not fit the recorded surgery: {(missing + unexpected)[0]}")
    model.load_state_dict(weights, strict=False)
    return model


def _tuples(config: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples; methods' fields are tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    else:
        files = [folder / "model.safetensors"]
    for path in files:
        if not path.exists():
            if list(folder.glob("*.bin")):
                raise PretrainError(f"{folder} holds pickled weights, which are not read; accepted: safetensors")
            raise PretrainError(f"missing file {path}")
    return files


def _check(path: Path, checksum: str | None) -> None:
    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise PretrainError(f"{path} is truncated or damaged ({error})") from error
    if checksum is not None and file_digest(path) != checksum:
        raise PretrainError(f"{path} is damaged: its checksum is not the one in {RECORD}")


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise PretrainError(
            f"{folder}: the tokenizer cannot be loaded: {' '.join(str(error).split())[:200]}"
        ) from error

"""The folder of an adapter of `peft`, given as a checkpoint: its model is opened, and the adapter put into it.

`adapter_config.json` names the model by its folder or its name on the hub; `adapter_model.safetensors` holds what was
trained beside it. The checkpoint made of both is one of the surgery `peft_adapter`: training goes on from the adapter,
and `merge_adapters` folds it in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from transformers import PreTrainedModel

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError, warn
from pretrain.core.exchange.gguf_in import ORIGIN
from pretrain.core.exchange.opening import adapter_at
from pretrain.core.exchange.peft_out import WEIGHTS, base_name
from pretrain.core.files import JSONObject, atomic_folder, digest, file_digest, read_json, read_object, write_json
from pretrain.core.folders import checkpoint_of
from pretrain.core.foreign.paths import expanded
from pretrain.core.foreign.weights import header
from pretrain.core.method import method_class
from pretrain.core.models.heads import output, with_head
from pretrain.core.models.storage import narrow
from pretrain.core.processors import TOKENIZER_FILES, Processor, load_processor, tokenizer_in
from pretrain.core.quick import hub
from pretrain.core.quick.trust import ADAPTER

VERSION = 1  # of what is made of an adapter
BASE = "base_model_name_or_path"
OPENED = {"CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS", ""}  # tasks
CLASSIFIERS = {"SEQ_CLS": "sequence", "TOKEN_CLS": "token"}
MERGED = "the folder that peft's merge_and_unload() and save_pretrained() write"


def key(folder: Path) -> str:
    """What tells an adapter from another, and from itself after a change of it or of its model."""
    base = model_of(folder)
    parts = [(path, path.stat()) for path in sorted((*folder.glob("*"), *base.glob("*"))) if path.is_file()]
    return digest([VERSION, [[str(path.resolve()), state.st_size, state.st_mtime_ns] for path, state in parts]])


def model_of(folder: Path) -> Path:
    """The checkpoint that an adapter goes on: a folder, else what the hub has by that name, as other names are found.

    Raises `PretrainError` for an adapter that is none which changes layers, and where its model is not at hand.
    """
    hub.fetch_weights(folder, warn)
    config = _config(folder)
    name, revision = config.get(BASE), config.get("revision")
    where = f"{folder / ADAPTER}: {BASE} {name!r}"
    if not isinstance(name, str) or not name:
        raise PretrainError(
            f"{where}: accepted: the folder of the model that it was trained on, or its name on the hub"
        )
    place = expanded(name)
    if place.exists():
        if adapter_at(place) is not None:
            raise PretrainError(f"{where} is an adapter itself; accepted: a whole model, as {MERGED}")
        return checkpoint_of(place)
    if not hub.looks_like(name):
        raise PretrainError(f"{where}: there is no such folder; accepted: the model that it was trained on")
    asked = f"{name}@{revision}" if isinstance(revision, str) and revision and "@" not in name else name
    try:
        base = hub.pinned(asked) or hub.pin(asked)
        hub.fetch_weights(base, warn)
    except PretrainError as error:
        raise PretrainError(f"{where}: there is no such folder, and {error}") from error
    return base


def convert(folder: Path, target: Path) -> None:
    """Write the model with the adapter in it, as a checkpoint, to the folder `target`."""
    base, weights = model_of(folder), folder / WEIGHTS
    model, processor = checkpoint.load(base, dtype=torch.float32)
    its = load_processor(folder) if any((folder / name).exists() for name in TOKENIZER_FILES) else None
    model = _with_head(folder, model, its or processor)
    surgery = cast(
        "Callable[..., Callable[[PreTrainedModel], PreTrainedModel]]", method_class("peft_adapter", "surgery")
    )
    with atomic_folder(target) as work:
        model = surgery(folder=str(folder))(model)
        narrow(model, checkpoint.stored_dtype(base))
        parts = (folder / ADAPTER, weights, base / "config.json", *sorted(base.glob("*.safetensors")))
        sha256 = digest([file_digest(path) for path in parts])
        before = checkpoint.lineage(base)
        made_by = {
            "name": folder.resolve().name, "stage": "convert", "address": f"peft {sha256}", "format": "peft",
            "methods": {"peft_adapter": 1}, "base": base_name(base),
        }  # fmt: skip
        stages = [stage for stage in (*before.get("stages", []), before.get("made_by")) if stage]
        checkpoint.save(model, its or processor, work, before | {"stages": stages, "made_by": made_by}, base)
        write_json(work / ORIGIN, {"format": "peft", "file": str(folder), "sha256": sha256})


def layered() -> list[str]:
    """The types of `peft` that change layers: not learnt prompts, nor mixtures of others."""
    tuners = {kind: tuner for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items() if isinstance(tuner, type)}
    return [str(k.value) for k, tuner in tuners.items() if issubclass(tuner, BaseTuner) and k != PeftType.XLORA]


def _config(folder: Path) -> JSONObject:
    """The adapter's configuration, if it is of a kind that can be put into a model."""
    path = folder / ADAPTER
    config = read_object(path)
    kind, task = str(config.get("peft_type")).upper(), str(config.get("task_type") or "").upper()
    if kind not in layered():
        raise PretrainError(f"{path}: peft_type {kind}: accepted: types that change layers, as LORA, or {MERGED}")
    if task not in OPENED:
        raise PretrainError(f"{path}: task_type {task}; accepted: {', '.join(sorted(OPENED - {''}))}, or {MERGED}")
    if not (folder / WEIGHTS).exists():
        pickled = " (a pickled adapter_model.bin is never read)" if (folder / "adapter_model.bin").exists() else ""
        raise PretrainError(f"{folder}: missing file {WEIGHTS}{pickled}; accepted: an adapter in safetensors")
    return config


def _with_head(folder: Path, model: PreTrainedModel, processor: Processor | None) -> PreTrainedModel:
    """The model as the classifier that the adapter was trained in, whose last layer lies with the adapter."""
    config = read_json(folder / ADAPTER)
    head = CLASSIFIERS.get(str(config.get("task_type")).upper())
    if head is None or output(model) is not None:
        return model
    last = [
        each.shape[0] for name, each in header(folder / WEIGHTS).items()
        if name.rpartition(".")[0].endswith(("classifier", "score", "classifier.out_proj")) and len(each.shape) == 2
    ]  # fmt: skip
    tokenizer = tokenizer_in(processor)
    if not last or tokenizer is None:
        raise PretrainError(
            f"{folder}: task_type {config['task_type']}, and no last layer of a classifier lies in it, nor in its "
            f"model; accepted: an adapter with one among modules_to_save, or {MERGED}"
        )
    labels = [f"LABEL_{number}" for number in range(last[-1])]
    return with_head(model, head, labels, Vocabulary.of(tokenizer))

"""What was trained beside frozen weights, alone, as a folder that `peft` opens on the model it was trained beside."""

from __future__ import annotations

import shutil
from pathlib import Path

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.exchange.card import write_card
from pretrain.core.exchange.task import Export
from pretrain.core.files import JSONObject, read_object, write_json
from pretrain.core.foreign.weights import header
from pretrain.core.quick.trust import ADAPTER

WEIGHTS = "adapter_model.safetensors"


def write(given: Export, work: Path) -> JSONObject:
    """Write `adapter_config.json`, with the name of the model below if it is one of the hub, and the weights."""
    folder = given.source / checkpoint.ADAPTER
    if not (folder / ADAPTER).exists():
        raise PretrainError(
            f"{given.source} holds no adapter in peft's format; accepted: a checkpoint that an adapter was put into, "
            "as by the surgery lora, and not yet folded in"
        )
    lineage = checkpoint.lineage(given.source)
    base = next((stage["name"] for stage in lineage.get("stages", []) if stage.get("stage") == "hub"), None)
    config = read_object(folder / ADAPTER)
    write_json(work / ADAPTER, config | {"base_model_name_or_path": config.get("base_model_name_or_path") or base})
    shutil.copyfile(folder / WEIGHTS, work / WEIGHTS)
    write_card(work, lineage, given.source)
    return {"tensors": len(header(work / WEIGHTS)), "base": base or ""}

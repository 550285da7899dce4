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
from pretrain.core.quick import hub
from pretrain.core.quick.trust import ADAPTER

WEIGHTS = "adapter_model.safetensors"


def write(given: Export, work: Path) -> JSONObject:
    """Write `adapter_config.json`, with the name of the model that the adapter goes on, and the weights."""
    folder = given.source / checkpoint.ADAPTER
    if not (folder / ADAPTER).exists():
        raise PretrainError(
            f"{given.source} holds no adapter in peft's format; accepted: a checkpoint that an adapter was put into, "
            "as by the surgery lora, and not yet folded in"
        )
    lineage = checkpoint.lineage(given.source)
    base, revision = base_of(lineage)
    config = read_object(folder / ADAPTER) | {"base_model_name_or_path": base, "revision": revision}
    write_json(work / ADAPTER, config)
    shutil.copyfile(folder / WEIGHTS, work / WEIGHTS)
    write_card(work, lineage, given.source)
    return {"tensors": len(header(work / WEIGHTS)), "base": base or ""}


def base_name(base: Path) -> str:
    """What `peft` is to find a model by: its name on the hub with the revision, `NAME@REVISION`, or its whole path."""
    return (hub.state(base) or str(base.absolute())).removeprefix("hub ")


def base_of(lineage: JSONObject) -> tuple[str | None, str | None]:
    """The checkpoint that an adapter was put into, by its path, or by its name on the hub and its revision there.

    None where it lies nowhere, as after other surgeries of the same stage, and where nothing is known of it.
    """
    stages = [stage for stage in (*lineage.get("stages", []), lineage.get("made_by")) if stage]
    named = next((str(stage["base"]) for stage in reversed(stages) if "base" in stage), None)
    if named is None:
        named = next((stage["name"] for stage in stages if stage.get("stage") == "hub"), "")
    if Path(named).is_absolute():
        return named, None
    name, _, revision = named.partition("@")
    return name or None, revision or None

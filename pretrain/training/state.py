"""Training state: all that a killed training needs to go on with bit-identical results.

One folder a state, `state/step-000120/`: the weights, the optimiser's tensors, and `training.json` with the counters,
the sampler, the policies and the meter. Random generators are seeded anew at each step from (seed, step, rank), so
there is nothing of them to save. A state is written under a temporary name, checksummed, synced and renamed; reading
starts with the newest and falls back to an older one when a checksum does not hold.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from pretrain.core.errors import PretrainError
from pretrain.core.files import atomic_folder, file_digest, read_json, sweep, write_json
from pretrain.core.weights import load_tensors
from pretrain.training.distributed import World, full, like

TENSORS = ("model", "optimizer", "policies")


def split_tensors(tree: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A JSON-like copy of `tree` with each tensor replaced by `{"tensor": name}` and put into `tensors`."""
    if isinstance(tree, torch.Tensor):
        tensors[prefix] = full(tree).detach().cpu().contiguous().clone()
        return {"tensor": prefix}
    if isinstance(tree, dict):
        return {str(k): split_tensors(v, f"{prefix}.{k}", tensors) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [split_tensors(v, f"{prefix}.{i}", tensors) for i, v in enumerate(tree)]
    return tree


def join_tensors(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `split_tensors` (tuples come back as lists, keys as strings)."""
    if isinstance(tree, dict):
        if set(tree) == {"tensor"}:
            return tensors[tree["tensor"]]
        return {k: join_tensors(v, tensors) for k, v in tree.items()}
    if isinstance(tree, list):
        return [join_tensors(v, tensors) for v in tree]
    return tree


def save(
    folder: Path,
    step: int,
    trainee: nn.Module,
    optimizer: torch.optim.Optimizer,
    policies: dict[str, Any],
    record: dict[str, Any],
    world: World,
    keep: int,
) -> None:
    """Write the state after `step` steps and remove all but the newest `keep`; every process must call it."""
    tensors: dict[str, dict[str, torch.Tensor]] = {name: {} for name in TENSORS}
    split_tensors(dict(trainee.state_dict()), "", tensors["model"])
    record = record | {
        "step": step,
        "optimizer": split_tensors(optimizer.state_dict(), "", tensors["optimizer"]),
        "policies": split_tensors(policies, "", tensors["policies"]),
    }
    if world.main:
        sweep(folder)
        with atomic_folder(folder / f"step-{step:09d}") as work:
            for name in TENSORS:
                save_file(tensors[name], work / f"{name}.safetensors")
            (work / "training.json").write_text(json.dumps(record), encoding="utf-8")
            write_json(work / "checksums.json", {p.name: file_digest(p) for p in sorted(work.iterdir())})
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    world.wait()


def newest(folder: Path) -> Path | None:
    """The newest state whose files all match their checksums; damaged ones are passed over."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            sums = read_json(path / "checksums.json")
            if all(file_digest(path / name) == value for name, value in sums.items()):
                return path
        except (PretrainError, OSError):
            continue
    return None


def load(path: Path, trainee: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put a state back into the modules and the optimiser; returns `training.json` and the policies' state."""
    try:
        tensors = {name: load_tensors(path / f"{name}.safetensors") for name in TENSORS}
    except (SafetensorError, OSError) as error:
        raise PretrainError(
            f"training state {path} cannot be read ({error}); remove it to resume from an older"
        ) from error
    record = read_json(path / "training.json")
    current = trainee.state_dict()
    weights = {name.removeprefix("."): value for name, value in tensors["model"].items()}
    if set(weights) != set(current):
        odd = sorted(set(weights) ^ set(current))
        raise PretrainError(f"training state {path} is of another model: {odd[0]} is not in both")
    with torch.no_grad():
        for name, value in current.items():
            value.copy_(like(weights[name], value))
    _load_optimizer(optimizer, join_tensors(record.pop("optimizer"), tensors["optimizer"]))
    return record, join_tensors(record.pop("policies"), tensors["policies"])


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Restore an optimiser's state with its exact types (torch's own loading would cast it to the weights' type)."""
    owners = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.clear()
    for index, entries in saved["state"].items():
        parameter, group = owners[int(index)]
        on_device = group.get("fused") or group.get("capturable")

        def place(v: Any, parameter: Any = parameter, on_device: Any = on_device) -> Any:
            if not isinstance(v, torch.Tensor):
                return v
            if v.shape == parameter.shape and v.ndim:
                return like(v, parameter)
            return v.to(parameter.device) if v.ndim or on_device else v

        optimizer.state[parameter] = {k: place(v) for k, v in entries.items()}
    for group, was in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for key, value in was.items():
            if key != "params":
                group[key] = tuple(value) if isinstance(value, list) else value

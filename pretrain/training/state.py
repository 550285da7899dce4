"""Training state: all that a killed training needs to go on with bit-identical results.

One folder a state, `state/step-000120/`: the weights, the optimiser's and the policies' tensors in pieces
(`rank-00000.safetensors`, each process what it holds), and `training.json` with the counters, the sampler, the policies
and the meter. Random generators are seeded anew at each step from (seed, step, rank), so there is nothing of them to
save.

To save, each process copies what it is to write into the host's memory; the rest is done in the background: the files
are written under a temporary name, checksummed and synced, and when those of all processes are whole the first renames
the folder. Nothing is written that is not finite. Reading starts with the newest and falls back to an older one when a
checksum does not hold, or when it is another stage's; the number of processes may be another than when it was written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor, nn

from pretrain.core.errors import PretrainError, warn
from pretrain.core.files import (
    JSON,
    JSONObject,
    file_digest,
    fsync,
    not_written,
    open_file,
    put_in_place,
    read_json,
    read_object,
    sweep,
    write_json,
)
from pretrain.core.meter import Counted
from pretrain.training.background import Background
from pretrain.training.distributed import World
from pretrain.training.loader import Counters
from pretrain.training.shards import Piece, Stored, held, like, local, snapshot, write

OF = "of"  # in a list of checksums: whose state it is, and after which step
OLD = ("model", "optimizer", "policies")  # files of states that the first process wrote alone
Tree: TypeAlias = bool | int | float | str | Tensor | list["Tree"] | tuple["Tree", ...] | dict[str, "Tree"] | None
Memory: TypeAlias = dict[str, dict[str, Any]]  # by policy what it remembers: a `Tree`, of which it knows the types


class Record(TypedDict, total=False):
    """What `training.json` says besides the trees of the optimiser and of the policies."""

    step: int
    tokens: int
    flops: int
    dense_flops: int
    useful_flops: int
    log: list[object]  # the bytes of the log so far, their SHA-256
    seconds: float
    elapsed: float
    opening: float
    preparing: float
    timed: int
    measuring: float
    measured: int
    unmeasured: bool
    rates: dict[str, float]
    metrics: dict[str, float]
    meter: dict[str, list[Counted]]
    loader: Counters
    seed: int
    skipped: int
    skipped_in_row: int
    files: int


class _Optimizer(TypedDict):
    state: dict[str, dict[str, JSON]]
    param_groups: list[dict[str, JSON]]


def split_tensors(tree: Tree, prefix: str, tensors: dict[str, Tensor]) -> JSON:
    """A JSON-like copy of `tree` with each tensor replaced by `{"tensor": name}` and put into `tensors`."""
    if isinstance(tree, Tensor):
        tensors[prefix] = tree
        return {"tensor": prefix}
    if isinstance(tree, dict):
        return {str(k): split_tensors(v, f"{prefix}.{k}", tensors) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [split_tensors(v, f"{prefix}.{i}", tensors) for i, v in enumerate(tree)]
    return tree


def join_tensors(tree: JSON, read: Callable[[str], Tensor]) -> Any:
    """The inverse of `split_tensors` (tuples come back as lists, keys as strings); `read` gives a tensor by name."""
    if isinstance(tree, dict):
        name = tree.get("tensor")
        if set(tree) == {"tensor"} and isinstance(name, str):
            return read(name)
        return {k: join_tensors(v, read) for k, v in tree.items()}
    if isinstance(tree, list):
        return [join_tensors(v, read) for v in tree]
    return tree


def save(
    folder: Path,
    step: int,
    trainee: nn.Module,
    optimizer: torch.optim.Optimizer,
    policies: Memory,
    record: Mapping[str, object],
    world: World,
    keep: int,
    background: Background,
    stage: str = "",
) -> None:
    """Save the state after `step` steps and remove all but the newest `keep`; every process must call it.

    `stage` is the address of whose it is. Returns when all is copied; the writing goes on in the `background`.
    """
    background.wait()  # two copies of the state at a time are enough
    alike, others, trees = _tensors(trainee, optimizer, policies)
    pieces = snapshot(alike, others, world.rank, world.size)
    text = json.dumps({**record, **trees, "step": step, "files": world.size})
    target, work = folder / f"step-{step:09d}", folder / f".tmp-step-{step:09d}"

    def begin() -> None:
        if world.main:
            sweep(folder)
            work.mkdir(parents=True)

    def write_own() -> None:
        _check_finite(pieces, alike, step)
        write(pieces, work / f"rank-{world.rank:05d}.safetensors")
        mine = [work / f"rank-{world.rank:05d}.safetensors"]
        if world.main:
            (work / "training.json").write_text(text, encoding="utf-8")
            mine.append(work / "training.json")
        for path in mine:
            fsync(path)
        sums: JSONObject = {path.name: file_digest(path) for path in mine}
        write_json(work / f"checksums-{world.rank:05d}.json", sums | {OF: {"stage": stage, "state": target.name}})

    def finish() -> None:
        if world.main:
            put_in_place(work, target)
            states = sorted(folder.glob("step-*"))
            kept = [path for path in states if path.name <= target.name][-keep:]
            for other in set(states) - set(kept):  # later ones are damaged: they were passed over
                shutil.rmtree(other, ignore_errors=True)

    def whole() -> None:
        try:
            for part in (begin, write_own, finish):
                background.together(part)
        except Exception as error:
            if world.main:
                shutil.rmtree(work, ignore_errors=True)
            raise not_written(target, work, error) from error

    background.hand_in(whole)


def _tensors(
    trainee: nn.Module, optimizer: torch.optim.Optimizer, policies: Memory
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, JSON]]:
    """The tensors by name, those that all processes hold alike and the others, and what they are part of, in JSON."""
    alike: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    parameters = {name for name, _ in trainee.named_parameters(remove_duplicate=False)}
    for name, tensor in trainee.state_dict().items():
        (alike if name in parameters else others)[f"model.{name}"] = tensor
    trees = {"optimizer": split_tensors(optimizer.state_dict(), "optimizer", alike)}
    return alike, others, trees | {"policies": split_tensors({**policies}, "policies", others)}


def _check_finite(pieces: dict[str, Piece], finite: Collection[str], step: int) -> None:
    """An error where a weight or the optimiser's memory of one is not finite, or another tensor holds no numbers."""
    for name, piece in pieces.items():
        if not piece.tensor.is_floating_point():
            continue
        if (name in finite and not piece.tensor.isfinite().all()) or piece.tensor.isnan().any():
            raise PretrainError(
                f"the state after step {step} is not written: {name} is not finite; accepted: a smaller lr"
            )


def newest(folder: Path, world: World | None = None, stage: str = "") -> Path | None:
    """The newest state whose files all match their checksums; of those passed over a warning tells.

    `stage` is the address of whose it must be, where it says so. Among several processes, which must all call it, each
    checks a share of the files. Raises `PretrainError` where there are states and none is good: beginning again is the
    user's choice.
    """
    paths, words = sorted(folder.glob("step-[0-9]*"), reverse=True), []
    for path in paths:
        word = _fault(path, world, stage)
        if not word:
            return path
        words.append(word)
        if world is None or world.main:
            warn(f"the training state {path} is {word} and passed over")
    if paths:
        names, faults = ", ".join(path.name for path in reversed(paths)), " or ".join(sorted({*words}))
        raise PretrainError(
            f"{folder}: all training states are {faults} ({names}); accepted: one of them as it was written, or "
            "`--refresh` of this stage, which trains from the beginning"
        )
    return None


def _fault(path: Path, world: World | None, stage: str) -> str:
    """What is wrong with a state, in a word or two: it is damaged, or another's; empty of a good one."""
    rank, size = (world.rank, world.size) if world else (0, 1)
    try:
        lists = sorted(path.glob("checksums*.json"))
        other = False
        sums: JSONObject = {}
        for each in lists:
            rows = read_object(each)
            if (of := rows.pop(OF, None)) is not None:  # of states of before nothing is said
                other = other or of["state"] != path.name or of["stage"] not in ("", stage or of["stage"])
            sums |= rows
        bad = "training.json" not in sums or len(lists) < read_json(path / "training.json").get("files", 1)
        for name in sorted(sums)[rank::size]:
            bad = bad or file_digest(path / name) != sums[name]
    except (PretrainError, OSError, AttributeError, TypeError, KeyError):
        bad, other = True, False
    bad, other = (count > 0 for count in (world.sum([bad, other]) if world else (bad, other)))
    return "damaged" if bad else "another stage's" if other else ""


def load(path: Path, trainee: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Record, Memory]:
    """Put a state back into the modules and the optimiser; returns `training.json` and the policies' state."""
    record, files = read_json(path / "training.json"), {file: "" for file in sorted(path.glob("rank-*.safetensors"))}
    old = "files" not in record
    if old:
        files = {path / f"{name}.safetensors": name for name in OLD}
    try:
        stored = Stored(files)
    except PretrainError as error:
        raise PretrainError(f"training state: {error}; remove {path} to resume from an older") from error
    current = trainee.state_dict()
    saved = {name.removeprefix("model.") for name in stored.shapes if name.startswith("model.")}
    if saved != set(current):
        odd = sorted(saved ^ set(current))
        raise PretrainError(f"training state {path} is of another model: {odd[0]} is not in both")
    with torch.no_grad():
        for name, value in current.items():
            local(value).copy_(stored.read(f"model.{name}", held(value)))
    _load_optimizer(optimizer, trainee, record.pop("optimizer"), stored, "optimizer" if old else "")
    policies = join_tensors(record.pop("policies"), lambda name: stored.read(("policies" if old else "") + name))
    return record, policies


def _load_optimizer(
    optimizer: torch.optim.Optimizer, trainee: nn.Module, saved: _Optimizer, stored: Stored, before: str
) -> None:
    """Restore an optimiser's state with its exact types (torch's own loading would cast it to the weights' type)."""
    owners = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    groups = list(zip(optimizer.param_groups, saved["param_groups"], strict=False))
    if [g["params"] for g in optimizer.state_dict()["param_groups"]] != [g["params"] for g in saved["param_groups"]]:
        # A state of before, when parameters were grouped by whether they have two dimensions.
        order, groups = {id(p): number for number, p in enumerate(trainee.parameters())}, []
        owners.sort(key=lambda owner: (owner[0].ndim < 2, order[id(owner[0])]))
    optimizer.state.clear()
    for index, entries in saved["state"].items():
        parameter, group = owners[int(index)]
        on_device = bool(group.get("fused") or group.get("capturable"))

        def read(name: str, parameter: Tensor = parameter, on_device: bool = on_device) -> Tensor:
            shape = stored.shapes[before + name]
            if shape and shape == parameter.shape:
                return like(stored, before + name, parameter)
            value = stored.read(before + name)
            return value.to(parameter.device) if shape or on_device else value

        optimizer.state[parameter] = {key: join_tensors(entry, read) for key, entry in entries.items()}
    for group, was in groups:
        for key, value in was.items():
            if key != "params":
                group[key] = tuple(value) if isinstance(value, list) else value


def noted(path: Path) -> list[object]:
    """What a state notes of the log it is saved beside: its bytes so far, and their SHA-256 (hex)."""
    return [path.stat().st_size, file_digest(path)] if path.exists() else [0, ""]


def set_aside(path: Path, note: object) -> None:
    """Move a log away that no longer begins with what a state has `noted` of it: what it says is not to be believed."""
    if not isinstance(note, list) or not note[1]:  # of a state of before, or of one beside which no log was
        return
    kept = b""
    if path.exists():
        with open_file(path) as file:
            kept = file.read(int(str(note[0])))
    if hashlib.sha256(kept).hexdigest() != note[1]:
        aside = path.with_name("log.damaged.jsonl")
        what = f"damaged, it is kept as {aside.name}" if path.exists() else "gone"
        if path.exists():
            path.replace(aside)
        warn(f"{path} is {what}: training goes on, and its log and curves begin here")

"""Training states: in pieces, by any number of processes, in the background, and those of before."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_training import finish, log, small, weights

from pretrain.core.errors import PretrainError, PretrainWarning
from pretrain.core.files import file_digest, write_json
from pretrain.policies import Policy
from pretrain.training import state
from pretrain.training.budget import Budget
from pretrain.training.loop import Settings
from pretrain.training.shards import Stored

pytestmark = pytest.mark.processes

JOB = Path(__file__).with_name("state_job.py")


@pytest.fixture(scope="module")
def saved(prepared, tmp_path_factory) -> dict[str, Path]:
    """Folders of trainings that saved after their third step: alone, and as two processes."""
    folder = tmp_path_factory.mktemp("saved")
    finish(folder / "alone", prepared, 3, "ddp", "0")
    for strategy in ("ddp", "fsdp"):
        finish(folder / strategy, prepared, 3, strategy, "0", processes=2)
    return {path.name: path for path in folder.iterdir()}


def stored(folder: Path) -> Stored:
    path = state.newest(folder)
    assert path is not None
    return Stored({file: "" for file in path.glob("rank-*.safetensors")})


def equal(one: Stored, other: Stored) -> bool:
    assert one.shapes == other.shapes and any(name.startswith("optimizer") for name in one.shapes)
    return all(torch.equal(one.read(name), other.read(name)) for name in one.shapes)


@pytest.mark.promise("Determinism", "A training state is read by another number of processes without a bit changed.")
@pytest.mark.parametrize(
    ("before", "processes", "strategy"),
    [("fsdp", 1, "ddp"), ("ddp", 1, "ddp"), ("alone", 2, "fsdp"), ("alone", 2, "ddp"), ("ddp", 2, "fsdp")],
)
def test_a_state_is_read_by_another_number_of_processes_and_no_bit_changes(
    prepared, saved, tmp_path, before, processes, strategy
):
    (tmp_path / "state").symlink_to(saved[before] / "state")
    command = [sys.executable, str(JOB)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    subprocess.run([*command, str(tmp_path), str(prepared), strategy], check=True)
    assert len(list((tmp_path / "again").glob("step-*/rank-*.safetensors"))) == processes
    assert equal(stored(tmp_path / "again"), stored(saved[before] / "state"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_each_process_writes_a_share_and_none_the_whole(saved, strategy):
    path = state.newest(saved[strategy] / "state")
    sizes = [file.stat().st_size for file in sorted(path.glob("rank-*.safetensors"))]
    alone = (state.newest(saved["alone"] / "state") / "rank-00000.safetensors").stat().st_size
    assert len(sizes) == 2 and all(0.4 * alone < size < 0.6 * alone for size in sizes)
    with safe_open(path / "rank-00001.safetensors", framework="pt") as file:
        name = next(n for n in json.loads(file.metadata()["pieces"]) if n.endswith("down_proj.weight"))
        whole, start = json.loads(file.metadata()["pieces"])[name]
        held = file.get_slice(name).get_shape()
    assert (held, start) == (([16, 64], [16, 0]) if strategy == "fsdp" else (whole, [0, 0])) and whole == [32, 64]


@pytest.mark.promise(
    "Determinism", "A training that goes on with 1, 2 or 4 processes has the losses of one process, to rounding"
)
@pytest.mark.parametrize(("before", "processes", "strategy"), [("fsdp", 1, "ddp"), ("alone", 2, "fsdp")])
def test_training_goes_on_as_if_the_number_of_processes_had_not_changed(
    prepared, saved, tmp_path, before, processes, strategy
):
    for name in ("changed", "same"):
        (tmp_path / name).mkdir()
        source = saved["alone"] if name == "same" else saved[before]
        (tmp_path / name / "state").mkdir()
        for path in (source / "state").iterdir():
            (tmp_path / name / "state" / path.name).symlink_to(path)
    finish(tmp_path / "same", prepared, 8, "ddp", "0")
    finish(tmp_path / "changed", prepared, 8, strategy, "0", processes=processes)
    one, two = ([row["loss"] for row in log(tmp_path / name)] for name in ("same", "changed"))
    assert len(one) == 5 and two == pytest.approx(one, rel=1e-4)
    for name, value in weights(tmp_path / "same").items():
        assert torch.allclose(value, weights(tmp_path / "changed")[name], atol=2e-3), name


def test_a_part_is_read_without_the_rest(tmp_path):
    whole = torch.arange(35.0).view(7, 5)
    for rank, (start, stop) in enumerate([(0, 4), (4, 7)]):
        index = {"pieces": json.dumps({"w": [[7, 5], [start, 0]]})}
        save_file({"w": whole[start:stop].clone()}, tmp_path / f"{rank}.safetensors", index)
    files = Stored({path: "" for path in tmp_path.iterdir()})
    assert torch.equal(files.read("w"), whole)
    for start, stop in [(0, 2), (3, 6), (5, 7), (7, 7)]:
        assert torch.equal(files.read("w", ((start, 0), (stop - start, 5))), whole[start:stop])
    (tmp_path / "1.safetensors").unlink()
    alone = Stored({tmp_path / "0.safetensors": ""})
    assert torch.equal(alone.read("w", ((1, 0), (3, 5))), whole[1:4])
    with pytest.raises(PretrainError, match="w: 20 of 35 values are on disk"):
        alone.read("w")


@pytest.mark.promise("Faults", "A training state that is damaged")
@pytest.mark.parametrize("lost", ["rank-00001.safetensors", "checksums-00001.json", "training.json"])
def test_a_state_of_which_one_processs_file_is_lost_is_passed_over(saved, tmp_path, lost):
    (tmp_path / "step-000000003").mkdir()
    source = state.newest(saved["fsdp"] / "state")
    for path in source.iterdir():
        if path.name != lost:
            (tmp_path / "step-000000003" / path.name).symlink_to(path)
    with (
        pytest.warns(PretrainWarning, match="step-000000003 is damaged and passed over"),
        pytest.raises(PretrainError, match=r"all training states are damaged \(step-000000003\).*--refresh"),
    ):
        state.newest(tmp_path)


@pytest.mark.bits
def test_states_of_before_still_resume(tiny, prepared, tmp_path):
    """One file each of the weights, the optimiser and the policies, whose names begin with a dot."""
    settings = Settings(budget=Budget(steps=6), save_every=3, bar=False)
    whole = small(prepared, tiny, tmp_path / "a", settings=settings, policies=[Remember()])
    new = tmp_path / "a" / "state" / "step-000000003"
    old = tmp_path / "b" / "state" / "step-000000003"
    old.mkdir(parents=True)
    files, record = Stored({new / "rank-00000.safetensors": ""}), json.loads((new / "training.json").read_text())
    for kind in ("model", "optimizer", "policies"):
        tensors = {n.removeprefix(kind): files.read(n) for n in files.shapes if n.startswith(f"{kind}.")}
        save_file(tensors, old / f"{kind}.safetensors")
    del record["files"], record["skipped"], record["skipped_in_row"]
    text = json.dumps(record).replace('{"tensor": "optimizer.', '{"tensor": ".')
    (old / "training.json").write_text(text.replace('{"tensor": "policies.', '{"tensor": ".'))
    write_json(old / "checksums.json", {path.name: file_digest(path) for path in old.iterdir()})
    again = small(prepared, tiny, tmp_path / "b", settings=settings, policies=[Remember()])
    assert [row["step"] for row in log(tmp_path / "b")] == [4, 5, 6]
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    assert torch.equal(whole.state["remember"]["sum"], again.state["remember"]["sum"])


@dataclass(frozen=True)
class Remember(Policy):
    """Remembers a tensor."""

    name = "remember"

    def after_step(self, training: Any, state: Any, batches: Any, losses: Any) -> None:
        state["sum"] = state.get("sum", torch.zeros(3)) + training.step


@dataclass(frozen=True)
class At(Policy):
    """Does something after a step."""

    step: int
    what: Any
    name = "at"

    def after_step(self, training: Any, state: Any, batches: Any, losses: Any) -> None:
        if training.step == self.step:
            self.what(training)


def test_a_state_is_written_while_training_goes_on(tiny, prepared, tmp_path, monkeypatch):
    """The disk is as slow as two further steps; the state is that of the step it was asked for."""
    gone_on, write = threading.Event(), state.write
    waited = []

    def slow(pieces: Any, path: Path) -> None:
        waited.append(gone_on.wait(60))
        write(pieces, path)

    monkeypatch.setattr(state, "write", slow)
    settings = Settings(budget=Budget(steps=6), save_every=4, bar=False)
    small(prepared, tiny, tmp_path / "a", settings=settings, policies=[At(6, lambda _: gone_on.set())])
    assert waited == [True, True]
    monkeypatch.setattr(state, "write", write)
    ended = Settings(budget=Budget(steps=4), save_every=4, bar=False)
    small(prepared, tiny, tmp_path / "b", settings=ended, policies=[At(9, print)])
    one, other = (Stored({tmp_path / x / "state" / "step-000000004" / "rank-00000.safetensors": ""}) for x in "ab")
    assert equal(one, other)


@pytest.mark.promise("Faults", "A full disk is one line, and what was there stays.")
def test_a_disk_that_is_full_is_told_of_at_the_next_state(tiny, prepared, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state, "write", full)
    settings = Settings(budget=Budget(steps=9), save_every=2, bar=False)
    with pytest.raises(PretrainError, match=r"cannot write .*step-000000002: No space left on device"):
        small(prepared, tiny, tmp_path, settings=settings)
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3, 4] and not list((tmp_path / "state").iterdir())


def test_an_interrupt_waits_for_the_state(tiny, prepared, tmp_path, monkeypatch):
    write, begun = state.write, threading.Event()

    def slow(pieces: Any, path: Path) -> None:
        begun.set()
        threading.Event().wait(0.5)
        write(pieces, path)

    def interrupt(training: Any) -> None:
        training.interrupts.asked = True

    monkeypatch.setattr(state, "write", slow)
    settings = Settings(budget=Budget(steps=9), save_every=100, bar=False)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3"):
        small(prepared, tiny, tmp_path, settings=settings, policies=[At(3, interrupt)])
    assert begun.is_set() and state.newest(tmp_path / "state").name == "step-000000003"

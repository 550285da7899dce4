"""A step of training neither waits for its device nor talks among processes more than it must."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_cases import build
from torch.utils._python_dispatch import TorchDispatchMode
from training_job import parts

from pretrain.core.batch import is_count, to_device
from pretrain.core.errors import PretrainError
from pretrain.core.meter import Work
from pretrain.core.models.cross_entropy import linear_cross_entropy
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.training.distributed import World
from pretrain.training.loop import _start, exchange, forward_backward, step
from pretrain.training.running import Settings, Training

META = torch.device("meta")  # a device whose values nobody can read: whoever waits for one fails


class Reads(TorchDispatchMode):
    """Notes each tensor whose value is read."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.tensors.append(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def reads() -> Iterator[list[torch.Tensor]]:
    mode = Reads()
    with mode:
        yield mode.tensors


def test_a_step_reads_counts_which_are_on_the_host_and_one_flag(prepared, tmp_path):
    training = _start(*parts(tmp_path, prepared, 99), None, [])
    step(training)  # the first is metered
    taken = training.loader.step
    seen: list[Any] = []
    training.loader.step = lambda *given: seen.extend(taken(*given)) or seen
    with reads() as tensors:
        step(training)
    counts = {
        id(value)
        for batches in seen
        for batch in batches
        for name, value in batch.items()
        if is_count(name) or name == "cut"
    }
    others = [tensor for tensor in tensors if id(tensor) not in counts]
    targets = len(seen)  # on a CPU each loss asks whether all positions have targets, which costs nothing there
    assert [t.dtype for t in others] == [torch.bool] * (targets + 1), others
    assert len(seen) == 4


def test_counts_stay_on_the_host():
    batch = {"tokens": torch.tensor(3), "weight": torch.tensor(2), "weight_x": torch.tensor(1), "mask": torch.tensor(4)}
    moved = to_device(batch | {"tokens_BL": torch.zeros(2, 2)}, META)
    assert {name: value.device.type for name, value in moved.items()} == {
        "tokens": "cpu", "weight": "cpu", "weight_x": "cpu", "mask": "meta", "tokens_BL": "meta"
    }  # fmt: skip


@pytest.mark.parametrize("case", [("causal_lm", {}, "llama"), ("masked_lm", {}, "bert"), ("span_corruption", {}, "t5")])
def test_gradients_are_made_without_reading_anything_of_the_device(prepared, tmp_path, monkeypatch, case):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # it knows of no such device
    made = build(*case, prepared, tmp_path)
    made.trainee.to(META)
    nothing: Any = None
    training = Training(
        made.trainee, made.trainee, nothing, nothing, nothing, (), Settings(budget=nothing, precision="float32"),
        World(0, 1, META), tmp_path,
    )  # fmt: skip
    micro_batches = [[to_device(batch, META) for batch in batches] for batches in made.micro_batches()]
    works = [Work(str(number)) for number, _ in enumerate(micro_batches)]
    totals = exchange(training, micro_batches, works, {})
    losses, record = forward_backward(training, micro_batches, works, {}, totals)
    norm = torch.nn.utils.clip_grad_norm_(made.trainee.parameters(), 1.0)
    assert len(losses) == 4 and record["loss"].device == norm.device == META
    with pytest.raises(RuntimeError, match="meta"):
        float(norm)


@pytest.mark.bits
def test_targets_found_by_their_number_are_those_found_by_looking():
    """What a device does that need not be asked: on a CPU the two ways are compared."""
    torch.manual_seed(0)
    hidden_BLE, weight_VE = torch.randn(3, 7, 4), torch.randn(11, 4)
    target_BL, weight_BL = torch.randint(0, 11, (3, 7)), torch.rand(3, 7)
    target_BL[torch.rand(3, 7) < 0.4] = -100
    number, results = int((target_BL != -100).sum()), []
    for targets in (None, number):
        h, w = hidden_BLE.clone().requires_grad_(), weight_VE.clone().requires_grad_()
        with by_number(targets is not None):
            value, nll_BL = linear_cross_entropy(h, w, target_BL, weight_BL=weight_BL, targets=targets)
        value.backward()
        results.append((value.detach(), nll_BL, h.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with by_number(True):
        value, _ = linear_cross_entropy(hidden_BLE, weight_VE, target_BL, targets=number - 1)
    assert value.isnan()


@contextmanager
def by_number(yes: bool) -> Iterator[None]:
    """While open, the loss takes the CPU for a device that is not to be waited for."""
    from pretrain.core.models import cross_entropy

    was = cross_entropy.READABLE
    cross_entropy.READABLE = () if yes else was
    try:
        yield
    finally:
        cross_entropy.READABLE = was


@pytest.mark.processes
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_exchange_numbers_once_a_step(prepared, tmp_path, strategy):
    job = Path(__file__).with_name("step_job.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(job)]
    subprocess.run([*command, str(tmp_path), str(prepared), strategy], check=True)


def test_an_objective_without_a_weight_or_a_loss_is_one_clear_line(prepared, tmp_path):
    def trained(objective):
        model, loader, _, *others = parts(tmp_path / type(objective).__name__, prepared, 3)
        loader.objectives = [objective]
        step(_start(model, loader, [objective], *others, None, []))

    class Weightless(CausalLM):
        name = "weightless"

        def prepare(self, rows, context):
            return {name: value for name, value in super().prepare(rows, context).items() if name != "weight"}

    class Bare(CausalLM):
        name = "bare"

        def loss(self, model, batch, modules=None):
            return super().loss(model, batch, modules).value

    with pytest.raises(PretrainError, match=r"weightless: prepare gave .*tokens_BL.*; accepted: beside them `weight`"):
        trained(Weightless())
    with pytest.raises(PretrainError, match=r"bare: loss gave a Tensor; accepted: a pretrain.objectives.Loss"):
        trained(Bare())

"""The training loop.

Reads top to bottom: `train` is the loop, `Training` what it holds and what policies see, and the few functions below
are one step's parts. What a step computes is a function of the state before it and (seed, step, rank) alone.

Shape letters: B rows of a micro-batch, L tokens of a row.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.core import hardware
from pretrain.core.batch import Batch, to_device
from pretrain.core.errors import PretrainError
from pretrain.core.meter import Meter, peak_memory
from pretrain.core.models import families
from pretrain.core.models.fast import accelerate
from pretrain.objectives import Loss, Objective
from pretrain.optim import Optimizer, Schedule
from pretrain.policies import Policy
from pretrain.training import state as states
from pretrain.training.budget import Budget
from pretrain.training.distributed import World, full, gather, join, synchronised, whole, wrap
from pretrain.training.log import Log


@dataclass(frozen=True)
class Settings:
    """How to train, apart from the methods. Steps count optimiser steps."""

    budget: Budget
    seed: int = 0
    clip: float = 1.0  # the gradient's norm is held below it; 0: no clipping
    evaluate_every: int = 0  # 0: only at the end
    save_every: int = 200  # 0: never
    keep: int = 2  # how many training states stay
    log_every: int = 0  # 0: each step on a CPU, each tenth on a GPU
    precision: str = "auto"  # auto, float32, bfloat16
    strategy: str = "ddp"  # under torchrun: ddp, fsdp
    compile: bool = False  # torch.compile each block
    checkpointing: bool = False  # recompute activations in the backward pass
    bar: bool = True


class Trainee(nn.Module):
    """The model, the modules that its objectives train beside it, and the weighted sum of their losses."""

    def __init__(self, model: nn.Module, objectives: Sequence[Objective], weights: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.beside = nn.ModuleList([objective.modules(model) or nn.Identity() for objective in objectives])
        self.objectives, self.weights = list(objectives), list(weights)

    def forward(self, batches: Sequence[Batch], scales: Sequence[float]) -> tuple[Tensor, list[Loss]]:
        """`batches`: the micro-batch as each objective prepared it; `scales`: its share of the step's targets."""
        losses = [
            objective.loss(self.model, batch, modules)
            for objective, batch, modules in zip(self.objectives, batches, self.beside, strict=True)
        ]
        total = sum(loss.value * w * s for loss, w, s in zip(losses, self.weights, scales, strict=True))
        return torch.as_tensor(total), losses


@dataclass
class Training:
    """A training while it runs: what policies see and may change."""

    trainee: Trainee
    wrapped: nn.Module  # the trainee as its processes share it
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    loader: Any
    policies: Sequence[Policy]
    settings: Settings
    world: World
    folder: Path
    meter: Meter = field(default_factory=Meter)
    state: dict[str, dict[str, Any]] = field(default_factory=dict)  # what each policy remembers
    step: int = 0
    tokens: int = 0
    flops: int = 0
    dense_flops: int = 0  # with the products with zeros that `flops` leaves out
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)  # of the newest evaluation

    @property
    def model(self) -> nn.Module:
        """The model in training."""
        return self.trainee.model

    @property
    def spent(self) -> dict[str, float]:
        """What the budget counts."""
        return {"tokens": self.tokens, "steps": self.step, "flops": self.flops, "seconds": self.seconds}

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, 0 to 1."""
        return self.settings.budget.progress(self.spent)

    def save(self) -> None:
        """Write the training state; every process must call it."""
        names = ("tokens", "flops", "dense_flops", "seconds", "metrics")
        record = {name: getattr(self, name) for name in names}
        record |= {"meter": self.meter.counts, "products": self.meter.products}
        record |= {"loader": self.loader.state(), "seed": self.settings.seed}
        states.save(
            self.folder / "state",
            self.step,
            self.trainee,
            self.optimizer,
            self.state,
            record,
            self.world,
            self.settings.keep,
        )

    def resume(self) -> None:
        """Go on from the newest whole state, if there is one."""
        path = states.newest(self.folder / "state")
        if path is None:
            return
        record, policies = states.load(path, self.trainee, self.optimizer)
        for name in ("step", "tokens", "flops", "seconds", "metrics"):
            setattr(self, name, record[name])
        self.dense_flops = record.get("dense_flops", self.flops)
        self.meter = Meter(record["meter"], record.get("products"))
        self.loader.load_state(record["loader"])
        self.state.update(policies)


def train(
    model: nn.Module,
    loader: Any,
    objectives: Sequence[Objective],
    optimizer: Optimizer,
    schedule: Schedule,
    settings: Settings,
    folder: Path,
    *,
    weights: Sequence[float] | None = None,
    policies: Sequence[Policy] = (),
    evaluate: Callable[[Trainee], dict[str, float]] | None = None,
    targets_per_byte: float | None = None,
) -> Training:
    """Train `model` in place until the budget is spent, going on from the newest state in `folder` if there is one.

    `loader.step(step, progress)` gives this process's micro-batches, each a list with one batch an objective.
    `evaluate(trainee)` gives held-out metrics. `targets_per_byte` turns the loss into bits per byte for the log.
    Writes `log.jsonl`, `tensorboard/` and `state/` into `folder`. An interrupt saves the state, then is raised.
    """
    training = _start(model, loader, objectives, optimizer, schedule, settings, folder, weights, policies)
    world, every = training.world, settings.log_every or (10 if training.world.device.type == "cuda" else 1)

    with Log(folder, main=world.main, from_step=training.step, bar=settings.bar) as log, Interrupts() as interrupts:
        while training.progress < 1:
            record = step(training)
            done = training.progress >= 1
            stop = world.any(interrupts.asked)
            saving = settings.save_every > 0 and (done or stop or training.step % settings.save_every == 0)

            if done or saving or training.step % every == 0:
                log.write("step", _finished(record, training, targets_per_byte), training.progress)
            if evaluate and (done or (settings.evaluate_every and training.step % settings.evaluate_every == 0)):
                with whole(training.wrapped):
                    training.metrics = evaluate(training.trainee.eval())
                training.trainee.train()
                for policy in policies:
                    policy.on_evaluation(training, training.state[policy.name], training.metrics)
                log.write("evaluation", training.spent | {"step": training.step, "metrics": training.metrics}, 0)
            if saving:
                training.save()
            if stop and not done:
                raise KeyboardInterrupt(f"stopped after step {training.step}")
    gather(training.model)
    return training


def _start(
    model: nn.Module,
    loader: Any,
    objectives: Sequence[Objective],
    optimizer: Optimizer,
    schedule: Schedule,
    settings: Settings,
    folder: Path,
    weights: Sequence[float] | None,
    policies: Sequence[Policy],
) -> Training:
    """Place the model, make it quick, wrap it for its processes, build the optimiser, resume."""
    hardware.tune_allocator()
    world = join(hardware.pick_device())
    model.to(world.device)
    torch.manual_seed(settings.seed)  # what objectives train beside the model begins alike in every run
    trainee = Trainee(model, objectives, weights or [1.0] * len(objectives)).to(world.device).train()
    accelerate(model)
    if settings.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.compile:
        for block in families.blocks(model):
            block.compile()
    wrapped = wrap(trainee, families.blocks(model) if world.size > 1 else [], world, settings.strategy)
    built = optimizer.build(trainee.named_parameters())
    for group in built.param_groups:
        group["peak_lr"] = group["lr"]
    state: dict[str, dict[str, Any]] = {policy.name: {} for policy in policies}
    training = Training(trainee, wrapped, built, schedule, loader, policies, settings, world, folder, state=state)
    training.resume()
    for policy in policies:
        policy.start(training, training.state[policy.name])
    return training


def step(training: Training) -> dict[str, Any]:
    """One optimiser step; returns its loss, parts, gradient norm, tokens, FLOPs (all, and of zeros) and seconds."""
    settings, world, number = training.settings, training.world, training.step
    started, seconds_before = time.perf_counter(), training.seconds
    torch.manual_seed(_seed(settings.seed, number, world.rank))
    micro_batches = [
        [to_device(batch, world.device) for batch in batches]
        for batches in training.loader.step(number, training.progress)
    ]
    flat = [batch for batches in micro_batches for batch in batches]
    for policy in training.policies:
        policy.before_step(training, training.state[policy.name], flat)

    losses, record = forward_backward(training, micro_batches)
    record["grad_norm"] = full(nn.utils.clip_grad_norm_(training.trainee.parameters(), settings.clip or math.inf))

    tokens = sum(int(batches[0]["tokens"]) for batches in micro_batches)
    tokens, dense, skipped = (int(n) for n in world.sum([tokens, record["dense_flops"], record["skipped_flops"]]))
    training.step, training.tokens = number + 1, training.tokens + tokens
    training.flops, training.dense_flops = training.flops + dense - skipped, training.dense_flops + dense
    training.seconds = seconds_before + world.longest(time.perf_counter() - started)
    # Only now is it known what a step spends, and with it how many steps the budget makes.
    factor = training.schedule.factor(number, settings.budget.total_steps(training.spent))
    for group in training.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    phase = getattr(training.optimizer, "phase", "")  # steps of one phase cost the same
    _, update = training.meter.run(f"optimizer {phase}", training.optimizer.step)
    training.flops, training.dense_flops = training.flops + update, training.dense_flops + update
    training.optimizer.zero_grad(set_to_none=True)
    for policy in training.policies:
        policy.after_step(training, training.state[policy.name], flat, losses)
    training.seconds = seconds_before + world.longest(time.perf_counter() - started)
    return record | {"tokens": tokens, "dense_flops": dense + update, "seconds": training.seconds - seconds_before}


def forward_backward(training: Training, micro_batches: list[list[Batch]]) -> tuple[list[Loss], dict[str, Any]]:
    """Leave the gradient of the mean over all targets of the step, over micro-batches and processes alike."""
    world, trainee = training.world, training.trainee
    # Each objective's micro-batch counts by its share of the step's targets; processes average, hence their number.
    targets = world.sum([sum(float(b[i]["weight"]) for b in micro_batches) for i in range(len(trainee.objectives))])
    losses: list[Loss] = []
    parts: dict[str, Tensor] = {}
    total, flops, skipped = torch.zeros((), device=world.device), 0, 0
    zeros = _zeros(training)
    layers = {n: m for n, m in families.linears(training.model).items() if n in zeros} if zeros else {}
    for index, batches in enumerate(micro_batches):
        scales = [float(b["weight"]) * world.size / max(n, 1.0) for b, n in zip(batches, targets, strict=True)]

        def work(batches: list[Batch] = batches, scales: list[float] = scales) -> tuple[Tensor, list[Loss]]:
            with autocast(world.device, training.settings.precision):
                value, losses = training.wrapped(batches, scales)
            value.backward()
            return value.detach(), losses

        with synchronised(training.wrapped, last=index + 1 == len(micro_batches)):
            shapes = _shapes(batches)
            (value, micro_losses), micro_flops = training.meter.run(shapes, work, layers)
        losses += [Loss(loss.value.detach(), loss.parts, loss.nll_BL) for loss in micro_losses]
        total, flops = total + value, flops + micro_flops
        skipped += training.meter.skipped(shapes, zeros)
        for loss, scale in zip(micro_losses, scales, strict=True):
            for name, part in loss.parts.items():
                parts[name] = parts.get(name, 0) + part.detach() * scale
    return losses, {"loss": total, "parts": parts, "dense_flops": flops, "skipped_flops": skipped}


def _zeros(training: Training) -> dict[str, float]:
    """The share of zeros that the policies declare for each linear layer; the largest where several do."""
    found: dict[str, float] = {}
    for policy in training.policies:
        for name, share in policy.zeros(training, training.state[policy.name]).items():
            found[name] = max(share, found.get(name, 0.0))
    return found


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The arithmetic's precision: `auto` is what the hardware does well."""
    known = {"auto": hardware.precision(device), "float32": None, "bfloat16": torch.bfloat16}
    if precision not in known:
        raise PretrainError(f"precision {precision!r}: accepted: {', '.join(known)}")
    dtype = known[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class Interrupts:
    """While open, SIGINT and SIGTERM ask the loop to save and stop after its step; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _finished(record: dict[str, Any], training: Training, targets_per_byte: float | None) -> dict[str, Any]:
    """The record of a step as it is logged; a loss or gradient that is not finite ends the training here."""
    world = training.world
    names = list(record["parts"])
    loss, *parts = (
        v / world.size for v in world.sum([float(record["loss"]), *(float(record["parts"][n]) for n in names)])
    )
    norm = float(record["grad_norm"])
    if not (math.isfinite(loss) and math.isfinite(norm)):
        last = states.newest(training.folder / "state")
        raise PretrainError(
            f"loss {loss:g}, gradient norm {norm:g} at step {training.step}: training has diverged; the newest good "
            f"state is {last.name if last else 'the start'}; accepted: a smaller lr, a longer warm-up, a smaller clip"
        )
    rate = record["dense_flops"] / max(record["seconds"], 1e-9)
    return training.spent | {
        "step": training.step,
        "dense_flops": training.dense_flops,
        "loss": loss,
        "parts": dict(zip(names, parts, strict=True)),
        "bits_per_byte": loss / math.log(2) * targets_per_byte if targets_per_byte else None,
        "grad_norm": norm,
        "lr": training.optimizer.param_groups[0]["lr"],
        "tokens_per_second": record["tokens"] / max(record["seconds"], 1e-9),
        "mfu": rate / (hardware.matrix_rate(world.device) * world.size),
        "memory_bytes": peak_memory(world.device),
    }


def _shapes(batches: list[Batch]) -> str:
    """What the FLOPs of a micro-batch depend on."""
    return ";".join(f"{k}{list(v.shape)}" for b in batches for k, v in sorted(b.items()) if v.ndim)


def _seed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

"""What a training holds while it runs: how it was set up, what it trains, what it has spent."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from pretrain.core import hardware
from pretrain.core.batch import Batch
from pretrain.core.errors import PretrainError, warn
from pretrain.core.files import read_json_lines
from pretrain.core.meter import Meter
from pretrain.core.quick.machine import described
from pretrain.core.quick.plan import Plan
from pretrain.objectives import Loss, Objective, sum_of
from pretrain.optim import Schedule
from pretrain.policies import Policy
from pretrain.training import state as states
from pretrain.training.background import Background
from pretrain.training.budget import Budget
from pretrain.training.distributed import World
from pretrain.training.guard import Guard
from pretrain.training.interrupts import Interrupts
from pretrain.training.loader import Loader

# Of which states of before lack some.
KEPT = ("preparing", "timed", "opening", "measuring", "measured", "unmeasured", "rates", "rows", "cut")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train, apart from the methods. Steps count optimiser steps."""

    budget: Budget
    seed: int = 0
    clip: float = 1.0  # the gradient's norm is held below it; 0: no clipping
    evaluate_every: float = 0  # steps, or a share of the budget below 1; 0: only at the end
    save_every: int = 200  # 0: never
    keep: int = 2  # how many training states stay
    log_every: int = 0  # 0: each step on a CPU, each tenth on a GPU
    precision: str = "auto"  # auto, float32, bfloat16
    strategy: str = "ddp"  # under torchrun: ddp, fsdp
    compile: bool = False  # torch.compile each block
    checkpointing: bool = False  # recompute activations in the backward pass
    max_skips: int = 10  # training stops when so many steps in a row are not finite
    bar: bool = True
    unit: str = "tokens"  # what the bar calls the tokens: images are none
    plan: Plan | None = None  # what was expected of it
    begun: float | None = None  # when its stage was, by `time.perf_counter`
    stage: str = ""  # the address of its stage, by which its states are known


class Trainee(nn.Module):
    """The model, the modules that its objectives train beside it, and the weighted sum of their losses.

    What policies add to a loss is part of it.
    """

    def __init__(
        self, model: nn.Module, objectives: Sequence[Objective], weights: Sequence[float],
        policies: Sequence[Policy] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self.beside = nn.ModuleList([objective.modules(model) or nn.Identity() for objective in objectives])
        self.objectives, self.weights = list(objectives), list(weights)
        self.added = [added for policy in policies if (added := policy.added(model)) is not None]

    def forward(self, batches: Sequence[Batch], shares: Sequence[Mapping[str, float]]) -> tuple[Tensor, list[Loss]]:
        """`batches`: the micro-batch as each objective prepared it; `shares`: its share of the step's targets."""
        losses = [
            self._loss(objective, batch, modules)
            for objective, batch, modules in zip(self.objectives, batches, self.beside, strict=True)
        ]
        return sum_of(loss.shared(s, w) for loss, w, s in zip(losses, self.weights, shares, strict=True)), losses

    def _loss(self, objective: Objective, batch: Batch, modules: nn.Module) -> Loss:
        loss = objective.loss(self.model, batch, modules)
        if not isinstance(loss, Loss):
            raise PretrainError(
                f"{objective.name}: loss gave a {type(loss).__name__}; accepted: a pretrain.objectives.Loss"
            )
        for added in self.added:
            loss = added(loss, batch)
        return loss


class Step(TypedDict, total=False):
    """What a step tells, still on the device."""

    loss: Tensor
    parts: dict[str, Tensor]
    grad_norm: Tensor


@dataclass
class Training:
    """A training while it runs: what policies see and may change."""

    trainee: Trainee
    wrapped: nn.Module  # the trainee as its processes share it
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    loader: Loader
    policies: Sequence[Policy]
    settings: Settings
    world: World
    folder: Path
    meter: Meter = field(default_factory=Meter)
    interrupts: Interrupts = field(default_factory=Interrupts)
    state: states.Memory = field(default_factory=dict)  # what each policy remembers
    step: int = 0
    tokens: int = 0
    flops: int = 0
    dense_flops: int = 0  # with the products with zeros that `flops` leaves out
    useful_flops: int = 0  # of the gradient, without what is computed a second time
    rows: int = 0  # or examples, each as often as it was read
    cut: int = 0  # examples among them whose texts were longer than the model reads
    seconds: float = 0.0
    preparing: float = 0.0  # seconds among them in which a shape was compiled or its FLOPs were counted
    timed: int = 0  # steps whose seconds the budget counts
    opening: float = 0.0  # seconds before the first step, of all its parts
    measuring: float = 0.0  # seconds of held-out measurements, and how many of them there were
    measured: int = 0
    unmeasured: bool = False  # whether the measurement after the newest step is still to be made
    before: float = 0.0  # seconds of the parts of this training that were interrupted
    rates: dict[str, float] = field(default_factory=dict)  # FLOP/s of its machines' large products: MFU's yardsticks
    saved: int | None = None  # the step of the newest state
    metrics: dict[str, float] = field(default_factory=dict)  # of the newest evaluation
    enough: bool = False  # whether a policy ends the training before its budget does
    clock: float = field(default_factory=time.perf_counter)  # up to when seconds are counted
    unshared: dict[str, float] = field(default_factory=dict)  # seconds that the other processes do not know of yet
    ready: set[str] = field(default_factory=set)  # shapes that a step was made of as any other will be
    new: bool = False  # whether this step has one that is not
    logged: dict[str, float] = field(default_factory=dict)  # what was spent when the log was last written

    def __post_init__(self) -> None:
        # Policies must not see a step that was not made, and sharded weights have no optimiser that leaves it out.
        alone = self.world.size == 1 or self.settings.strategy == "ddp"
        late = self.world.device.type == "cuda" and alone and not self.policies
        self.begun = time.perf_counter() if self.settings.begun is None else self.settings.begun
        self.guard, self.background = Guard(self.optimizer, late=late), Background(self.world)

    @property
    def model(self) -> nn.Module:
        """The model in training."""
        return self.trainee.model

    @property
    def spent(self) -> dict[str, float]:
        """What the budget counts; of seconds those of steps whose shapes were met before."""
        seconds = self.seconds - self.preparing
        return {"tokens": self.tokens, "steps": self.step, "flops": self.flops, "seconds": seconds}

    @property
    def lost(self) -> dict[str, float]:
        """Steps that were skipped, and texts that were cut, of how many: of these what there are."""
        texts = {"texts_read": self.rows, "texts_cut": self.cut} if self.cut else {}
        skips = {"skipped_steps": self.guard.skipped, "skipped_at_end": self.guard.in_row}
        return {name: count for name, count in (skips | texts).items() if count}

    @property
    def rate(self) -> float:
        """FLOP/s of this machine's large products, MFU's yardstick: measured once for all parts of the training."""
        device = self.world.device
        machine = described(device.type)
        if machine not in self.rates:
            self.rates[machine] = hardware.matrix_rate(device)
        return self.rates[machine]

    @property
    def elapsed(self) -> float:
        """All seconds of all its parts, whatever they went to."""
        return self.before + time.perf_counter() - self.begun

    def opened(self) -> None:
        """Note that its first step is next."""
        self.opening += time.perf_counter() - self.begun

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, 0 to 1."""
        return 1.0 if self.enough else self.settings.budget.progress(self.spent)

    @property
    def stopping(self) -> bool:
        """Whether the loop is to save and stop: asked by a signal that all processes know of."""
        return self.interrupts.agreed or (self.world.size == 1 and self.interrupts.asked)

    def lap(self) -> dict[str, float]:
        """What was spent since the last lap, with the useful FLOPs and all seconds."""
        before, self.logged = self.logged, self.spent | {"useful_flops": self.useful_flops, "seconds": self.seconds}
        return {name: value - before.get(name, 0) for name, value in self.logged.items()}

    def tick(self) -> None:
        """Count the time since the clock's last stand; among several processes it waits for their next exchange."""
        now = time.perf_counter()
        for name in ("seconds", *(["preparing"] if self.new else [])):
            self.unshared[name] = self.unshared.get(name, 0.0) + now - self.clock
        self.clock = now
        if self.world.size == 1:
            self.share(self.unshared)

    def share(self, mean: Mapping[str, float]) -> None:
        """Take in the seconds, a mean over all processes, that `unshared` has gathered in this one."""
        self.seconds += mean.get("seconds", 0.0)
        self.preparing += mean.get("preparing", 0.0)
        self.unshared = {}

    def save(self) -> None:
        """Copy the training state, which is written in the background; every process must call it."""
        names = ("tokens", "flops", "dense_flops", "useful_flops", "metrics", "seconds", *KEPT)
        record = {name: getattr(self, name) for name in names} | {"meter": self.meter.counts}
        record |= {"elapsed": self.elapsed, "loader": self.loader.state(), "seed": self.settings.seed}
        record |= {"skipped": self.guard.skipped, "skipped_in_row": self.guard.in_row}
        record |= {"log": states.noted(self.folder / "log.jsonl")} if self.world.main else {}
        states.save(
            self.folder / "state",
            self.step,
            self.trainee,
            self.optimizer,
            self.state,
            record,
            self.world,
            self.settings.keep,
            self.background,
            self.settings.stage,
        )
        self.saved = self.step

    def resume(self) -> None:
        """Go on from the newest whole state, if there is one."""
        path = states.newest(self.folder / "state", self.world, self.settings.stage)
        if path is None:
            logged = self.folder / "log.jsonl"
            if self.world.main and logged.exists() and (rows := read_json_lines(logged)):
                warn(f"{logged} tells of step {rows[-1].get('step')}, and no state is there: training begins again")
            return
        record, policies = states.load(path, self.trainee, self.optimizer)
        if self.world.main:
            states.set_aside(self.folder / "log.jsonl", record.get("log"))
        self.step, self.tokens, self.seconds = record["step"], record["tokens"], record["seconds"]
        self.flops, self.metrics = record["flops"], record["metrics"]
        self.dense_flops = record.get("dense_flops", self.flops)
        for name in KEPT:
            setattr(self, name, record.get(name, self.step if name == "timed" else getattr(self, name)))
        self.before, self.saved = record.get("elapsed", self.seconds), self.step
        self.useful_flops = record.get("useful_flops", self.dense_flops)
        if "useful_flops" in record:  # else it is of a meter that knew nothing of targets: all is counted anew
            self.meter = Meter(record["meter"])
        self.guard.skipped, self.guard.in_row = record.get("skipped", 0), record.get("skipped_in_row", 0)
        self.loader.load_state(record["loader"])
        self.state.update(policies)

"""The training loop.

Reads top to bottom: `train` is the loop, `step` one step of it, and the few functions below are a step's parts; what a
training holds stands in `running`. What a step computes is a function of the state before it and (seed, step, rank)
alone; of that state the meter's counts are part, since a step whose FLOPs are counted may round otherwise.

The host never waits for the device inside a step, except where a comment says why: it would leave the device idle.

Shape letters: B rows of a micro-batch, L tokens of a row.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.core import hardware
from pretrain.core.batch import LAYOUT, Batch, counts, to_device
from pretrain.core.hardware import autocast
from pretrain.core.meter import Cost, Work, recomputing
from pretrain.core.models import families
from pretrain.core.models.fast import accelerate
from pretrain.core.models.parameters import described
from pretrain.objectives import Loss, Objective, share, sum_of
from pretrain.optim import Optimizer, Schedule
from pretrain.policies import Policy
from pretrain.training import state as states
from pretrain.training.averages import settle
from pretrain.training.compatible import check_averages, check_families, check_together, check_written
from pretrain.training.distributed import full, gather, join, synchronised, wrap
from pretrain.training.guard import seed
from pretrain.training.loader import Loader
from pretrain.training.log import Log, check, step_record
from pretrain.training.measuring import Evaluate, Measuring
from pretrain.training.pace import Pace, stopping
from pretrain.training.running import Settings as Settings
from pretrain.training.running import Step, Trainee, Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIRST = 8  # steps in which shapes are compiled and counted without their seconds being spent
MicroBatches = list[list[Batch]]  # those of a step, each one batch an objective
Counts = dict[str, float]  # the numbers of a batch that say what each term of the loss is the mean over
Zeros = dict[str, float]  # the share of zeros in linear layers, by name


def train(
    model: nn.Module,
    loader: Loader,
    objectives: Sequence[Objective],
    optimizer: Optimizer,
    schedule: Schedule,
    settings: Settings,
    folder: Path,
    *,
    weights: Sequence[float] | None = None,
    policies: Sequence[Policy] = (),
    evaluate: Evaluate | None = None,
    targets_per_byte: float | None = None,
    say: Callable[[str], None] | None = None,
) -> Training:
    """Train `model` in place until the budget is spent, going on from the newest state in `folder` if there is one.

    `loader.step(step, progress)` gives this process's micro-batches, each a list with one batch an objective.
    `evaluate(trainee)` gives held-out metrics. `targets_per_byte` turns the loss into bits per byte for the log.
    `say` gets a line where it goes on, and where the speed is not the planned one. Writes `log.jsonl`, `tensorboard/`
    and `state/` into `folder`. An interrupt saves the state, then is raised. Of a model sharded over processes the
    first has it whole at the end.
    """
    training = _start(model, loader, objectives, optimizer, schedule, settings, folder, weights, policies)
    world, every = training.world, settings.log_every or (10 if training.world.device.type == "cuda" else 1)

    def now(interval: float) -> bool:
        return interval > 0 and training.step % interval == 0

    with (
        Log(folder, main=world.main, from_step=training.step, bar=settings.bar, unit=settings.unit, say=say) as log,
        training.interrupts,
        training.background,
    ):
        measuring, pace = Measuring(training, log, evaluate), Pace(training)
        training.opened()
        log.say(f"going on from step {training.step:,}" if training.step else "")
        if training.unmeasured:  # after the newest step, where an interrupt has put it off
            measuring.make()
            _save_or_stop(training, saving=settings.save_every > 0 and not training.unmeasured, stop=training.stopping)
        while training.progress < 1:
            record = step(training)
            log.say(pace.line())
            done, stop = training.progress >= 1, training.stopping
            saving = settings.save_every > 0 and (done or stop or now(settings.save_every))
            evaluating = measuring.due(done=done)
            telling = done or saving or evaluating or now(every)

            good = check(training, log, record, telling)
            saving = saving and (good or done or stop)  # among steps that are skipped no good state gives way
            if telling and good:
                log.write("step", step_record(training, record, targets_per_byte), training.progress)
            if evaluating:
                measuring.make(record)
                stop = training.stopping
            saving = saving or (settings.save_every > 0 and (training.enough or stop))
            _save_or_stop(training, saving=saving, stop=stop)
    settle(training)
    gather(training.trainee, world)
    return training


def _save_or_stop(training: Training, *, saving: bool, stop: bool) -> None:
    """Save the state if it is time to; stop where that is asked for and something is left to do."""
    if saving:
        training.save()
    if stop and (training.unmeasured or training.progress < 1):
        training.background.wait()
        raise training.interrupts.left(f"stopped after step {training.step}")


def _start(
    model: nn.Module,
    loader: Loader,
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
    check_together(objectives, policies, loader.batch_rows // loader.micro_rows)
    check_averages(optimizer, policies)
    check_families([*objectives, *policies], families.family(model))
    families.apart(model)  # asked now, before the model is compiled, sharded or counted
    if settings.budget.unit == "steps":
        schedule.check(int(settings.budget.limit))
    world = join(hardware.pick_device())
    model.to(world.device)
    torch.manual_seed(settings.seed)  # what objectives train beside the model begins alike in every run
    trainee = Trainee(model, objectives, weights or [1.0] * len(objectives), policies).to(world.device).train()
    if not (settings.compile and world.device.type == "cuda"):  # where the compiler fuses the same, and more
        accelerate(model)
    if settings.checkpointing:
        cast("PreTrainedModel", model).gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": recomputing}
        )
    if settings.compile:
        for block in families.repeated_blocks(model):
            block.compile()
    wrapped = wrap(trainee, families.repeated_blocks(model) if world.size > 1 else [], world, settings.strategy)
    built = optimizer.build(described(trainee))
    for group in built.param_groups:
        group["peak_lr"] = group["lr"]
    state: states.Memory = {policy.name: {} for policy in policies}
    training = Training(trainee, wrapped, built, schedule, loader, policies, settings, world, folder, state=state)
    training.resume()
    training.interrupts.words = partial(stopping, training)
    for policy in policies:
        policy.start(training, training.state[policy.name])
    return training


def step(training: Training) -> Step:
    """One optimiser step; returns its loss, parts and gradient norm, which are still on the device."""
    settings, number = training.settings, training.step
    training.clock = time.perf_counter()
    torch.manual_seed(_seed(settings.seed, number, training.world.rank))
    micro_batches = [
        [to_device(batch, training.world.device) for batch in batches]
        for batches in training.loader.step(number, training.progress)
    ]
    flat = [batch for batches in micro_batches for batch in batches]
    for policy in training.policies:
        policy.before_step(training, training.state[policy.name], flat)
    check_written(training.trainee.objectives, micro_batches)

    works, zeros = [_work(training.model, batches) for batches in micro_batches], _zeros(training)
    training.new = number < FIRST and not training.ready.issuperset(work.shapes for work in works)
    totals = exchange(training, micro_batches, works, zeros)
    losses, record = forward_backward(training, micro_batches, works, zeros, totals)
    for policy in training.policies:
        policy.before_update(training, training.state[policy.name])
    record["grad_norm"] = full(nn.utils.clip_grad_norm_(training.trainee.parameters(), settings.clip or math.inf))
    spend(training, works, zeros, totals)

    # Only now is it known what a step spends, and with it how many steps the budget makes.
    total = settings.budget.total_steps(training.spent)
    factor = training.schedule.factor(number, total)
    for group in training.optimizer.param_groups:
        group["lr"], group["total_steps"] = group["peak_lr"] * factor, total
    update = Work(f"optimizer {getattr(training.optimizer, 'phase', '')}")  # steps of one phase cost the same
    if training.guard.admits(record["grad_norm"], training.step):
        _, flops = training.meter.run(update, training.optimizer.step)
        training.flops, training.dense_flops = training.flops + flops, training.dense_flops + flops
        for policy in training.policies:
            policy.after_step(training, training.state[policy.name], flat, losses)
    training.optimizer.zero_grad(set_to_none=True)
    training.tick()
    training.timed += not training.new
    if totals.flops is not None:  # else its shapes were counted, eagerly, and the next step is the first of its kind
        training.ready.update(work.shapes for work in works)
    return record


def forward_backward(
    training: Training, micro_batches: MicroBatches, works: list[Work], zeros: Zeros, totals: Totals
) -> tuple[list[Loss], Step]:
    """Leave the gradient of the mean over all targets of the step, over micro-batches and processes alike."""
    world, layers = training.world, families.linears(training.model) if zeros else {}
    layers = {name: layer for name, layer in layers.items() if name in zeros}
    total, losses = torch.zeros((), device=world.device), []
    parts: dict[tuple[str, int], Tensor] = {}  # by name and number of the objective
    for index, (work, batches) in enumerate(zip(works, micro_batches, strict=True)):
        # Each term of an objective counts by its share of the step's targets; processes average, hence their number.
        shares = [
            {name: number * world.size / max(total[name], 1.0) for name, number in counts(batch).items()}
            for batch, total in zip(batches, totals.targets, strict=True)
        ]
        last = index + 1 == len(micro_batches)
        counting = training.meter.counting(work, layers) if totals.flops is None else nullcontext()
        with counting, synchronised(training.wrapped, last=last):
            with autocast(world.device, training.settings.precision):
                value, micro_losses = training.wrapped(batches, shares)
            value.backward(seed(value))
        for policy in training.policies:
            policy.after_backward(training, training.state[policy.name], shares)
        weighted = zip(micro_losses, training.trainee.weights, shares, strict=True)
        total = total + sum_of(loss.logged_share(mine, weight) for loss, weight, mine in weighted)
        losses += [Loss(loss.value.detach(), loss.parts, loss.nll_BL) for loss in micro_losses]
        for number, (loss, mine) in enumerate(zip(micro_losses, shares, strict=True)):
            for name, part in loss.parts.items():
                parts[name, number] = parts.get((name, number), 0) + part.detach() * share(name, mine)
    return losses, {"loss": total, "parts": _named(parts, training.trainee.objectives)}


def _named(parts: dict[tuple[str, int], Tensor], objectives: Sequence[Objective]) -> dict[str, Tensor]:
    """Parts by their names, after their objective's where several have one of that name: `distillation/soft`."""
    shared, methods = Counter(name for name, _ in parts), [objective.name for objective in objectives]
    labels = [name if methods.count(name) == 1 else f"{name}.{number}" for number, name in enumerate(methods, 1)]
    return {name if shared[name] == 1 else f"{labels[o]}/{name}": part for (name, o), part in parts.items()}


@dataclass(frozen=True)
class Totals:
    """A step's numbers over all processes."""

    targets: list[Counts]  # of each objective
    tokens: int
    rows: int  # or examples
    cut: int  # of these, whose texts were longer than the model reads
    flops: dict[str, float] | None  # None while some process does not know what its shapes cost


def exchange(training: Training, micro_batches: MicroBatches, works: list[Work], zeros: Zeros) -> Totals:
    """Sum the step's numbers over all processes, in one all-reduce between hosts.

    With them go the seconds of the steps before, which all processes take to be their mean, and whether one was asked
    to stop.
    """
    world = training.world
    costs = [cost for work in works if (cost := training.meter.known(work, zeros)) is not None]
    flops = _flops(costs, zeros)
    local: dict[str | tuple[int, str], float] = {"unknown": len(costs) < len(works)}
    local.update(flops)
    local |= {"tokens": sum(int(batches[0]["tokens"]) for batches in micro_batches)}
    local |= {"rows": sum(len(batches[0].get("row_B", ())) for batches in micro_batches)}
    local |= {"cut": sum(int(batches[0].get("cut", 0)) for batches in micro_batches)}
    local |= {name: training.unshared.get(name, 0.0) for name in ("seconds", "preparing")}
    local |= {"asked": training.interrupts.asked}
    for index, batch in ((i, batch) for batches in micro_batches for i, batch in enumerate(batches)):
        for name, number in counts(batch).items():
            local[index, name] = local.get((index, name), 0.0) + number
    whole = dict(zip(local, world.sum([*local.values()]), strict=True))
    training.share({name: whole[name] / world.size for name in ("seconds", "preparing")})
    training.interrupts.agreed = whole["asked"] > 0
    targets = [{name: whole[i, name] for name in counts(batch)} for i, batch in enumerate(micro_batches[0])]
    known = None if whole["unknown"] else {name: whole[name] for name in flops}
    return Totals(targets, int(whole["tokens"]), int(whole["rows"]), int(whole["cut"]), known)


def spend(training: Training, works: list[Work], zeros: Zeros, totals: Totals) -> None:
    """Count the step and what its gradient has cost."""
    flops = totals.flops
    if flops is None:  # a further all-reduce, in the few steps in which some process met a new shape
        local = _flops([training.meter.cost(work) for work in works], zeros)
        flops = dict(zip(local, training.world.sum([*local.values()]), strict=True))
    training.step, training.tokens = training.step + 1, training.tokens + totals.tokens
    training.rows, training.cut = training.rows + totals.rows, training.cut + totals.cut
    training.flops += int(flops["dense"] - flops["skipped"])
    training.dense_flops += int(flops["dense"])
    training.useful_flops += int(flops["useful"])
    training.tick()


def _flops(costs: list[Cost], zeros: Zeros) -> dict[str, float]:
    """What this process's micro-batches cost: all, what is not computed a second time, products with zeros."""
    return {
        "dense": sum(cost.flops for cost in costs),
        "useful": sum(cost.useful for cost in costs),
        "skipped": sum(cost.skipped(zeros) for cost in costs),
    }


def _zeros(training: Training) -> Zeros:
    """The share of zeros that the policies declare for each linear layer; the largest where several do."""
    merged: Zeros = {}
    for policy in training.policies:
        for name, zeros in policy.zeros(training, training.state[policy.name]).items():
            merged[name] = max(zeros, merged.get(name, 0.0))
    return merged


def _work(model: nn.Module, batches: list[Batch]) -> Work:
    """What the FLOPs of a micro-batch depend on: its shapes and its numbers of targets."""
    apart = families.apart(model)
    shapes = ";".join(
        f"{k}{v.tolist() if k in LAYOUT else list(v.shape)}"
        for b in batches for k, v in sorted(b.items()) if v.ndim and (apart or k not in LAYOUT)
    )  # fmt: skip
    return Work(shapes, tuple(number for batch in batches for number in counts(batch).values()))


def _seed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

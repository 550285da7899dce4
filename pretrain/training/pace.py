"""How fast a training is beside its plan, and what its time goes to.

A budget of seconds counts the steps alone, so that the schedule is the same however long other things take: not the
first steps, in which shapes are compiled and counted, not held-out measurements, not what is saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pretrain.core.quick.machine import crowding
from pretrain.core.quick.quantities import counted, duration
from pretrain.training.budget import FAR, far

if TYPE_CHECKING:
    from pretrain.training.running import Training

EARLY, STEPS, FEW = 0.05, 10, 3  # the speed is known from this share of the budget, after so many steps, so many timed
LATE = 0.2  # or from this share, however few they were
AGAIN, LAST = 0.1, 0.5  # then it is looked at again over each such share, since a machine becomes busy, up to there
SHORT = 10.0  # seconds beyond the planned ones that nobody minds


class Pace:
    """Says once, as early as it is known, what the speed comes to by the end, where that is far from the plan."""

    def __init__(self, training: Training) -> None:
        self.training, self.judged, self.first = training, training.settings.plan is None, True
        self.timed, self.seconds = training.timed, training.spent["seconds"]  # before what is looked at
        self.progress = training.progress

    def line(self) -> str:
        """What is to be said after this step: nothing but for that once."""
        training, progress = self.training, self.training.progress
        timed, seconds = training.timed - self.timed, training.spent["seconds"] - self.seconds
        known = timed >= FEW and training.step >= STEPS and progress >= (EARLY if self.first else self.progress + AGAIN)
        if self.judged or not timed or not (known or (self.first and progress >= LATE)):
            return ""
        words, slower = projection(training, seconds / timed)
        words = words if slower or self.first else ""  # a while that was quicker than planned is no news
        self.judged, self.first = bool(words) or progress >= LAST, False
        self.timed, self.seconds, self.progress = training.timed, training.spent["seconds"], progress
        crowded = words and slower and training.world.device.type == "cpu"
        return words + (crowding(torch.get_num_threads()) if crowded else "")


def projection(training: Training, step: float) -> tuple[str, bool]:
    """What steps of so many seconds come to by the end, where that is far from the plan; whether they are slower."""
    plan, budget, spent = training.settings.plan, training.settings.budget, training.spent
    if plan is None:
        return "", False
    if budget.unit == "seconds":
        steps = spent["steps"] + max(0.0, budget.limit - spent["seconds"]) / step
        share = steps * spent["flops"] / spent["steps"] / plan.flops
        if not far(share):
            return "", share < 1
        worth = f"{share:.1%}" if share < 0.1 else f"{share:.0%}"
        makes = f"the {duration(budget.limit)} make about {steps:,.0f} steps, where {plan.steps:,.0f} were planned"
        other = plan.instead(share) if plan.instead is not None and share < 1 else None
        anew = f"; for such a speed the dial chooses {other.size}: Ctrl-C, then {other.command}" if other else ""
        return f"at this speed {makes}: {worth} of the FLOPs{anew}", share < 1
    takes = spent["seconds"] + (budget.total_steps(spent) - spent["steps"]) * step
    if takes <= plan.seconds / FAR or takes < plan.seconds + SHORT:
        return "", False
    return f"at this speed training takes about {duration(takes)}, where {duration(plan.seconds)} were planned", True


def times(training: Training) -> str:
    """`training 3 min, measuring 41 s, preparing 12 s, saving and the rest 3 s, total 3 min 56 s`: of all its parts."""
    whole = training.elapsed
    parts = {
        "training": training.spent["seconds"],
        "measuring": training.measuring,
        "preparing": training.preparing + training.opening,
    }
    parts["saving and the rest"] = whole - sum(parts.values())
    shown = [f"{name} {duration(value)}" for name, value in parts.items() if value >= 0.05 or name == "training"]
    return f"{', '.join(shown)}, total {duration(whole)}"


def shortened(training: Training) -> str:
    """How many of the texts that were read were cut to the model's length; nothing where none was."""
    if not training.cut:
        return ""
    share, many = training.cut / max(1, training.rows), counted(training.rows, "text")
    words = f"{training.cut:,} of {many} read ({max(share, 0.0001):.2%}) had more than"
    return f"{words} {training.loader.length:,} tokens and {'were' if training.cut > 1 else 'was'} cut (length)"


def stopping(training: Training) -> str:
    """What becomes of a training that a signal asks to stop; nothing in all processes but the first."""
    if not training.world.main:
        return ""
    if not training.settings.save_every:
        return "stopping after this step; nothing is saved, since save_every is 0; another Ctrl-C stops at once"
    when = "after this step"
    if training.unmeasured:  # it is being measured, which several processes only leave off together
        when = "now, and measured when it goes on" if training.world.size == 1 else "after the next step"
    later = "it begins again" if training.saved is None else f"it goes on from step {training.saved:,}"
    return f"stopping: the state is saved {when}; after another Ctrl-C, which stops at once, {later}"

"""Held-out measurements while a training runs: when they are due, what time they may take, that they can wait.

A budget of seconds counts the steps alone. To keep the whole near it, measurements that are due are left out where they
would take more than the share `MEASURING` of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median

from pretrain.core.files import read_json_lines
from pretrain.core.hardware import autocast
from pretrain.core.quick.quantities import duration
from pretrain.training.averages import averaged
from pretrain.training.budget import MEASURING
from pretrain.training.distributed import unsharded
from pretrain.training.interrupts import LeftOff
from pretrain.training.log import Log, diverged
from pretrain.training.running import Step, Trainee, Training

Evaluate = Callable[[Trainee], dict[str, float]]
FEWEST, LATE = 8, 3  # measurements that tell noise from a course; of these the end, at least
# A loss has risen where the middle of its end lies above the lowest before by so much of that, and by so many of what
# it usually lies beside the middle of its neighbours. Of 4,000 courses of noise alone 1.1% were taken for such of 20
# measurements each, 1.8% of 8; of those that fell first at most 0.1%.
RISE, SWINGS = 0.01, 6.0


class Measuring:
    """The held-out measurements of one training."""

    def __init__(self, training: Training, log: Log, evaluate: Evaluate | None) -> None:
        self.training, self.log, self.evaluate = training, log, evaluate
        self.shares, self.thinned = self._shares(), False

    def due(self, *, done: bool) -> bool:
        """Whether to measure after this step, of which all processes say the same; after the last one always."""
        training, every = self.training, self.training.settings.evaluate_every
        before, self.shares = self.shares, self._shares()
        due = training.step % every == 0 if every >= 1 else self.shares > before
        training.unmeasured = self.evaluate is not None and (done or (due and self._affordable()))
        return training.unmeasured

    def _shares(self) -> int:
        """How many whole shares of the budget are spent; a share that binary fractions miss by a hair is whole."""
        every = self.training.settings.evaluate_every
        return int(self.training.progress / every + 1e-9) if 0 < every < 1 else 0

    def _affordable(self) -> bool:
        """Whether a measurement fits its share of a budget of seconds, with the last one, which is made in any case.

        How long the first one takes is what was planned, at the speed of the steps.
        """
        training, budget = self.training, self.training.settings.budget
        if budget.unit != "seconds":
            return True
        spent, plan = training.spent["seconds"], training.settings.plan
        each = training.measuring / max(1, training.measured)
        if not training.measured and plan is not None and training.timed:
            each = plan.measurement * (spent / training.timed) / (plan.seconds / plan.steps)
        most = MEASURING * budget.limit
        fits = training.measuring + each <= MEASURING * spent and training.measuring + 2 * each <= most
        if not fits and not self.thinned:
            self.thinned = True
            self.log.say(
                f"a held-out measurement takes about {duration(each)}: some are left out, so that they take "
                f"no more than {MEASURING:.0%} of the {duration(budget.limit)}; "
                "accepted for more of them: fewer evaluate_tokens"
            )
        return training.world.sum([float(fits and training.world.main)])[0] > 0

    def make(self, record: Step | None = None) -> None:
        """Take the held-out metrics, of averaged weights where a policy averages, and tell the policies and the log.

        Where the training is to stop it stays `unmeasured` until it goes on, since a measurement may take minutes.
        Several processes, which measure together, end what they have begun. `record` is that of the newest step.
        """
        training, world, began = self.training, self.training.world, time.perf_counter()
        training.interrupts.agree(world)
        if self.evaluate is None or training.stopping:
            return
        try:
            with averaged(training):
                with (
                    training.interrupts.at_once(alone=world.size == 1),
                    unsharded(training.wrapped),
                    autocast(world.device, training.settings.precision),
                ):
                    metrics = self.evaluate(training.trainee.eval())
                training.metrics, training.unmeasured = metrics, False
                training.trainee.train()
                for policy in training.policies:
                    policy.on_evaluation(training, training.state[policy.name], training.metrics)
        except LeftOff:
            training.trainee.train()
            return
        training.measuring, training.measured = training.measuring + time.perf_counter() - began, training.measured + 1
        times = {"elapsed": training.elapsed, "measuring": training.measuring}
        evaluation = training.spent | times | {"step": training.step, "metrics": training.metrics}
        self.log.write("evaluation", evaluation, 0)
        if training.progress >= 1 and training.guard.in_row and not all(map(math.isfinite, metrics.values())):
            raise diverged(training, "the last steps were skipped and its metrics are not finite", record)


def course(training: Training) -> Iterator[str]:
    """What the held-out measurements of a training that has ended say: which weights were kept, that a loss has risen.

    They are those of its log, so that the parts before an interrupt count too; of the first process alone.
    """
    log = training.folder / "log.jsonl"
    if not training.world.main or not log.exists():
        return
    rows = [row for row in read_json_lines(log) if row.get("event") == "evaluation"]
    keeping = next((policy for policy in training.policies if policy.name == "keep_best"), None)
    if keeping is not None and "best_step" in training.metrics:
        metric, step = str(getattr(keeping, "metric", "loss")), training.metrics["best_step"]
        ended = ", which ended there for want of a better one (patience)" if training.enough else ""
        yield (
            f"kept the weights of step {step:,.0f} of {training.step:,}{ended}: the best {metric} of {len(rows):,} "
            f"measurements, {training.metrics[metric]:.4g}"
        )
    points = [(int(row["step"]), float(row["metrics"].get("loss", math.nan))) for row in rows]
    points = [(step, loss) for step, loss in points if math.isfinite(loss)]
    end = risen([loss for _, loss in points])
    if end is None:
        return
    step, least = min(points, key=lambda point: point[1])
    rose = f"the validation loss was best at step {step:,} of {training.step:,} ({least:.4g}), and rose to {end:.4g}"
    less = f"try a budget of about {max(step / training.step, 0.01):.0%} of this one, or more documents"
    keep = "" if keeping is not None else "policies: [keep_best] keeps the best weights; "
    yield f"{'warning: ' if keep else ''}{rose}: {keep}{less}"


def risen(losses: Sequence[float]) -> float | None:
    """Where the end of a loss lies, its last fifth, if that is higher than the lowest before by more than noise."""
    if len(losses) < FEWEST:
        return None
    late = max(LATE, len(losses) // 5)
    end, least = median(losses[-late:]), min(losses[:-late])
    swing = median(abs(b - (a + c) / 2) for a, b, c in zip(losses, losses[1:], losses[2:], strict=False))
    return end if end - least > max(RISE * abs(least), SWINGS * swing) else None

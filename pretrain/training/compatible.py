"""What cannot be trained together, refused before anything is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from typing import TYPE_CHECKING

from pretrain.core.errors import PretrainError, nearest
from pretrain.core.quick.table import Family
from pretrain.objectives import Objective
from pretrain.optim import Optimizer, Schedule
from pretrain.policies import Policy

if TYPE_CHECKING:
    from pretrain.core.batch import Batch
    from pretrain.core.method import Method

_UNFOLLOWED = (
    "weighs tokens, which not every term of the loss of {!r} follows: accepted: an objective whose do, such as "
    "causal_lm or masked_lm"
)


def check_written(objectives: Sequence[Objective], micro_batches: Sequence[Sequence[Batch]]) -> None:
    """An error where a policy that does not say so has weighed the tokens of an objective that does not follow it."""
    for batches in micro_batches:
        for objective, batch in zip(objectives, batches, strict=True):
            if "token_weight_BL" in batch and not objective.token_weights:
                raise PretrainError(f"a policy {_UNFOLLOWED.format(objective.name)}")


def measured_names(objective: Objective) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The held-out metrics that a training with this objective takes, and those that it takes by domain besides.

    Both are empty where they are not known before it runs.
    """
    labelled: tuple[str, ...] = getattr(objective, "metric_names", ())
    if objective.reads == "examples":
        return (("loss", *labelled), ()) if labelled else ((), ())
    if objective.task == "causal" and not objective.own_evaluation:
        return ("loss", "perplexity", "bits_per_byte"), ("loss", "bits_per_byte")
    return (), ()


def metric_fault(objective: Objective, metric: str) -> str:
    """What is said of a metric that a training with this objective surely does not take; empty where it may."""
    names, by_domain = measured_names(objective)
    what, _, domain = metric.partition("/")
    if not names or (what in by_domain if domain else metric in names):
        return ""
    domains = f", or {' and '.join(f'{name}/DOMAIN' for name in by_domain)}" if by_domain else ""
    return f"{nearest(metric, names, 0.5)}; accepted: {', '.join(names)}{domains}"


def check_planned(objectives: Sequence[Objective], policies: Sequence[Policy], batches: int) -> None:
    """What `check_together` refuses, and best weights by a metric that a stage will not measure."""
    _check_kept(objectives[0], policies)
    check_together(objectives, policies, batches)


def _check_kept(objective: Objective, policies: Sequence[Policy]) -> None:
    """An error where the best weights are to be kept by what is not measured; other policies may add metrics."""
    if not all(policy.name == "keep_best" or policy.averages_weights for policy in policies):
        return
    for metric in (str(getattr(policy, "metric", "")) for policy in policies if policy.name == "keep_best"):
        if fault := metric_fault(objective, metric):
            raise PretrainError(f"keep_best: metric {metric!r}: {objective.name} has no such one{fault}")


def check_together(objectives: Sequence[Objective], policies: Sequence[Policy], batches: int) -> None:
    """An error where an objective's loss does not bear that a step is `batches` batches, or what a policy does."""
    for objective in objectives:
        if batches > 1 and not objective.divisible:
            raise PretrainError(
                f"objective {objective.name!r}: its loss is one of the whole batch, and a step is cut into {batches}: "
                "accepted: micro_rows 0 (or as many as batch_rows), and one process"
            )
        for policy in policies:
            if policy.weighs_tokens and not objective.token_weights:
                raise PretrainError(f"policy {policy.name!r} {_UNFOLLOWED.format(objective.name)}")


def check_averages(optimizer: Optimizer, policies: Sequence[Policy]) -> None:
    """An error where two average the weights, of which evaluations can use one, and where a policy stands twice."""
    given = [policy.name for policy in policies]
    if twice := next((name for name in given if given.count(name) > 1), ""):
        raise PretrainError(f"policies: {twice} stands there {given.count(twice)} times; accepted: each once")
    names = [optimizer.name] * optimizer.averages_weights + [p.name for p in policies if p.averages_weights]
    if len(names) > 1:
        raise PretrainError(f"{' and '.join(names)} average the weights: accepted: one of them")


def ill_scheduled(optimizer: Optimizer, schedule: Schedule) -> str:
    """What to say where the schedule is not one that the optimiser is made for; empty where it is."""
    if not optimizer.schedules or schedule.name in optimizer.schedules:
        return ""
    made_for = " or ".join(optimizer.schedules)
    return f"optimizer {optimizer.name} is made for schedule {made_for} (with a warm-up), not for {schedule.name}"


def check_families(methods: Iterable[Method], entry: Family | None) -> None:
    """An error for a method, or one that it holds, that is declared for other families; None: not known as yet."""
    if entry is None:
        return
    for method in methods:
        if not entry.among(method.families):
            raise PretrainError(f"{method.name}: model family {entry.name!r}: accepted: {', '.join(method.families)}")
        if is_dataclass(method):  # others have no fields that could hold any
            check_families(method.held().values(), entry)

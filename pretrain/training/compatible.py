"""What cannot be trained together, refused before anything is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from typing import TYPE_CHECKING

from pretrain.core.errors import PretrainError
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
    """An error where two average the weights: evaluations can use one average only."""
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

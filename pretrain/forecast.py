"""What a run is expected to take, stage by stage, and what is wrong with it, before anything runs and without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.folders import corpus_of
from pretrain.core.quick.machine import likely_device, memory
from pretrain.core.quick.plan import Plan
from pretrain.core.quick.quantities import duration, short
from pretrain.identity import Planned
from pretrain.recipe import Recipe
from pretrain.records import StageRecord
from pretrain.stages import Stage
from pretrain.stages._estimates import Estimate, Left, left_in, resident
from pretrain.stages._preflight import (
    Seen,
    check_columns,
    check_domains,
    columns_asked,
    domains_asked,
    labels_asked,
    other_labels,
    seen_in_corpus,
    seen_in_sources,
)
from pretrain.stages.data import Data
from pretrain.stages.train import Train
from pretrain.training.budget import LONGEST, endless, least_seconds, processes, share_made

SURE = 1.3  # an estimate of memory so many times what there is does not fit, whatever it is off by


@dataclass(frozen=True)
class Forecast:
    """A stage of the plan and what it is expected to take: nothing where it is finished."""

    item: Planned
    estimate: Estimate
    done: float = 0.0  # the share that an interrupted run has done and goes on from

    @property
    def ahead(self) -> Estimate:
        """Of what is still to do."""
        left, whole = 1 - self.done, self.estimate
        flops, seconds = (None if value is None else value * left for value in (whole.flops, whole.seconds))
        return replace(whole, flops=flops, seconds=seconds)

    @property
    def to_run(self) -> bool:
        """Whether it is still to run."""
        return not self.item.finished


def forecast(planned: Sequence[Planned]) -> list[Forecast]:
    """Each stage's estimate, from what those before it leave or are expected to leave."""
    left: dict[str, Left] = {}
    made, ran = [], list[str]()  # in the process that is to run the others
    for item in planned:
        done = 0.0
        if item.finished:
            estimate = Estimate(left=left_in(item.folder))
        else:
            try:
                estimate = item.stage.estimate(dict(_given(item, left)))
            except ArithmeticError:  # of a split without text, or numbers beyond what can be computed with
                estimate = Estimate()
            if estimate.memory_bytes is not None:
                more = resident(item.stage.stage, ran)
                estimate = replace(estimate, memory_bytes=estimate.memory_bytes + more)
            ran.append(item.stage.stage)
            done = item.stage.done(item.folder, estimate)
        left[item.stage.name] = estimate.left
        made.append(Forecast(item, estimate, done))
    return made


def _given(item: Planned, left: dict[str, Left]) -> Iterator[tuple[str, Left]]:
    """What the references of a stage lead to, by field; of a list each with its number."""
    for field, names in item.stage.references().items():
        places = item.inputs[field]
        if isinstance(names, list) and isinstance(places, list):
            listed = {f"{field}.{number}": pair for number, pair in enumerate(zip(names, places, strict=True))}
        else:
            listed = {field: (str(names), Path(str(places)))}
        for key, (name, place) in listed.items():
            yield key, left[name] if name in left else left_in(place)


def total(forecasts: Sequence[Forecast]) -> Estimate:
    """Of what is still to run: sums, and the most memory; of what is known."""
    ahead = [each.ahead for each in forecasts if each.to_run]

    def known(name: str) -> list[float]:
        return [value for each in ahead if (value := getattr(each, name)) is not None]

    return Estimate(
        sum(known("flops")) if known("flops") else None, max(known("memory_bytes"), default=None),
        sum(known("seconds")) if known("seconds") else None, sum(known("disk_bytes")) if known("disk_bytes") else None,
    )  # fmt: skip


def warnings(forecasts: Sequence[Forecast], note: bool = False) -> list[str]:
    """A line for each thing that is likely a mistake; with `note` for each that is good to know."""
    ahead = [(each.item.stage.name, odd) for each in forecasts if each.to_run for odd in each.estimate.warnings]
    return [f"stage {name!r}: {odd.text}" for name, odd in ahead if odd.note == note]


def check_documents(recipe: Recipe, planned: Sequence[Planned], seconds: float | None = None) -> list[str]:
    """Look at the documents of stages that are to run; refuses what cannot work, and gives a line for what is odd.

    `seconds` are of reading the sources of each stage, those of a run where none are given.
    """
    seen: dict[str, Seen] = {}
    lines: list[str] = []
    stages = {item.stage.name: item.stage for item in planned}
    for item in planned:
        stage = item.stage
        try:
            if isinstance(stage, Data) and not item.finished:
                seen[stage.name] = seen_in_sources(stage, _corpus_before(item, seen), seconds)
                lines += [f"stage {stage.name!r}: {line}" for line in seen[stage.name].odd]
            elif not item.finished and "corpus" in item.inputs and (columns_asked(stage) or domains_asked(stage)):
                corpus = str(stage.references().get("corpus", ""))
                if corpus not in seen:
                    same = (other for other in stages.values() if other.references().get("corpus") == corpus)
                    wanted = [name for other in same for name in labels_asked(other)]
                    seen[corpus] = seen_in_corpus(corpus_of(Path(str(item.inputs["corpus"]))), wanted)
                lines += [f"stage {stage.name!r}: {line}" for line in check_columns(stage, seen[corpus])]
                check_domains(stage, seen[corpus])
            trained = stages.get(str(stage.references().get("checkpoint", "")))
            if isinstance(trained, Train) and not item.finished:
                lines += [f"stage {stage.name!r}: {line}" for line in other_labels(stage, trained)]
        except PretrainError as error:
            raise PretrainError(f"{recipe.at(stage, error.place)}: {error}") from error
    return lines


def _corpus_before(item: Planned, seen: Mapping[str, Seen]) -> Seen | None:
    """What is known of the corpus that a data stage goes on with, if it does."""
    name, place = str(item.stage.references().get("corpus", "")), item.inputs.get("corpus")
    if name in seen or not isinstance(place, Path):
        return seen.get(name)
    return seen_in_corpus(corpus_of(place), [])


def check_ends(recipe: Recipe, forecasts: Sequence[Forecast]) -> None:
    """Refuse a budget that this machine would be at for more than ten years."""
    for each in forecasts:
        stage, plan = each.item.stage, each.estimate.plan
        if not each.to_run or not isinstance(stage, Train):
            continue
        seconds = least_seconds(stage.budget, stage.batch_rows, stage.length)
        if plan is not None:
            seconds = max(seconds, plan.seconds / processes())
        if seconds > LONGEST:
            error = endless(stage.budget, seconds)
            raise PretrainError(f"{recipe.at(stage, error.place)}: {error}")


def check_fits(forecasts: Sequence[Forecast]) -> None:
    """Refuse what this machine's memory cannot hold; that of a device is its own affair."""
    most = memory()
    for each in forecasts:
        need = each.estimate.memory_bytes or 0.0
        if each.to_run and need > SURE * most and likely_device() == "cpu":
            name, has = each.item.stage.name, f"this machine has {short(most, 'B')}"
            if each.estimate.much:
                raise PretrainError(f"stage {name!r}: about {short(need, 'B')} of memory, {has}; {each.estimate.much}")
            raise PretrainError(
                f"stage {each.item.stage.name!r}: about {short(need, 'B')} of memory, this machine has "
                f"{short(most, 'B')}; accepted: a smaller model, a smaller micro_rows or length, or less text"
            )


def plan_of(name: str, recipe: Recipe, estimates: Mapping[str, Estimate]) -> Plan | None:
    """What is expected of a training, with what the dial says of another speed, where it has chosen the size."""
    expected = estimates[name].plan if name in estimates else None
    chosen = next((each for each in recipe.sizes if each.stage == name), None)
    if expected is None or chosen is None:
        return expected
    return replace(expected, instead=partial(chosen.instead, recipe=str(recipe.path or ""), given=recipe.given))


def shortfall(stage: Stage, record: StageRecord, estimates: Mapping[str, Estimate]) -> str:
    """That a budget of seconds made far fewer FLOPs than was planned, or far more; else nothing."""
    budget = record["config"].get("budget")
    planned, spent = estimates[stage.name].flops if stage.name in estimates else None, record["flops"]
    share = share_made(budget, planned, spent)
    if share is None or not isinstance(budget, dict):
        return ""
    how = "slower, or busier," if share < 1 else "quicker"
    advice = "; a smaller size or more seconds would suit it" if share < 1 else ""
    if other := record.get("planned", {}).get("instead"):
        changes = " ".join(f"--set {name}={value}" for name, value in other["changes"].items())
        advice = f"; {other['size']}, which {changes} chooses, or more seconds would suit it"
    return (
        f"warning: {duration(budget['seconds'])} made {share:.0%} of the FLOPs that were planned ({short(spent)} of "
        f"{short(planned or 0)}): this machine was {how} than it was taken to be{advice}"
    )

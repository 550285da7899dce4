"""Trials: single runs of recipes, and what runs many of them.

A trial is a recipe with its budget; the engine's store makes it resumable: what is finished is not run again, what was
interrupted goes on, and stages that several trials share (a corpus, a tokenizer, a baseline) are run once.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from pretrain.core.errors import Diverged, PretrainError, unknown
from pretrain.core.files import JSONObject, digest, read_json, read_json_lines
from pretrain.core.folders import corpus_in
from pretrain.core.quick.quantities import short
from pretrain.core.system.processes import cluster, end, end_with_parent
from pretrain.recipe import check
from pretrain.records import StageRecord, altered

Fields = JSONObject  # of a recipe, as it is read
Outcome = JSONObject  # JSON: what a trial comes to
UNITS = ("flops", "tokens", "steps", "none")


@dataclass(frozen=True)
class Trial:
    """A run of a recipe. The stage `trained` gets `amount` of `unit`, of FLOPs what the stages before it leave over."""

    name: str  # what the queue calls it
    recipe: Fields
    output: str
    store: str
    trained: str
    unit: str
    amount: float
    metric: str  # STAGE.metric
    curve: str | None = None  # of the held-out metrics in the trained stage's log
    also: tuple[str, ...] = ()  # more like `metric`
    progress: bool = False  # whether its run says on standard error how far it is

    @cached_property
    def key(self) -> str:
        """What makes its outcome: the same for two trials that differ only in their name and place."""
        recipe = {name: value for name, value in self.recipe.items() if name != "name"}
        return digest([recipe, self.trained, self.unit, self.amount, self.metric, self.curve, self.also])[:24]

    def run(self) -> Outcome:
        """Run it, or what is left of it: `final`, `also`, `flops` up to and with the trained stage, `seconds`, …

        `wall` are the seconds that all of it took here. `final` is None where training diverged, and `diverged` says
        how.
        """
        begun = time.perf_counter()
        try:
            outcome = self._outcome()
        except Diverged as error:
            outcome = {
                "final": None,
                "diverged": str(error),
                "also": {},
                "flops": 0,
                "curve": [],
            }
        return outcome | {"wall": time.perf_counter() - begun}

    def _outcome(self) -> Outcome:
        from pretrain.report.regime import by_document, regime

        recipe = copy.deepcopy(self.recipe)
        names = [stage.get("name", stage.get("stage")) for stage in recipe["stages"]]
        if self.trained not in names:
            raise PretrainError(
                f"{self.name}: no stage {self.trained!r}; accepted: one of {', '.join(map(str, names))}"
            )
        index, spent = names.index(self.trained), 0
        if self.unit != "none":
            left = self.amount
            if self.unit == "flops" and index:
                spent = sum(r["flops"] for r in self._run(recipe | {"stages": recipe["stages"][:index]}).values())
                left -= spent
            if left <= 0:
                raise PretrainError(
                    f"{self.name}: the stages before {self.trained!r} spend all {short(self.amount)} FLOPs"
                )
            recipe["stages"][index]["budget"] = {self.unit: left}
        records = self._run(recipe)
        self._check_whole(records)
        output, stages = Path(self.output), {stage.name: stage for stage in check(recipe).stages}
        nll_D = by_document(output, self.metric)
        log = Path(self.output) / self.trained / "log.jsonl"
        return {
            "final": value_of(self.metric, records, Path(self.output)),
            "also": {name: value_of(name, records, Path(self.output)) for name in self.also},
            "flops": sum(records[name]["flops"] for name in names[: index + 1]),
            "seconds": records[self.trained]["seconds"],
            "peak_memory_bytes": records[self.trained]["peak_memory_bytes"],
            "regime": regime(stages, output, Path(self.store), self.trained, self.metric),
            "documents": None if nll_D is None else nll_D.round(5).tolist(),
            "curve": held_out_curve(log, self.curve, records, names[:index]) if self.curve else [],
        }

    def _check_whole(self, records: dict[str, StageRecord]) -> None:
        """Refuse files that are read below and are not as their stage has left them."""
        for name, record in records.items():
            folder = Path(self.output) / name
            for file in {"log.jsonl", "evaluation.json", "documents.json"}.intersection(altered(folder, record)):
                raise PretrainError(
                    f"{folder / file} is not as the stage has left it: damaged or replaced; accepted: the file as it "
                    f"was, or no {folder.resolve()}: then it is made again"
                )

    def _run(self, recipe: Fields) -> dict[str, StageRecord]:
        from pretrain import engine

        checked = check(recipe, None, output=self.output)
        say = partial(_say, self.name) if self.progress else engine.silent
        return engine.run(checked, say=say, store=self.store, report=False).stages


def _say(name: str, text: str) -> None:
    """A line of a trial's run."""
    print(f"{name}: {text}", file=sys.stderr, flush=True)


def check_leaks(trial: Trial) -> None:
    """No document that is judged on may stand in what any stage was trained on."""
    from pretrain.corpus.store import Corpus

    stages = {stage.get("name", stage["stage"]): stage for stage in trial.recipe["stages"]}

    def texts(reference: str, split: str) -> set[str]:
        return {digest(d["text"]) for d in Corpus(corpus_in(Path(trial.output), reference)).documents(split)}

    judge = stages[trial.metric.partition(".")[0]]
    split = judge.get("split", "test") if judge["stage"] == "evaluate" else "validation"
    judged = texts(judge["corpus"], split) if "corpus" in judge else set()
    for reference in {stage["corpus"] for stage in stages.values() if stage["stage"] in ("train", "tokenizer")}:
        if leaked := len(judged & texts(reference, "train")):
            raise PretrainError(
                f"{trial.name}: {leaked} documents of {judge['corpus']}/{split} are in the training split of "
                f"{reference!r}; accepted: none"
            )


def value_of(metric: str, records: dict[str, StageRecord], output: Path) -> float:
    """`STAGE.metric` among the stage's metrics, or deeper in its `evaluation.json`: `evaluation.domains.doc.loss`."""
    stage, _, name = metric.partition(".")
    if stage not in records:
        raise unknown("stage of the metric", stage, records)
    known: Any = {k: v for k, v in records[stage].items() if isinstance(v, int | float)} | records[stage]["metrics"]
    if name in known:
        return float(known[name])
    path = output / stage / "evaluation.json"
    value: Any = read_json(path) if path.exists() else {}
    for step in name.split("."):
        if not isinstance(value, dict) or step not in value:
            raise unknown(f"metric of stage {stage!r}", name, known)
        value = value[step]
    return float(value)


def held_out_curve(log: Path, metric: str, records: dict[str, StageRecord], before: Sequence[str]) -> list[list[float]]:
    """Pairs of FLOPs (those of the stages before included) and the held-out metric, as training logged them."""
    spent = sum(records[name]["flops"] for name in before)
    measured = [row for row in read_json_lines(log) if row.get("event") == "evaluation"]
    curve = [[spent + row["flops"], row["metrics"][metric]] for row in measured if metric in row["metrics"]]
    if not curve:
        known = sorted({name for row in measured for name in row["metrics"]})
        raise PretrainError(f"{log}: no held-out {metric!r} is logged; accepted: {', '.join(known) or 'none'}")
    return curve


def run_all(
    trials: Sequence[Trial], *, jobs: int = 1, ray: str | None = None, say: Callable[[str], None] = print
) -> list[Outcome]:
    """Run trials and give their outcomes in order: in this process, in `jobs` processes, or on a `ray` cluster.

    On a cluster `output` and `store` must lie where all its machines see them. An error ends the queue once the trials
    that are under way have finished; run again to go on.
    """
    outcomes: list[Outcome] = [{}] * len(trials)
    with workers(jobs, ray) as start:
        for number, (index, done) in enumerate(_in_turn(trials, start, alone=jobs == 1 and ray is None), 1):
            outcomes[index] = done.result()
            final = outcomes[index]["final"]
            value = "diverged" if final is None else f"{final:.4f}"
            say(f"{number}/{len(trials)} {trials[index].name}: {trials[index].metric} {value}")
    return outcomes


Start = Callable[[Trial], "Future[Outcome]"]


def _in_turn(trials: Sequence[Trial], start: Start, *, alone: bool) -> Iterator[tuple[int, Future[Outcome]]]:
    """Each trial's place and outcome as it is done; `alone` none is begun before the one before it is looked at."""
    if alone:
        yield from ((index, start(trial)) for index, trial in enumerate(trials))
        return
    waiting = {start(trial): index for index, trial in enumerate(trials)}
    yield from ((waiting[done], done) for done in as_completed(waiting))


@contextmanager
def workers(jobs: int = 1, ray: str | None = None) -> Iterator[Start]:
    """What starts a trial and gives its outcome to come. Trials that have not begun when this closes never do."""
    if ray is not None:
        with cluster(ray) as joined:
            task = joined.remote(Trial.run)
            yield lambda trial: task.remote(trial).future()
    elif jobs == 1:
        yield _now
    else:
        with _threads(max(1, len(os.sched_getaffinity(0)) // jobs)):
            # A process is made anew from time to time: what torch has allocated it never gives back.
            pool = ProcessPoolExecutor(
                jobs, mp_context=get_context("spawn"), initializer=end_with_parent, max_tasks_per_child=20
            )
            try:
                yield lambda trial: pool.submit(trial.run)
            except (KeyboardInterrupt, SystemExit):
                pool.shutdown(wait=False, cancel_futures=True)
                end(active_children())
                raise
            finally:
                pool.shutdown(cancel_futures=True)


def _now(trial: Trial) -> Future[Outcome]:
    """Run it in this process, at once."""
    future: Future[Outcome] = Future()
    try:
        future.set_result(trial.run())
    except PretrainError as error:
        future.set_exception(error)
    return future


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Processes that begin while this is open use so many threads each."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before

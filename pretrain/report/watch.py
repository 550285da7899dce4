"""A run while it goes on: its report written again and again, which the open page loads by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from pretrain.core.files import read_json
from pretrain.core.quick.quantities import duration
from pretrain.core.system.portable import held
from pretrain.records import Status, run_status, statuses
from pretrain.report.advice import spent_share
from pretrain.report.data import BITS, Trained
from pretrain.report.numbers import known, last
from pretrain.report.page import collect, write

BEGINNING, PAUSE = 30.0, 0.5  # seconds that a run may take to begin, and between two looks whether it has


def watch(folder: Path | str, *, every: float = 5.0, say: Callable[[str], None] = print) -> Path:
    """Write a run's report every so many seconds until the run ends or is interrupted; returns the report's path.

    `say` gets a line whenever there is something new, and at last the run's state. A run that is over has its report
    written once.
    """
    folder, before, path = Path(folder), "", Path(folder) / "report.html"
    _wait(folder, say)
    try:
        while stage := running(folder):
            path = write(folder, running=stage, every=max(1, round(every)))
            if not before:
                say(f"report: {path}")
            line = _line(folder, stage)
            if line != before:
                say(line)
            before = line
            time.sleep(every)
    finally:  # what is written last does not load itself again
        path = write(folder, running=running(folder))
    say(_end(folder))
    return path


def _wait(folder: Path, say: Callable[[str], None]) -> None:
    """Wait for a run that is only beginning: what it needs is imported and planned before anything is written."""
    if not (folder / "run.json").exists() and not any(folder.glob("*")):
        say(f"{folder}: no run is there yet: waiting {duration(BEGINNING)} at most for one that begins")
        until = time.monotonic() + BEGINNING
        while not (folder / "run.json").exists() and time.monotonic() < until:
            time.sleep(PAUSE)


def running(folder: Path) -> str:
    """The stage that a run is at; empty where no process holds the run."""
    if not (folder / "run.json").exists() or not held(folder / ".lock"):
        return ""
    states = _states(folder)
    at = [name for name, status in states.items() if status == Status.RUNNING]
    return next(iter([*at, *(name for name, status in states.items() if status != Status.FINISHED)]), "")


def _end(folder: Path) -> str:
    """`runs/x: finished`; of a run that is not, at which stage."""
    states = _states(folder)
    status = run_status(folder, states.values())
    left = [name for name, state in states.items() if state != Status.FINISHED]
    at = next((name for name in left if states[name] == Status.FAILED), next(iter(left), ""))
    return f"{folder}: {status}" + (f" at “{at}”" if at else "")


def _states(folder: Path) -> dict[str, str]:
    return statuses(folder, read_json(folder / "run.json")["stages"])


def _since(training: Trained | None, done: float | None) -> str:
    """At what share of the budget the newest held-out number was measured, where that is not now."""
    if training is None or done is None:
        return ""
    measured, seen = last(training["evaluation"]["tokens"]), last(training["step"]["tokens"])
    return f" at {done * measured / seen:.0%}" if 0 < measured < seen else ""


def _line(folder: Path, stage: str) -> str:
    """Where the run is: the stage, the share of its budget, the newest held-out number."""
    page = collect(folder)
    words, done = [f"[{stage}]"], spent_share(page, stage)
    words += [] if done is None else [f"{done:.0%}"]
    training = next((t for t in page["trainings"] if t["name"] == stage), None)
    for name, unit in ((BITS, "bits per byte"), ("loss", "nats")) if training else ():
        if values := known(training["evaluation"][name] if training else []):
            words.append(f"validation {values[-1]:.3f} {unit}{_since(training, done)}")
            break
    return " ".join(words) if len(words) > 1 else f"[{stage}] running"

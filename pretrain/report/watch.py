"""A run while it goes on: its report written again and again, which the open page loads by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from pretrain.core.files import read_json
from pretrain.core.system.portable import held
from pretrain.report.advice import ENDED, spent_share
from pretrain.report.data import BITS
from pretrain.report.numbers import known
from pretrain.report.page import collect, write


def watch(folder: Path | str, *, every: float = 5.0, say: Callable[[str], None] = print) -> Path:
    """Write a run's report every so many seconds until the run ends or is interrupted; returns the report's path.

    `say` gets a line whenever there is something new. A run that is over has its report written once.
    """
    folder, before, path = Path(folder), "", Path(folder) / "report.html"
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
    return path


def running(folder: Path) -> str:
    """The stage that a run is at; empty where no process holds the run."""
    if not (folder / "run.json").exists() or not held(folder / ".lock"):
        return ""
    stages = read_json(folder / "run.json")["stages"]
    return next((stage["name"] for stage in stages if stage["status"] not in ENDED), "")


def _line(folder: Path, stage: str) -> str:
    """Where the run is: the stage, the share of its budget, the newest held-out number."""
    page = collect(folder)
    words, done = [f"[{stage}]"], spent_share(page, stage)
    words += [] if done is None else [f"{done:.0%}"]
    training = next((t for t in page["trainings"] if t["name"] == stage), None)
    for name, unit in ((BITS, "bits per byte"), ("loss", "nats")) if training else ():
        if values := known(training["evaluation"][name] if training else []):
            words.append(f"held-out {values[-1]:.3f} {unit}")
            break
    return " ".join(words) if len(words) > 1 else f"[{stage}] running"

"""What training tells while it runs: JSON Lines, TensorBoard, and a progress bar with the time left.

Where nobody looks at a terminal (a file, a pipe) the bar is a line at each tenth, and every half minute.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.core.files import atomic_text, whole_lines

EVERY = 30.0  # seconds between two lines of progress

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch.utils.tensorboard.writer import SummaryWriter


def keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step` (of a process that died before its next state) and a half-written last one."""
    if not path.exists():
        return
    with atomic_text(path) as kept:
        for row, line in whole_lines(path):
            if isinstance(row.get("step"), int | float) and row["step"] <= step:
                kept.write(line.decode().rstrip("\n") + "\n")


class Log:
    """Writes one training's events; silent in all processes but the first."""

    def __init__(self, folder: Path, *, main: bool, from_step: int, bar: bool = True, unit: str = "tokens") -> None:
        self.main, self.unit = main, unit
        if not main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        keep_until(folder / "log.jsonl", from_step)
        self.file = (folder / "log.jsonl").open("a", encoding="utf-8")
        self.board = _board(folder / "tensorboard", from_step)
        self.bar = _bar() if bar and sys.stderr.isatty() else None
        self.lines = Lines() if bar and not self.bar else None
        self.task = self.bar.add_task("starting", total=1.0) if self.bar else None

    def __enter__(self) -> Log:
        if self.main and self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.main:
            if self.bar:
                self.bar.stop()
            self.file.close()
            if self.board:
                self.board.close()

    def write(self, event: str, record: Mapping[str, object], progress: float) -> None:
        """Write one event; scalars also go to TensorBoard."""
        if not self.main:
            return
        self.file.write(json.dumps({"event": event, **record}) + "\n")
        self.file.flush()
        metrics, parts = record.get("metrics"), record.get("parts")
        values = dict(metrics if isinstance(metrics, dict) and metrics else record)
        values |= parts if isinstance(parts, dict) and not metrics else {}
        if self.board:
            for name, value in values.items():
                if isinstance(value, int | float) and name != "step":
                    self.board.add_scalar(f"{event}/{name}", value, record["step"])
        if event == "step" and (self.bar or self.lines):
            text = f"step {record['step']}  loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} {self.unit}/s"
            if self.bar and self.task is not None:
                self.bar.update(self.task, completed=progress, description=text)
            if self.lines:
                self.lines.update(progress, text)


class Lines:
    """Progress as lines of a file: one at each tenth that is passed, and one when the last is half a minute old."""

    def __init__(self, say: Callable[[str], None] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self.clock, self.begun = clock, clock()
        self.last, self.tenths, self.start = self.begun, -1, 0.0

    def update(self, progress: float, text: str) -> None:
        """Say how far it is and what is left, if it is time to."""
        now, tenths = self.clock(), int(10 * progress + 1e-9)
        if self.tenths < 0:  # a training that is gone on with does not begin at nothing
            self.tenths, self.start, self.begun = tenths, progress, now
            return
        if tenths == self.tenths and now - self.last < EVERY:
            return
        self.last, self.tenths = now, tenths
        done = progress - self.start
        left = (now - self.begun) * (1 - progress) / done if done > 0 else 0.0
        self.say(f"{progress:4.0%}  {text}" + (f"  {left:,.0f} s left" if progress < 1 else ""))


def _bar() -> Progress:
    """The progress bar; `rich` is asked for by nothing else in training."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))


def _board(folder: Path, from_step: int) -> SummaryWriter | None:
    """A TensorBoard writer, or None where `tensorboard` is not installed."""
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=from_step + 1)

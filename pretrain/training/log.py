"""What training tells: JSON Lines, TensorBoard, a progress bar with the time left, steps that were skipped.

All of them go by the training's own clock, which counts the parts before an interrupt too.
Where nobody looks at a terminal (a file, a pipe) the bar is a line at each tenth, and every half minute.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.core.errors import Diverged, PretrainError
from pretrain.core.files import atomic_text, whole_lines
from pretrain.core.foreign.reading import open_append
from pretrain.core.meter import peak_memory
from pretrain.core.quick.quantities import duration
from pretrain.training.state import newest

EVERY = 30.0  # seconds between two lines of progress

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch.utils.tensorboard.writer import SummaryWriter

    from pretrain.training.running import Step, Training


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

    def __init__(
        self, folder: Path, *, main: bool, from_step: int, bar: bool = True, unit: str = "tokens",
        say: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self.main, self.unit, self._say = main, unit, say
        if not main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        keep_until(folder / "log.jsonl", from_step)
        self.file = io.TextIOWrapper(open_append(folder / "log.jsonl"), encoding="utf-8")
        self.board = _board(folder / "tensorboard", from_step)
        self.bar = _bar() if bar and sys.stderr.isatty() else None
        self.lines = Lines() if bar and not self.bar else None
        self.task = self.bar.add_task("starting", total=1.0) if self.bar else None
        self.left = Left()

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

    def say(self, line: str) -> None:
        """A line for the user, if there is one."""
        if self.main and self._say and line:
            self._say(line)

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
            elapsed = record["elapsed"]
            assert isinstance(elapsed, float)
            text = f"step {record['step']}  loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} {self.unit}/s"
            text += self.left.words(progress, elapsed)
            if self.bar and self.task is not None:
                self.bar.tasks[0].start_time = self.bar.get_time() - elapsed
                self.bar.update(self.task, completed=progress, description=text)
            if self.lines:
                self.lines.update(progress, elapsed, text)


class Lines:
    """Progress as lines of a file: one at each tenth that is passed, and one when the last is half a minute old."""

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self.last, self.tenths = 0.0, -1

    def update(self, progress: float, elapsed: float, text: str) -> None:
        """Say how far it is after so many seconds, if it is time to."""
        tenths = int(10 * progress + 1e-9)
        if self.tenths < 0:  # a training that is gone on with does not begin at nothing
            self.tenths, self.last = tenths, elapsed
            return
        if tenths == self.tenths and elapsed - self.last < EVERY:
            return
        self.last, self.tenths = elapsed, tenths
        self.say(f"{progress:4.0%}  {text}")


class Left:
    """The time that is left, by that since the first look at the progress."""

    def __init__(self) -> None:
        self.first: tuple[float, float] | None = None  # progress and seconds then

    def words(self, progress: float, elapsed: float) -> str:
        """`  3 min 20 s left` at a progress after so many seconds; nothing where it is not known."""
        self.first = self.first or (progress, elapsed)
        done, seconds = progress - self.first[0], elapsed - self.first[1]
        return f"  {duration(seconds * (1 - progress) / done)} left" if done > 0 and progress < 1 else ""


def _bar() -> Progress:
    """The progress bar; `rich` is asked for by nothing else in training."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}"))
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))


def _board(folder: Path, from_step: int) -> SummaryWriter | None:
    """A TensorBoard writer, or None where `tensorboard` is not installed."""
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=from_step + 1)


def step_record(training: Training, record: Step, targets_per_byte: float | None) -> dict[str, object]:
    """The record of a step as it is logged.

    The host waits for the device here, since the log is of numbers, and the processes exchange theirs.
    """
    world = training.world
    names = list(record["parts"])
    loss, *parts = (
        v / world.size for v in world.sum([float(record["loss"]), *(float(record["parts"][n]) for n in names)])
    )
    norm = float(record["grad_norm"])
    training.tick()
    since = training.lap()
    return training.spent | {
        "step": training.step,
        "progress": round(training.progress, 6),
        "dense_flops": training.dense_flops,
        "loss": loss,
        "parts": dict(zip(names, parts, strict=True)),
        "bits_per_byte": loss / math.log(2) * targets_per_byte if targets_per_byte else None,
        "grad_norm": norm,
        "lr": training.optimizer.param_groups[0]["lr"],
        "tokens_per_second": since["tokens"] / max(since["seconds"], 1e-9),
        "mfu": min(1.0, since["useful_flops"] / max(since["seconds"], 1e-9) / world.size / training.rate),
        "elapsed": training.elapsed,
        "preparing": training.preparing,
        "measuring": training.measuring,
        **({"cut": training.cut} if training.cut else {}),
        "memory_bytes": peak_memory(world.device),
    }


def check(training: Training, log: Log, record: Step, telling: bool) -> bool:
    """Log steps that were skipped, and end the training if they are too many; whether the newest was made.

    Too many are `max_skips` in a row, or most of those that the budget had.
    Unless the log is `telling` of this step anyway, what became of it is asked for a step later.
    """
    guard, most = training.guard, training.settings.max_skips
    guard.read(unread=0 if telling else 1)
    for number in guard.unlogged:
        log.write("skipped", {"step": number, "skipped_steps": guard.skipped, "in_row": guard.in_row}, 0)
    guard.unlogged.clear()
    if guard.in_row >= most:
        reason = f"{guard.in_row} steps in a row were skipped"
        raise diverged(training, reason, record, f", a max_skips above {most}")
    if training.progress >= 1 and 2 * guard.skipped > training.step:
        raise diverged(training, f"{guard.skipped} of {training.step} steps were skipped", record)
    return guard.in_row == 0


def diverged(training: Training, reason: str, record: Step | None = None, more: str = "") -> Diverged:
    """The error, once what is being saved is there; every process must call it."""
    numbers = ""
    if record is not None:
        loss = training.world.sum([float(record["loss"])])[0] / training.world.size
        numbers = f"loss {loss:g}, gradient norm {float(record['grad_norm']):g} at "
    with suppress(PretrainError):  # of a state that could not be written: the older ones are there
        training.background.wait()
    last = newest(training.folder / "state", training.world, training.settings.stage)
    return Diverged(
        f"{numbers}step {training.step}: training has diverged, {reason}; the newest good state is "
        f"{last.name if last else 'the start'}; accepted: a smaller lr, a longer warm-up, a smaller clip{more}"
    )

"""Series: numbers over time, with the column `series`, a list of steps, each a list of the channels' values.

Read are tables (CSV or TSV with a row for each step, or for each series), the `.ts` files of the UCR and UEA archives
and the `.tsf` files of the Monash archive.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError
from pretrain.core.packages import Package
from pretrain.corpus.sources._files import Document, PathLabel, Source, evenly_read, numbered_lines, path_label
from pretrain.corpus.sources._paths import located, stamps
from pretrain.corpus.sources._skipped import Skipped
from pretrain.corpus.sources._tables import column, number, rows_of

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".ts", ".ts.gz", ".tsf", ".tsf.gz")
LARGEST = float(np.finfo(np.float32).max)
BLOCK = 8  # windows; what overlaps lies inside a block, and a block on one side of the split
# Where in its file a series stands (`:LINE`; nothing of one that is the whole file), its values (time × channels) and
# its label.
Found = tuple[str, np.ndarray, dict[str, str]]


@dataclass(frozen=True)
class Series(Source):
    """Files of a folder or a glob. In a table each row is a step, or with `rows` a series after its label.

    `channels` are the columns to take, by default all that hold numbers but `time`. `.ts` files have labels of their
    own; `label` is a file's folder (`parent`) or name (`stem`) instead. With `window` a series is cut into windows of
    so many steps, one each `stride` steps (by default the window): those that overlap stay on one side of the split, as
    blocks of `8 * window` steps. A gap is filled between its neighbours in time.
    """

    series: str
    label: PathLabel = None
    time: str | None = None  # the column that says when, which is no channel
    channels: tuple[str, ...] = ()
    rows: bool = False
    window: Count | None = None
    stride: Count | None = None
    longest: Count = 1 << 16  # steps; longer ones are passed over, unless there is a window
    limit: Count | None = None  # at most so many, from all alike
    domain: str = "series"
    package: Package | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride is not None and self.window is None:
            raise PretrainError(f"stride {self.stride}: accepted: only with a window")

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        yield from evenly_read(self._all, self.limit, skipped)

    def state(self) -> object:
        return stamps(self.series, self.package, SUFFIXES)

    def _all(self, skipped: Skipped) -> Iterator[Document]:
        for name, path in located(self.series, self.package, SUFFIXES, skipped):
            for index, (at, values_LC, label) in enumerate(self._of(path, skipped)):
                filled_LC = fill(values_LC)
                if filled_LC is None:
                    skipped.add("series without values", f"{name}{at}")
                elif self.window is None and len(filled_LC) > self.longest:
                    skipped.add(f"series of more than {self.longest} steps", f"{name}{at}")
                else:
                    _in_range(filled_LC, f"{path}: series {index + 1}")
                    place = label | path_label(path, self.label) | {"domain": self.domain}
                    for piece_LC, where in self._windows(filled_LC, f"{name}{at}"):
                        yield {"series": piece_LC.astype(np.float32).tolist()} | place | where

    def _windows(self, values_LC: np.ndarray, name: str) -> Iterator[tuple[np.ndarray, dict[str, str]]]:
        if self.window is None:
            yield values_LC, {"id": name}
            return
        stride, block = self.stride or self.window, BLOCK * self.window
        for first in range(0, len(values_LC), block):
            end = min(first + block, len(values_LC))
            for start in range(first, end - self.window + 1, stride):
                group = {"group": f"{name}@{first}"} if stride < self.window else {}
                yield values_LC[start : start + self.window], {"id": f"{name}@{start}"} | group

    def _of(self, path: Path, skipped: Skipped) -> Iterator[Found]:
        kind = path.name.removesuffix(".gz").rpartition(".")[2]
        if kind in ("ts", "tsf"):
            yield from archived(numbered_lines(path, skipped), kind, skipped, path)
        else:
            yield from self._rows(path, skipped) if self.rows else self._table(path, skipped)

    def _rows(self, path: Path, skipped: Skipped) -> Iterator[Found]:
        """Each row is a series of one channel, after its label; empty cells at its end are no part of it."""
        for line, row in rows_of(path, skipped)[1]:
            while row and not row[-1].strip():
                row.pop()
            if len(row) > 1:
                yield f":{line}", np.array([_value(cell) for cell in row[1:]])[:, None], {"label": row[0].strip()}

    def _table(self, path: Path, skipped: Skipped) -> Iterator[Found]:
        """Each row is a step."""
        names, rows = rows_of(path, skipped)
        cells = [row for _, row in rows if len(row) == len(names)]
        time = None if self.time is None else column(names, self.time, "time", path)
        if self.channels:
            chosen = [column(names, name, "channels", path) for name in self.channels]
        else:
            chosen = [i for i in range(len(names)) if i != time and any(number(row[i]) is not None for row in cells)]
            chosen = [i for i in chosen if not any(_worded(row[i]) for row in cells)]
        if not chosen or not cells:
            skipped.add("tables without columns of numbers", path)
            return
        yield "", np.array([[_value(row[i]) for i in chosen] for row in cells]), {}


def archived(lines: Iterator[tuple[int, str]], kind: str, skipped: Skipped, path: Path) -> Iterator[Found]:
    """The cases of a `.ts` file, channels apart by `:` and the class last, or of a `.tsf` file, its values last."""
    head: dict[str, str] = {}
    attributes, data = 0, False
    for place, line in lines:
        line = line.strip()
        if not line or line[0] in "#%":
            continue
        if not data:
            word, _, rest = line.removeprefix("@").partition(" ")
            data, attributes = word.lower() == "data", attributes + (word.lower() == "attribute")
            head[word.lower()] = rest.strip().lower()
            continue
        try:
            if kind == "tsf":
                yield f":{place}", _channel(line.split(":", attributes)[attributes])[:, None], {}
                continue
            stamped = head.get("timestamps", "false").startswith("true")
            cells = re.split(r":(?![^()]*\))", line) if stamped else line.split(":")
            labelled = any(head.get(name, "false").startswith("true") for name in ("classlabel", "targetlabel"))
            label = {"label": cells.pop().strip()} if labelled else {}
            yield f":{place}", np.stack([_channel(cell) for cell in cells], axis=1), label
        except (ValueError, IndexError):  # words for numbers, or channels of unequal lengths
            skipped.add("broken series", f"{path}:{place}")
    if not data:
        skipped.add("no series", path)


def _channel(cell: str) -> np.ndarray:
    """`1.0,?,3.0`, or `(TIME,1.0),(TIME,3.0)`, as numbers."""
    stamped = re.findall(r"\([^()]*,\s*([^(),]+)\)", cell)
    return np.array([np.nan if v.strip() == "?" else _finite(v, float(v)) for v in stamped or cell.split(",")])


def _value(cell: str) -> float:
    value = number(cell)
    return np.nan if value is None else _finite(cell, value)


def _finite(cell: str, value: float) -> float:
    """The value of a cell; one that is too large for any float is no gap, as the word `inf` is, but out of range."""
    beyond = math.isinf(value) and any(character.isdigit() for character in cell)
    return math.copysign(sys.float_info.max, value) if beyond else value


def _in_range(values_LC: np.ndarray, where: str) -> None:
    """Refuse what float32, in which series are kept, cannot hold."""
    steps = np.flatnonzero((np.abs(values_LC) > LARGEST).any(axis=1))
    if len(steps):
        value = max(values_LC[steps[0]], key=abs)
        accepted = f"numbers from -{LARGEST:.2g} to {LARGEST:.2g} (float32), or none for a gap"
        raise PretrainError(f"{where}, row {steps[0] + 1}: {value:g} is out of range; accepted: {accepted}")


def _worded(cell: str) -> bool:
    """Whether a cell holds something that is neither a number nor a way to say that it is missing."""
    return number(cell) is None and cell.strip().lower() not in ("", "na", "n/a", "?", "null", "none", "-", ".")


def fill(values_LC: np.ndarray) -> np.ndarray | None:
    """The series with each gap (NaN, infinity) on a line between its neighbours; None for an empty channel."""
    values_LC = np.where(np.isfinite(values_LC), values_LC, np.nan)
    gaps_LC = np.isnan(values_LC)
    if not values_LC.size or gaps_LC.all(axis=0).any():
        return None
    steps_L = np.arange(len(values_LC))
    for c in np.flatnonzero(gaps_LC.any(axis=0)):
        known_L = ~gaps_LC[:, c]
        values_LC[:, c] = np.interp(steps_L, steps_L[known_L], values_LC[known_L, c])
    return values_LC

"""Where an operation keeps what an interrupted run is to find again, what it leaves out, and what it reports.

The data stage opens a desk around its operations; an operation called alone works at a desk that is gone afterwards.
What is kept goes by the files (`stamps`) of the checkpoint it was made with; reports hold `by_domain`, `percentiles`.
An operation that leaves documents out says which and why: `keep`, or `drop` batch by batch.

Shape letters: N documents, K those that are kept.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pretrain.core.errors import PretrainError, warn
from pretrain.core.files import SEAL, JSONObject, read_object, sealed, write_json
from pretrain.data._dropped import Ledger
from pretrain.data._workers import Rows, Shard, Workers

if TYPE_CHECKING:
    from datasets import Dataset

LEVELS = (0, 5, 25, 50, 75, 95, 100)


@dataclass
class Desk:
    """`folder` outlives a killed run; `flops` are what such a run spent on what was found there again."""

    folder: Path
    ledger: Ledger | None = None  # of what is left out, where somebody asks for it
    workers: Workers = field(default_factory=Workers)  # of an operation called alone none but this process
    flops: int = 0
    reports: list[dict[str, object]] = field(default_factory=list)  # one an operation, for `corpus.json`

    def kept(self, name: str, make: Callable[[], JSONObject]) -> JSONObject:
        """What `make` gives, with the `flops` that it took: found again under its name, or made and kept.

        What is damaged is made anew, with a warning.
        """
        there = self.stored(name)
        if there is not None:
            return there
        made = make()
        self._put(name, made)
        return made

    def kept_each(
        self, method: str, work: Callable[[Rows], JSONObject], shards: Iterable[Shard], documents: int
    ) -> Iterator[JSONObject]:
        """The same of what `work` gives of each shard, by their keys and in order; the `workers` do what is missing."""
        for shard, made in self.workers.each(method, work, shards, documents, self.stored):
            if SEAL not in made:
                self._put(shard.key, made)
            yield made

    def stored(self, name: str) -> JSONObject | None:
        """What is kept under a name; None where nothing is, or it is damaged, with a warning."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        try:
            row = read_object(path)
            if SEAL in row and row.get("of") == name:
                self.flops += row["flops"]
                return row
            finding = f"{path} is not what was kept"
        except PretrainError as error:
            finding = str(error)
        warn(f"{finding}; it is made anew")
        return None

    def _put(self, name: str, made: JSONObject) -> None:
        write_json(self.folder / f"{name}.json", sealed({"of": name, **made}))

    def keep(
        self, method: str, corpus: Dataset, kept_K: NDArray[np.int64], why: str,
        measured_N: NDArray[np.float64] | None = None,
    ) -> Dataset:  # fmt: skip
        """The documents at `kept_K`, ascending; all others are noted as dropped, with what was measured of them."""
        rows_D = np.setdiff1d(np.arange(len(corpus)), kept_K)
        self.drop(method, corpus, rows_D, why, None if measured_N is None else measured_N[rows_D])
        return corpus.select(kept_K.tolist())

    def drop(
        self, method: str, corpus: Dataset, rows_D: NDArray[np.int64], why_D: Sequence[str] | str,
        measured_D: NDArray[np.float64] | None = None, first_D: NDArray[np.int64] | None = None,
    ) -> None:  # fmt: skip
        """Note that documents are left out, with the reason (a word that stays the same) and what was measured.

        `first_D` are the documents that are kept, of which these are copies.
        """
        if self.ledger is not None:
            self.ledger.drop(method, corpus, rows_D, why_D, measured_D, first_D)


_DESK: ContextVar[Desk | None] = ContextVar("desk", default=None)


@contextmanager
def working(folder: Path, ledger: Ledger | None = None, workers: Workers | None = None) -> Iterator[Desk]:
    """Let the operations called inside keep their work in `folder`, and note in `ledger` what they leave out.

    They share what they measure out to the `workers`, which are open.
    """
    desk = Desk(Path(folder), ledger, workers or Workers())
    token = _DESK.set(desk)
    try:
        yield desk
    finally:
        _DESK.reset(token)


@contextmanager
def desk() -> Iterator[Desk]:
    """The desk of the stage that runs, or a temporary one."""
    opened = _DESK.get()
    if opened is not None:
        yield opened
        return
    with tempfile.TemporaryDirectory(prefix="pretrain-work-") as folder:
        yield Desk(Path(folder))


def stamps(folder: Path) -> list[list[str | int]]:
    """The name, size and time of each file of a folder: whether it is still what it was."""
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(folder.iterdir()) if f.is_file()]


def by_domain(corpus: Dataset, kept_K: NDArray[np.int64]) -> dict[str, dict[str, int]]:
    """How many documents each domain has before and after a selection."""
    domain_N = np.array(corpus["domain"] if "domain" in corpus.column_names else ["all"] * len(corpus), dtype=object)
    return {
        str(domain): {"before": int((domain_N == domain).sum()), "after": int((domain_N[kept_K] == domain).sum())}
        for domain in sorted(set(domain_N), key=str)
    }


def percentiles(value_N: NDArray[np.float64]) -> dict[str, float]:
    """How values lie, by level; empty where there are none."""
    return {str(level): float(np.percentile(value_N, level)) for level in LEVELS if len(value_N)}

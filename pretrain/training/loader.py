"""The loader: which rows (or examples) a step takes, and the batches that objectives make of them.

Everything is a function of (seed, step, what was taken before): the same rows on any number of processes, the same
batches with any number of workers, and a resume in constant time from a few counters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.core.batch import Batch, Context, Example, Row, Vocabulary, pinned
from pretrain.core.errors import PretrainError, unknown
from pretrain.corpus.shards import Shards
from pretrain.objectives import Objective

if TYPE_CHECKING:
    from pretrain.corpus.examples import Examples
    from pretrain.corpus.packing import Plan

ALL = "*"  # the stream of all rows, when there is no mixture
Piece: TypeAlias = "tuple[int, int]"  # a row's number, and which of the pieces that it is cut into


class Counters(TypedDict):
    """What a loader goes on from."""

    step: int
    taken: dict[str, int]  # rows, by the stream that they are of
    progress: float
    mixture: dict[str, float] | None


class Loader:
    """Batches of packed rows.

    A step takes `batch_rows` rows over all processes, in micro-batches of `micro_rows`. Without a `mixture` each row
    comes once an epoch, in a seeded order; with one, each row's domain is drawn by the weights, and each domain goes
    through its own rows in a seeded order. `mixture`, `batch_rows`, `cuts` and `spread` may be set at any time and hold
    from the next step on. With `pin` batches lie in pinned memory, from which a CUDA device copies them while it
    computes.
    """

    def __init__(
        self,
        shards: Shards | Examples,
        objectives: Sequence[Objective],
        vocabulary: Vocabulary,
        *,
        length: int,
        batch_rows: int,
        micro_rows: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        mixture: dict[str, float] | None = None,
        pin: bool = False,
    ) -> None:
        if seed < 0:
            raise PretrainError(f"seed {seed}: accepted: 0 or more")
        self.shards, self.objectives, self.vocabulary = shards, list(objectives), vocabulary
        self.length, self.seed, self.rank, self.world = length, seed, rank, world
        self.pin = pin
        self.micro_rows = micro_rows or max(1, batch_rows // world)
        self._pending: deque[tuple[list[Future[list[Batch]]], dict[str, int]]] = deque()
        self.batch_rows, self._cuts, self._spread = batch_rows, 1, 1
        raw = min(objective.raw_length(length) for objective in objectives)
        self.plan: Plan | Examples = shards.plan(raw)
        if not len(self.plan):
            raise PretrainError(f"{shards.folder}: no documents to train on")
        self.next_step, self.taken, self.progress = 0, {ALL: 0}, 0.0
        self._pool = ThreadPoolExecutor(max(1, workers))
        self._ahead = workers > 0
        self._order = lru_cache(maxsize=2 * len(shards.domain_names) + 2)(self._make_order)
        self._of_domain: dict[str, NDArray[np.int64]] = {}
        self._mixture: dict[str, float] | None = None
        self.mixture = mixture

    @property
    def batch_rows(self) -> int:
        """The rows of a step, over all processes; fewer than micro-batches of all processes have make them smaller."""
        return self._batch_rows

    @batch_rows.setter
    def batch_rows(self, rows: int) -> None:
        micro = min(self.micro_rows, max(1, rows // self.world))
        if rows < 1 or rows % (micro * self.world):
            raise PretrainError(
                f"batch_rows {rows}: accepted: a multiple of micro_rows x processes ({micro} x {self.world})"
            )
        self._drop_pending()
        self._batch_rows = rows

    @property
    def cuts(self) -> int:
        """Into how many rows each row is cut: the same tokens in the same order, as so many more and shorter rows."""
        return self._cuts

    @cuts.setter
    def cuts(self, number: int) -> None:
        if number < 1 or self.length % number or self.length // number < 2:
            raise PretrainError(
                f"length {self.length} in {number} rows: accepted: a divisor that leaves 2 tokens or more"
            )
        shorter = self.length // number
        for objective in self.objectives if number > 1 else ():
            if objective.reads != "rows" or objective.raw_length(shorter) != shorter:
                raise PretrainError(
                    f"rows cut in {number}: objective {objective.name}: accepted: one on rows of that length"
                )
        self._drop_pending()
        self._cuts = number

    @property
    def spread(self) -> int:
        """Among how many rows that follow each other the pieces of cut rows are dealt out; 1: each keeps its own."""
        return self._spread

    @spread.setter
    def spread(self, rows: int) -> None:
        self._drop_pending()
        self._spread = rows

    @property
    def mixture(self) -> dict[str, float] | None:
        """The weight of each domain, summing to 1; None takes all rows as they come."""
        return self._mixture

    @mixture.setter
    def mixture(self, weights: dict[str, float] | None) -> None:
        if weights is not None:
            names = [self.shards.domain_names[d] for d in np.unique(self.plan.domain_R)]
            for name, weight in weights.items():
                if name not in names:
                    raise unknown("domain in the mixture", name, names)
                if not (np.isfinite(weight) and weight >= 0):
                    raise PretrainError(f"mixture: weight {weight} of {name!r}: accepted: 0 or more")
            total = sum(weights.values())
            if total <= 0:
                raise PretrainError("mixture: all weights are 0; accepted: at least one above 0")
            weights = {name: weight / total for name, weight in sorted(weights.items())}
        if weights != self._mixture:
            self._drop_pending()
        self._mixture = weights

    def restrict(self, domain: str, rows: int) -> None:
        """From the next step on, a mixture draws only the first `rows` rows of a domain, in the order of this seed."""
        self._drop_pending()
        self._of_domain[domain] = np.asarray(self._rows(domain))[self._make_order(domain, 0)[:rows]]
        self._order.cache_clear()

    def _drop_pending(self) -> None:
        """What was fetched ahead is fetched anew."""
        if self._pending:
            self.taken, self._pending = self._pending[0][1], deque()

    def step(self, step: int, progress: float) -> list[list[Batch]]:
        """This process's micro-batches of a step, each one batch an objective; steps are taken in order."""
        if step != self.next_step:
            raise PretrainError(f"the loader is at step {self.next_step}, not {step}: load its state first")
        if not self._pending:
            self._fetch(step)
        futures, _ = self._pending.popleft()
        # Objectives see the progress of one step ago, which is known when the step is fetched ahead.
        self.next_step, self.progress = step + 1, progress
        if self._ahead:
            self._fetch(step + 1)
        return [future.result() for future in futures]

    def state(self) -> Counters:
        """What a resume needs: a few counters."""
        taken = self._pending[0][1] if self._pending else self.taken
        return {"step": self.next_step, "taken": taken, "progress": self.progress, "mixture": self._mixture}

    def load_state(self, state: Counters) -> None:
        """Go on from a state."""
        self._pending.clear()
        self.next_step, self.taken, self.progress = state["step"], dict(state["taken"]), state["progress"]
        self._mixture = state["mixture"]

    def _fetch(self, step: int) -> None:
        before = dict(self.taken)
        rows, micro = self._draw(step), min(self.micro_rows, self.batch_rows // self.world)
        starts = [start + self.rank * micro for start in range(0, self.batch_rows, micro * self.world)]
        futures = [
            self._pool.submit(self._prepare, step, start, rows[start : start + micro], self.progress)
            for start in starts
        ]
        self._pending.append((futures, before))

    def _draw(self, step: int) -> list[list[Piece]]:
        """The rows of the whole step, over all processes, each by its pieces; advances the counters."""
        if self._mixture is None:
            streams = [ALL] * self.batch_rows
        else:
            rng = np.random.default_rng((self.seed, step, 1))
            streams = rng.choice(list(self._mixture), self.batch_rows, p=list(self._mixture.values())).tolist()
        rows, taken = [], dict(self.taken)
        for stream in streams:
            count = taken.get(stream, 0)
            rows.append(self._dealt(stream, *divmod(count, len(self._rows(stream)))))
            taken[stream] = count + 1
        self.taken = taken
        return rows

    def _dealt(self, stream: str, epoch: int, place: int) -> list[Piece]:
        """The pieces that make up a row of a stream: its own, or one each of rows of its block that lie far apart.

        Of each row of a block each piece comes once: the shift of a piece is the same for all rows.
        """
        rows, order = self._rows(stream), self._order(stream, epoch)
        begin = place - place % self._spread
        block = min(self._spread, len(order) - begin)
        places = (begin + (place - begin + part * (block // self.cuts)) % block for part in range(self.cuts))
        return [(int(rows[order[each]]), part) for part, each in enumerate(places)]

    def _rows(self, stream: str) -> NDArray[np.int64] | range:
        if stream == ALL:
            return range(len(self.plan))
        if stream not in self._of_domain:
            self._of_domain[stream] = self.plan.rows_of_domain(self.shards.domain_names.index(stream))
        return self._of_domain[stream]

    def _make_order(self, stream: str, epoch: int) -> NDArray[np.int64]:
        number = 0 if stream == ALL else 1 + self.shards.domain_names.index(stream)
        return np.random.default_rng((self.seed, number, epoch, 2)).permutation(len(self._rows(stream)))

    def _rows_of(self, pieces: list[list[Piece]], length: int) -> list[Row | Example]:
        """Rows, or the pieces of rows of text that are there: a short row has fewer."""
        shards = cast("Shards", self.shards)  # of which examples, which are their own plan, need nothing
        if self.cuts == 1:
            return [self.plan.row(shards, number) for row in pieces for number, _ in row]
        cut = {number: self.plan.row(shards, number) for row in pieces for number, _ in row}
        parts = {number: row.cut(length) for number, row in cut.items() if isinstance(row, Row)}
        there = [(number, part) for row in pieces for number, part in row if part < len(parts[number])]
        return [parts[number][part] for number, part in there or [(pieces[0][0][0], 0)]]

    def _prepare(self, step: int, first: int, pieces: list[list[Piece]], progress: float) -> list[Batch]:
        length = self.length // self.cuts
        rows = self._rows_of(pieces, length)
        tokens = {"tokens": torch.tensor(sum(row.tokens for row in rows))}
        origin = {
            "domain_B": torch.tensor([row.domain for row in rows]),
            "row_B": torch.tensor([row.index for row in rows]),
        }
        batches, cut = [], set[int]()
        for index, objective in enumerate(self.objectives):
            rng = np.random.default_rng((self.seed, step, first, index, 3))
            domains = tuple(self.shards.domain_names)
            context = Context(self.vocabulary, length, rng, progress, domains=domains, cut=cut, **self.shards.given)
            batch = tokens | objective.prepare(rows, context) | origin
            if "weight" not in batch:
                given = ", ".join(sorted(batch.keys() - origin.keys()))
                raise PretrainError(
                    f"{objective.name}: prepare gave {given}; accepted: beside them `weight`, how many targets its "
                    "loss is the mean over"
                )
            batches.append(pinned(batch) if self.pin else batch)
        batches[0] |= {"cut": torch.tensor(len(cut))}
        return batches

"""What filters share: numbers for each document, kept as columns or measured, and rules that drop by them.

A filter measures each document alone and drops it by the first of its rules that does not hold. With `tag` it only adds
the numbers as columns, `METHOD_NUMBER`; where a corpus has these columns they are read and nothing is measured again:
tag in one data stage, and change thresholds in another. A number that has no meaning for a document is NaN, in a column
null, and breaks no rule.

Shape letters: N documents of a batch, M numbers.
"""

from __future__ import annotations

import base64
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import fields
from hashlib import blake2b
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.core.errors import PretrainError
from pretrain.core.files import JSONObject
from pretrain.data import DataOperation, _mapped
from pretrain.data._work import Desk, by_domain, desk, percentiles
from pretrain.data._workers import Shard

if TYPE_CHECKING:
    from datasets import Dataset

SPREAD = 100_000  # documents that percentiles are of


class Rule(NamedTuple):
    """`number` must lie between `least` and `most`, both included; the reason to drop a document where it does not."""

    reason: str
    number: str
    least: float | None = None
    most: float | None = None


class Filter(DataOperation):
    """Base of the filters; a method is a dataclass with a field `tag: bool`."""

    computes: ClassVar[bool] = False
    shared: ClassVar[bool] = True
    numbers: ClassVar[tuple[str, ...]]  # what `measure` gives, in its order
    measures: ClassVar[tuple[str, ...]] = ()  # fields by which the numbers change; all others are thresholds
    tag: bool

    @abstractmethod
    def measure(self, text: str) -> tuple[float, ...]:
        """The numbers of a text."""
        raise NotImplementedError

    @abstractmethod
    def rules(self) -> tuple[Rule, ...]:
        """What is asked of the numbers, the first first."""
        raise NotImplementedError

    @property
    def adds(self) -> tuple[str, ...]:
        """The columns that it adds."""
        return tuple(self.columns) if self.tag else ()

    @property
    def columns(self) -> list[str]:
        """The columns that hold the numbers."""
        return [f"{self.name}_{number}" for number in self.numbers]

    def __call__(self, corpus: Dataset) -> Dataset:
        """The corpus without the documents that break a rule, in order; with `tag` all, with the numbers."""
        if "text" not in corpus.column_names and not self._tagged(corpus):
            known = ", ".join(corpus.column_names)
            raise PretrainError(f"{self.name}: a corpus with {known or 'no columns'}; accepted: one with text")
        with desk() as here:
            return self._add(corpus, here) if self.tag else self._filter(corpus, here)

    def _tagged(self, corpus: Dataset) -> bool:
        return set(self.columns) <= set(corpus.column_names)

    def _filter(self, corpus: Dataset, here: Desk) -> Dataset:
        kept_K: list[NDArray[np.int64]] = []
        start, spread = 0, Spread()
        for measured_NM in self._numbers(corpus, here):
            broken_N, value_N, reasons = self.broken(measured_NM)
            rows_D = np.flatnonzero(broken_N)
            here.drop(self.name, corpus, start + rows_D, [reasons[n] for n in rows_D], value_N[rows_D])
            kept_K.append(start + np.flatnonzero(~broken_N))
            spread.add(measured_NM)
            start += len(measured_NM)
        kept = np.concatenate(kept_K) if kept_K else np.zeros(0, np.int64)
        facts: dict[str, object] = {"method": self.name, "documents": by_domain(corpus, kept)}
        here.reports.append(facts | {"percentiles": self._percentiles(spread)})
        return corpus.select(kept)

    def broken(self, measured_NM: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.float64], list[str]]:
        """For each document whether it breaks a rule, what was measured by the first that it breaks, and the reason."""
        broken_N = np.zeros(len(measured_NM), bool)
        value_N, reasons = np.full(len(measured_NM), np.nan), [""] * len(measured_NM)
        for rule in self.rules():
            number_N = measured_NM[:, self.numbers.index(rule.number)]
            low_N = False if rule.least is None else number_N < rule.least
            high_N = False if rule.most is None else number_N > rule.most
            now_N = ~broken_N & (low_N | high_N)
            value_N[now_N] = number_N[now_N]
            for row in np.flatnonzero(now_N):
                reasons[row] = rule.reason
            broken_N |= now_N
        return broken_N, value_N, reasons

    def _add(self, corpus: Dataset, here: Desk) -> Dataset:
        import datasets

        old = [column for column in self.columns if column in corpus.column_names]
        stream = self._numbers(corpus.remove_columns(old), here)
        spread = Spread()

        def add(texts: list[str]) -> dict[str, list[float | None]]:
            measured_NM = next(stream)
            assert len(measured_NM) == len(texts), "documents come in the batches in which they are measured"
            spread.add(measured_NM)
            columns = (_plain(number_N) for number_N in measured_NM.T)
            return dict(zip(self.columns, columns, strict=True))

        features = datasets.Features(
            {n: f for n, f in corpus.features.items() if n not in old}
            | {column: datasets.Value("float64") for column in self.columns}
        )
        tagged = _mapped.mapped(corpus.remove_columns(old), add, features)
        here.reports.append({"method": self.name, "tagged": len(tagged), "percentiles": self._percentiles(spread)})
        return tagged

    def _percentiles(self, spread: Spread) -> dict[str, dict[str, float]]:
        columns = zip(self.numbers, np.array(spread.rows).reshape(-1, len(self.numbers)).T, strict=True)
        known = {name: column_N[~np.isnan(column_N)] for name, column_N in columns}
        return {name: percentiles(column_N) for name, column_N in known.items() if len(column_N)}

    def _numbers(self, corpus: Dataset, here: Desk) -> Iterator[NDArray[np.float64]]:
        """The documents' numbers, batch by batch: those of the columns, or measured; none is measured twice."""
        if self._tagged(corpus):
            for table in corpus.select_columns(self.columns).with_format("arrow").iter(_mapped.SHARD):
                yield np.stack([table[c].to_numpy(zero_copy_only=False).astype(float) for c in self.columns], axis=1)
            return
        shards = map(self._named, _mapped.shards(corpus))
        for row in here.kept_each(self.name, self._measured, shards, len(corpus)):
            yield np.frombuffer(base64.b64decode(row["numbers"])).reshape(-1, len(self.numbers))

    def _named(self, shard: Shard) -> Shard:
        """The shard by what its numbers follow from."""
        measures = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name in self.measures)
        fixed = [self.name, self.version, *measures]
        key = blake2b(repr([fixed, [len(text) for text in shard.rows]]).encode(), digest_size=16)
        for text in shard.rows:
            key.update(text.encode(errors="surrogatepass"))
        return shard._replace(key=key.hexdigest())

    def _measured(self, texts: list[str]) -> JSONObject:
        measured_NM = np.array([self.measure(text) for text in texts], np.float64)
        return {"numbers": base64.b64encode(measured_NM.tobytes()).decode(), "flops": 0}


class Spread:
    """Rows from the whole length of a corpus alike, `SPREAD` at the most, whatever batches they come in."""

    def __init__(self) -> None:
        self.rows: list[NDArray[np.float64]] = []
        self._every, self._count = 1, 0

    def add(self, measured_NM: NDArray[np.float64]) -> None:
        """The next rows."""
        self.rows += list(measured_NM[-self._count % self._every :: self._every])
        self._count += len(measured_NM)
        while len(self.rows) > SPREAD:
            self.rows, self._every = self.rows[::2], 2 * self._every


def _plain(number_N: NDArray[np.float64]) -> list[float | None]:
    return [None if value != value else value for value in number_N.tolist()]

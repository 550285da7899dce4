"""Drop documents by a column that something before has written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pretrain.core.bounds import AnyNumber
from pretrain.core.errors import PretrainError, nearest
from pretrain.data import DataOperation
from pretrain.data._work import by_domain, desk

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

BLOCK = 8192  # documents


@dataclass(frozen=True)
class ColumnFilter(DataOperation):
    """Dolma: an Open Corpus of Three Trillion Tokens for Language Model Pretraining Research (arXiv:2402.00159).

    Of its toolkit the second half: taggers write columns, and what to keep is decided later, by thresholds that can
    change without tagging again. A document is kept if the number in `column` lies between `least` and `most`, both
    included, or, with `values`, if what stands there is among them. Where nothing stands there it is dropped, or with
    `missing` kept.
    """

    computes: ClassVar[bool] = False
    speed: ClassVar[float] = 280e6

    column: str
    least: AnyNumber | None = None
    most: AnyNumber | None = None
    values: tuple[str, ...] = ()
    missing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.values) == (self.least is not None or self.most is not None):
            raise PretrainError("column_filter: accepted: either values, or least, most or both")

    def __call__(self, corpus: Dataset) -> Dataset:
        """The documents whose column is as it should be, in order."""
        known = corpus.column_names
        if self.column not in known:
            accepted = ", ".join(known) or "a corpus with it"
            raise PretrainError(
                f"column_filter: no column {self.column!r}{nearest(self.column, known)}; accepted: {accepted}"
            )
        kept_K: list[NDArray[np.int64]] = []
        start = 0
        with desk() as here:
            for table in corpus.select_columns([self.column]).with_format("arrow").iter(BLOCK):
                values = table[self.column].to_pylist()
                reasons = [self._why(value) for value in values]
                rows_D = np.flatnonzero([bool(why) for why in reasons])
                number_N = np.array([v if isinstance(v, int | float) else np.nan for v in values], float)
                here.drop(self.name, corpus, start + rows_D, [reasons[n] for n in rows_D], number_N[rows_D])
                kept_K.append(start + np.flatnonzero([not why for why in reasons]))
                start += len(values)
            kept = np.concatenate(kept_K) if kept_K else np.zeros(0, np.int64)
            facts = {"method": self.name, "column": self.column}
            here.reports.append(facts | {"documents": by_domain(corpus, kept)})
        return corpus.select(kept)

    def _why(self, value: object) -> str:
        """The reason to drop a document; empty to keep it."""
        if value is None or value != value:
            return "" if self.missing else f"no {self.column}"
        if self.values:
            return "" if str(value) in self.values else f"{self.column} {str(value)[:40]}"
        if not isinstance(value, int | float):
            raise PretrainError(
                f"column_filter: column {self.column!r} holds {str(value)[:40]!r}; accepted: numbers, or values to keep"
            )
        low = self.least is not None and value < self.least
        return f"low {self.column}" if low else f"high {self.column}" if self._above(value) else ""

    def _above(self, value: float) -> bool:
        return self.most is not None and value > self.most

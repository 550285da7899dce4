"""Write a document's own date as a year with its fraction, for whoever is to take a period of time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pretrain.data import DataOperation
from pretrain.data._columns import check_columns
from pretrain.data._mapped import SHARD
from pretrain.data._work import desk, percentiles

if TYPE_CHECKING:
    from datasets import Dataset

YEAR = "document_age_year"
_DATE = re.compile(r"\s*(\d{4})(?:[-/.]?(\d{2})(?:[-/.]?(\d{2})(?!\d)(?:[T ].*)?)?)?\s*", re.DOTALL)


@dataclass(frozen=True)
class DocumentAge(DataOperation):
    """A Pretrainer's Guide to Training Data: Measuring the Effects of Data Age, Domain Coverage, Quality, & Toxicity (arXiv:2305.13169).

    Of its axes the age of data: a tagger that drops nothing and writes the column `document_age_year`, the year of the
    document's own `date` with the share of it that has gone by (of the 2nd of July 2019: 2019.4986). Then column_filter
    takes the documents of a period. A date is a date or a time, a year as a number, or a text that begins with one,
    `2019`, `2019-07`, `2019-07-02` or `20190702`, a time after it or not; of a year or a month its first day counts.
    Where there is none, or what is no date, the year is null, and counted. A column of this name that is there already
    is written anew.
    """  # noqa: E501

    computes: ClassVar[bool] = False
    speed: ClassVar[float] = 650e6
    adds: ClassVar[tuple[str, ...]] = (YEAR,)

    date: str = "date"

    def __call__(self, corpus: Dataset) -> Dataset:
        """The corpus with the column."""
        import datasets

        check_columns(self.name, corpus, (self.date,))
        made: list[float | None] = []
        missing = unread = 0
        for table in corpus.select_columns([self.date]).with_format("arrow").iter(SHARD):
            for value in table[self.date].to_pylist():
                made.append(year_of(value))
                missing += value is None
                unread += value is not None and made[-1] is None
        bare = corpus.remove_columns([YEAR]) if YEAR in corpus.column_names else corpus
        tagged = bare.add_column(YEAR, made, feature=datasets.Value("float64"))
        known = [year for year in made if year is not None]
        with desk() as here:
            facts = {"method": self.name, "tagged": len(known), "without_date": missing, "unread": unread}
            here.reports.append(facts | {"percentiles": {"year": percentiles(np.array(known))} if known else {}})
        return tagged


def year_of(value: object) -> float | None:
    """A date's year with the share of it that has gone by; None of what is no date."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, date):  # a time too
        day = value.toordinal()
    elif isinstance(value, int | float):
        return float(value) if 1000 <= value < 10000 else None
    else:
        parts = _DATE.fullmatch(str(value))
        try:
            day = date(int(parts[1]), int(parts[2] or 1), int(parts[3] or 1)).toordinal() if parts else 0
        except ValueError:
            return None
        if not day:
            return None
    year = date.fromordinal(day).year
    first = date(year, 1, 1).toordinal()
    return year + (day - first) / (366 if year % 4 == 0 and (year % 100 or year % 400 == 0) else 365)

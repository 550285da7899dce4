"""What operations leave out of a corpus: a row for each document in a table, and the counts of a funnel.

The table lies beside the corpus as `dropped.parquet`: the operation, the reason in a short stable word, the number that
was measured, and of the document its domain, id, bytes and the beginning of its text; of a copy the id of the document
that was kept (`copy_of`). A text stands with the first
documents that an operation drops, then with every second, every fourth and so on, so that the texts of a corpus of any
size take as little room as is wanted. All is written as it comes: of the documents no more than a batch is in memory.

Shape letters: D documents that are dropped.
"""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from heapq import heappush, heapreplace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.payload import bucket, in_payload, payload
from pretrain.data._funnel import Domain, Dropped, Passage, Sizes

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

BLOCK = 1024  # documents
GROUP = 1 << 15  # rows of the table that are written at once
LETTERS = 600  # of an example
EXAMPLES = 3  # of each reason, drawn at random
UNKNOWN = "left out"  # the reason where an operation gives none
FILE = "dropped.parquet"
Columns = dict[str, list[object]]


class Ledger:
    """The table and the funnel of the operations of a stage; `settle` ends each of them.

    Of `texts` documents of an operation all have the first `characters` of their texts in the table, of later ones ever
    fewer.
    """

    def __init__(self, folder: Path, characters: int = 1000, texts: int = 100_000) -> None:
        self.path, self.characters, self.texts = folder / FILE, characters, texts
        self.funnel: list[Passage] = []
        self._writer: pyarrow.parquet.ParquetWriter | None = None
        self._rows: list[pyarrow.Table] = []
        self._begin()

    def _begin(self) -> None:
        self.drops = 0  # of the operation that is not settled
        self._reasons: dict[str, Sizes] = defaultdict(_nothing)
        self._lengths = Counter[str]()
        self._of_domain: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._drawn: dict[str, list[tuple[float, int, Dropped]]] = defaultdict(list)
        self._random = np.random.default_rng(len(self.funnel))

    def drop(
        self, operation: str, corpus: Dataset, rows_D: NDArray[np.int64], reasons_D: Sequence[str] | str,
        measured_D: NDArray[np.float64] | None = None, first_D: NDArray[np.int64] | None = None,
    ) -> None:  # fmt: skip
        """Note the documents at `rows_D` as dropped, as copies of those at `first_D`; a reason may be all of theirs."""
        known = _compared(corpus)
        for start in range(0, len(rows_D), BLOCK):
            part = slice(start, start + BLOCK)
            table = corpus.select_columns(known).with_format("arrow")[rows_D[part].tolist()]
            given = [reasons_D] * len(table) if isinstance(reasons_D, str) else list(reasons_D[part])
            measured = [None] * len(table) if measured_D is None else measured_D[part].tolist()
            of = (
                None
                if first_D is None or "id" not in known
                else corpus.select_columns(["id"])[first_D[part].tolist()]["id"]
            )
            self._note(operation, table, given, measured, of or [None] * len(table))

    def _note(
        self, operation: str, table: pyarrow.Table, reasons: list[str], measured: Sequence[float | None],
        of: Sequence[object],
    ) -> None:  # fmt: skip
        import pyarrow

        domains, sizes = _domains(table), _sizes(table)
        ids = table["id"].to_pylist() if "id" in table.column_names else [None] * len(table)
        for reason, domain, size in zip(reasons, domains, sizes, strict=True):
            self._reasons[reason]["documents"] += 1
            self._reasons[reason]["bytes"] += size
            self._of_domain[domain][reason] += 1
            self._lengths[bucket(size)] += 1
        written = self._beginnings(table)
        self._draw(table, reasons, measured, domains, ids)
        self.drops += len(table)
        columns = {
            "operation": pyarrow.array([operation] * len(table)).dictionary_encode(),
            "reason": pyarrow.array(reasons, pyarrow.string()).dictionary_encode(),
            "measured": pyarrow.array(measured, pyarrow.float64(), from_pandas=True),
            "domain": pyarrow.array(domains, pyarrow.string()).dictionary_encode(),
            "id": pyarrow.array([None if i is None else str(i) for i in ids], pyarrow.string()),
            "copy_of": pyarrow.array([None if i is None else str(i) for i in of], pyarrow.string()),
            "bytes": pyarrow.array(sizes, pyarrow.int64()),
            "text": pyarrow.array(written, pyarrow.string()),
        }
        self._rows.append(pyarrow.table(columns))
        if sum(map(len, self._rows)) >= GROUP:
            self._flush()

    def _beginnings(self, table: pyarrow.Table) -> list[str | None]:
        """What the table keeps of the documents' texts."""
        import pyarrow.compute

        if not self.characters or not self.texts or "text" not in table.column_names:
            return [None] * len(table)
        texts = pyarrow.compute.utf8_slice_codeunits(table["text"], 0, self.characters).to_pylist()
        numbers = range(self.drops, self.drops + len(table))
        return [None if n % (1 << (n // self.texts).bit_length()) else text for n, text in zip(numbers, texts)]

    def _draw(
        self, table: pyarrow.Table, reasons: list[str], measured: Sequence[float | None], domains: list[str],
        ids: list[object],
    ) -> None:  # fmt: skip
        """Keep a few documents of each reason, each with the same chance: those of the highest random numbers."""
        for row, (reason, luck) in enumerate(zip(reasons, self._random.random(len(table)), strict=True)):
            drawn = self._drawn[reason]
            if len(drawn) == EXAMPLES and luck <= drawn[0][0]:
                continue
            text = table["text"][row].as_py() if "text" in table.column_names else None
            value = measured[row]
            example: Dropped = {
                "reason": reason, "measured": None if value is None or value != value else value,
                "domain": domains[row], "id": str(ids[row] or ""), "text": (text or "")[:LETTERS],
            }  # fmt: skip
            entry = (float(luck), self.drops + row, example)
            heappush(drawn, entry) if len(drawn) < EXAMPLES else heapreplace(drawn, entry)

    def settle(self, operation: str, before: Dataset, after: Dataset) -> None:
        """End an operation: add its passage to the funnel. Where it gave no reasons it is looked what is gone."""
        if not self.drops and len(after) < len(before):
            self._missing(operation, before, after)
        sizes = {"before": census(before), "after": census(after)}
        domains: dict[str, Domain] = {
            domain: {
                "before": sizes["before"].get(domain, _nothing()),
                "after": sizes["after"].get(domain, _nothing()),
                "reasons": dict(self._of_domain.get(domain, {})),
            }
            for domain in sorted({**sizes["before"], **sizes["after"]})
        }
        drawn = (entry for reason in sorted(self._drawn) for entry in sorted(self._drawn[reason], key=lambda e: e[1]))
        ordered = sorted(self._reasons, key=lambda reason: (-self._reasons[reason]["documents"], reason))
        self.funnel.append({
            "operation": operation, "before": total(sizes["before"]), "after": total(sizes["after"]),
            "reasons": {reason: self._reasons[reason] for reason in ordered}, "domains": domains,
            "examples": [example for _, _, example in drawn],
            "lengths": dict(sorted(self._lengths.items(), key=lambda item: int(item[0]))),
        })  # fmt: skip
        self._begin()

    def _missing(self, operation: str, before: Dataset, after: Dataset) -> None:
        """Note what `before` has and `after`, read beside it in order, has not; nothing where they are not alike."""
        columns = [n for n in _compared(before) if n in after.column_names]
        left = _rows_of(after, columns)
        awaited = next(left, None)
        gone = []
        for number, row in enumerate(_rows_of(before, columns)):
            if row == awaited:
                awaited = next(left, None)
            else:
                gone.append(number)
        if awaited is None and len(gone) == len(before) - len(after):
            self.drop(operation, before, np.array(gone, np.int64), UNKNOWN)

    def _flush(self) -> None:
        import pyarrow
        import pyarrow.parquet

        if not self._rows:
            return
        table = pyarrow.concat_tables(self._rows).unify_dictionaries()
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pyarrow.parquet.ParquetWriter(self.path, table.schema, compression="zstd")
        self._writer.write_table(table)
        self._rows = []

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def put(self, folder: Path) -> None:
        """Put the table into a folder, where documents were dropped at all."""
        self.close()
        if self.path.exists():
            shutil.move(self.path, folder / FILE)


def census(corpus: Dataset) -> dict[str, Sizes]:
    """Documents and bytes of each domain."""
    import pyarrow

    counts: dict[str, Sizes] = defaultdict(_nothing)
    columns = [n for n in corpus.column_names if n in ("domain", *in_payload(corpus.column_names))]
    if not columns:
        return {"all": {"documents": len(corpus), "bytes": 0}} if len(corpus) else {}
    for table in corpus.select_columns(columns).with_format("arrow").iter(BLOCK):
        summed = pyarrow.table({"domain": _domains(table), "bytes": pyarrow.array(_sizes(table), pyarrow.int64())})
        for row in summed.group_by("domain").aggregate([("bytes", "sum"), ("bytes", "count")]).to_pylist():
            counts[row["domain"]]["documents"] += row["bytes_count"]
            counts[row["domain"]]["bytes"] += row["bytes_sum"]
    return dict(counts)


def total(counts: dict[str, Sizes]) -> Sizes:
    """Of all domains together."""
    return {
        "documents": sum(size["documents"] for size in counts.values()),
        "bytes": sum(size["bytes"] for size in counts.values()),
    }


def _nothing() -> Sizes:
    return {"documents": 0, "bytes": 0}


def _domains(table: pyarrow.Table) -> list[str]:
    if "domain" not in table.column_names:
        return ["all"] * len(table)
    return [str(domain) for domain in table["domain"].to_pylist()]


def _sizes(table: pyarrow.Table) -> list[int]:
    """The bytes of the documents' payloads, as `corpus.json` counts them; 0 of a document without content."""
    import pyarrow.compute

    columns = in_payload(table.column_names)
    if columns == ["text"]:
        lengths = pyarrow.compute.binary_length(table["text"].combine_chunks().cast("large_string"))
        return [length or 0 for length in lengths.to_pylist()]
    rows = table.select(columns).to_pylist()
    return [len(payload(row)) if any(value is not None for value in row.values()) else 0 for row in rows]


def _compared(corpus: Dataset) -> list[str]:
    """The columns by which a document is known: its payload, id and domain."""
    return [name for name in corpus.column_names if name in ("id", "domain", *in_payload(corpus.column_names))]


def _rows_of(corpus: Dataset, columns: list[str]) -> Iterator[dict[str, object]]:
    for table in corpus.select_columns(columns).with_format("arrow").iter(BLOCK):
        yield from table.to_pylist()

"""What is in a folder of files, or in a corpus: how much, of what kinds, in which languages, and how often the same.

All files are counted; their documents are read in an order drawn once, until all are or the time that was given is up.
What is measured of a sample says its size. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TypedDict

import numpy as np

from pretrain.core.errors import PretrainError
from pretrain.core.folders import corpus_at
from pretrain.corpus.copies.minhash import copies
from pretrain.corpus.look import languages
from pretrain.corpus.look.glance import SECONDS
from pretrain.corpus.progress import reported
from pretrain.corpus.sources import Document, Files, Skipped
from pretrain.corpus.sources._containers import READERS, ending
from pretrain.corpus.store import SPLITS, Corpus, opened_part

DRAWN = 1000  # documents that are compared with one another, of which some are shown
IDENTIFIED, LETTERS = 500, 2000  # documents whose language is told, and characters of each
COMPARED = 5000  # characters of a document that is compared
THRESHOLD = 0.8  # alike are near-duplicates, as for a data stage
SAMPLES, SHOWN = 3, 400  # documents that are shown, and characters of each
LEVELS = (0, 5, 25, 50, 75, 95, 100)  # percent of the documents that are at most so long
MOST_KINDS = 20
TABLES = [name for name in READERS if name not in (".ipynb", ".json")]  # which is settings, more often than not


class Kind(TypedDict):
    """The files of an ending."""

    files: int
    bytes: int


class Read(TypedDict):
    """How much was read. `expected` is how many documents there may be; None where they are known or cannot be told."""

    whole: bool
    files: int
    bytes: int
    seconds: float
    documents: int
    text_bytes: int
    expected: int | None


class Copies(TypedDict):
    """Documents that are copies of an earlier one: exact ones of all that were read, near ones in a sample."""

    exact: int
    near: int
    sample: int
    threshold: float


class Sample(TypedDict):
    """A document at random; `text` is its beginning."""

    id: str
    domain: str
    characters: int
    text: str


class Languages(TypedDict):
    """How many documents of a sample are in each language; `missing` says what must be installed to know."""

    sample: int
    documents: dict[str, int]
    missing: str


class Summary(TypedDict):
    """All of it, as `pretrain corpus --json` prints it."""

    place: str
    corpus: str  # the folder of a stored corpus; empty of files
    files: int
    bytes: int
    kinds: dict[str, Kind]
    columns: dict[str, str]  # of tables whose texts are in another column than `text`: which
    splits: dict[str, int]  # of a stored corpus
    removed: dict[str, int]  # likewise: by whom how many documents were left out
    read: Read
    domains: dict[str, int]
    characters: dict[str, int]  # by level
    languages: Languages
    copies: Copies
    pages: dict[str, int]  # of HTML that were read: how many, the letters of their text, and those taken
    passed_over: dict[str, dict[str, str | int | list[str]]]
    samples: list[Sample]


# Of a table the column of its texts, and whether its first row names its columns where that is known.
Columns = Callable[[Path, str], tuple[str, bool | None]]


@dataclass
class _Seen:
    """What is kept of the documents as they go by."""

    random: Random = field(default_factory=lambda: Random(0))
    lengths: list[int] = field(default_factory=list)
    size: int = 0  # bytes of text
    hashes: set[bytes] = field(default_factory=set)
    exact: int = 0
    domains: Counter[str] = field(default_factory=Counter)
    drawn: list[Sample] = field(default_factory=list)  # each with the same chance

    def add(self, document: Document) -> None:
        """One more."""
        text = document.get("text") or ""
        data = text.encode(errors="replace")
        key = hashlib.blake2b(data, digest_size=16).digest()
        self.exact += bool(text) and key in self.hashes
        self.hashes.add(key)
        self.lengths.append(len(text))
        self.size += len(data)
        domain = str(document.get("domain") or "")
        self.domains[domain] += 1
        place = len(self.drawn) if len(self.drawn) < DRAWN else self.random.randrange(len(self.lengths))
        if place < DRAWN:
            row: Sample = {
                "id": str(document.get("id") or ""), "domain": domain, "characters": len(text), "text": text[:COMPARED],
            }  # fmt: skip
            self.drawn[place : place + 1] = [row]


def summarized(
    place: str, seconds: float = SECONDS, say: Callable[[str], None] = lambda text: None,
    columns: Columns = lambda path, name: ("text", None),
) -> Summary:  # fmt: skip
    """Look at a folder, a file, a glob or a URL, at a corpus that a data stage has made, or at a run's last one.

    `seconds` bound the reading; `say` is told every half minute how far it is, and of tables without texts; `columns`
    tells of a table where they are. Raises `PretrainError` where there is nothing to look at.
    """
    folder = corpus_at(place)
    if folder is not None:
        return _of_corpus(place, Corpus(folder), seconds, say)
    skipped, seen, begun = Skipped(), _Seen(), time.monotonic()
    source = Files(place, on_error="skip")
    files = source.located(skipped)
    sizes = {name: path.stat().st_size for name, path in files}
    kinds: dict[str, Kind] = {}
    for name, path in files:
        kind = kinds.setdefault(ending(path) or "none", {"files": 0, "bytes": 0})
        kind["files"], kind["bytes"] = kind["files"] + 1, kind["bytes"] + sizes[name]
    order = Random(0).sample(files, len(files))
    count, read, texts = 0, 0, dict[str, str]()
    for name, path in reported(order, say, "files read"):
        before = seen.size
        table = _table(source, path, name, columns, len(files) == 1, say)
        if table.text != source.text:
            texts[name] = table.text
        whole = _until(table.inside(name, path, skipped, alone=len(files) == 1), seen, skipped, begun + seconds)
        read += sizes[name] if whole else min(sizes[name], seen.size - before)
        count += whole
        if not whole or time.monotonic() > begun + seconds:
            break
    facts = _read(seen, count, read, sum(sizes.values()), count == len(files), time.monotonic() - begun)
    ordered = dict(sorted(kinds.items(), key=lambda item: (-item[1]["bytes"], item[0])))
    return {
        "place": place, "corpus": "", "files": len(files), "bytes": sum(sizes.values()), "kinds": ordered,
        "columns": texts, "splits": {}, "removed": {}, "pages": skipped.pages, "passed_over": skipped.facts(),
        **_measured(seen, facts),
    }  # fmt: skip


def _table(source: Files, path: Path, name: str, columns: Columns, alone: bool, say: Callable[[str], None]) -> Files:
    """The source with the columns of a table; of one without texts among others a line says so."""
    if ending(path) not in TABLES:
        return source
    try:
        text, header = columns(path, name)
    except PretrainError as error:
        if alone:
            raise
        say(str(error))
        return source
    return replace(source, text=text, header=header)


def _of_corpus(place: str, corpus: Corpus, seconds: float, say: Callable[[str], None]) -> Summary:
    seen, begun, info = _Seen(), time.monotonic(), corpus.info
    paths = [path for split in SPLITS for path in sorted((corpus.folder / split).glob("*.parquet"))]
    size = sum(path.stat().st_size for path in paths)
    whole = True
    for document in reported(_shuffled(paths, ("text", "domain", "id")), say, "documents read"):
        seen.add(document)
        if time.monotonic() > begun + seconds:
            whole = len(seen.lengths) == sum(info["documents"].values())
            break
    facts = _read(seen, len(paths) if whole else 0, size if whole else 0, size, whole, time.monotonic() - begun)
    return {
        "place": place, "corpus": str(corpus.folder), "files": len(paths), "bytes": size,
        "kinds": {".parquet": {"files": len(paths), "bytes": size}} if paths else {},
        "columns": {}, "splits": dict(info["documents"]), "removed": dict(info.get("removed") or {}),
        "pages": dict(info.get("pages") or {}), "passed_over": dict(info.get("passed_over") or {}),
        **_measured(seen, facts),
    }  # fmt: skip


def _shuffled(paths: list[Path], columns: tuple[str, ...]) -> Iterator[Document]:
    """The documents of parts, a row group after another in an order drawn once: a sample may end anywhere."""
    groups: list[tuple[Path, int]] = []
    for path in paths:
        with opened_part(path) as file:
            groups += [(path, number) for number in range(file.num_row_groups)]
    for path, number in Random(0).sample(groups, len(groups)):
        with opened_part(path) as file:
            known = [name for name in file.schema_arrow.names if name in columns]
            yield from file.read_row_group(number, columns=known).to_pylist()


def _until(rows: Iterator[tuple[str, Document]], seen: _Seen, skipped: Skipped, end: float) -> bool:
    """Take in a file's documents; False where the time was up before all were."""
    for _, document in rows:
        if len(document.get("text") or "") > skipped.longest:
            skipped.too_long("documents", str(document.get("id")))
        else:
            seen.add(document)
        if time.monotonic() > end:
            return False
    return True


def _read(seen: _Seen, files: int, size: int, total: int, whole: bool, seconds: float) -> Read:
    documents = len(seen.lengths)
    expected = None if whole or not size else round(documents * total / size)
    return {
        "whole": whole, "files": files, "bytes": size, "seconds": round(seconds, 2), "documents": documents,
        "text_bytes": seen.size, "expected": expected,
    }  # fmt: skip


class _Measured(TypedDict):
    read: Read
    domains: dict[str, int]
    characters: dict[str, int]
    languages: Languages
    copies: Copies
    samples: list[Sample]


def _measured(seen: _Seen, facts: Read) -> _Measured:
    """What is measured of the documents that were taken in."""
    drawn = seen.random.sample(seen.drawn, len(seen.drawn))
    near = sum(copy is not None and copy[0] != "exact copy" for copy in _copies(drawn))
    lengths = np.percentile(seen.lengths, LEVELS, method="nearest").tolist() if seen.lengths else list[int]()
    shown: list[Sample] = [{**row, "text": row["text"][:SHOWN]} for row in drawn[:SAMPLES]]
    return {
        "read": facts, "domains": dict(seen.domains.most_common()),
        "characters": {str(level): int(length) for level, length in zip(LEVELS, lengths)},
        "languages": _languages(drawn), "samples": shown,
        "copies": {"exact": seen.exact, "near": near, "sample": len(drawn), "threshold": THRESHOLD},
    }  # fmt: skip


def _copies(drawn: list[Sample]) -> Iterator[tuple[str, float] | None]:
    return copies(((row["text"], "") for row in drawn if row["text"].strip()), THRESHOLD)


def _languages(drawn: list[Sample]) -> Languages:
    texts = [row["text"][:LETTERS] for row in drawn[:IDENTIFIED] if row["text"].strip()]
    try:
        identifier = languages.identifier() if texts else None
    except PretrainError as error:
        return {"sample": 0, "documents": {}, "missing": str(error).partition("accepted: ")[2]}
    counts = Counter(identifier.classify(text)[0] for text in texts) if identifier is not None else Counter[str]()
    return {"sample": len(texts), "documents": dict(counts.most_common()), "missing": ""}

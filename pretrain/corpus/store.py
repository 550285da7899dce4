"""A corpus on disk: Parquet files by split, and `corpus.json`.

A document's side is decided by a hash of its content (of its `group` where it has one), so it is the same whatever the
order and whatever else the corpus holds; a salt draws other sides. Exact copies are removed everywhere: documents that
have the whole payload alike (`corpus/payload.py`: the content and all that belongs to it, a target, a label). Training
documents whose text is a near-duplicate of a held-out one are removed from training; where there is more than text,
those of the same content. Documents stream through: the corpus may be larger than memory.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from os import SEEK_END
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pretrain.core.errors import PretrainError, unknown
from pretrain.core.files import JSONObject, atomic_folder, digest, read_object, write_json
from pretrain.core.folders import verify
from pretrain.core.foreign import json as foreign
from pretrain.corpus.look.census import Census
from pretrain.corpus.parts import NAMES, TEXTS, Columns, Writer, opened_part, read_part, write_table
from pretrain.corpus.parts import count_rows as count_rows
from pretrain.corpus.parts import iterate as iterate
from pretrain.corpus.payload import (
    CONTENT,
    Placed,
    Split,
    columns_in,
    identity,
    in_payload,
    payload,
    side_of,
    single_type,
    split_in,
    typed,
)
from pretrain.corpus.payload import belongs as belongs
from pretrain.corpus.payload import beside as beside
from pretrain.corpus.payload import key_of as key_of
from pretrain.corpus.payload import side as side
from pretrain.corpus.progress import without_bars
from pretrain.corpus.sources import Document, Removed, Skipped, evenly

if TYPE_CHECKING:
    from datasets import Dataset

    from pretrain.corpus.copies.held_out import Each

SPLITS = ("train", "validation", "test")
DOMAINS = 1 << 16  # that shards can number
COLUMNS = 1000  # of a corpus, with what objects in them hold: each takes 8 bytes a row, whatever it has


def write_corpus(
    documents: Iterable[Document],
    folder: Path,
    *,
    validation: float = 0.02,
    test: float = 0.02,
    split_seed: int = 0,
    near_duplicates: float | None = 0.8,
    operations: Sequence[Callable[[Dataset], Dataset]] = (),
    facts: JSONObject | None = None,
    skipped: Skipped | None = None,
    beside: Callable[[Path], None] = lambda folder: None,
    each: Each | None = None,
) -> JSONObject:
    """Split, deduplicate and store documents; returns what `corpus.json` says.

    `validation` and `test` are shares of the documents, which each `split_seed` draws anew; training documents at least
    `near_duplicates` alike to a held-out one are removed (None: not looked for). `operations` then act on the training
    split; `facts` are noted; `skipped` holds what the sources pass over as they are read; `beside` may put more files
    into the folder; `each` may share the search for copies out to processes.
    """
    if validation < 0 or test < 0 or validation + test >= 1:
        raise PretrainError(
            f"validation {validation} + test {test}: accepted: shares of 0 or more that leave some to train"
        )
    with atomic_folder(folder) as work:
        removed, added, copies = {"exact": 0, "near": 0}, dict[str, int](), Removed(work)
        sided = partial(side_of, validation=validation, test=test, salt=split_seed)
        read = _write_splits(documents, work, sided, removed, copies)
        _same_columns(work)
        if near_duplicates:
            removed["near"] = _drop_near_heldout(work, near_duplicates, copies, each)
        if operations:
            with without_bars():
                _operate(work, operations, removed, added)
        beside(work)
        census = _count(work)
        counts = census.counts
        if not counts["train"]:
            why = f" (passed over: {skipped})" if skipped and skipped.reasons else ""
            raise PretrainError(f"no training documents are left{why}; accepted: at least one document")
        info = {
            "documents": {s: sum(d["documents"] for d in counts[s].values()) for s in SPLITS},
            "bytes": {s: sum(d["bytes"] for d in counts[s].values()) for s in SPLITS},
            "domains": counts,
            "read": read,  # + added = documents + removed
            "removed": removed,
            "copies": copies.names,  # the first of them, all are in removed.jsonl
            "added": added,
            "passed_over": skipped.facts() if skipped else {},
            "pages": skipped.pages if skipped else {},  # of HTML: their letters, and those taken
            "fingerprint": digest([counts, census.digest]),
            "lengths": census.lengths,
            "kept": census.kept,
        } | (facts or {})
        write_json(work / "corpus.json", info)
    return info


def _write_splits(
    documents: Iterable[Document], work: Path, sided: Callable[[Document], str], removed: dict[str, int],
    copies: Removed,
) -> int:  # fmt: skip
    """Write the documents to the split that `sided` tells, copies left out, and return how many there were."""
    seen: dict[bytes, int] = {}  # where the name of each document lies
    domains: set[str] = set()
    columns: set[str] = set()
    writers = {split: Writer(work / split, columns) for split in SPLITS}
    read = 0
    with tempfile.TemporaryFile(dir=work) as kept:  # the names, lest they lie in memory
        for read, document in enumerate(documents, 1):  # noqa: B007
            key = identity(document)
            if key in seen:
                removed["exact"] += 1
                copies.add("exact", document, _name_at(kept, seen[key]))
                continue
            seen[key] = kept.seek(0, SEEK_END)
            kept.write(json.dumps({name: document.get(name) for name in ("domain", "id")}).encode() + b"\n")
            domains.add(document["domain"])
            columns.update(columns_in(document))
            for what, there, most in (("domains", domains, DOMAINS), ("columns and what is in them", columns, COLUMNS)):
                if len(there) > most:
                    raise PretrainError(f"document {document.get('id')!r}: more than {most:,} {what}; accepted: fewer")
            writers[sided(document)].add(document, len(payload(document)))
    for writer in writers.values():
        writer.flush()
    return read


def _name_at(kept: IO[bytes], place: int) -> JSONObject:
    """The domain and id of a document, which were written there."""
    kept.seek(place)
    return foreign.loads(kept.readline().decode())


def _same_columns(work: Path) -> None:
    """Give the parts of all splits the same columns, null where a source has none."""
    import pyarrow
    import pyarrow.parquet

    parts = sorted(work.glob("*/*.parquet"))
    schemas = [pyarrow.parquet.read_schema(path) for path in parts]
    if all(schema.equals(schemas[0]) for schema in schemas[1:]):
        return
    schema = single_type(lambda: pyarrow.unify_schemas(schemas, promote_options="permissive")).remove_metadata()
    whole = typed(schema.empty_table()).schema
    for path in parts:
        fresh = path.with_suffix(".fresh")
        with (
            pyarrow.parquet.ParquetFile(path) as file,
            pyarrow.parquet.ParquetWriter(fresh, whole, compression="zstd") as writer,
        ):
            for number in range(file.num_row_groups):
                table = file.read_row_group(number)
                for field in schema:
                    if field.name not in table.column_names:
                        table = table.append_column(field, pyarrow.nulls(len(table), field.type))
                writer.write_table(single_type(partial(table.select(schema.names).cast, whole)))
        fresh.replace(path)


def _drop_near_heldout(work: Path, threshold: float, copies: Removed, each: Each | None) -> int:
    """Remove training documents that are copies of held-out ones, as `near_held_out` finds them."""
    import pyarrow.parquet

    from pretrain.corpus.copies.held_out import here, near_held_out

    parts = {split: sorted((work / split).glob("*.parquet")) for split in SPLITS}
    rows = {path: pyarrow.parquet.read_metadata(path).num_rows for paths in parts.values() for path in paths}
    held = [path for split in ("validation", "test") for path in parts[split]]
    held_out = (document for path in held for document in read_part(path, CONTENT))
    training = (document for path in parts["train"] for document in read_part(path, CONTENT))
    counts = (sum(map(rows.__getitem__, held)), sum(map(rows.__getitem__, parts["train"])))
    copy_T = near_held_out(held_out, training, counts, threshold, each or here)
    places = set(copy_T[copy_T >= 0].tolist())
    names = {
        place: name
        for place, name in enumerate(row for path in held for row in read_part(path, NAMES)) if place in places
    }  # fmt: skip
    start = 0
    for path in parts["train"]:
        copy_M, start = copy_T[start : start + rows[path]], start + rows[path]
        if (copy_M >= 0).any():
            for row, place in zip(read_part(path, NAMES), copy_M.tolist(), strict=True):
                _ = place < 0 or copies.add("near", row, names[place])
            write_table(pyarrow.parquet.read_table(path).filter(copy_M < 0), path)
    return int((copy_T >= 0).sum())


def _operate(
    work: Path, operations: Sequence[Callable[[Dataset], Dataset]], removed: dict[str, int], added: dict[str, int]
) -> None:
    """Apply data operations to the training split; by each it is noted how many documents that takes or brings."""
    import datasets
    import pyarrow.parquet

    corpus = _open(work / "train", cache := work / "cache")
    columns = set(corpus.column_names)
    for number, operation in enumerate(operations):
        before = len(corpus)
        corpus = operation(corpus)
        if not isinstance(corpus, datasets.Dataset):
            raise PretrainError(f"operations.{number} returned {type(corpus).__name__}; accepted: a datasets.Dataset")
        if change := len(corpus) - before:
            counts, name = added if change > 0 else removed, getattr(operation, "name", f"operations.{number}")
            counts[name] = counts.get(name, 0) + abs(change)
    (after := work / "train-after").mkdir()
    rows = max(1, min(50_000, len(corpus)))
    for part, start in enumerate(range(0, len(corpus), rows)):
        chosen = corpus.select(range(start, min(start + rows, len(corpus))))
        chosen.to_parquet(path := after / f"part-{part:05d}.parquet")  # with its own compression, of half the effect
        write_table(pyarrow.parquet.read_table(path), path)
    changed = set(corpus.column_names) != columns
    del corpus
    shutil.rmtree(cache, ignore_errors=True)
    shutil.rmtree(work / "train")
    after.rename(work / "train")
    if changed:
        _same_columns(work)


def _open(split: Path, cache: Path) -> Dataset:
    import datasets

    files = [str(path) for path in sorted(split.glob("*.parquet"))]
    for path in files:
        with opened_part(Path(path)):
            pass
    if not files:
        return datasets.Dataset.from_dict({"text": [], "domain": [], "id": []})
    with without_bars():
        return datasets.Dataset.from_parquet(files, cache_dir=str(cache))


def _count(work: Path) -> Census:
    """What there is, split by split."""
    census = Census()
    for split in SPLITS:
        census.begin(split)
        for document in iterate(work / split, lambda names: [*in_payload(names), "domain", "id"]):
            census.add(document)
        census.end()
    return census


def _inside(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, dict) else None


class Corpus:
    """A stored corpus, opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._cache: tempfile.TemporaryDirectory[str] | None = None  # of `datasets`, gone with this object
        if not (self.folder / "corpus.json").exists():
            raise PretrainError(f"{folder} is not a corpus (no corpus.json); accepted: what a data stage wrote")

    @cached_property
    def info(self) -> JSONObject:
        """`corpus.json`: the documents and bytes of each split, those of its domains, a fingerprint."""
        path = self.folder / "corpus.json"
        verify(self.folder, lambda name: name == path.name)
        facts = read_object(path)
        for measure in ("documents", "bytes"):
            for split in SPLITS:
                size = _inside(_inside(facts, measure), split)
                if not isinstance(size, int) or size < 0:
                    raise PretrainError(f"{path}: {measure}.{split} {size!r}: accepted: a whole number")
        if not isinstance(facts.get("fingerprint"), str):
            raise PretrainError(f"{path}: fingerprint {facts.get('fingerprint')!r}: accepted: a digest")
        for split in SPLITS:
            if not isinstance(_inside(_inside(facts, "domains"), split), dict):
                raise PretrainError(f"{path}: domains.{split}: accepted: a mapping from the split's domains")
        return facts

    @property
    def splitting(self) -> Split | None:
        """How its documents were split, where it is noted."""
        return split_in(self.info, self.folder / "corpus.json")

    @property
    def domains(self) -> list[str]:
        """The names of the domains."""
        return sorted({domain for split in self.info["domains"].values() for domain in split})

    def split(self, name: str) -> Dataset:
        """One split as a `datasets.Dataset`."""
        folder = self._whole(name)
        if self._cache is None:
            self._cache = tempfile.TemporaryDirectory(prefix="pretrain-corpus-")
        return _open(folder, Path(self._cache.name))

    def _whole(self, name: str) -> Path:
        """The folder of a split, whose files are as they were written."""
        if name not in SPLITS:
            raise unknown("split", name, SPLITS)
        verify(self.folder, lambda file: file.startswith(f"{name}/"))
        return self.folder / name

    @property
    def columns(self) -> list[str]:
        """The names of the documents' columns."""
        parts = sorted(self.folder.glob("*/*.parquet"))
        if not parts:
            return []
        verify(self.folder, lambda name: name == parts[0].relative_to(self.folder).as_posix())
        with opened_part(parts[0]) as file:
            return list(file.schema_arrow.names)

    def documents(self, name: str, columns: Columns = TEXTS) -> Iterator[Document]:
        """One split's documents, streamed; without `columns` those of text, of which a document without is an error."""
        stream = iterate(self._whole(name), columns)
        return self._with_text(name, stream) if columns is TEXTS else stream

    def _with_text(self, name: str, documents: Iterator[Document]) -> Iterator[Document]:
        for document in documents:
            if document.get("text") is None:
                known = ", ".join(self.columns)
                where = f"{name} document {document.get('id')!r} has no 'text'"
                raise PretrainError(f"{self.folder}: {where}; accepted: a corpus of text; its columns: {known}")
            yield document

    def again(self) -> Iterator[Placed]:
        """The documents of all splits with all their columns, to go on with."""
        for name in SPLITS:
            for document in self.documents(name, list):
                placed = Placed(document)
                placed.split = name
                yield placed

    def sample(self, name: str, limit: int, columns: Columns = TEXTS) -> list[Document]:
        """At most `limit` of one split's documents, from its whole length alike, so from all sources."""
        stream = self.documents(name, columns)
        chosen = set(evenly(range(self.info["documents"][name]), limit))
        return [document for number, document in enumerate(stream) if number in chosen]

"""Text: files and folders, JSON lines, Parquet, and data sets of the `datasets` library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError, nearest
from pretrain.core.packages import Package
from pretrain.corpus.sources._files import (
    Document,
    Skipped,
    Source,
    below,
    located,
    open_text,
    read_text,
    stamp,
    stamps,
)


@dataclass(frozen=True)
class Files(Source):
    """A file, a folder or a glob: text and code (a document a file), `.jsonl[.gz|.zst]`, `.parquet`.

    `suffixes` keeps only the files of a folder that end so (empty: all that are text). The domain is `domain`, or the
    column of that name where the file has one, or the file's suffix without its dot. With `package` the path is one
    inside that package.
    """

    files: str
    suffixes: tuple[str, ...] = ()
    text: str = "text"  # the column that holds the text, for jsonl and parquet
    domain: str | None = None
    package: Package | None = None

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        for name, path in located(self.files, self.package, self.suffixes):
            if path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
                yield from _rows(_read_jsonl(path), name, self, skipped)
            elif path.suffix == ".parquet":
                yield from _rows(_read_parquet(path), name, self, skipped)
            elif (text := read_text(path, skipped)) is not None:
                ending = Path(path.name.removesuffix(".gz")).suffix.lstrip(".")
                yield {"text": text, "domain": self.domain or ending or "text", "id": name}

    def state(self) -> object:
        return stamps(self.files, self.package, self.suffixes)


@dataclass(frozen=True)
class HubDataset(Source):
    """A data set of the `datasets` library: a name on the hub, or a local folder written by it; streaming if asked."""

    dataset: str
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    text: str = "text"
    domain: str | None = None
    limit: Count | None = None  # read at most so many documents

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        for number, document in enumerate(_rows(enumerate(self._open(), 1), self.dataset, self, skipped)):
            if self.limit is not None and number >= self.limit:
                return
            yield document

    def _open(self) -> Iterator[Document]:
        import datasets

        place = Path(self.dataset)
        try:
            if (place / "dataset_info.json").exists() or (place / "dataset_dict.json").exists():
                data = datasets.load_from_disk(self.dataset)
                data = data[self.split] if isinstance(data, datasets.DatasetDict) else data
            else:
                data = datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=self.streaming)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise PretrainError(f"data set {self.dataset!r} cannot be loaded: {reason}") from error
        return iter(data)

    def state(self) -> object:
        return [stamp(path) for path in below(Path(self.dataset))] if Path(self.dataset).exists() else None


Row = tuple[int, Document]  # where it stands, its line or its number from 1, and its columns


def _rows(rows: Iterator[Row], path: str, source: Files | HubDataset, skipped: Skipped) -> Iterator[Document]:
    """Documents from rows with columns."""
    for number, (place, row) in enumerate(rows):
        if source.text not in row:
            hint, columns = nearest(source.text, row), ", ".join(sorted(row)) or "no column"
            raise PretrainError(
                f"{path}:{place} (row {number + 1}): no column {source.text!r}{hint}; accepted: rows that all "
                f"have it, or another `text`; this one has {columns}"
            )
        text, domain = row.get(source.text), source.domain
        if text is None or (isinstance(text, str) and not text.strip()):
            skipped.add("empty")
            continue
        if not isinstance(text, str):
            raise PretrainError(
                f"{path}:{place} (row {number + 1}): column {source.text!r} is {type(text).__name__}, not text"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            skipped.add("not UTF-8")  # half of a character, as broken JSON holds
            continue
        if domain is None or domain in row:
            domain = row.get(domain or "domain") or Path(path).name.split(".")[0]
        rest = {k: v for k, v in row.items() if k not in (source.text, "text", "domain", "id")}
        yield {"text": text, "domain": str(domain), "id": str(row.get("id", f"{path}:{number}"))} | rest


def _read_jsonl(path: Path) -> Iterator[Row]:
    import zstandard

    number = 0
    try:
        with open_text(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise PretrainError(f"{path}:{number}: accepted: one JSON object a line")
                    yield number, row
    except json.JSONDecodeError as error:
        raise PretrainError(f"{path}:{number}: not JSON ({error.msg}): truncated or damaged") from error
    except (EOFError, OSError, UnicodeDecodeError, zstandard.ZstdError) as error:
        raise PretrainError(f"{path}: cannot be read after line {number} ({error}): truncated or damaged") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from enumerate((row for part in file.iter_batches(batch_size=256) for row in part.to_pylist()), 1)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise PretrainError(f"{path}: not a whole Parquet file ({' '.join(str(error).split())[:200]})") from error

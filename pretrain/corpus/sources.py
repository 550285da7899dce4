"""Where documents come from: files, data sets, Python's standard library and packages, Debian's documentation.

A source is a frozen dataclass; `read(source)` yields documents, `{"text", "domain", "id"}` and what other columns a
data set has (`group`: documents that must stay on one side of the split); `fingerprint(source)` changes when the source
does. A path that is missing or a column that is not there is an error; one unreadable file among many is passed over
and counted.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pretrain.core.errors import PretrainError, nearest
from pretrain.core.files import digest
from pretrain.corpus import modules
from pretrain.corpus.roff import unroff

Document = dict[str, Any]
T = TypeVar("T")
HIDDEN = {".git", ".hg", ".venv", "__pycache__", "node_modules"}
MADE = ("run.json", "CACHEDIR.TAG")  # what lies beside these is a run's output or a cache, and no source
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".log")


@dataclass(frozen=True)
class Files:
    """A file, a folder or a glob: text and code (a document a file), `.jsonl[.gz|.zst]`, `.parquet`.

    `suffixes` keeps only the files of a folder that end so (empty: all that are text). The domain is `domain`, or the
    column of that name where the file has one, or the file's suffix without its dot.
    """

    files: str
    suffixes: tuple[str, ...] = ()
    text: str = "text"  # the column that holds the text, for jsonl and parquet
    domain: str | None = None


@dataclass(frozen=True)
class HubDataset:
    """A data set of the `datasets` library: a name on the hub, or a local folder written by it; streaming if asked."""

    dataset: str
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    text: str = "text"
    domain: str | None = None
    limit: int | None = None  # read at most so many documents

    def __post_init__(self) -> None:
        _check_limit(self.limit)


@dataclass(frozen=True)
class PythonStdlib:
    """Python's own standard library: modules (domain `python`) and their docstrings (domain `docstrings`)."""

    stdlib: bool = True
    docstrings: bool = True
    tests: bool = False  # the library's own tests, two thirds of its text
    limit: int | None = None  # at most so many modules, from the whole library alike
    exclude: tuple[str, ...] = ()  # modules to leave out: `encodings/*` for the tables of character sets

    def __post_init__(self) -> None:
        _check_limit(self.limit)


@dataclass(frozen=True)
class Packages:
    """Installed Python packages, by the names that they are imported by: their modules, the package as the domain.

    Nothing is imported. A document's id is its path from the package's name on.
    """

    packages: tuple[str, ...]
    tests: bool = False
    limit: int | None = None  # at most so many modules of each package, from the whole of it alike
    exclude: tuple[str, ...] = ()  # modules to leave out: `torch/_inductor/*`

    def __post_init__(self) -> None:
        if not self.packages:
            raise PretrainError("packages: accepted: at least one name")
        _check_limit(self.limit)


@dataclass(frozen=True)
class Functions:
    """Documented functions of installed Python packages (`stdlib`: the standard library), the package as the domain.

    Examples to learn from: `text` is a function's code without its docstring, `target` the docstring's first paragraph.
    """

    functions: tuple[str, ...]
    limit: int | None = None  # at most so many modules of each package, from the whole of it alike
    longest: int = 2000  # characters of code; longer functions are left out

    def __post_init__(self) -> None:
        if not self.functions:
            raise PretrainError("functions: accepted: at least one package, or stdlib")
        _check_limit(self.limit)


@dataclass(frozen=True)
class DebianDocs:
    """The documentation that Debian installed: `/usr/share/doc` (domain `doc`) and manual pages (domain `man`)."""

    debian: bool = True
    doc: str = "/usr/share/doc"
    man: str = "/usr/share/man"


Source = Files | HubDataset | PythonStdlib | Packages | Functions | DebianDocs


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise PretrainError(f"limit {limit}: accepted: 1 or more, or null for all")


def evenly(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` of the items, from their whole length alike, in their order."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[number * len(items) // limit] for number in range(limit)]


class Skipped:
    """Counts the files that were passed over, by reason."""

    def __init__(self) -> None:
        self.reasons: dict[str, int] = {}

    def add(self, reason: str) -> None:
        """One more."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1


def read(source: Source, skipped: Skipped | None = None) -> Iterator[Document]:
    """The source's documents, in a fixed order."""
    skipped = skipped or Skipped()
    if isinstance(source, Files):
        yield from _read_files(source, skipped)
    elif isinstance(source, HubDataset):
        yield from _read_dataset(source, skipped)
    elif isinstance(source, PythonStdlib):
        yield from _read_stdlib(source, skipped)
    elif isinstance(source, Packages):
        yield from _read_packages(source, skipped)
    elif isinstance(source, Functions):
        yield from _read_functions(source, skipped)
    else:
        yield from _read_debian(source, skipped)


def fingerprint(source: Source) -> str:
    """Changes when the source's files do (their names, sizes, times) or its version."""
    facts: Any = None
    if isinstance(source, Files):
        facts = [_stamp(path) for path in paths(source)]
    elif isinstance(source, PythonStdlib):
        facts = sys.version
    elif isinstance(source, Packages):
        facts = [[name, modules.version(name), _sizes(name, source.tests)] for name in source.packages]
    elif isinstance(source, Functions):
        facts = [sys.version if name == "stdlib" else _sizes(name, False) for name in source.functions]
    elif isinstance(source, DebianDocs):
        facts = [_stamp(path) for folder in (source.doc, source.man) for path in _below(Path(folder))]
    elif Path(source.dataset).exists():
        facts = [_stamp(path) for path in _below(Path(source.dataset))]
    return digest([type(source).__name__, asdict(source), facts])


def paths(source: Files) -> list[Path]:
    """The files that a `Files` source names, sorted."""
    path = Path(source.files).expanduser()
    if path.is_dir():
        found = _below(path)
    elif path.exists():
        found = [path]
    else:
        fixed = next((i for i, part in enumerate(path.parts) if re.search(r"[*?\[]", part)), len(path.parts) - 1)
        root = Path(*path.parts[:fixed])
        found = _seen(root, root.glob(str(Path(*path.parts[fixed:])))) if root.is_dir() else []
    kept = [p for p in found if not source.suffixes or p.name.endswith(tuple(source.suffixes))]
    if not kept:
        ends = f" that end with {', '.join(source.suffixes)}" if source.suffixes else ""
        raise PretrainError(f"no files{ends} at {source.files!r}; accepted: a file, a folder or a glob")
    return kept


def _below(folder: Path) -> list[Path]:
    return _seen(folder, folder.rglob("*"))


def _seen(root: Path, found: Iterator[Path]) -> list[Path]:
    """The files among those found below a folder, sorted, without what hidden folders, caches and runs hold."""
    made: dict[Path, bool] = {root: False}  # what is asked for by name is taken

    def is_made(folder: Path) -> bool:
        if folder not in made:
            made[folder] = any((folder / name).exists() for name in MADE) or is_made(folder.parent)
        return made[folder]

    return sorted(
        p for p in found if p.is_file() and not HIDDEN & set(p.relative_to(root).parts) and not is_made(p.parent)
    )


def _stamp(path: Path) -> list[Any]:
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns]


def _read_files(source: Files, skipped: Skipped) -> Iterator[Document]:
    for path in paths(source):
        if path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
            yield from _rows(_read_jsonl(path), path, source, skipped)
        elif path.suffix == ".parquet":
            yield from _rows(_read_parquet(path), path, source, skipped)
        else:
            text = read_text(path, skipped)
            if text is not None:
                yield {
                    "text": text,
                    "domain": source.domain or Path(path.name.removesuffix(".gz")).suffix.lstrip(".") or "text",
                    "id": str(path),
                }


def _rows(
    rows: Iterator[dict[str, Any]], path: Path | str, source: Files | HubDataset, skipped: Skipped
) -> Iterator[Document]:
    """Documents from rows with columns."""
    for number, row in enumerate(rows):
        if source.text not in row:
            hint = nearest(source.text, row)
            raise PretrainError(f"{path}: no column {source.text!r}{hint}; accepted: {', '.join(sorted(row))}")
        text, domain = row.get(source.text), source.domain
        if text is None or (isinstance(text, str) and not text.strip()):
            skipped.add("empty")
            continue
        if not isinstance(text, str):
            raise PretrainError(f"{path}, row {number + 1}: column {source.text!r} is {type(text).__name__}, not text")
        try:
            text.encode()
        except UnicodeEncodeError:
            skipped.add("not UTF-8")  # half of a character, as broken JSON holds
            continue
        if domain is None or domain in row:
            domain = row.get(domain or "domain") or Path(path).name.split(".")[0]
        rest = {k: v for k, v in row.items() if k not in (source.text, "text", "domain", "id")}
        yield {"text": text, "domain": str(domain), "id": str(row.get("id", f"{path}:{number}"))} | rest


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    import zstandard

    number = 0
    try:
        with _open_text(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise PretrainError(f"{path}:{number}: accepted: one JSON object a line")
                    yield row
    except json.JSONDecodeError as error:
        raise PretrainError(f"{path}:{number}: not JSON ({error.msg}): truncated or damaged") from error
    except (EOFError, OSError, UnicodeDecodeError, zstandard.ZstdError) as error:
        raise PretrainError(f"{path}: cannot be read after line {number} ({error}): truncated or damaged") from error


def _open_text(path: Path) -> io.TextIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")  # type: ignore[return-value]
    if path.suffix == ".zst":
        import zstandard

        return zstandard.open(path, "rt", encoding="utf-8")  # type: ignore[return-value]
    return path.open(encoding="utf-8")


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise PretrainError(f"{path}: not a whole Parquet file ({' '.join(str(error).split())[:200]})") from error


def _read_dataset(source: HubDataset, skipped: Skipped) -> Iterator[Document]:
    import datasets

    try:
        if Path(source.dataset, "dataset_info.json").exists() or Path(source.dataset, "dataset_dict.json").exists():
            data = datasets.load_from_disk(source.dataset)
            data = data[source.split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(source.dataset, source.config, split=source.split, streaming=source.streaming)
    except Exception as error:
        raise PretrainError(
            f"data set {source.dataset!r} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    for number, document in enumerate(_rows(iter(data), source.dataset, source, skipped)):
        if source.limit is not None and number >= source.limit:
            return
        yield document


def read_text(path: Path, skipped: Skipped) -> str | None:
    """A text file's content (`.gz` too), or None, counted, when it is binary, undecodable, broken or empty."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if b"\0" in data[:8192]:
            skipped.add("binary")
            return None
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        skipped.add("not UTF-8")
        return None
    except (OSError, EOFError, ValueError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        skipped.add(f"unreadable ({type(error).__name__})")
        return None
    if not text.strip():
        skipped.add("empty")
        return None
    return text


def _read_stdlib(source: PythonStdlib, skipped: Skipped) -> Iterator[Document]:
    for inside, path in evenly(modules.without(modules.of_stdlib(source.tests), source.exclude), source.limit):
        text = read_text(path, skipped)
        if text is None:
            continue
        yield {"text": text, "domain": "python", "id": inside, "group": inside}
        described = modules.docstrings(text) if source.docstrings else ""
        if described:
            yield {"text": described, "domain": "docstrings", "id": f"{inside}#docstrings", "group": inside}


def _read_packages(source: Packages, skipped: Skipped) -> Iterator[Document]:
    for name in source.packages:
        found = modules.without(modules.of_package(name, source.tests), source.exclude)
        for inside, path in evenly(found, source.limit):
            text = read_text(path, skipped)
            if text is not None:
                yield {"text": text, "domain": name, "id": inside, "group": inside}


def _read_functions(source: Functions, skipped: Skipped) -> Iterator[Document]:
    for name in source.functions:
        found = modules.of_stdlib(False) if name == "stdlib" else modules.of_package(name, False)
        for inside, path in evenly(found, source.limit):
            text = read_text(path, skipped)
            for number, (function, code, summary) in enumerate(modules.functions(text or "")):
                if len(code) <= source.longest:
                    place = {"id": f"{inside}#{number}-{function}", "group": inside}
                    yield {"text": code, "domain": name, "target": summary} | place


def _sizes(name: str, tests: bool) -> list[Any]:
    return [[inside, path.stat().st_size] for inside, path in modules.of_package(name, tests)]


def _read_debian(source: DebianDocs, skipped: Skipped) -> Iterator[Document]:
    doc, man = Path(source.doc), Path(source.man)
    if not doc.is_dir() and not man.is_dir():
        raise PretrainError(f"neither {doc} nor {man} is a folder; accepted: where Debian keeps its documentation")
    for path in _below(doc) if doc.is_dir() else ():
        if path.name.removesuffix(".gz").endswith((*TEXT_SUFFIXES, "README", "NEWS", "copyright", "TODO", "FAQ")):
            text = read_text(path, skipped)
            if text is not None:
                yield {"text": text, "domain": "doc", "id": str(path)}
    for path in sorted(p for folder in man.glob("man[0-9]") for p in _below(folder)):  # English: no man/LANGUAGE/
        if re.search(r"\.\d\w*(\.gz)?$", path.name):
            text = read_text(path, skipped)
            if text is not None and (plain := unroff(text).strip()):
                yield {"text": plain + "\n", "domain": "man", "id": str(path)}

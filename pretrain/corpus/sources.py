"""Where documents come from: files, data sets, Python's standard library, Debian's documentation.

A source is a frozen dataclass; `read(source)` yields documents, `{"text", "domain", "id"}` and what other columns a
data set has (`group`: documents that must stay on one side of the split); `fingerprint(source)` changes when the source
does. A path that is missing or a column that is not there is an error; one unreadable file among many is passed over
and counted.
"""

from __future__ import annotations

import ast
import gzip
import io
import json
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.core.errors import PretrainError, nearest
from pretrain.core.files import digest

Document = dict[str, Any]
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


@dataclass(frozen=True)
class PythonStdlib:
    """Python's own standard library: modules (domain `python`) and their docstrings (domain `docstrings`)."""

    stdlib: bool = True
    docstrings: bool = True
    tests: bool = False  # the library's own tests, two thirds of its text


@dataclass(frozen=True)
class DebianDocs:
    """The documentation that Debian installed: `/usr/share/doc` (domain `doc`) and manual pages (domain `man`)."""

    debian: bool = True
    doc: str = "/usr/share/doc"
    man: str = "/usr/share/man"


Source = Files | HubDataset | PythonStdlib | DebianDocs


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
    else:
        yield from _read_debian(source, skipped)


def fingerprint(source: Source) -> str:
    """Changes when the source's files do (their names, sizes, times) or its version."""
    facts: Any = None
    if isinstance(source, Files):
        facts = [_stamp(path) for path in paths(source)]
    elif isinstance(source, PythonStdlib):
        facts = sys.version
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
        root = Path(path.anchor or ".")
        found = sorted(p for p in root.glob(str(path.relative_to(path.anchor) if path.anchor else path)) if p.is_file())
    kept = [p for p in found if not source.suffixes or p.name.endswith(tuple(source.suffixes))]
    if not kept:
        ends = f" that end with {', '.join(source.suffixes)}" if source.suffixes else ""
        raise PretrainError(f"no files{ends} at {source.files!r}; accepted: a file, a folder or a glob")
    return kept


def _below(folder: Path) -> list[Path]:
    hidden = {".git", ".hg", ".venv", "__pycache__", "node_modules"}
    return sorted(p for p in folder.rglob("*") if p.is_file() and not hidden & set(p.relative_to(folder).parts))


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
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "__pycache__"}
    if not source.tests:
        left_out |= {"test", "tests", "idle_test"}
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if left_out & set(inside.parts):
            continue
        text = read_text(path, skipped)
        if text is None:
            continue
        yield {"text": text, "domain": "python", "id": str(inside), "group": str(inside)}
        described = _docstrings(text) if source.docstrings else ""
        if described:
            yield {"text": described, "domain": "docstrings", "id": f"{inside}#docstrings", "group": str(inside)}


def _docstrings(text: str) -> str:
    """A module's docstrings with the names they describe; the code is parsed, never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError):
        return ""
    parts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) > 40:
                name = getattr(node, "name", None)
                parts.append(f"{name}\n{docstring}" if name else docstring)
    return "\n\n".join(parts)


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


_ESCAPES = (
    (r"\\f[A-Z]|\\f\(..|\\s[+-]?\d|\\[&/,|^:]", ""),
    (r"\\-|\\\(hy|\\\(mi", "-"),
    (r"\\\(bu", "*"),
    (r"\\e", r"\\"),
    (r"\\\(aq|\\\(oq|\\\(cq", "'"),
    (r"\\\(lq|\\\(rq|\\\(dq", '"'),
    (r"\\\(em", "--"),
    (r"\\ |\\~", " "),
)
_DROPPED = {"TH", "Dd", "Os", "so", "de", "ds", "nr", "if", "ie", "el", "ft", "ad", "hy", "hla", "hpf", "ne", "ta"}
_PARAGRAPHS = {"PP", "P", "LP", "TP", "IP", "Pp", "sp"}
_LAYOUT = {"TP", "RS", "RE", "nf", "fi", "in", "br", "PD", "sp"}


def unroff(text: str) -> str:
    """Manual-page markup as plain text: sections and paragraphs kept, requests and font changes dropped."""
    lines: list[str] = []
    for raw in text.splitlines():
        line = raw
        if line.startswith((".", "'")):
            request, _, rest = line[1:].strip().partition(" ")
            if request.startswith("\\") or request in _DROPPED:
                continue
            lines += ["", ""] if request in ("SH", "SS", "Sh", "Ss") else [""] if request in _PARAGRAPHS else []
            line = "" if request in _LAYOUT else rest.replace('"', "")
            if not line:
                continue
        for pattern, plain in _ESCAPES:
            line = re.sub(pattern, plain, line)
        lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))

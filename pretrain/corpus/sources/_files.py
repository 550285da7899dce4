"""What sources share: documents, which files a path names, and how one is opened."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import Field, asdict
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TextIO, TypeVar

from pretrain.core.bounds import check_fields
from pretrain.core.errors import PretrainError
from pretrain.core.files import digest
from pretrain.core.packages import Package, package_facts, package_folder

Document = dict[str, Any]  # its columns by name
T = TypeVar("T")
HIDDEN = {".git", ".hg", ".venv", "__pycache__", "node_modules"}
MADE = ("run.json", "CACHEDIR.TAG")  # what lies beside these is a run's output or a cache, and no source
Named = tuple[str, Path]  # a file's id, and where it is


class Skipped:
    """Counts the files that were passed over, by reason."""

    def __init__(self) -> None:
        self.reasons: dict[str, int] = {}

    def add(self, reason: str) -> None:
        """One more."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1


class Source:
    """Base of the sources, which are frozen dataclasses."""

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __post_init__(self) -> None:
        """Refuse fields outside their bounds; a source that checks more calls this first."""
        check_fields(self, "")

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        """The documents, in a fixed order; what is passed over is counted in `skipped`."""
        raise NotImplementedError

    def state(self) -> object:
        """What changes when the files do; None where the fields say it all, as a package's version does."""
        return None


def read(source: Source, skipped: Skipped | None = None) -> Iterator[Document]:
    """The source's documents, in a fixed order."""
    return source.documents(skipped or Skipped())


def fingerprint(source: Source) -> str:
    """Changes when the source's files do (their names, sizes, times) or its version."""
    return digest([type(source).__name__, asdict(source), source.state()])


def described(source: Source) -> dict[str, object]:
    """What a corpus notes of a source: its fields, and of the package that it comes from the archive and its sha256."""
    facts = {"source": type(source).__name__} | asdict(source)
    package: Package | None = getattr(source, "package", None)
    return facts | {"package": package_facts(package)} if package else facts


def evenly(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` of the items, from their whole length alike, in their order."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[number * len(items) // limit] for number in range(limit)]


def evenly_read(make: Callable[[Skipped], Iterator[T]], limit: int | None, skipped: Skipped) -> Iterator[T]:
    """At most `limit` of what `make` yields, from its whole length alike: it is read twice, and never held."""
    if limit is None:
        yield from make(skipped)
        return
    chosen = set(evenly(range(sum(1 for _ in make(Skipped()))), limit))
    yield from (item for number, item in enumerate(make(skipped)) if number in chosen)


def located(where: str, package: Package | None, suffixes: Iterable[str] = ()) -> list[Named]:
    """The files at a path, a folder or a glob, sorted, with their ids: inside a package, their paths in it."""
    if package is None:
        return [(str(path), path) for path in _matching(Path(where).expanduser(), where, suffixes)]
    inside = PurePath(where)
    if inside.is_absolute() or ".." in inside.parts:
        raise PretrainError(f"{where!r}: accepted: a path inside the package {package.spec!r}")
    root = package_folder(package)
    paths = _matching(root / inside, f"{where} of the package {package.spec}", suffixes)
    return [(path.relative_to(root).as_posix(), path) for path in paths]


def _matching(path: Path, where: str, suffixes: Iterable[str]) -> list[Path]:
    ends = tuple(suffixes)
    if path.is_dir():
        paths = below(path)
    elif path.exists():
        paths = [path]
    else:
        fixed = next((i for i, part in enumerate(path.parts) if re.search(r"[*?\[]", part)), len(path.parts) - 1)
        root = Path(*path.parts[:fixed])
        paths = _seen(root, root.glob(str(Path(*path.parts[fixed:])))) if root.is_dir() else []
    kept = [p for p in paths if not ends or p.name.endswith(ends)]
    if not kept:
        endings = f" that end with {', '.join(ends)}" if ends else ""
        raise PretrainError(f"no files{endings} at {where!r}; accepted: a file, a folder or a glob")
    return kept


def below(folder: Path) -> list[Path]:
    """The files in a folder, as deep as they lie, sorted."""
    return _seen(folder, folder.rglob("*"))


def _seen(root: Path, paths: Iterator[Path]) -> list[Path]:
    """The files among those found below a folder, sorted, without what hidden folders, caches and runs hold."""
    made: dict[Path, bool] = {root: False}  # what is asked for by name is taken

    def is_made(folder: Path) -> bool:
        if folder not in made:
            made[folder] = any((folder / name).exists() for name in MADE) or is_made(folder.parent)
        return made[folder]

    return sorted(
        p for p in paths if p.is_file() and not HIDDEN & set(p.relative_to(root).parts) and not is_made(p.parent)
    )


def stamps(where: str, package: Package | None, suffixes: Iterable[str] = ()) -> list[list[str | int]] | None:
    """Names, sizes and times of the files at a path; nothing for those of a package, whose version says it."""
    return None if package else [stamp(path) for _, path in located(where, None, suffixes)]


def stamp(path: Path) -> list[str | int]:
    """A file's name, size and time."""
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns]


def any_case(*suffixes: str) -> tuple[str, ...]:
    """The suffixes in small and in capital letters, as cameras write them."""
    return (*suffixes, *(suffix.upper() for suffix in suffixes))


PathLabel = Literal["parent", "stem"] | None


def path_label(path: Path, label: PathLabel) -> dict[str, str]:
    """`{"label": …}` from a file's folder or its name without endings; nothing for None."""
    if label is None:
        return {}
    return {"label": path.absolute().parent.name if label == "parent" else path.name.split(".")[0]}


def open_text(path: Path) -> TextIO:
    """A text file, plain, `.gz` or `.zst`."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        import zstandard

        return zstandard.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def lines_of(path: Path, skipped: Skipped) -> Iterator[str]:
    """The lines of a text file; one that cannot be read to its end is counted, and ends there."""
    import zstandard

    try:
        with open_text(path) as lines:
            for line in lines:
                yield line.rstrip("\r\n")
    except UnicodeDecodeError:
        skipped.add("not UTF-8")
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        skipped.add(f"unreadable ({type(error).__name__})")


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
    except (OSError, EOFError, ValueError, zlib.error) as error:
        skipped.add(f"unreadable ({type(error).__name__})")
        return None
    if not text.strip():
        skipped.add("empty")
        return None
    return text

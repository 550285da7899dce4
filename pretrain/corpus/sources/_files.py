"""What sources share: documents, and how a file is opened."""

from __future__ import annotations

import builtins
import importlib
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import Field, asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TextIO, TypeVar

from pretrain.core.bounds import check_fields
from pretrain.core.files import digest
from pretrain.core.packages import Package, package_facts
from pretrain.corpus.sources._skipped import Skipped

Document = dict[str, Any]  # its columns by name
# What is told of something that cannot be read: where it is, what is wrong, its reason in the counts, what is accepted.
Wrong = Callable[[str, str, str, str], None]
T = TypeVar("T")


class Size(NamedTuple):
    """What a source is about to give: bytes of text, and documents (0: not known without reading)."""

    bytes: float
    documents: float = 0


PACKED = (".gz", ".bz2", ".xz", ".zst")
UNPACKED = 4  # times as large is text as its compressed file, about


def size_of(paths: Iterable[Path]) -> Size:
    """Of files that are a document each."""
    sizes = [path.stat().st_size * (UNPACKED if path.suffix in PACKED else 1) for path in paths]
    return Size(sum(sizes), len(sizes))


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

    def size(self) -> Size | None:
        """About what it gives, from the sizes of files alone; None where that is not known."""
        return None

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


def any_case(*suffixes: str) -> tuple[str, ...]:
    """The suffixes in small and in capital letters, as cameras write them."""
    return (*suffixes, *(suffix.upper() for suffix in suffixes))


PathLabel = Literal["parent", "stem"] | None


def path_label(path: Path, label: PathLabel) -> dict[str, str]:
    """`{"label": …}` from a file's folder or its name without endings; nothing for None."""
    if label is None:
        return {}
    return {"label": path.absolute().parent.name if label == "parent" else path.name.split(".")[0]}


OPENED: dict[str, str] = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "zstandard"}  # by which module
BROKEN = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    lzma.LZMAError,
)  # of files that end too early, and more


def plain_name(path: Path) -> str:
    """A file's name without the ending that says how it is compressed."""
    return path.stem if path.suffix in OPENED else path.name


def open_text(path: Path, errors: str = "strict", newline: str | None = None) -> TextIO:
    """A text file in UTF-8, plain or compressed (`.gz`, `.bz2`, `.xz`, `.zst`); a byte-order mark is left out."""
    module = importlib.import_module(OPENED[path.suffix]) if path.suffix in OPENED else builtins
    opened: TextIO = module.open(path, "rt", encoding="utf-8-sig", errors=errors, newline=newline)
    return opened


def lines_of(path: Path, skipped: Skipped) -> Iterator[str]:
    """The lines of a text file; one that cannot be read to its end is counted, and ends there."""
    import zstandard

    number = 0
    try:
        with open_text(path) as lines:
            for line in lines:
                number += 1
                yield line.rstrip("\r\n")
    except UnicodeDecodeError:
        skipped.add("not UTF-8", f"{path}:{number + 1}")
    except (*BROKEN, zstandard.ZstdError) as error:
        skipped.add(f"unreadable ({type(error).__name__})", f"{path}:{number + 1}")


def read_text(path: Path, skipped: Skipped, wrong: Wrong | None = None, name: str = "") -> str | None:
    """A text file's content (a compressed one's too), or None, counted, when it is binary, broken or empty.

    With `wrong` a broken one, or one with bytes that are not UTF-8, is told to it; else it is counted.
    """
    import zstandard

    name = name or str(path)
    wrong = wrong or (lambda where, what, reason, accepted: skipped.add(reason, where))
    try:
        module = importlib.import_module(OPENED[path.suffix]) if path.suffix in OPENED else builtins
        with module.open(path, "rb") as file:
            data: bytes = file.read()
    except (*BROKEN, zstandard.ZstdError) as error:
        why = getattr(error, "strerror", None) or str(error)
        wrong(name, f"cannot be read ({why})", f"unreadable ({type(error).__name__})", "a whole file")
        return None
    if is_binary(data):
        skipped.add("binary", name)
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        wrong(f"{name}:{line}", f"byte 0x{data[error.start]:02x} is not UTF-8", "not UTF-8", "text in UTF-8")
        return None
    if not text.strip():
        skipped.add("empty", name)
        return None
    return text


HEAD = 8192


def is_binary(data: bytes) -> bool:
    """Whether bytes are no text in any encoding: a zero byte, or control characters (2% of the first ones)."""
    head = data[:HEAD]
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") and not len(data) % 2:  # UTF-16, which is text
        return False
    return b"\0" in head or len(head.translate(None, _NO_CONTROL)) > len(head) / 50


_NO_CONTROL = bytes(sorted({*range(32, 256), *b"\t\n\r\f\b\x1b"}))

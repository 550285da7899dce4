"""What sources share: documents, and how a file is opened."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, asdict
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

from pretrain.core.bounds import Fielded, check_fields
from pretrain.core.files import digest
from pretrain.core.foreign import rows, texts
from pretrain.core.foreign.archives import BROKEN, PACKED, Place, open_packed, open_text
from pretrain.core.foreign.parsing import raise_memory, reason
from pretrain.core.packages import Package, check_whole, package_facts
from pretrain.corpus.sources._skipped import Skipped

Document = dict[str, Any]  # its columns by name
# What is told of something that cannot be read: where it is, what is wrong, its reason in the counts, what is accepted.
Wrong = Callable[[str, str, str, str], None]
Part = tuple[int, Iterator[Document]]  # the bytes of a file, and the documents that it holds
T = TypeVar("T")


class Size(NamedTuple):
    """What a source is about to give: bytes of text, and documents (0: not known without reading)."""

    bytes: float
    documents: float = 0
    whole: float = 0  # bytes with those of the columns beside the text, where it has any; 0: it has none


UNTOUCHED = ("image", "audio", "series")  # columns without text
DOMAIN, NAME = 200, 1000  # characters of a domain's name, and of an id
OF_A_SIZE = 4  # files that are read one after another, where they are of the same size
UNPACKED = 4  # times as large is text as its compressed file, about


def given(row: Mapping[str, object], column: str) -> bool:
    """Whether a row has something in a column: neither null nor NaN nor blanks."""
    value = row.get(column)
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def name_of(where: str) -> str:
    """The name of a document of a table, as its id and every message have it: `FILE:LINE`, `FILE, row N`."""
    return re.sub(r" \(row \d+\)$", "", where)


def size_of(paths: Iterable[Path]) -> Size:
    """Of files that are a document each."""
    sizes = [path.stat().st_size * (UNPACKED if path.suffix in PACKED else 1) for path in paths if path.exists()]
    return Size(sum(sizes), len(sizes))


class Source(metaclass=Fielded):
    """Base of the sources, which are frozen dataclasses."""

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    speed: ClassVar[float] = 20e6  # bytes of its size that a core reads in a second, where nobody has looked at it
    version: ClassVar[int] = 1  # raised when the same fields come to give other documents

    def __post_init__(self) -> None:
        """Refuse fields outside their bounds; a source that checks more calls this first."""
        check_fields(self, "")

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        """The documents, in a fixed order; what is passed over is counted in `skipped`."""
        raise NotImplementedError

    def by_file(self, skipped: Skipped) -> list[Part]:
        """The same by the files that hold them, in their order; none is opened before its documents are asked for."""
        return [(0, self.documents(skipped))]

    def domains(self) -> tuple[str, ...] | None:
        """The domains of its documents; None where that is not known before they are read."""
        domain = getattr(self, "domain", None)
        return (domain,) if domain else None

    def size(self) -> Size | None:
        """About what it gives, from the sizes of files alone; None where that is not known."""
        return None

    def flops(self) -> float:
        """The products that make its documents; none of those that are read."""
        return 0.0

    def state(self) -> object:
        """What changes when the files do; None where the fields say it all, as a package's version does."""
        return None


def read(source: Source, skipped: Skipped | None = None) -> Iterator[Document]:
    """The source's documents, in a fixed order; none is longer, or holds other characters, than can be stored."""
    skipped = skipped or Skipped()
    package: Package | None = getattr(source, "package", None)
    if package is not None:
        check_whole(package)
    return _stored(source.documents(skipped), skipped)


def read_by_file(source: Source, skipped: Skipped) -> list[Part]:
    """The source's documents by the files that hold them, to be read in any order."""
    return [(size, _stored(documents, skipped)) for size, documents in source.by_file(skipped)]


def _stored(documents: Iterable[Document], skipped: Skipped) -> Iterator[Document]:
    """The documents as they can be stored, without those that are too long."""
    for document in documents:
        if len(document.get("text") or "") > skipped.longest:
            skipped.too_long("documents", str(document.get("id"))[:NAME])
        else:
            yield _storable(document, skipped)


def _storable(document: Document, skipped: Skipped) -> Document:
    """The document with whole characters alone, and with a domain and an id of bounded lengths."""
    plain = {name: value for name, value in document.items() if name not in UNTOUCHED}
    if texts.broken_in(plain) is not None:
        document = texts.mended_in(document)
        skipped.add("halves of characters, replaced", str(document.get("id"))[:NAME])
    for name, most in (("domain", DOMAIN), ("id", NAME)):
        if isinstance(value := document.get(name), str) and len(value) > most:
            document = document | {name: value[:most]}
            skipped.add(f"long names, cut ({name})", value[:most])
    return document


def fingerprint(source: Source) -> str:
    """Changes when the source's files do (their names, sizes, times) or its version."""
    version = [source.version] if source.version > 1 else []
    return digest([type(source).__name__, asdict(source), source.state(), *version])


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


def spread(sizes: Sequence[int]) -> list[int]:
    """The places of files of such sizes in an order of which every beginning is like all of them.

    It is drawn once for all; a few files of one size follow each other: whoever reads one reads its copies too, if it
    has no more than that.
    """
    random, alike, count = Random(0), dict[tuple[int, int], list[int]](), Counter[int]()
    for place in random.sample(range(len(sizes)), len(sizes)):
        alike.setdefault((sizes[place], count[sizes[place]] // OF_A_SIZE), []).append(place)
        count[sizes[place]] += 1
    return [place for places in random.sample(list(alike.values()), len(alike)) for place in places]


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


def plain_name(path: Place) -> str:
    """A file's name without the ending that says how it is compressed."""
    return path.stem if path.suffix in PACKED else path.name


def lines_of(path: Path, skipped: Skipped) -> Iterator[str]:
    """The lines of a text file; one that cannot be read to its end is counted, and ends there."""
    yield from (line for _, line in numbered_lines(path, skipped))


def numbered_lines(path: Path, skipped: Skipped) -> Iterator[tuple[int, str]]:
    """The same with their numbers in the file, from 1."""
    number = 0
    try:
        with open_text(path) as opened:
            for number, line in rows.lines(opened, skipped.longest):
                if line is None:
                    skipped.too_long("lines", f"{path}:{number}")
                else:
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError:
        skipped.add("not UTF-8", f"{path}:{number + 1}")
    except BROKEN as error:
        raise_memory(error, path)
        skipped.add(f"unreadable ({type(error).__name__})", f"{path}:{number + 1}")


def read_text(path: Place, skipped: Skipped, wrong: Wrong | None = None, name: str = "") -> str | None:
    """A text file's content (a compressed one's too), or None, counted, when it is binary, broken, empty or too long.

    With `wrong` a broken one, or one with bytes that are not UTF-8, is told to it; else it is counted.
    """
    name = name or str(path)
    text = _read(path, skipped, wrong or _counted(skipped), name)
    if text is TOO_LONG:
        skipped.too_long("documents", name)
    return None if text is TOO_LONG else text


def read_pieces(path: Place, skipped: Skipped, wrong: Wrong, name: str) -> Iterator[tuple[str, bool]]:
    """A text file's content, and that this is all of it; a longer one comes in pieces, cut at ends of lines."""
    text = _read(path, skipped, wrong, name)
    if text is not TOO_LONG:
        yield from () if text is None else ((text, True),)
        return
    held = ""
    try:
        with open_text(path, newline="") as opened:
            while piece := opened.read(skipped.longest + 1 - len(held)):
                held += piece
                if len(held) > skipped.longest:
                    end = held.rfind("\n", 0, skipped.longest) + 1 or skipped.longest
                    yield held[:end], False
                    held = held[end:]
    except BROKEN as error:
        raise_memory(error, name)
        wrong(name, f"cannot be read ({reason(error)})", f"unreadable ({type(error).__name__})", "a whole file")
    if held.strip():
        yield held, False


TOO_LONG = "\0"  # in place of a text that is longer than a document may be


def _counted(skipped: Skipped) -> Wrong:
    return lambda where, what, why, accepted: skipped.add(why, where)


def _read(path: Place, skipped: Skipped, wrong: Wrong, name: str) -> str | None:
    """A file's text; None for one that is told or counted, `TOO_LONG` of one of which not all was read."""
    most = 4 * skipped.longest  # bytes, which no text of as many characters has more of
    try:
        with open_packed(path) as file:
            data = file.read(HEAD)
            if not is_binary(data):
                data += file.read(max(0, most + 1 - len(data)))
    except BROKEN as error:
        raise_memory(error, name)
        wrong(name, f"cannot be read ({reason(error)})", f"unreadable ({type(error).__name__})", "a whole file")
        return None
    if is_binary(data):
        skipped.add("UTF-16 without a byte-order mark" if _unmarked(data) else "binary", name)
        return None
    if len(data) > most:
        return TOO_LONG
    try:
        text = texts.decode(data)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        kind = texts.encoding_of(data[:4]).upper().removesuffix("-SIG")
        wrong(f"{name}:{line}", f"byte 0x{data[error.start]:02x} is not {kind}", f"not {kind}", f"text in {kind}")
        return None
    if not text.strip():
        skipped.add("empty", name)
        return None
    return text if len(text) <= skipped.longest else TOO_LONG


def _unmarked(data: bytes) -> bool:
    """Whether bytes look like UTF-16 without a mark: of Western text every other one is zero."""
    head = data[:HEAD]
    return len(head) > 3 and any(head[side::2].count(0) > 0.4 * len(head) for side in (0, 1))


HEAD = 8192


def is_binary(data: bytes) -> bool:
    """Whether bytes are no text in any encoding: a zero byte, or control characters (2% of the first ones)."""
    head = data[:HEAD]
    if texts.encoding_of(data[:4]) not in ("utf-8", "utf-8-sig"):  # of its two or four bytes a character many are zero
        return False
    return b"\0" in head or len(head.translate(None, _NO_CONTROL)) > len(head) / 50


_NO_CONTROL = bytes(sorted({*range(32, 256), *b"\t\n\r\f\b\x1b"}))

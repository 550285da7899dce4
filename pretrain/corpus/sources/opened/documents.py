"""The text of HTML pages, of PDF files and of the pages in WARC files.

A reader yields documents with where each stands. What cannot be read is told to `wrong`, which raises, or counts it and
lets the reader go on; what holds no text is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.foreign import texts
from pretrain.core.foreign.archives import BROKEN, PACKED, Place, open_packed, seekable
from pretrain.core.foreign.documents import html, pdf, warc
from pretrain.core.foreign.documents.members import ARCHIVES, ENCRYPTED
from pretrain.core.foreign.parsing import raise_memory, reason
from pretrain.core.system.extras import MissingExtra
from pretrain.corpus.sources._containers import Row, ending
from pretrain.corpus.sources._files import HEAD, UNPACKED, Size, Wrong, is_binary, size_of
from pretrain.corpus.sources._skipped import Skipped

PageReader = Callable[[Place, str, Wrong, Skipped], Iterator[Row]]
# Bytes of text in a byte of a file, measured on 291 pages and 2 manuals in /usr/share/doc; of archives as of what they
# hold, which is taken for text.
TEXT = {".html": 0.37, ".htm": 0.37, ".xhtml": 0.37, ".warc": 0.37, ".pdf": 0.25}
SMALL = 1 << 20  # bytes of a PDF whose pages are kept
UNNEEDED = "files that need pip install 'pretrain[documents]'"
NO_TEXT = {"HTML": "documents without text (HTML)", "PDF": "documents without text (PDF: scans, pictures)"}


def read_html(path: Place, name: str, wrong: Wrong, skipped: Skipped) -> Iterator[Row]:
    """The text that a page is about, without menus, footers and advertisements."""
    most = 4 * skipped.longest
    try:
        with open_packed(path) as opened:
            data = opened.read(most + 1)
    except BROKEN as error:
        _unreadable(error, name, wrong)
        return
    if len(data) > most:
        skipped.too_long("documents", name)
    elif (text := _page(data, name, None, wrong, skipped)) is not None:
        yield from _pieces([text], name, skipped)


def _page(data: bytes, name: str, declared: str | None, wrong: Wrong, skipped: Skipped) -> str | None:
    """The text of a page's bytes; None, told or counted, where there is none."""
    if is_binary(data[:HEAD]):
        skipped.add("binary", name)
        return None
    encoding = html.encoding_of(data, declared)
    try:
        page = data.decode(encoding)
    except UnicodeDecodeError as error:
        line, kind = data.count(b"\n", 0, error.start) + 1, encoding.upper().removesuffix("-SIG")
        what = f"byte 0x{data[error.start]:02x} is not {kind}"
        wrong(f"{name}:{line}", what, f"not {kind}", "a page in the encoding that it names, or in UTF-8")
        return None
    try:
        text, letters, taken = html.main_text(texts.mended(page))
    except Exception as error:
        _not_whole(error, name, "HTML", wrong, skipped)
        return None
    if not text.strip():
        skipped.add("empty" if not page.strip() else NO_TEXT["HTML"], name)
        return None
    skipped.page(letters, taken)
    return text


def read_pdf(path: Place, name: str, wrong: Wrong, skipped: Skipped) -> Iterator[Row]:
    """The text of a PDF's pages, an empty line between them."""
    try:
        opened = seekable(path)
    except BROKEN as error:
        _unreadable(error, name, wrong)
        return
    count = 0
    try:
        with opened:
            stat = path.stat() if isinstance(path, Path) else None
            kept = _pages(path, stat.st_mtime_ns) if stat is not None and stat.st_size <= SMALL else pdf.pages(opened)
            for count, row in enumerate(_pieces(kept, name, skipped), 1):  # noqa: B007
                yield row
    except Exception as error:
        _not_whole(error, name, "PDF", wrong, skipped)
        return
    if not count:
        skipped.add(NO_TEXT["PDF"], name)


@lru_cache(maxsize=64)
def _pages(path: Place, _: int) -> tuple[str, ...]:
    """The pages of a PDF, as it is at a time: a plan looks at them again and again, and they take long to read."""
    with seekable(path) as opened:
        return tuple(pdf.pages(opened))


def read_warc(path: Place, name: str, wrong: Wrong, skipped: Skipped) -> Iterator[Row]:
    """The text of each page that a server answered with, with its `url`."""
    number = 0
    try:
        with open_packed(path) as opened:
            for number, answer in enumerate(warc.answers(opened, 4 * skipped.longest), 1):
                where = f"{name}#{number}"
                if answer.why:
                    skipped.add(answer.why, where)
                elif answer.data is None:
                    skipped.too_long("documents", where)
                elif (text := _page(answer.data, where, answer.charset, wrong, skipped)) is not None:
                    yield from ((place, row | {"url": answer.url}) for place, row in _pieces([text], where, skipped))
    except Exception as error:
        _not_whole(error, f"{name}, after {number} answers" if number else name, "WARC", wrong, skipped)


def _pieces(parts: Iterable[str], name: str, skipped: Skipped) -> Iterator[Row]:
    """A document of parts, an empty line between them; one that is too long comes in pieces, cut at ends of lines."""
    held, number = "", 0
    for part in parts:
        if not part.strip():
            continue
        held = f"{held}\n\n{part.strip()}" if held else part.strip()
        while len(held) > skipped.longest:
            if not number:
                skipped.add(f"documents cut to {skipped.longest:,} characters", name)
            end = held.rfind("\n", 0, skipped.longest) + 1 or skipped.longest
            yield name, {"text": held[:end], "id": f"{name}#{number}", "group": name}
            held, number = held[end:], number + 1
    if held.strip():
        yield name, {"text": held} | ({"id": f"{name}#{number}", "group": name} if number else {"id": name})


def _unreadable(error: BaseException, name: str, wrong: Wrong) -> None:
    raise_memory(error, name)
    wrong(name, f"cannot be read ({reason(error)})", f"unreadable ({type(error).__name__})", "a whole file")


def _not_whole(error: Exception, name: str, kind: str, wrong: Wrong, skipped: Skipped) -> None:
    """Tell what a library has raised of a file; what `wrong` has raised goes on."""
    raise_memory(error, name)
    if isinstance(error, MissingExtra):
        what, _, accepted = str(error).partition("; accepted: ")
        wrong(name, what, UNNEEDED, accepted)
    elif isinstance(error, PretrainError):
        raise error
    elif isinstance(error, pdf.Encrypted):
        skipped.add(ENCRYPTED, name)
    else:
        wrong(
            name, f"no whole {kind} ({reason(error)}): truncated or damaged", f"broken {kind}", f"a whole {kind} file"
        )


READERS: dict[str, PageReader] = {
    ".html": read_html, ".htm": read_html, ".xhtml": read_html, ".pdf": read_pdf, ".warc": read_warc,
}  # fmt: skip


def about(paths: Iterable[Path], markup: bool) -> Size:
    """About what files hold of text that are no tables; how many documents is not known where one holds many."""
    total, count, many = 0.0, 0, False
    for path in paths:
        size = size_of([path])
        packed = ending(path) in ARCHIVES and path.suffix.lower() not in (".tar", *PACKED)
        share = TEXT.get(ending(path), 1.0) if reader_of(path, markup) else UNPACKED if packed else 1.0
        total, count = total + share * size.bytes, count + int(size.documents)
        many = many or ending(path) in (".warc", *ARCHIVES)
    return Size(total, 0 if many else count)


def reader_of(path: Place, markup: bool) -> PageReader | None:
    """What reads a file's text, by its ending; with `markup` HTML is read as it stands, like any text."""
    reader = READERS.get(ending(path))
    return None if markup and reader is read_html else reader

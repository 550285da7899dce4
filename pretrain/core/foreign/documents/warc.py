"""Records of the web (WARC, ISO 28500): the pages that servers answered with, by `warcio`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from pretrain.core.foreign.parsing import reason
from pretrain.core.system.extras import extras_named

if TYPE_CHECKING:
    from warcio.recordloader import ArcWarcRecord

PIECE = 1 << 16
CHARSET = re.compile(r"""(?i)charset\s*=\s*["']?([\w.:-]{1,40})""")
PAGES = ("text/html", "application/xhtml+xml")


@dataclass(frozen=True)
class Answer:
    """A server's answer: `data` are the bytes of the page, None of one that is no page or longer than asked for."""

    url: str
    data: bytes | None
    why: str  # it has none
    charset: str | None


class _Whole:
    """A stream that ends too early with an error that `warcio` does not take for the end of the file."""

    def __init__(self, source: BinaryIO) -> None:
        self.source = source

    def read(self, size: int = -1) -> bytes:
        """As the stream."""
        try:
            return self.source.read(size)
        except EOFError as error:
            raise OSError(reason(error)) from error


def answers(stream: BinaryIO, most: int) -> Iterator[Answer]:
    """The answers in a WARC file that is unpacked already, in order; no page of more than `most` bytes is held.

    Raises what reading raises, and `warcio`'s `ArchiveLoadFailed` for what is no WARC.
    """
    with extras_named():
        from warcio.archiveiterator import ArchiveIterator
    for record in ArchiveIterator(_Whole(stream)):
        if record.rec_headers.get_header("Content-Length") is None:
            raise OSError("a record does not say its length")
        if record.rec_type == "response" and record.http_headers is not None:
            yield _answer(record, most)
        while record.raw_stream.read(PIECE):
            pass
        if (rest := getattr(record.raw_stream, "limit", 0)) > 0:
            raise OSError(f"it ends {rest} bytes before the end of a record")


def _answer(record: ArcWarcRecord, most: int) -> Answer:
    url = record.rec_headers.get_header("WARC-Target-URI") or ""
    status, kind = record.http_headers.get_statuscode(), record.http_headers.get_header("Content-Type") or ""
    match = CHARSET.search(kind)
    charset = match[1] if match else None
    if status != "200":
        return Answer(url, None, "answers that are no page (another status than 200)", charset)
    if kind.partition(";")[0].strip().lower() not in PAGES:
        return Answer(url, None, "answers that are no page (another type than HTML)", charset)
    data = record.content_stream().read(most + 1)
    return Answer(url, data if len(data) <= most else None, "", charset)

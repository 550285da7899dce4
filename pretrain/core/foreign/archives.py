"""Compressed files that others have made: unpacked piece by piece, within a ratio, a bound and a little memory."""

from __future__ import annotations

import io
import lzma
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TextIO, cast

from pretrain.core.foreign import texts
from pretrain.core.foreign.parsing import raise_memory
from pretrain.core.foreign.reading import in_bytes, open_file

PACKED = (".gz", ".bz2", ".xz", ".zst")
FREE = 64 << 20  # bytes that any file may unpack to
RATIO = 250  # times as large as its file may what is unpacked be beyond that; text is 3 to 50 times
MOST = 1 << 40  # bytes that one file may unpack to
WINDOW = 128 << 20  # bytes that a decoder may keep of what it has unpacked
PIECE = 1 << 16
HELD = 64 << 20  # bytes of a file in an archive that are in memory at once
# What opening, unpacking and decoding raise of files that are damaged, end too early, or are none at all.
# What is of memory among them, `raise_memory` tells apart.
BROKEN = (OSError, EOFError, ValueError, MemoryError, zlib.error, lzma.LZMAError)


class Bomb(OSError):
    """A file that unpacks to more than is allowed."""


@dataclass(frozen=True)
class Member:
    """A file inside an archive, which is read as one on disk is, and never laid there.

    `inside` is its path in the archive, `size` how many bytes it has there; `opener` gives them, from the first one on,
    each time it is called.
    """

    inside: PurePosixPath
    size: int
    opener: Callable[[], BinaryIO]

    @property
    def name(self) -> str:
        """The last part of its path, as a path has it."""
        return self.inside.name

    @property
    def stem(self) -> str:
        """Its name without the ending."""
        return self.inside.stem

    @property
    def suffix(self) -> str:
        """The ending of its name."""
        return self.inside.suffix


Place = Path | Member  # of a file that can be opened


def seekable(place: Place) -> BinaryIO:
    """A file whose bytes can be read in any order; those of one in an archive are held, if they are at most `HELD`."""
    if not isinstance(place, Member):
        return open_file(place)
    if place.size > HELD:
        raise OSError(f"it is of {in_bytes(place.size)}, where at most {in_bytes(HELD)} can be read inside an archive")
    with place.opener() as opened:
        return io.BytesIO(opened.read())


def most_of(size: int) -> int:
    """Bytes that a compressed file of `size` bytes may unpack to."""
    return min(MOST, max(FREE, RATIO * size))


class _Bounded(io.RawIOBase):
    """What a decoder gives, until it is too much for the size of its file."""

    def __init__(self, source: BinaryIO, file: BinaryIO, least: int, size: int) -> None:
        self.source, self.file, self.count = source, file, 0
        self.most, self.least = most_of(size), least

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = self.source.read(len(buffer))
        except BROKEN:
            raise
        except Exception as error:  # zstandard has an error type of its own
            raise_memory(error, "a compressed file")
            raise OSError(" ".join(str(error).split())[:200]) from error
        self.count += len(data)
        if not data and len(buffer) and self.count < self.least:
            raise EOFError(f"it ends after {self.count} of {self.least} bytes")
        if self.count > self.most:
            raise Bomb(f"it unpacks to more than {in_bytes(self.most)}, {RATIO} times its own size and more")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.source.close()
            self.file.close()
        super().close()


class _Xz(io.RawIOBase):
    """A file of xz or lzma whose decoder gets no more than `WINDOW` of memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.decoder, self.ended = file, self._new(), False

    def _new(self) -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(memlimit=WINDOW + (16 << 20))

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; none at the end."""
        while True:
            if self.decoder.eof:
                rest = self.decoder.unused_data or self.file.read(PIECE)
                rest = rest.lstrip(b"\0")  # what pads one stream after another
                if not rest:
                    return b""
                self.decoder = self._new()
                data = self.decoder.decompress(rest, size)
            else:
                piece = self.file.read(PIECE) if self.decoder.needs_input else b""
                if not piece and self.decoder.needs_input:
                    raise EOFError("it ends before its end was marked")
                data = self.decoder.decompress(piece, size)
            if data:
                return data


def open_packed(path: Place, packed: str | None = None) -> BinaryIO:
    """A regular file's bytes, unpacked where its ending, or `packed` in its place, says that it is compressed.

    Reading raises one of `BROKEN`: a `Bomb` for what unpacks to too much.
    """
    packed = path.suffix if packed is None else packed
    file = path.opener() if isinstance(path, Member) else open_file(path)
    try:
        if packed not in PACKED:
            return file
        size = path.size if isinstance(path, Member) else os.fstat(file.fileno()).st_size
        return cast("BinaryIO", io.BufferedReader(_Bounded(*_decoder(file, packed), size), PIECE))
    except BaseException:
        file.close()
        raise


def _decoder(file: BinaryIO, ending: str) -> tuple[BinaryIO, BinaryIO, int]:
    """What unpacks a file, the file, and how many bytes it says that it holds where its decoder does not look."""
    if ending == ".gz":
        import gzip

        return cast("BinaryIO", gzip.GzipFile(fileobj=file)), file, 0
    if ending == ".bz2":
        import bz2

        return cast("BinaryIO", bz2.BZ2File(file)), file, 0
    if ending == ".xz":
        return cast("BinaryIO", _Xz(file)), file, 0
    import zstandard

    head = file.read(32)
    file.seek(0)
    try:
        least = max(0, zstandard.frame_content_size(head))
    except zstandard.ZstdError:
        least = 0
    decoder = zstandard.ZstdDecompressor(max_window_size=WINDOW)
    reader = decoder.stream_reader(file, read_size=PIECE, read_across_frames=True, closefd=False)
    return cast("BinaryIO", reader), file, least


def open_text(path: Place, errors: str = "strict", newline: str | None = None) -> TextIO:
    """A text file, plain or compressed, in the encoding that its byte-order mark says, which is left out, or UTF-8."""
    packed = open_packed(path)
    try:
        held = packed if isinstance(packed, io.BufferedReader) else io.BufferedReader(cast("io.RawIOBase", packed))
        encoding = texts.encoding_of(held.peek(4)[:4])
        return io.TextIOWrapper(held, encoding, errors=errors, newline=newline)
    except BaseException:
        packed.close()
        raise

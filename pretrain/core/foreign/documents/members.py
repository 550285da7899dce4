"""The files inside archives, `.zip` and `.tar`: read where they lie, one after another, and never laid on disk.

So a name that leads out of its archive can do no harm; it is refused all the same, like a link, since whoever wrote it
meant something else than a file of that name. What all files of an archive come to is bounded as what a compressed file
unpacks to is.
"""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, BinaryIO, cast

from pretrain.core.foreign.archives import HELD, PIECE, Bomb, Member, Place, most_of, open_packed
from pretrain.core.foreign.parsing import SHOWN, raise_memory
from pretrain.core.foreign.reading import in_bytes, open_file

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

TARS = {".tar": None, ".tgz": ".gz", ".tbz2": ".bz2", ".tbz": ".bz2", ".txz": ".xz", ".tzst": ".zst"}
ARCHIVES = (".zip", *TARS)  # by their endings, without the one that says how a `.tar` is compressed
ARCHIVED = (*ARCHIVES, ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")  # as their names end
ENDS = ("EOFHeaderError", "EmptyHeaderError")  # of an archive: zeros, or nothing at all
MOST_FILES = 200_000
DIRECTORY = 16 << 20  # bytes of what a zip file says of its files, which is held: about 200,000 of them
HEADER = 1 << 20  # bytes of what a tar file says of one, as of a long name
PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)  # decoders of which none takes much memory
IRREGULAR, LEADING_OUT, ENCRYPTED = "no regular files", "names that lead out of their archive", "unreadable (encrypted)"
PACKED_ELSE = "unreadable (packed in a way that is not read)"
HEADERS = (b"x", b"g", b"X", b"L", b"K")  # types of what says more of the next file

Inside = tuple[str, Member | str]  # a file's path in its archive, and the file, or why it is not read


def members(path: Path, ending: str) -> Iterator[Inside]:
    """The files of an archive, in its order; `ending` is one of `ARCHIVES`.

    Raises one of `archives.BROKEN` for an archive that is damaged, ends too early or holds too much.
    """
    with _telling(path):
        for count, (name, file) in enumerate(_zipped(path) if ending == ".zip" else _tarred(path, TARS[ending])):
            if count >= MOST_FILES:
                raise OSError(f"it holds more than {MOST_FILES:,} files")
            yield name, LEADING_OUT if _leads_out(name) else file


def _leads_out(name: str) -> bool:
    """Whether a name is none of a file below the archive's own folder."""
    parts = name.split("/")
    return not name or name.startswith("/") or ".." in parts or ":" in parts[0] or any(ord(sign) < 32 for sign in name)


@contextmanager
def _telling(what: object) -> Iterator[None]:
    """Make an `OSError` of whatever the libraries of archives raise."""
    try:
        yield
    except (OSError, EOFError):
        raise
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, NotImplementedError, RuntimeError, ValueError) as error:
        raise_memory(error, what)
        raise OSError(" ".join(str(error).split())[:SHOWN] or type(error).__name__) from error


class _Part(io.RawIOBase):
    """The next `size` bytes of a stream, which is closed with it; errors of archives are `OSError`."""

    def __init__(self, source: IO[bytes], size: int) -> None:
        self.source, self.rest = source, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        with _telling("a file in an archive"):
            data = self.source.read(min(len(view), self.rest))
        if not data and self.rest and len(view):
            raise EOFError(f"it ends {self.rest} bytes before its end")
        self.rest -= len(data)
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.source.close()
        super().close()


def _buffered(source: IO[bytes], size: int) -> BinaryIO:
    return cast("BinaryIO", io.BufferedReader(_Part(source, size), PIECE))


def _zipped(path: Path) -> Iterator[Inside]:
    with open_file(path) as file:
        _check_directory(file)
        most, total = most_of(os.fstat(file.fileno()).st_size), 0
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                name = info.filename.replace("\\", "/")
                if info.is_dir():
                    continue
                total += info.file_size  # of which no more is ever unpacked, whatever follows
                if total > most:
                    raise Bomb(f"its files come to more than {in_bytes(most)}")
                opener = partial(_in_zip, archive, info)
                yield name, _why_not(info) or Member(PurePosixPath(name), info.file_size, opener)


def _why_not(info: zipfile.ZipInfo) -> str:
    """Why a file of a zip is not read; empty for one that is."""
    kind = info.external_attr >> 28  # as Unix has it: 8 is a regular file, 0 none said
    if info.flag_bits & 1:
        return ENCRYPTED
    if info.create_system == 3 and kind not in (0, 8):
        return IRREGULAR
    return "" if info.compress_type in PACKINGS else PACKED_ELSE


def _in_zip(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> BinaryIO:
    with _telling(info.filename):
        return _buffered(archive.open(info), info.file_size)


def _check_directory(file: BinaryIO) -> None:
    """Refuse a zip whose list of files is too large to be held; what is no zip is left to who opens it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 66_000))  # the record at the end has a comment of at most 65,535 bytes
    tail = file.read()
    file.seek(0)
    place = tail.rfind(b"PK\5\6")
    listed = int.from_bytes(tail[place + 12 : place + 16], "little") if place >= 0 else 0
    longer = tail.rfind(b"PK\6\6", 0, max(0, place))
    if longer >= 0:
        listed = max(listed, int.from_bytes(tail[longer + 40 : longer + 48], "little"))
    if listed > DIRECTORY:
        raise Bomb(f"its list of files is of {in_bytes(listed)}, where at most {in_bytes(DIRECTORY)} are read")


class _Info(tarfile.TarInfo):
    """What a tar says of a file. Of a damaged header Python's own class makes the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Info:
        """As the class above; `OSError` for a header that is damaged, or says too much."""
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if type(error).__name__ in ENDS:
                raise
            raise OSError(f"the header of a file in it is damaged ({error})") from error
        if info.type in HEADERS and info.size > HEADER:
            raise Bomb(f"the name of a file in it takes more than {in_bytes(HEADER)}")
        return info


def _tarred(path: Path, packed: str | None) -> Iterator[Inside]:
    stream = open_packed(path, packed)
    with stream, tarfile.open(fileobj=stream, mode="r|", bufsize=PIECE, tarinfo=_Info) as archive:
        while (info := archive.next()) is not None:
            vars(archive)["members"].clear()  # which would be all that were read
            if info.isdir():
                continue
            if not info.isreg() or info.issparse():
                yield info.name, IRREGULAR
                continue
            yield info.name, Member(PurePosixPath(info.name), info.size, _opener(archive, info, path, packed))


def _opener(archive: tarfile.TarFile, info: tarfile.TarInfo, path: Path, packed: str | None) -> Callable[[], BinaryIO]:
    """How a file of a tar is opened: from its bytes, or a large one by going through the archive to its place."""
    if info.size > HELD:
        return partial(_in_tar, path, packed, info.offset_data, info.size)
    opened = archive.extractfile(info)
    assert opened is not None, "it is a regular file"
    return partial(io.BytesIO, opened.read())


def _in_tar(path: Place, packed: str | None, start: int, size: int) -> BinaryIO:
    stream = open_packed(path, packed)
    try:
        rest = start
        while rest:
            data = stream.read(min(rest, 1 << 20))
            if not data:
                raise EOFError(f"it ends {rest} bytes before a file in it")
            rest -= len(data)
        return _buffered(stream, size)
    except BaseException:
        stream.close()
        raise

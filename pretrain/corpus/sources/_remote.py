"""Sources elsewhere: `s3://…`, `gs://…`, `https://…`, whatever `fsspec` has the protocol of, copied into the cache.

A file is fetched once for each state that its store tells of it (an ETag, a time, a size), so that reading it again,
and again after an interrupt, takes no network but for that question.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pretrain.core.errors import PretrainError, warn
from pretrain.core.files import digest, digest_read, locked, write_text
from pretrain.core.folders import cache_folder

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

MAX_FILES = 100_000
NEEDS = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "az": "adlfs",
    "abfs": "adlfs", "sftp": "paramiko", "ssh": "paramiko", "smb": "smbprotocol", "git": "pygit2",
}  # fmt: skip
# Of `fsspec`'s protocols those that are laid over another one, need more than a URL, or are another way to say a path.
WRAPPERS = {
    "async_wrapper", "asynclocal", "asyncwrapper", "blockcache", "cached", "dask", "data", "dir", "filecache",
    "generic", "jlab", "jupyter", "libarchive", "pyscript", "reference", "simplecache", "tar", "zip",
}  # fmt: skip
ACCEPTED = "s3://, gs://, https://"


def is_remote(where: str) -> bool:
    """Whether a path is a URL: `PROTOCOL://…`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", where) is not None


@contextmanager
def _telling(where: str) -> Iterator[None]:
    """Make one line of whatever `fsspec` and the packages below it raise: each store has error types of its own."""
    protocol = where.partition("://")[0]
    try:
        yield
    except PretrainError:
        raise
    except ImportError as error:
        package = NEEDS.get(protocol)
        needed = f"the package {package}" if package else " ".join(f"more than is installed ({error})".split())[:200]
        accepted = f"pip install {package}" if package else f"{ACCEPTED}, a path"
        raise PretrainError(f"{where!r}: needs {needed}; accepted: {accepted}") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise PretrainError(
            f"{where!r} cannot be read ({reason}); accepted: a URL that can be reached, or a path"
        ) from error


def opened(where: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path in it."""
    protocol = where.partition("://")[0]
    try:
        import fsspec
    except ImportError as error:
        raise PretrainError(f"{where!r}: needs the package fsspec; accepted: pip install fsspec") from error
    with _telling(where):
        if protocol in WRAPPERS or protocol not in fsspec.available_protocols():
            what = (
                f"{protocol}:// is no place of files"
                if protocol in WRAPPERS
                else f"fsspec knows no protocol {protocol!r}"
            )
            raise PretrainError(f"{where!r}: {what}; accepted: {ACCEPTED}, a path")
        if protocol in ("http", "https"):
            urlsplit(where)  # of a host that is none
            return fsspec.filesystem(protocol), where  # `::`, with which `fsspec` joins URLs, may stand in one
        system, path = fsspec.core.url_to_fs(where)
    return system, path


def _listed(where: str) -> tuple[AbstractFileSystem, str, list[str]]:
    """The file system, the fixed part of the path, and the files: one, a folder's or a glob's."""
    system, path = opened(where)
    web = where.startswith(("http://", "https://"))
    with _telling(where):
        if re.search(r"[*?\[]", "/".join(path.partition("?")[0].split("/")[3:]) if web else path):
            files = [name for name in system.glob(path) if system.isfile(name)]
            root = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
        elif web or system.isfile(path):
            files, root = [path], path.rpartition("/")[0]
        else:
            files, root = system.find(path), path
    if not files:
        raise PretrainError(f"no files at {where!r}; accepted: a file, a folder or a glob")
    if len(files) > MAX_FILES:
        raise PretrainError(f"{where!r}: {len(files):,} files; accepted: at most {MAX_FILES:,}")
    return system, root, sorted(files)


def local_copies(where: str, wanted: Callable[[str], bool]) -> list[tuple[str, Path]]:
    """The files that are `wanted`, by their path from the place asked for, each with its URL and its copy here."""
    system, root, files = _listed(where)
    protocol, copies = where.partition("://")[0], []
    for name in files:
        if wanted(name.removeprefix(root).lstrip("/")):
            url = name if "://" in name else f"{protocol}://{name.lstrip('/')}"
            copies.append((url, _fetched(system, name, url)))
    return copies


def _state(system: AbstractFileSystem, name: str, where: str) -> str:
    with _telling(where):
        facts = system.info(name)  # of HTTP `ukey` is the URL alone
        return f"{system.ukey(name)} {facts.get('size')} {facts.get('ETag')} {facts.get('LastModified')}"


def _fetched(system: AbstractFileSystem, name: str, url: str) -> Path:
    home = cache_folder() / "remote"
    last = PurePosixPath(url.partition("?")[0]).name or "index"
    target = home / digest([url, _state(system, name, url)])[:24] / last
    if not _whole(target):
        if not (home / "CACHEDIR.TAG").exists():
            write_text(home / "CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n")
        with locked(target.parent.with_name(f".{target.parent.name}.lock")):
            if not _whole(target):
                if target.exists():
                    warn(f"{target} is damaged or was replaced, and is fetched again")
                part = target.with_name(f".tmp-{last}")
                part.parent.mkdir(parents=True, exist_ok=True)
                try:
                    with _telling(url), system.open(name, "rb") as source, part.open("wb") as copy:
                        shutil.copyfileobj(source, copy, 1 << 20)
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
                write_text(_sum(target), digest_read(part))
                part.replace(target)
    return target


def _sum(copy: Path) -> Path:
    """Where a copy's digest is kept; of those of before there is none."""
    return copy.parent.with_name(f"{copy.parent.name}.sha256")


def _whole(copy: Path) -> bool:
    """Whether a copy is there and, as far as that is known, as it was fetched."""
    return copy.exists() and (not _sum(copy).exists() or _sum(copy).read_text(errors="replace") == digest_read(copy))


def remote_stamps(where: str) -> object:
    """The files at a URL, and what tells that one has changed."""
    system, _, files = _listed(where)
    return [[name, _state(system, name, where)] for name in files]

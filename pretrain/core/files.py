"""Files that are either whole or not there, and folders that vouch for their files; safe reading of JSON."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeAlias, cast

from pretrain.core.errors import PretrainError
from pretrain.core.foreign import json as foreign
from pretrain.core.foreign.json import JSON as JSON
from pretrain.core.foreign.reading import irregular, open_append, open_file
from pretrain.core.system.portable import exchange, fsync, hold, let_be, take

JSONObject: TypeAlias = dict[str, Any]  # whose values are what the file says they are

NEW = 60.0  # seconds in which a temporary folder or file may be empty, and not held yet
MARK = 40  # characters of a name that what is to become it is marked by
LINE = 1 << 20  # bytes of a line of JSON of ours
SUMS = "checksums.json"  # of a folder: the digests of its files, and its own
SEAL = "seal"  # in an object: the digest of the rest of it
STAGE = "stage.json"  # of a finished stage
_READ: dict[tuple[int, int, int, int], str] = {}  # digests of files that were read, by what changes with a file
_LEFT: dict[tuple[int, int, int, int], dict[str, str]] = {}  # of records of stages likewise: the seals of their folders


@contextmanager
def atomic_folder(target: Path, of: str = "") -> Iterator[Path]:
    """Give a temporary folder beside `target`; on success it becomes `target` in one rename, on an error it is removed.

    An existing `target` is replaced. A process killed inside leaves `target` as it was, and a `.tmp-*` folder that the
    next one removes, as `sweep` does. `checksums.json` in it holds the digests of its files, by which `damage` finds
    one that is no longer as it was written, and what the folder is `of`, by which it knows another's.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear(target)
    work = Path(tempfile.mkdtemp(prefix=f".tmp-{target.name[:MARK]}-", dir=target.parent))
    handle = hold(work, wait=True)
    try:
        yield work
        sums = {name: file_digest(work / name) for name in _names(work)}
        facts = {"sha256": sums} | ({"of": of} if of else {})
        (work / SUMS).write_text(json.dumps(sealed(facts), indent=2), encoding="utf-8")
        for path in work.rglob("*"):
            fsync(path)
        put_in_place(work, target)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        raise not_written(target, work, error) from error
    finally:
        let_be(handle)


def _clear(target: Path) -> None:
    """Remove what killed processes left of what they were to put at `target`: what no process holds any more."""
    for path in target.parent.glob(f".tmp-{glob.escape(target.name[:MARK])}-*"):
        handle = hold(path)
        with suppress(OSError):
            state, folder = path.lstat(), path.is_dir() and not path.is_symlink()
            empty = not any(path.iterdir()) if folder else not state.st_size
            if handle >= 0 and not (empty and time.time() - state.st_mtime < NEW):
                shutil.rmtree(path, ignore_errors=True) if folder else path.unlink()
        let_be(handle)


def put_in_place(work: Path, target: Path) -> None:
    """Let the folder `work`, whose files are synced, become `target` in one rename; what was there is replaced."""
    fsync(work)
    work.chmod(0o755)
    if target.is_dir() and not target.is_symlink() and exchange(work, target):
        shutil.rmtree(work, ignore_errors=True)  # what was at `target` before
    elif target.is_dir() and not target.is_symlink():  # two renames: a kill between them leaves nothing at `target`
        aside = Path(tempfile.mkdtemp(prefix=f".tmp-old-{target.name}-", dir=target.parent))
        os.replace(target, aside / "old")
        os.replace(work, target)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(work, target)
    fsync(target.parent)


def not_written(target: Path, work: Path, error: BaseException) -> BaseException:
    """What to raise of an error met while `work` was to become `target`: one of the disk names `target`."""
    inside = isinstance(error, PretrainError) and str(error).startswith(f"cannot write {work}")
    cause = error.__cause__ if inside else error
    if isinstance(cause, OSError) or type(cause).__name__ == "SafetensorError":  # its way to tell of a full disk
        return PretrainError(f"cannot write {target}: {getattr(cause, 'strerror', None) or cause}")
    return error


@contextmanager
def locked(path: Path, blocked: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock file, which the system frees when a process dies; `blocked` is called before waiting for another."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open_append(path)
    except OSError as error:
        raise PretrainError(f"cannot write {path}: {error.strerror}") from error
    with lock:
        if not take(lock):
            blocked()
            take(lock, wait=True)
        yield


def sweep(folder: Path, name: str = "") -> None:
    """Remove what killed processes left in `folder`, or of what they were writing as `name` there.

    The caller holds a lock, so that nobody is writing it at this moment.
    """
    for path in Path(folder).glob(f".tmp-{name and f'{name}-'}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically (temporary name, fsync, rename)."""
    with atomic_text(path) as file:
        file.write(text)


@contextmanager
def atomic_text(path: Path) -> Iterator[TextIO]:
    """Give a text file that becomes `path` when the block ends, and is removed if it ends with an error.

    Line ends are written as they come. A process killed inside leaves a `.tmp-*` file that the next one removes. A
    pipe or a device at `path` is refused: a file shall not take its place.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind := irregular(path):
            raise PretrainError(f"cannot write {path}: it is {kind}; accepted: a regular file, or nothing")
        _clear(path)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", newline="", dir=path.parent, prefix=f".tmp-{path.name[:MARK]}-", delete=False
        ) as f:  # fmt: skip
            handle = hold(Path(f.name), wait=True)
            try:
                yield cast("TextIO", f)
                f.flush()
                os.fsync(f.fileno())
                Path(f.name).chmod(0o644)
                f.close()  # Windows renames no open file
                os.replace(f.name, path)
            except BaseException:
                with suppress(OSError):  # it flushes once more, and the disk may be as full as before
                    f.close()
                Path(f.name).unlink(missing_ok=True)
                raise
            finally:
                let_be(handle)
        fsync(path.parent)
    except OSError as error:
        raise PretrainError(f"cannot write {path}: {error.strerror or error}") from error


def output_file(path: Path, force: bool, taken: str = "") -> Path:
    """The file that a command is to write: `path`, or what it names as a link.

    Raises `PretrainError` where no file can be: no folder to lie in, or what is there is no regular file, with `force`
    too; and without `force` where a file is there, which `taken` says in words of the command.
    """
    target = Path(os.path.realpath(path))
    kind = irregular(target) or ("a link to itself" if target.is_symlink() else "")
    if kind:
        raise PretrainError(f"--output {path} is {kind}; accepted: another file")
    if not target.parent.is_dir():
        raise PretrainError(
            f"--output {path}: there is no folder {target.parent}; accepted: a file in one that is there"
        )
    if os.path.lexists(target) and not force:
        raise PretrainError(taken or f"--output {path} exists; accepted: another file, or --force to write over it")
    return target


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, *, halves: bool = False) -> Any:
    """Read a JSON file; a missing or broken one, or one whose seal does not hold, is an error that names it.

    `halves`: as `foreign.json` has it.
    """
    try:
        value = foreign.read(path, halves=halves)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PretrainError(f"missing file {path}") from error
    seal = value.get(SEAL) if isinstance(value, dict) else None
    if isinstance(seal, str) and value != sealed({name: entry for name, entry in value.items() if name != SEAL}):
        raise PretrainError(
            f"{path} is damaged, or changed with its {SEAL!r} left in: it does not hold what was sealed"
        )
    return value


def read_sealed(path: Path) -> JSONObject:
    """Read a JSON file that holds an object, without its seal; one of before, which has none, is taken as it is."""
    value = read_object(path)
    value.pop(SEAL, None)
    return value


def read_object(path: Path, *, halves: bool = False) -> JSONObject:
    """Read a JSON file that holds an object."""
    value = read_json(path, halves=halves)
    if not isinstance(value, dict):
        raise PretrainError(f"{path} holds a {type(value).__name__}; accepted: a JSON object")
    return value


def read_json_lines(path: Path) -> list[JSONObject]:
    """The objects of a file of JSON lines; a line that is half-written or damaged is left out."""
    return [row for row, _ in whole_lines(path)]


def whole_lines(path: Path) -> Iterator[tuple[JSONObject, bytes]]:
    """The objects of a file of JSON lines with their lines; one that is half-written or damaged is left out."""
    with open_file(path) as file:
        while line := file.readline(LINE):
            if len(line) < LINE or line.endswith(b"\n"):
                with suppress(ValueError):
                    row = foreign.loads(line.decode())
                    if isinstance(row, dict):
                        yield row, line
            else:
                while len(line) == LINE and not line.endswith(b"\n"):
                    line = file.readline(LINE)


def damage(folder: Path, wanted: Callable[[str], bool] = lambda _: True, of: str = "") -> str:
    """The first file of a folder that is not as it was written, and how it differs; empty where all are.

    `wanted` tells of a name whether the file is looked at. A file is read once in a process, unless it changes. A
    folder whose files are whole and another's is found where it says what it is `of`, and where it lies in a finished
    stage, whose `stage.json` holds the seals of its folders. One without `checksums.json` is of an older release or
    from elsewhere: nothing is known of it.
    """
    path = Path(folder) / SUMS
    if not path.is_file():
        return ""
    try:
        sums = read_json(path)
        whole = isinstance(sums["sha256"], dict) and isinstance(sums[SEAL], str)
        known = left_with(path.parent) or sums[SEAL]
    except PretrainError as error:
        return str(error)
    except (OSError, KeyError, TypeError):
        whole = False
    if not whole:
        return f"{path} is damaged"
    if sums[SEAL] != known or sums.get("of", of) != (of or sums.get("of", of)):
        return f"{path.parent} was replaced: it is whole, and another's"
    for name, known in sums["sha256"].items():
        if wanted(name):
            try:
                if digest_read(path.parent / name) != known:
                    return f"{path.parent / name} is damaged or was replaced: its checksum is not the one in {SUMS}"
            except OSError as error:
                return f"{path.parent / name}: {error.strerror or error}"
    return ""


def damage_of(path: Path | str) -> tuple[Path, str]:
    """What `damage` says of one file by the checksums beside it, or of the folder above, with the folder of those."""
    for place in dict.fromkeys((Path(path).absolute(), Path(path).resolve())):
        folder = next((each for each in list(place.parents)[:2] if (each / SUMS).is_file()), None)
        name = place.relative_to(folder).as_posix() if folder else ""
        if folder and (finding := damage(folder, lambda each, name=name: each == name)):  # type: ignore[misc]
            return folder, finding
    return Path(path).parent, ""


def left_with(folder: Path) -> str:
    """The seal with which a finished stage has left a folder in it, as its `stage.json` says; empty where none does."""
    for home in list(folder.parents)[:2]:
        if (home / STAGE).is_file():
            seals = _seals(home / STAGE)
            return seals.get(folder.relative_to(home).as_posix(), "")
    return ""


def _seals(path: Path) -> dict[str, str]:
    """The seals of the folders of a stage, read once in a process while nothing changes its record."""
    state = path.stat()
    key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    if key not in _LEFT:
        folders = read_object(path).get("folders")
        _LEFT[key] = folders if isinstance(folders, dict) else {}
    return _LEFT[key]


def seals_in(home: Path) -> dict[str, str]:
    """The seals of the folders that a stage has written, by their way from its own folder."""
    paths = [*home.glob(f"*/{SUMS}"), *home.glob(f"*/*/{SUMS}")]
    return {path.parent.relative_to(home).as_posix(): str(read_object(path).get(SEAL, "")) for path in sorted(paths)}


def sealed(record: JSONObject) -> JSONObject:
    """A JSON object with a digest of its values, by which `read_json` finds out damage that leaves it valid JSON."""
    return record | {SEAL: digest(foreign.loads(json.dumps(record), halves=True))}


def _names(folder: Path) -> list[str]:
    """All files of a folder but its own list of them."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / SUMS)
    return [path.relative_to(folder).as_posix() for path in files]


def digest_read(path: Path) -> str:
    """The digest of a file, taken once in a process while nothing changes it."""
    state = path.stat()
    key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    if key not in _READ:
        _READ[key] = file_digest(path)
    return _READ[key]


def digest(value: object) -> str:
    """SHA-256 (hex) of a JSON-like value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open_file(path) as file:
        return hashlib.file_digest(cast("io.BufferedReader", file), "sha256").hexdigest()

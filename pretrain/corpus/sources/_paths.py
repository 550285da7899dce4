"""Which files a path, a folder or a glob names, and which of them are passed over: hidden, secret-looking, a run's own.

Where a source says so, also those that git is told to ignore, and those whose names are a program's work.

A path that names one file is taken as it is, unless it looks like a secret; of a folder's and a glob's files those are
left out whose name begins with a dot (unless the path says the dot itself), and what lies in tools' folders and runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import TypeVar

from pretrain.core.errors import PretrainError
from pretrain.core.foreign.archives import PACKED
from pretrain.core.foreign.documents.members import ARCHIVED
from pretrain.core.foreign.paths import expanded
from pretrain.core.foreign.reading import irregular
from pretrain.core.packages import Package, package_folder
from pretrain.corpus.gitignore import Ignored
from pretrain.corpus.leaks import is_generated
from pretrain.corpus.sources._remote import is_remote, local_copies, remote_stamps
from pretrain.corpus.sources._skipped import Skipped

TOOLS = {".git", ".hg", ".svn", ".venv", "__pycache__", "node_modules"}  # folders that are never looked into
SYSTEM = ("/proc", "/sys", "/dev")  # whose files are none
MEMORY = "/dev/shm"  # but here
MADE = ("run.json", "CACHEDIR.TAG")  # what lies beside these is a run's output or a cache, and no source
SECRET = (
    ".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ppk", "*.gpg",
    "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "credentials*", "*credentials.json", "secrets.*", "secret.*",
    "client_secret*.json", "service[-_]account*.json", ".netrc", "_netrc", ".pgpass", ".npmrc", ".pypirc",
    ".git-credentials", ".htpasswd", "*.tfstate", "*.tfvars", "*.ovpn", "kubeconfig",
)  # fmt: skip
SECRET_FOLDERS = (".ssh", ".aws", ".gnupg", ".kube")
PUBLIC = ("*.example", "*.sample", "*.template", "*.pub")  # `.env.example` says which secrets there are, and none
ENDINGS = 6  # that an error names
T = TypeVar("T")
Named = tuple[str, Path]  # a file's id, and where it is


@dataclass(frozen=True)
class Taken:
    """What is taken of a folder's files that may as well be left out."""

    hidden: bool = False
    secrets: bool = False
    ignored: bool = True  # by git
    generated: bool = True


PLAIN = Taken()
# What a file's name has after what it is a page of: its ending, and a code of a language before it.
_ENDING = re.compile(r"(?i)(\.[a-z]{2}([-_][a-z]{2,4})?)?\.\w+$")


def check_group(group: str) -> None:
    """Refuse what tells no groups of files."""
    try:
        re.compile(group)
    except re.error as error:
        raise PretrainError(f"group {group!r}: {error}; accepted: stem, path, or a regular expression") from error


def group_of(name: str, files: str, group: str) -> dict[str, str]:
    """`{"group": …}` of a file with the id `name` of a source of `files`; nothing where it stands alone."""
    path, root = PurePath(name), PurePath(expanded(files))
    above = next((place for place in (root, *root.parents) if place != path and path.is_relative_to(place)), None)
    below = path.relative_to(above).as_posix() if above else path.as_posix()
    if group in ("stem", "path"):
        plain = below.removesuffix(path.suffix) if path.suffix in PACKED else below
        plain = _ENDING.sub("", plain) or plain
        return {"group": plain.rpartition("/")[2] if group == "stem" else plain}
    match = re.search(group, below)
    return {} if match is None else {"group": str(next(filter(None, (*match.groups(), match[0])), ""))}


def located(
    where: str,
    package: Package | None,
    suffixes: Iterable[str] = (),
    skipped: Skipped | None = None,
    taken: Taken = PLAIN,
) -> list[Named]:
    """The files at a path, a folder, a glob or a URL, sorted, with their ids: inside a package, their paths in it.

    What is passed over is noted in `skipped`.
    """
    skipped, ends = Skipped() if skipped is None else skipped, tuple(suffixes)
    if package is None and is_remote(where):
        ids = local_copies(where, lambda name: wanted(name, ends, taken, skipped))
        return _some(ids, where, ends, skipped)
    if package is None:
        paths = _matching(expanded(where), where, ends, skipped, taken)
        return [(str(path), path) for path in paths]
    inside = PurePath(where)
    if inside.is_absolute() or ".." in inside.parts:
        raise PretrainError(f"{where!r}: accepted: a path inside the package {package.spec!r}")
    root = package_folder(package)
    taken = replace(taken, ignored=True)
    paths = _matching(root / inside, f"{where} of the package {package.spec}", ends, skipped, taken)
    return [(path.relative_to(root).as_posix(), path) for path in paths]


def _check_real(path: Path, where: str) -> None:
    """Refuse what the system shows of itself as files, which are neither documents nor end."""
    real = Path(os.path.realpath(path))
    if any(real.is_relative_to(place) for place in SYSTEM) and not real.is_relative_to(MEMORY):
        raise PretrainError(
            f"{where!r} is the system's, and no place of documents; accepted: the folder of the documents"
        )


def _matching(path: Path, where: str, ends: tuple[str, ...], skipped: Skipped, taken: Taken) -> list[Path]:
    if path.is_dir() and path.resolve() == Path(path.resolve().anchor):
        raise PretrainError(f"{where!r} is the whole machine; accepted: the folder of the documents")
    if path.is_dir():
        _check_real(path, where)
        paths = sorted(_tree(path, _refusal(path, skipped, taken)))
    elif path.exists():
        if kind := irregular(path):
            raise PretrainError(f"{where!r} is {kind}, which may never end; accepted: a file, a folder or a glob")
        _check_real(path, where)
        if not taken.secrets and is_secret(path.name):
            raise PretrainError(f"{where!r} looks like a secret; accepted: another file, or secrets: true to read it")
        paths = [path]
    else:
        fixed = next((i for i, part in enumerate(path.parts) if re.search(r"[*?\[]", part)), len(path.parts) - 1)
        root, pattern = Path(*path.parts[:fixed]), path.parts[fixed:]
        _check_real(root, where)
        dotted = taken.hidden or any(part.startswith(".") for part in pattern)
        refused = _refusal(root, skipped, replace(taken, hidden=dotted))
        paths = sorted(root.glob(str(Path(*pattern)))) if root.is_dir() else []
        paths = [p for p in paths if not p.is_dir() and not _any_refused(root, p, refused)]
    kept = []
    for p in paths:
        asked = p == path and p.name.lower().endswith(ARCHIVED)  # whose files the endings are of
        if ends and not p.name.endswith(ends) and not asked:
            skipped.add(f"other endings ({p.suffix})" if p.suffix else "other endings", p)
        else:
            kept.append(p)
    return _some(kept, where, ends, skipped)


def _some(kept: list[T], where: str, ends: tuple[str, ...], skipped: Skipped) -> list[T]:
    """The files, or an error where there are none."""
    if not kept:
        more = f", … ({len(ends)} endings)" if len(ends) > ENDINGS else ""
        endings = f" that end with {', '.join(ends[:ENDINGS])}{more}" if ends else ""
        if globs := [end for end in ends if end.startswith("*")]:
            raise PretrainError(f"suffixes {globs[0]!r}: accepted: an ending as it is: {globs[0].lstrip('*')}")
        over = f" (passed over: {skipped})" if skipped.reasons else ""
        raise PretrainError(f"no files{endings} at {where!r}{over}; accepted: a file, a folder or a glob")
    return kept


def below(folder: Path, skipped: Skipped | None = None) -> list[Path]:
    """The files in a folder, as deep as they lie, sorted, without those of tools and runs."""
    _check_real(folder, str(folder))
    return sorted(_tree(folder, _refusal(folder, skipped or Skipped(), Taken(True, True))))


Refused = Callable[[Path, bool], bool]  # of a path and whether it is a folder


def _tree(root: Path, refused: Refused) -> Iterator[Path]:
    """The files below a folder; what is refused is not looked into."""
    for here, folders, files in os.walk(root, onerror=lambda error: refused(Path(error.filename), True) and None):
        home = Path(here)
        folders[:] = [name for name in folders if not refused(home / name, True)]
        yield from (home / name for name in files if not refused(home / name, False))


def _any_refused(root: Path, path: Path, refused: Refused) -> bool:
    """Whether a file, or a folder between the root and it, is refused."""
    between = [folder for folder in path.parents if folder != root and folder.is_relative_to(root)]
    return any(refused(folder, True) for folder in reversed(between)) or refused(path, False)


def _refusal(root: Path, skipped: Skipped, taken: Taken) -> Refused:
    """What tells of a path whether it is passed over, and notes each once."""
    known: dict[Path, bool] = {root: False}
    ignored = None if taken.ignored else Ignored(root)

    def refused(path: Path, folder: bool) -> bool:
        if path not in known:
            reason = _reason(path, folder, taken)
            if reason is None and ignored is not None and ignored(path, folder):
                reason = "ignored by git"
            known[path] = reason is not None
            if reason is not None:
                skipped.add(reason, f"{path}/" if folder else path)
        return known[path]

    return refused


def _reason(path: Path, folder: bool, taken: Taken) -> str | None:
    """Why a file or folder is passed over."""
    if folder and path.name in TOOLS:
        return "tools' folders"
    if folder and str(path) in SYSTEM:
        return "the system's folders"
    if not taken.secrets and (path.name in SECRET_FOLDERS if folder else is_secret(path.name)):
        return "secret-looking"
    if not taken.hidden and path.name.startswith("."):
        return "hidden"
    try:
        if not folder:
            if not taken.generated and is_generated(path.name):
                return "generated"
            return None if path.is_file() else "no regular files"
        made = any((path / name).exists() for name in MADE)
    except OSError:
        return f"{'folders' if folder else 'files'} that cannot be opened"
    if path.is_symlink():
        return "linked folders"
    if not os.access(path, os.R_OK | os.X_OK):
        return "folders that cannot be opened"
    return "runs and caches" if made else None


def wanted(name: str, ends: tuple[str, ...], taken: Taken, skipped: Skipped, shown: str = "") -> bool:
    """Whether a file elsewhere, or in an archive, is taken; `name` is its path from the place that was asked for.

    One that is not is noted in `skipped`, under the name `shown` where that is another.
    """
    parts = PurePath(name).parts
    reason = None
    if TOOLS.intersection(parts[:-1]):
        reason = "tools' folders"
    elif not taken.secrets and (is_secret(parts[-1]) or set(SECRET_FOLDERS).intersection(parts)):
        reason = "secret-looking"
    elif not taken.hidden and any(part.startswith(".") for part in parts):
        reason = "hidden"
    elif not taken.generated and is_generated(parts[-1]):
        reason = "generated"
    elif ends and not name.endswith(ends):
        end = PurePath(name).suffix
        reason = f"other endings ({end})" if end else "other endings"
    if reason:
        skipped.add(reason, shown or name)
    return reason is None


def is_secret(name: str) -> bool:
    """Whether a file's name is one that keys, passwords and tokens go by."""
    small = name.lower()
    return _fits(small, SECRET) and not _fits(small, PUBLIC)


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def stamps(where: str, package: Package | None, suffixes: Iterable[str] = (), taken: Taken = PLAIN) -> object:
    """Names, sizes and times of the files at a path; nothing for those of a package, whose version says it."""
    if package is not None:
        return None
    if is_remote(where):
        return remote_stamps(where)
    return [stamp(path) for _, path in located(where, None, suffixes, taken=taken)]


def stamp(path: Path) -> list[str | int]:
    """A file's name, size and time; of one that is gone since it was listed that it is."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return [str(path), "gone"]
    return [str(path), stat.st_size, stat.st_mtime_ns]

"""Which files git is told to ignore: `.gitignore` of each folder, of those above it up to the repository, and its own.

Rules of a folder hold below it, deeper ones before those above. A folder that is ignored itself and asked for all the
same, as a repository's `data/` often is, is read by the rules in it alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.core.errors import PretrainError
from pretrain.core.foreign.reading import read_bytes

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec


class Ignored:
    """Tells of the files and folders below a root whether git ignores them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._specs: dict[Path, GitIgnoreSpec | None] = {}
        self.above = self._above(root.resolve())

    def __call__(self, path: Path, folder: bool) -> bool:
        """Whether a path below the root is ignored; that of a folder above it is asked before."""
        inside = path.relative_to(self.root)
        homes = [self.root / step for step in (*inside.parents,)]  # the nearest first
        for home in homes:
            verdict = self._verdict(home, path, folder)
            if verdict is not None:
                return verdict
        real = self.root.resolve() / inside
        return next((v for home in self.above if (v := self._verdict(home, real, folder)) is not None), False)

    def _above(self, root: Path) -> list[Path]:
        """The folders above the root whose rules hold in it, the nearest first."""
        homes: list[Path] = []
        for home in root.parents if not (root / ".git").exists() else ():
            homes.append(home)
            if (home / ".git").exists():
                steps = [root, *(folder for folder in root.parents if folder.is_relative_to(home) and folder != home)]
                rules = [self._verdict(each, step, True) for step in steps for each in homes if each in step.parents]
                return [] if any(rules) else homes
        return []

    def _verdict(self, home: Path, path: Path, folder: bool) -> bool | None:
        """What the rules of a folder say of a path below it; None where they say nothing."""
        if home not in self._specs:
            self._specs[home] = _spec(home)
        spec = self._specs[home]
        if spec is None:
            return None
        name = path.relative_to(home).as_posix()
        return spec.check_file(f"{name}/" if folder else name).include


MOST = 1 << 20  # bytes of a file of rules


def _spec(home: Path) -> GitIgnoreSpec | None:
    """The rules of a folder, and those that a repository keeps for itself; None where there are none."""
    lines: list[str] = []
    for path in (home / ".git" / "info" / "exclude", home / ".gitignore"):  # the last that fits decides
        try:
            lines += read_bytes(path, MOST).decode(errors="replace").splitlines()
        except (OSError, PretrainError):  # none there, or none that git would read
            continue
    if not any(line.strip() and not line.startswith("#") for line in lines):
        return None
    from pathspec import GitIgnoreSpec

    return GitIgnoreSpec.from_lines(lines)

"""The files inside an archive, as those of a folder are taken: `FILE.zip/path/inside`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pretrain.core.foreign.archives import BROKEN, Member, Place
from pretrain.core.foreign.documents.members import ARCHIVED, ARCHIVES, members
from pretrain.core.foreign.parsing import raise_memory, reason
from pretrain.corpus.sources._containers import ending
from pretrain.corpus.sources._files import Wrong
from pretrain.corpus.sources._paths import Taken, wanted
from pretrain.corpus.sources._skipped import Skipped


def is_archive(path: Place) -> bool:
    """Whether a file is an archive whose files are read."""
    return ending(path) in ARCHIVES


def of_members(suffixes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the endings that a source asks for that are not of archives: what is taken inside them."""
    return tuple(end for end in suffixes if not end.lower().endswith(ARCHIVED))


def inside(
    path: Path, name: str, suffixes: tuple[str, ...], taken: Taken, wrong: Wrong, skipped: Skipped
) -> Iterator[tuple[str, Member]]:
    """The files of an archive that are taken, each with its id; an archive in it is passed over."""
    count = 0
    try:
        for inner, member in members(path, ending(path)):
            count, shown = count + 1, f"{name}/{inner}"
            if isinstance(member, str):
                skipped.add(member, shown)
            elif is_archive(member):
                skipped.add("archives in archives", shown)
            elif wanted(inner, of_members(suffixes), taken, skipped, shown):
                yield shown, member
    except BROKEN as error:
        raise_memory(error, name)
        what = f"cannot be read after {count} of its files ({reason(error)}): truncated or damaged"
        wrong(name, what, f"unreadable ({type(error).__name__})", "a whole archive")

"""What is in archives, PDF and WARC files: a look at as much of it as there is time for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from random import Random

from pretrain.core.errors import PretrainError
from pretrain.core.foreign.archives import Place, seekable
from pretrain.core.foreign.documents import pdf
from pretrain.core.foreign.documents.members import ARCHIVES
from pretrain.corpus.sources import Files, Skipped
from pretrain.corpus.sources._containers import ending, unread
from pretrain.corpus.sources._files import PACKED
from pretrain.corpus.sources._paths import Taken
from pretrain.corpus.sources.content.rows import wrong_of
from pretrain.corpus.sources.opened import archives
from pretrain.corpus.sources.opened.documents import READERS, UNNEEDED
from pretrain.new.texts.languages import MARKUP

PAGED = tuple(end for end in READERS if end not in MARKUP)
OPENED = (*PAGED, *ARCHIVES)
NEEDED = ("pypdf", "warcio")
SECONDS = 2.0  # of the processor, to read what is in them
LISTED = 5000  # files of an archive that are looked at
LARGE, FEW_PAGES = 200_000, 8  # bytes of a PDF, of which only the first pages are read
Kind = Callable[[Place], str]
Inside = tuple[str, str, float]  # a file: its kind, its ending and its bytes


def ended(path: Place) -> str:
    """A file's ending as a recipe has it, `.txt` or `.txt.gz`; empty of one without."""
    return ending(path) + path.suffix if path.suffix in PACKED else path.suffix


def is_opened(path: Path) -> bool:
    """Whether a file is an archive, or one whose text is none as it stands."""
    return ending(path) in OPENED


def why_not(path: Path) -> str | None:
    """What a file is that is not read, or what is wanted for that."""
    if not is_opened(path):
        return unread(path)
    return None if ending(path) in ARCHIVES or all(map(find_spec, NEEDED)) else UNNEEDED


def files_in(path: Path, kind: Kind) -> tuple[Inside, ...]:
    """The file itself, or those in an archive; pages of HTML in it are taken for prose."""
    stat = path.stat()
    if ending(path) not in ARCHIVES:
        return ((kind(path), ended(path), float(stat.st_size)),)
    return _listed(path, kind, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _listed(path: Path, kind: Kind, _: int) -> tuple[Inside, ...]:
    skipped = Skipped()
    inside = archives.inside(path, str(path), (), Taken(), wrong_of("skip", skipped), skipped)
    return tuple(
        ("prose" if ending(member) in MARKUP else kind(member), ended(member), float(member.size))
        for _, member in islice(inside, LISTED)
    )


def most_of(path: Path, kind: Kind) -> str:
    """What an archive holds most of; empty where none of its files is known."""
    sizes = Counter[str]()
    for name, _, size in files_in(path, kind):
        sizes[name] += int(size)
    return max(filter(None, sizes), key=lambda name: sizes[name], default="")


@lru_cache(maxsize=64)
def texts_of(paths: tuple[Path, ...]) -> tuple[tuple[tuple[Path, str], ...], bool]:
    """Texts that such files hold, each with its name, from all of the files alike; and whether these are all."""
    texts, whole, begun = list[tuple[Path, str]](), True, time.process_time()
    for path in Random(0).sample(paths, len(paths)):
        large = ending(path) == ".pdf" and path.stat().st_size > LARGE
        whole = whole and not large
        for name, text in _first_pages(path) if large else _documents(path):
            texts.append((Path(name), text))
            if time.process_time() - begun > SECONDS:
                return tuple(texts), False
    return tuple(texts), whole


def _documents(path: Path) -> Iterator[tuple[str, str]]:
    with suppress(PretrainError, OSError):  # told when the recipe runs
        yield from ((row["id"], row["text"]) for row in Files(str(path), on_error="skip").documents(Skipped()))


def _first_pages(path: Path) -> Iterator[tuple[str, str]]:
    with suppress(Exception), seekable(path) as opened:  # of whatever the library makes of it
        yield str(path), "\n\n".join(islice(pdf.pages(opened), FEW_PAGES))


def plain(paths: Sequence[Path]) -> list[Path]:
    """The files that are text as they stand."""
    return [path for path in paths if not is_opened(path)]

"""The documentation that Debian installed, and manual pages in any language."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError
from pretrain.core.files import digest
from pretrain.core.packages import Package
from pretrain.corpus.roff import unroff
from pretrain.corpus.sources._files import Document, Size, Source, read_text, size_of
from pretrain.corpus.sources._paths import Taken, below, located, stamp, stamps
from pretrain.corpus.sources._skipped import Skipped

PAGE = re.compile(r"(.+\.\d\w*)(?:\.gz)?")  # ls.1.gz
NAMES = Taken(secrets=True)  # credentials.7 is a page as any
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".log")


@dataclass(frozen=True)
class DebianDocs(Source):
    """The documentation that Debian installed: `/usr/share/doc` (domain `doc`) and manual pages (domain `man`)."""

    speed: ClassVar[float] = 15e6

    debian: bool = True
    doc: str = "/usr/share/doc"
    man: str = "/usr/share/man"

    def domains(self) -> tuple[str, ...]:
        return ("doc", "man")

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        doc, man = Path(self.doc), Path(self.man)
        if not doc.is_dir() and not man.is_dir():
            raise PretrainError(f"neither {doc} nor {man} is a folder; accepted: where Debian keeps its documentation")
        for path in below(doc, skipped) if doc.is_dir() else ():
            if path.name.removesuffix(".gz").endswith((*TEXT_SUFFIXES, "README", "NEWS", "copyright", "TODO", "FAQ")):
                text = read_text(path, skipped)
                if text is not None:
                    yield {"text": text, "domain": "doc", "id": str(path)}
        for path in sorted(p for folder in man.glob("man[0-9]") for p in below(folder)):  # English: no man/LANGUAGE/
            if PAGE.fullmatch(path.name):
                text = read_text(path, skipped)
                if text is not None and (plain := unroff(text).strip()):
                    yield {"text": plain + "\n", "domain": "man", "id": str(path)}

    def size(self) -> Size:
        return size_of(path for folder in (self.doc, self.man) for path in below(Path(folder)))

    def state(self) -> object:
        return [stamp(path) for folder in (self.doc, self.man) for path in below(Path(folder))]


@dataclass(frozen=True)
class Manuals(Source):
    """Manual pages as plain text: a folder as `/usr/share/man/de`, or with `package` one inside it, as `manpages-de`.

    The domain is `domain`, or the folder's name. A page's `group` is its name and section (`ls.1`): translations of one
    page lie on one side of the split, and can be known by it.
    """

    manuals: str
    domain: str | None = None
    limit: Count | None = None  # at most so many pages, by their names' hashes: in each language the same ones
    package: Package | None = None

    def domains(self) -> tuple[str, ...]:
        return (self.domain or Path(self.manuals).name,)

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        (domain,) = self.domains()
        files = located(self.manuals, self.package, (), skipped, NAMES)
        names = {page[1] for _, path in files if (page := PAGE.fullmatch(path.name))}
        chosen = set(sorted(names, key=digest)[: self.limit])
        for name, path in files:
            page = PAGE.fullmatch(path.name)
            if page is None:
                skipped.add("no manual pages", name)
                continue
            text = read_text(path, skipped, name=name) if page[1] in chosen else None
            if text is not None and (plain := unroff(text).strip()):
                yield {"text": plain + "\n", "domain": domain, "id": name, "group": page[1]}

    def state(self) -> object:
        return stamps(self.manuals, self.package, (), NAMES)

"""The documentation that Debian installed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.corpus.roff import unroff
from pretrain.corpus.sources._files import Document, Size, Source, read_text, size_of
from pretrain.corpus.sources._paths import below, stamp
from pretrain.corpus.sources._skipped import Skipped

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".log")


@dataclass(frozen=True)
class DebianDocs(Source):
    """The documentation that Debian installed: `/usr/share/doc` (domain `doc`) and manual pages (domain `man`)."""

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
            if re.search(r"\.\d\w*(\.gz)?$", path.name):
                text = read_text(path, skipped)
                if text is not None and (plain := unroff(text).strip()):
                    yield {"text": plain + "\n", "domain": "man", "id": str(path)}

    def size(self) -> Size:
        return size_of(path for folder in (self.doc, self.man) for path in below(Path(folder)))

    def state(self) -> object:
        return [stamp(path) for folder in (self.doc, self.man) for path in below(Path(folder))]

"""Code that is installed here: Python's standard library, packages, and their documented functions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError
from pretrain.corpus import modules
from pretrain.corpus.sources._files import Document, Part, Size, Source, evenly, read_text, size_of
from pretrain.corpus.sources._skipped import Skipped

# Measured on the standard library and on scikit-learn: text of docstrings next to code, of documented functions next
# to code, and in a function.
DESCRIBED, FUNCTIONS, FUNCTION = 0.16, 0.18, 400


@dataclass(frozen=True)
class PythonStdlib(Source):
    """Python's own standard library: modules (domain `python`) and their docstrings (domain `docstrings`)."""

    speed: ClassVar[float] = 5.4e6  # docstrings are what takes long

    stdlib: bool = True
    docstrings: bool = True
    tests: bool = False  # the library's own tests, two thirds of its text
    limit: Count | None = None  # at most so many modules, from the whole library alike
    exclude: tuple[str, ...] = ()  # modules to leave out: `encodings/*` for the tables of character sets

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        for _, documents in self.by_file(skipped):
            yield from documents

    def by_file(self, skipped: Skipped) -> list[Part]:
        """By modules."""
        files = evenly(modules.without(modules.of_stdlib(self.tests), self.exclude), self.limit)
        return [(path.stat().st_size, self._of_module(inside, path, skipped)) for inside, path in files]

    def _of_module(self, inside: str, path: Path, skipped: Skipped) -> Iterator[Document]:
        text = read_text(path, skipped)
        if text is None:
            return
        yield {"text": text, "domain": "python", "id": inside, "group": inside}
        described = modules.docstrings(text) if self.docstrings else ""
        if described:
            yield {"text": described, "domain": "docstrings", "id": f"{inside}#docstrings", "group": inside}

    def domains(self) -> tuple[str, ...]:
        return ("python", "docstrings") if self.docstrings else ("python",)

    def size(self) -> Size:
        files = evenly(modules.without(modules.of_stdlib(self.tests), self.exclude), self.limit)
        modules_size = size_of(path for _, path in files)
        return Size(
            (1 + DESCRIBED * self.docstrings) * modules_size.bytes, (1 + self.docstrings) * modules_size.documents
        )

    def state(self) -> object:
        return sys.version


@dataclass(frozen=True)
class Packages(Source):
    """Installed Python packages, by the names that they are imported by: their modules, the package as the domain.

    Nothing is imported. A document's id is its path from the package's name on.
    """

    speed: ClassVar[float] = 100e6

    packages: tuple[str, ...]
    tests: bool = False
    limit: Count | None = None  # at most so many modules of each package, from the whole of it alike
    exclude: tuple[str, ...] = ()  # modules to leave out: `torch/_inductor/*`

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.packages:
            raise PretrainError("packages: accepted: at least one name")

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        for name in self.packages:
            files = modules.without(modules.of_package(name, self.tests), self.exclude)
            for inside, path in evenly(files, self.limit):
                text = read_text(path, skipped)
                if text is not None:
                    yield {"text": text, "domain": name, "id": inside, "group": inside}

    def domains(self) -> tuple[str, ...]:
        return self.packages

    def size(self) -> Size:
        listed = [modules.without(modules.of_package(name, self.tests), self.exclude) for name in self.packages]
        return size_of(path for files in listed for _, path in evenly(files, self.limit))

    def state(self) -> object:
        return [[name, modules.version(name), _sizes(name, self.tests)] for name in self.packages]


@dataclass(frozen=True)
class Functions(Source):
    """Documented functions of installed Python packages (`stdlib`: the standard library), the package as the domain.

    Examples to learn from: `text` is a function's code without its docstring, `target` the docstring's first paragraph.
    """

    speed: ClassVar[float] = 1e6

    functions: tuple[str, ...]
    limit: Count | None = None  # at most so many modules of each package, from the whole of it alike
    longest: Count = 2000  # characters of code; longer functions are left out

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.functions:
            raise PretrainError("functions: accepted: at least one package, or stdlib")

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        for name in self.functions:
            files = modules.of_stdlib(False) if name == "stdlib" else modules.of_package(name, False)
            for inside, path in evenly(files, self.limit):
                text = read_text(path, skipped)
                for number, (function, code, summary) in enumerate(modules.functions(text or "")):
                    if len(code) <= self.longest:
                        place = {"id": f"{inside}#{number}-{function}", "group": inside}
                        yield {"text": code, "domain": name, "target": summary} | place

    def domains(self) -> tuple[str, ...]:
        return self.functions

    def size(self) -> Size:
        listed = [
            modules.of_stdlib(False) if name == "stdlib" else modules.of_package(name, False) for name in self.functions
        ]
        code = size_of(path for files in listed for _, path in evenly(files, self.limit)).bytes
        return Size(FUNCTIONS * code, FUNCTIONS * code / FUNCTION)

    def state(self) -> object:
        return [sys.version if name == "stdlib" else _sizes(name, False) for name in self.functions]


def _sizes(name: str, tests: bool) -> list[object]:
    return [list(row) for row in modules.sizes_of_package(name, tests)]

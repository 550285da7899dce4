"""Python modules that are installed here: found and read, never imported."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import pkgutil
import re
import stat
import sysconfig
import textwrap
import tokenize
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from pretrain.core.errors import PretrainError, nearest

TESTS = {"test", "tests", "idle_test"}
Modules = list[tuple[str, Path]]  # the path from the library's or the package's name on, and the file
Measured = tuple[str, str, int]  # the same, the file's path, its bytes


@cache
def of_stdlib(tests: bool) -> Modules:
    """The modules of the standard library that are not empty, sorted; it does not change while a process runs."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "__pycache__"} | (set() if tests else TESTS)
    kept = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in left_out]  # none of these is walked
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        kept += [(path.relative_to(root), path) for path in paths if path.stat().st_size]
    return [(str(inside), path) for inside, path in sorted(kept)]


def of_package(name: str, tests: bool) -> Modules:
    """The modules of an installed package that are not empty, sorted; `name` is the one that it is imported by."""
    return [(inside, Path(path)) for inside, path, _ in _measured(name, tests)]


def sizes_of_package(name: str, tests: bool) -> list[tuple[str, int]]:
    """The modules of `of_package`, and the bytes of each."""
    return [(inside, size) for inside, _, size in _measured(name, tests)]


def _measured(name: str, tests: bool) -> list[Measured]:
    """A package's modules: every plan asks for them, and a package may have thousands, so each is looked at once."""
    top, *deeper = name.split(".")
    try:
        spec = importlib.util.find_spec(top) if all(part.isidentifier() for part in (top, *deeper)) else None
    except (ImportError, ValueError):
        spec = None
    places = (spec.submodule_search_locations or ()) if spec else ()
    roots, inside = [Path(place, *deeper) for place in places], "/".join((top, *deeper))
    files = [row for root in roots for row in _below(root, inside)]
    if not files:
        alone = [root.with_suffix(".py") for root in roots] if deeper else [Path((spec and spec.origin) or "")]
        files = [
            (f"{inside}.py", str(path), path.stat().st_size)
            for path in alone
            if path.suffix == ".py" and path.is_file()
        ]
    files = sorted(row for row in files if row[-1])
    if not files:
        raise PretrainError(
            f"package {name!r}{_meant(top) if spec is None else ''}: accepted: an installed Python package, by the "
            "name that it is imported by, with modules in Python"
        )
    return [row for row in files if tests or not _is_test(row[0].split("/")[1 + len(deeper) :])]


def without(files: Modules, patterns: tuple[str, ...]) -> Modules:
    """The modules whose path no pattern fits; `*` stands for any characters."""
    return [(inside, path) for inside, path in files if not any(fnmatchcase(inside, pattern) for pattern in patterns)]


def _below(root: Path, inside: str) -> Iterator[Measured]:
    """The files in Python of a folder and of those in it, links to folders not followed."""
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name != "__pycache__"]
        place = inside + folder[len(str(root)) :].replace(os.sep, "/")
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                with suppress(OSError):  # of a link to nothing
                    status = os.stat(path)
                    if stat.S_ISREG(status.st_mode):
                        yield f"{place}/{name}", path, status.st_size


def _is_test(inside: list[str]) -> bool:
    """By the names of its folders and its own, inside of the package."""
    return bool(TESTS & set(inside) or re.match(r"test_|conftest\.py|.*_test\.py", (inside or [""])[-1]))


def _meant(word: str) -> str:
    """What the user may have meant: what a distribution of that name is imported by, or the nearest import name."""
    known = importlib.metadata.packages_distributions()
    for name, distributions in known.items():
        if word.lower() in (distribution.lower() for distribution in distributions) and name.isidentifier():
            return f" (did you mean {name!r}?)"
    return nearest(word, {*known, *(module.name for module in pkgutil.iter_modules())})


def version(name: str) -> str | None:
    """The installed version of a package; None where its distribution has another name."""
    try:
        return importlib.metadata.version(name.partition(".")[0])
    except (importlib.metadata.PackageNotFoundError, ValueError):  # of what is no name
        return None


def _parsed(text: str) -> ast.Module | None:
    """The module's syntax, never run; None where it has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError):
        return None


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """The tree and its statements in the order of `ast.walk`, without the expressions, which define nothing."""
    kinds, waiting = (ast.stmt, ast.excepthandler, ast.match_case), deque[ast.AST]([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for name in node._fields:
            value = getattr(node, name)
            if isinstance(value, list):
                waiting.extend(each for each in value if isinstance(each, kinds))


def functions(text: str) -> list[tuple[str, str, str]]:
    """A module's documented functions: the name, the code without its docstring, the docstring's first paragraph."""
    functions, lines = [], text.splitlines()
    for node in _statements(_parsed(text) or ast.Module([], [])):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring, first = ast.get_docstring(node), node.body[0]
        if not docstring or first.lineno == node.lineno:
            continue
        code = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
        summary = " ".join(docstring.split("\n\n")[0].split())
        if summary:
            functions.append((node.name, textwrap.dedent("\n".join(code)) + "\n", summary))
    return functions


def docstrings(text: str) -> str:
    """A module's docstrings with the names they describe; the code is parsed, never run."""
    tree = _parsed(text)
    if tree is None:
        return ""
    parts = []
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) > 40:
                name = getattr(node, "name", None)
                parts.append(f"{name}\n{docstring}" if name else docstring)
    return "\n\n".join(parts)

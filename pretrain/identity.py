"""The code that made a result: which files ran, what they say apart from comments, and which libraries they used.

An address says what was asked for; this says what did it. The files are those that a stage and its methods import,
directly or not, read as syntax trees: comments, docstrings and layout do not count. It is written beside the result,
so that a later run can say which file or library has changed since.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

from pretrain.core.errors import PretrainError
from pretrain.core.files import digest, write_json
from pretrain.core.folders import cache_folder
from pretrain.core.registry import PACKAGE, source_of

# The libraries whose versions may change a result: the name that is imported, and that of the distribution.
LIBRARIES = {
    "datasets": "datasets", "lm_eval": "lm-eval", "numpy": "numpy", "peft": "peft", "PIL": "pillow",
    "pyarrow": "pyarrow", "rensa": "rensa", "safetensors": "safetensors", "scipy": "scipy",
    "sklearn": "scikit-learn", "tokenizers": "tokenizers", "torch": "torch", "transformers": "transformers",
}  # fmt: skip


class Code(TypedDict):
    """What ran: a digest for each file, by its path in the package, and the versions of libraries."""

    files: dict[str, str]
    libraries: dict[str, str]


@dataclass(frozen=True)
class _Module:
    """A file's digest without comments, and the names of the modules that it imports."""

    digest: str
    imports: tuple[str, ...]


def code_of(starts: Iterable[Path]) -> Code:
    """The code that runs when the files `starts` do: theirs, and that of all modules of the package they import."""
    todo = [Path(path).resolve() for path in starts]
    seen: dict[Path, _Module] = {}
    libraries: set[str] = set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen[path] = module = _module(path, path.stat().st_mtime_ns, path.stat().st_size)
        for name in module.imports:
            inner = _imported(name, path.parent)
            if inner is not None:
                todo.append(inner.resolve())
            else:
                libraries.add(name.partition(".")[0])
    _keep()
    files = {_shown(path): module.digest for path, module in sorted(seen.items())}
    known = {LIBRARIES[name] for name in libraries & set(LIBRARIES)}
    return {"files": files, "libraries": {name: _version(name) for name in sorted(known)}}


def changes(before: Code, now: Code) -> list[str]:
    """What differs, in words: `pretrain/training/loop.py changed`, `torch 2.12.0 -> 2.13.0`."""
    old, new = before["files"], now["files"]
    words = [f"{path} changed" for path in old.keys() & new.keys() if old[path] != new[path]]
    words += [f"{path} is new" for path in new.keys() - old.keys()]
    words += [f"{path} is gone" for path in old.keys() - new.keys()]
    older, newer = before["libraries"], now["libraries"]
    for name in sorted(older.keys() | newer.keys()):
        if older.get(name) != newer.get(name):
            words.append(f"{name} {older.get(name, 'unused')} -> {newer.get(name, 'unused')}")
    return sorted(words)


def _shown(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent)) if path.is_relative_to(PACKAGE) else str(path)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _imported(name: str, beside: Path) -> Path | None:
    """The file of an imported module: of this package, or (`.name`) of the same folder of methods; None for others."""
    if name.startswith("."):
        path = beside / f"{name[1:]}.py"
        return path if path.is_file() else None
    return source_of(name)


def _imports(tree: ast.Module) -> Iterator[str]:
    """The modules that a file imports, anywhere but for type checking."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from _imported_from(node)


def _imported_from(node: ast.ImportFrom) -> Iterator[str]:
    names = [alias.name for alias in node.names]
    if node.level:
        yield from (f".{node.module}" for _ in [0] if node.module)
        yield from (f".{name}" for name in names if not node.module)
        return
    inner = [f"{node.module}.{name}" for name in names]
    modules = [name for name in inner if source_of(name) is not None]
    yield from modules
    if len(modules) < len(inner):  # something of the package's own `__init__`, or of the module
        yield str(node.module)


def _digest(tree: ast.Module) -> str:
    """Of the syntax tree without docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                node.body = node.body[1:]
    return digest(ast.dump(tree))[:16]


_fresh: list[str] = []  # what this process has parsed and not yet written down


@cache
def _parsed() -> dict[str, _Module]:
    """Modules by path, time and size, as processes before this one have parsed them."""
    try:
        rows = json.loads(_cache().read_text(encoding="utf-8"))
        return {key: _Module(str(value), tuple(map(str, names))) for key, (value, names) in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # there is none yet, or it is damaged


def _module(path: Path, time: int, size: int) -> _Module:
    key = f"{path}:{time}:{size}"
    if key not in _parsed():
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError) as error:
            raise PretrainError(f"{path}: not a Python file ({error})") from error
        imports = tuple(sorted(set(_imports(tree))))
        _parsed()[key] = _Module(_digest(tree), imports)
        _fresh.append(key)
    return _parsed()[key]


def _keep() -> None:
    """Write down what was parsed, so that the next process need not; of each file what it is now."""
    if not _fresh:
        return
    _fresh.clear()
    newest = {key.rsplit(":", 2)[0]: key for key in _parsed()}
    with suppress(OSError, PretrainError):  # where nothing can be written it is parsed anew each time
        write_json(_cache(), {key: [_parsed()[key].digest, _parsed()[key].imports] for key in newest.values()})


def _cache() -> Path:
    return cache_folder() / f"code-{sys.version_info.major}.{sys.version_info.minor}.json"

"""The files of the package taken to pieces, once for all tests that look at its code."""

from __future__ import annotations

import ast
import gc
from functools import cache
from pathlib import Path

import pretrain

PACKAGE = Path(pretrain.__file__).parent


@cache
def texts() -> dict[str, str]:
    """The text of each file, by its path in the package."""
    return {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def _nodes() -> dict[str, tuple[ast.AST, ...]]:
    was = gc.isenabled()
    gc.disable()
    nodes = {name: tuple(ast.walk(ast.parse(text))) for name, text in texts().items()}
    gc.freeze()  # half a million that stay: else the collector goes through them again and again
    if was:
        gc.enable()
    return nodes


def nodes(name: str) -> tuple[ast.AST, ...]:
    """Each node of a file, the module first."""
    return _nodes()[name]


@cache
def calls(name: str) -> tuple[tuple[str, ast.Call], ...]:
    """Each call of a file: what is called, as it is written, and the node."""
    return tuple((ast.unparse(node.func), node) for node in nodes(name) if isinstance(node, ast.Call))


def words(call: ast.Call) -> dict[str | None, str]:
    """The names of a call's arguments with their values, as they are written."""
    return {word.arg: ast.unparse(word.value) for word in call.keywords}

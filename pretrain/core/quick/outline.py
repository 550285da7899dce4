"""A method's class without what its file imports: enough to check a recipe before torch is there.

A method's file imports torch at its top, which takes seconds, and its fields, bounds and checks need none of it. So the
file's statements are run one by one, each when a name that it defines is asked for: `class LoRA` is, `import torch` is
not. What the body of a function reads waits until the function is called. The class that comes out is made of the same
source as the method's own and says the same; a check that does need torch imports it and only takes longer. A file
whose statements change what others define (a table that is filled, functions that register themselves) has no outline.
"""

from __future__ import annotations

import ast
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import ParamSpec, TypeVar

from pretrain.core.errors import PretrainError

P = ParamSpec("P")
R = TypeVar("R")
PACKAGE = Path(__file__).resolve().parents[2]
_NEEDS = "_needs"  # under this name an outline holds its `_needs`
_PLAIN = ("property", "cached_property", "classmethod", "staticmethod", "abstractmethod", "setter")
_outlines: dict[str, Outline] = {}  # by module


def outline(module: str, path: Path) -> Outline:
    """The outline of a module, made once: its classes are the same for all who ask."""
    known = _outlines.get(module)
    if known is None or known.path != path:
        known = _outlines[module] = Outline(module, path)
    return known


def torch_imported() -> bool:
    """Whether this process has paid for torch: from then on nothing is made by outlines."""
    return "torch" in sys.modules


def source_of(cls: type) -> str | None:
    """The file of a class, or of what it is the outline of; `None` for what was typed at a prompt."""
    module, known = sys.modules.get(cls.__module__), _outlines.get(cls.__module__)
    return getattr(module, "__file__", None) or (str(known.path) if known else None)


class Outline:
    """The names of a module, each defined when it is asked for."""

    def __init__(self, module: str, path: Path) -> None:
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        self.module, self.path, self.package = module, path, package
        self.names: dict[str, object] = {
            "__name__": module, "__file__": str(path), "__package__": package, _NEEDS: self._needs
        }  # fmt: skip
        self.waiting: dict[str, list[ast.stmt]] = {}
        self.ran: set[ast.stmt] = set()
        self.libraries: set[str] = set()  # that the file imports at its top
        self.acts = False  # whether a statement changes what another defines: a table that is filled, a registry
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError) as error:
            raise PretrainError(f"{path}: not a Python file ({error})") from error
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for node in _statements(tree.body):
            self.acts = self.acts or _acts(node, functions)
            for name in _defined(node):
                self.waiting.setdefault(name, []).append(node)
            if isinstance(node, ast.Import):
                self.libraries |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                self.libraries.add(node.module.partition(".")[0])

    def __getitem__(self, name: str) -> object:
        self.define(name)
        if name not in self.names:
            raise ImportError(f"cannot import name {name!r} from {self.module!r} ({self.path})")
        return self.names[name]

    def absent(self) -> bool:
        """Whether the file imports a library that is not installed: then it cannot be imported."""
        return any(name not in sys.modules and find_spec(name) is None for name in self.libraries)

    def define(self, name: str) -> None:
        """Run the statements that define a name, after those that define what they read."""
        for node in self.waiting.pop(name, ()):
            if isinstance(node, ast.ImportFrom):
                self._take(node, name)
                continue
            if node in self.ran:  # for another name that it defines
                continue
            self.ran.add(node)
            node = _Deferred().visit(node)
            for needed in _read(node):
                self.define(needed)
            module = ast.fix_missing_locations(ast.Module([node], []))
            exec(compile(module, self.path, "exec", dont_inherit=True), self.names)

    def _take(self, node: ast.ImportFrom, name: str) -> None:
        """What `from MODULE import NAME` gives: where that is a file of the same package, out of its outline."""
        steps = self.package.split(".")
        inside = steps[: len(steps) - node.level + 1] if node.level else []
        home = ".".join([*inside, *filter(None, [node.module])])
        there = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        file = None if home in sys.modules or self._file(f"{home}.{there}") else self._file(home)
        if file is not None and not outline(home, file).acts:
            self.names[name] = outline(home, file)[there]
        else:
            module = importlib.import_module(home)
            whole = hasattr(module, there)
            self.names[name] = getattr(module, there) if whole else importlib.import_module(f"{home}.{there}")

    def _file(self, module: str) -> Path | None:
        """The source of a module of ours, or of the package that this file is in."""
        top, *steps = module.split(".")
        depth = self.package.count(".")
        roots = {self.package.partition(".")[0]: self.path.parents[depth]} if self.package else {}
        root = (roots | {PACKAGE.name: PACKAGE}).get(top)
        if root is None:
            return None
        path = root.joinpath(*steps)
        return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)

    def _needs(
        self, names: tuple[str, ...], marks: Callable[[], tuple[Callable[[Callable[P, R]], Callable[P, R]], ...]]
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Makes a function that defines what its body reads, and is decorated with its `marks`, when it is called."""

        def decorate(function: Callable[P, R]) -> Callable[P, R]:
            @functools.wraps(function)
            def call(*values: P.args, **named: P.kwargs) -> R:
                for name in names:
                    self.define(name)
                return functools.reduce(lambda done, mark: mark(done), reversed(marks()), function)(*values, **named)

            return call

        return decorate


class _Deferred(ast.NodeTransformer):
    """What a statement says once the bodies of its functions wait, and only fields' types are read."""

    fields = False  # whether the class at hand is a dataclass

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        outer, self.fields = self.fields, any("dataclass" in ast.unparse(mark) for mark in node.decorator_list)
        self.generic_visit(node)
        self.fields = outer
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign | ast.Assign:
        if self.fields:
            return node
        if node.value is not None and "ClassVar" in ast.unparse(node.annotation):
            return ast.Assign([node.target], node.value)
        node.annotation = ast.Constant(ast.unparse(node.annotation))  # a text, which nobody reads
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        now = [mark for mark in node.decorator_list if _is_plain(mark)]
        later = ast.Tuple([mark for mark in node.decorator_list if not _is_plain(mark)], ast.Load())
        names = sorted({name for part in (*node.body, later) for name in _read(part)})
        nothing = ast.arguments([], [], None, [], [], None, [])
        needs = [ast.Tuple([ast.Constant(name) for name in names], ast.Load()), ast.Lambda(nothing, later)]
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        node.returns = None
        node.decorator_list = [*now, ast.Call(ast.Name(_NEEDS, ast.Load()), needs, [])]
        return node


def _is_plain(mark: ast.expr) -> bool:
    """Whether a decorator makes something else of a function than a function, and needs no library."""
    return ast.unparse(mark).rpartition(".")[2] in _PLAIN


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module that run: under `if TYPE_CHECKING:` none does."""
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from _statements(node.orelse)
        else:
            yield node


def _acts(node: ast.stmt, functions: set[str]) -> bool:
    """Whether a statement does more than define names; a decorator that is a function of the file may."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return any(name in functions for mark in node.decorator_list for name in _read(mark))
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)
    stored = (part for part in ast.walk(node) if isinstance(getattr(part, "ctx", None), ast.Store | ast.Del))
    return any(isinstance(part, ast.Subscript | ast.Attribute) for part in stored)


def _defined(node: ast.AST) -> Iterator[str]:
    """The names that a statement defines in its module."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        if not (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Store):
            yield node.id
    else:
        for inner in ast.iter_child_nodes(node):
            yield from _defined(inner)


def _read(node: ast.AST) -> Iterator[str]:
    """The names that a statement reads when it runs: not those in the bodies of functions that wait."""
    if isinstance(node, ast.Name):
        yield node.id
        return
    parts = ast.iter_child_nodes(node)
    if isinstance(node, ast.FunctionDef) and any(_is_needs(mark) for mark in node.decorator_list):
        parts = iter([*node.decorator_list[:-1], node.args])
    for inner in parts:
        yield from _read(inner)


def _is_needs(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == _NEEDS

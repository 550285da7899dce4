"""How methods are found: by reading source files, importing none.

Ours lie in the folders of the kinds, at any depth. A user's lie in packages that declare the entry point group
`pretrain.methods`, or in folders that a recipe (`methods:`) or `use_methods` names. A class is a method if it is a
frozen dataclass that descends from the base of a kind: the class that says `kind` in a folder's `__init__.py`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from pretrain.core.errors import PretrainError, nearest, unknown, warn
from pretrain.core.files import digest, read_sealed, sealed, write_json
from pretrain.core.folders import cache_folder
from pretrain.core.foreign.paths import expanded
from pretrain.core.quick.outside import NAME, MethodFile, files_below, installed_files

PACKAGE = Path(__file__).resolve().parent.parent
FOLDERS = ("data", "objectives", "optim", "policies", "surgery", "decoding", "evaluation")
ABOUT = 600  # characters of a method's docstrings that are searched
_TITLE = re.compile(r"(?P<title>.+?) \((?:arXiv:(?P<arxiv>[\w./-]+)|(?P<venue>[^()]+))\)\.?\Z", re.DOTALL)
_added: list[Path] = []  # folders of methods from outside


@dataclass(frozen=True)
class MethodInfo:
    """A row of the list of methods, read from the source without importing it."""

    name: str
    kind: str
    title: str
    arxiv: str | None
    families: tuple[str, ...]
    module: str
    cls: str
    path: Path
    about: str = ""  # what its docstrings begin with, for searching

    @property
    def ours(self) -> bool:
        """Whether it is part of this package, and not from outside."""
        return self.module.startswith(f"{PACKAGE.name}.")

    def row(self) -> dict[str, str | tuple[str, ...] | None]:
        """What `pretrain methods --json` prints."""
        return {
            "name": self.name, "kind": self.kind, "title": self.title, "arxiv": self.arxiv, "families": self.families
        }  # fmt: skip


@dataclass(frozen=True)
class _Source:
    """A parsed file: its classes by name, the full names of what it imports, and its first paragraph."""

    classes: dict[str, ast.ClassDef]
    imports: dict[str, str]
    summary: str


@cache
def _source(path: Path) -> _Source:
    try:
        tree = ast.parse(path.read_bytes())  # whatever its encoding, as Python reads it
    except OSError as error:
        raise PretrainError(f"{path} cannot be read: {error.strerror}; accepted: a Python file") from error
    except (SyntaxError, ValueError) as error:
        at = f"{path}:{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else str(path)
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise PretrainError(f"{at}: not a Python file ({reason})") from error
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    imports: dict[str, str] = {}
    for node in _at_top(tree.body):
        if isinstance(node, ast.Import):
            imports |= {alias.asname or alias.name: alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            home = "." * node.level + (f"{node.module}." if node.module else "")
            imports |= {alias.asname or alias.name: f"{home}{alias.name}" for alias in node.names}
    return _Source(classes, imports, (ast.get_docstring(tree) or "").partition("\n\n")[0])


def _at_top(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """A module's statements, those inside `try` and `if` too."""
    for node in body:
        yield node
        if isinstance(node, ast.Try | ast.If):
            yield from _at_top(node for node in ast.iter_child_nodes(node) if isinstance(node, ast.stmt))


def _constant(cls: ast.ClassDef, name: str) -> object:
    """The value of a class variable that is written out in the class; `None` if it is not there."""
    for node in cls.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = getattr(node, "value", None)
            return None if value is None else ast.literal_eval(value)
    return None


@cache
def _says(path: Path, name: str, variable: str, heirs: tuple[tuple[Path, str], ...] = ()) -> object:
    """What a class of a file, or its nearest base that does, says of a class variable; `None` if none does.

    `heirs` are those on the way to it, of which it can be none.
    """
    if (path, name) in heirs:
        circle = " → ".join(f"{name} ({path.name})" for path, name in (*heirs, (path, name)))
        raise PretrainError(f"{path}: base classes in a circle: {circle}; accepted: bases that do not come from it")
    source, heirs = _source(path), (*heirs, (path, name))
    cls = source.classes.get(name)
    if cls is None:  # or one that the file hands on
        module, there = _split(source.imports.get(name, ""))
        home = _home(module, there, path)
        return _says(*home, variable, heirs) if home else None
    try:
        value = _constant(cls, variable)
    except (ValueError, TypeError, SyntaxError) as error:
        raise PretrainError(f"{path}: {variable} of {name}: accepted: names, written out") from error
    if value is not None:
        return value
    for base in cls.bases:
        base = base.value if isinstance(base, ast.Subscript) else base  # `FineTuning[str]`
        first, _, last = ast.unparse(base).rpartition(".")
        if not first and last in source.classes:
            home = (path, last)
        elif first:  # in a module by the name of that
            home = _home(source.imports.get(first, first), last, path)
        else:
            home = _home(*_split(source.imports.get(last, "")), path)
        inherited = _says(*home, variable, heirs) if home else None
        if inherited is not None:
            return inherited
    return None


def _kind(path: Path, name: str) -> str | None:
    """The kind of a class of a file; `None` for a class that is no method."""
    kind = _says(path, name, "kind")
    return kind if isinstance(kind, str) else None


def _split(full: str) -> tuple[str, str]:
    """The module of a full name, and the name in it: `a.b.C`, `._a.C`, `..C`."""
    name = full.rpartition(".")[2]
    module = full.removesuffix(name)
    return module.removesuffix(".") if module.strip(".") else module, name


def _home(module: str, name: str, beside: Path) -> tuple[Path, str] | None:
    """The file of a class, and its name there, as a file `beside` names it; `None` where no method can come from."""
    if module == f"{PACKAGE.name}.methods":  # under which ours stand by the names of their classes
        return next(((row.path, row.cls) for row in _ours() if row.cls == name), None)
    file = _file(module, beside) if module else None
    return (file, name) if file is not None else None


def _file(module: str, beside: Path) -> Path | None:
    """The source of a module of this package, or of the one that a file `beside` is in (`._helper`, `..bases`)."""
    inside = module.lstrip(".")
    steps, level = inside.split("."), len(module) - len(inside)
    if level:
        path = beside.parents[level - 1].joinpath(*filter(None, steps))
    else:
        roots = [PACKAGE, *beside.parents]
        root = next((root for root in roots if root.name == steps[0] and root.is_dir()), None)
        if root is None:
            return None
        path = root.joinpath(*steps[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _passed_over(path: Path) -> str | None:
    """Why a file that seems to be meant as a method is none."""
    for cls in _source(path).classes.values():
        kind, decorated = _kind(path, cls.name), _is_dataclass(path, cls)
        if kind and not decorated:
            return f"{path}: class {cls.name} is no dataclass; accepted: @dataclass(frozen=True) above it"
        if decorated and not kind and not cls.name.startswith("_"):
            accepted = "a base class of pretrain's: Objective, Surgery, Policy, Decoding, …"
            lack = _no_base(path, cls) or f"class {cls.name} has no base that says its kind"
            return f"{path}:{cls.lineno}: {lack}; accepted: {accepted}"
    return None


def _no_base(path: Path, cls: ast.ClassDef) -> str:
    """Which base a class asks for that there is not; empty where that is not what is wrong."""
    source = _source(path)
    for base in map(ast.unparse, cls.bases):
        first, dot, rest = base.partition(".")
        module, name = _split(source.imports.get(first, "") + dot + rest)
        if first not in source.classes and first not in source.imports:
            return f"class {cls.name} asks for the base {base}, which nothing in the file defines or imports"
        file = _file(module, path)
        if file is not None and _kind(file, name) is None and name not in _source(file).classes:
            hint = nearest(name, _source(file).classes)
            return f"class {cls.name} asks for the base {name}, which {module} has not{hint}"
    return ""


def _read(path: Path, module: str) -> MethodInfo | None:
    """The method of a file; `None` where there is none."""
    classes = [cls for cls in _source(path).classes.values() if _is_dataclass(path, cls) and _kind(path, cls.name)]
    if len(classes) > 1:
        raise PretrainError(f"{path} defines {len(classes)} methods; accepted: one method a file")
    if not classes:
        return None
    cls = classes[0]
    if not _is_frozen(cls):
        raise PretrainError(f"{path}: the dataclass {cls.name} may be changed; accepted: @dataclass(frozen=True)")
    title = _TITLE.match(" ".join((ast.get_docstring(cls) or "").split("\n\n")[0].split()))
    if title is None:
        raise PretrainError(f"{path}: the docstring of {cls.name} must open with 'Title (arXiv:NUMBER).'")
    families = _says(path, cls.name, "families")
    if not NAME.fullmatch(path.stem):
        raise PretrainError(f"{path}: a method is named as its file; accepted: letters, digits, '_' and '-'")
    return MethodInfo(
        name=path.stem,
        kind=_kind(path, cls.name) or "",
        title=title["title"],
        arxiv=title["arxiv"],
        families=families if isinstance(families, tuple) else (),
        module=module,
        cls=cls.name,
        path=path,
        about=_about(path, cls),
    )


def _about(path: Path, cls: ast.ClassDef) -> str:
    """The first sentences of a method's file and of its class, the paper's title aside."""
    text = [_source(path).summary, *(ast.get_docstring(cls) or "").split("\n\n")[1:2]]
    return " ".join(" ".join(text).split())[:ABOUT]


def _is_dataclass(path: Path, cls: ast.ClassDef) -> bool:
    imports, names = _source(path).imports, []
    for node in cls.decorator_list:
        first, dot, rest = ast.unparse(node.func if isinstance(node, ast.Call) else node).partition(".")
        names.append(imports.get(first, first) + dot + rest)
    return "dataclasses.dataclass" in names


def _is_frozen(cls: ast.ClassDef) -> bool:
    """Whether a decorator of a class says `frozen=True`."""
    keywords = [word for node in cls.decorator_list if isinstance(node, ast.Call) for word in node.keywords]
    return any(word.arg == "frozen" and ast.unparse(word.value) == "True" for word in keywords)


@cache
def kinds() -> dict[str, str]:
    """The kinds of methods and the folder of each, in the order of a model's life."""
    folders: dict[str, str] = {}
    for folder in FOLDERS:
        for cls in _source(PACKAGE / folder / "__init__.py").classes.values():
            kind = _constant(cls, "kind")
            if isinstance(kind, str):
                folders[kind] = folder
    return folders


@cache
def methods() -> dict[str, MethodInfo]:
    """All methods by name, ours in the order of kinds, then those from outside; imports none of them."""
    known: dict[str, MethodInfo] = {}
    packages = installed_files()
    installed = {file.path for file in packages}
    outside = [*map(_read_installed, packages), *map(_read_added, _in_folders())]
    for info in [*_ours(), *filter(None, outside)]:
        if info.name in known and info.path.read_bytes() == known[info.name].path.read_bytes():
            continue  # the same file by two ways, or a copy of it
        if info.name in known and info.path in installed:
            warn(f"two methods are named {info.name!r}: {info.path} is passed over")
            continue
        if info.name in known:
            both = f"{known[info.name].path} and {info.path}"
            raise PretrainError(f"two methods are named {info.name!r}: {both}; accepted: another name of the file")
        known[info.name] = info
    return known


def _ours() -> list[MethodInfo]:
    """The methods of this package: parsed where a file has changed, else from a cache, since parsing takes its time."""
    files = [path for folder in FOLDERS for path in sorted((PACKAGE / folder).rglob("*.py"))]
    states = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in [Path(__file__), *files]]
    cache = cache_folder() / f"methods-{digest(states)[:16]}.json"
    try:
        rows = read_sealed(cache)["methods"]
        return [MethodInfo(**row | {"families": tuple(row["families"]), "path": Path(row["path"])}) for row in rows]
    except (PretrainError, OSError, ValueError, TypeError, KeyError):
        pass  # there is none yet, or it is damaged
    named = [path for path in files if not path.name.startswith("_")]
    modules = [".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)) for path in named]
    rows = [info for info in map(_read, named, modules) if info is not None]
    with suppress(OSError, PretrainError):  # where nothing can be written it is read anew each time
        for old in sorted(cache.parent.glob("methods-*.json"), key=lambda path: path.stat().st_mtime)[:-8]:
            old.unlink()
        write_json(cache, sealed({"methods": [asdict(info) | {"path": str(info.path)} for info in rows]}))
    return rows


def _read_installed(file: MethodFile) -> MethodInfo | None:
    """The method of a file of an installed package. One that is broken stops only who asks for it."""
    try:
        return _read_added(file)
    except PretrainError as error:
        warn(str(error))
        return None


def _read_added(file: MethodFile) -> MethodInfo | None:
    """The method of a file; what is wrong with one that lies deep is told to who asks for it, by `info`."""
    try:
        return _read(file.path, file.module) if not file.deep or b"dataclass" in file.path.read_bytes() else None
    except (PretrainError, OSError):
        if file.deep:
            return None
        raise


def _in_folders() -> list[MethodFile]:
    return [file for folder in _added for file in files_below(folder, _package(folder))]


def _package(folder: Path) -> str:
    """The name under which a folder of methods is imported."""
    return f"pretrain_methods_{sha256(str(folder).encode()).hexdigest()[:12]}"


def use_methods(folder: Path | str) -> None:
    """Add a folder of methods, one a file, to those there are; its files may import one another (`from . import x`).

    They may lie in folders of it. What begins with `_` is no method.
    """
    folder = expanded(folder).resolve()
    if not folder.is_dir():
        raise PretrainError(f"methods {str(folder)!r}: accepted: a folder of Python files, one method each")
    if folder in _added:
        return
    _added.append(folder)
    methods.cache_clear()
    try:
        defined = {info.path for info in methods().values()}
        files = files_below(folder, _package(folder))
        for file in files:
            if not file.deep and file.path not in defined and (reason := _passed_over(file.path)):
                raise PretrainError(reason)
        if not any(map(_read_added, files)):
            raise PretrainError(f"methods {str(folder)!r}: no file there defines a method; accepted: one method a file")
    except PretrainError:
        _added.remove(folder)
        methods.cache_clear()
        raise
    package = ModuleType(_package(folder))
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package


def added() -> tuple[Path, ...]:
    """The folders of methods that `use_methods` was given."""
    return tuple(_added)


def info(name: str, kind: str | None = None) -> MethodInfo:
    """The row of one method; an unknown name, or one of another kind, is an error that lists what is accepted."""
    known = {n: m for n, m in methods().items() if kind is None or m.kind == kind}
    if name not in known:
        if name in methods():
            raise PretrainError(
                f"method {name!r} is of kind {methods()[name].kind!r}, not {kind!r}; accepted: {', '.join(known)}"
            )
        for file in (*installed_files(), *_in_folders()):
            if file.path.stem == name:
                _read(file.path, file.module)
                raise PretrainError(_passed_over(file.path) or f"{file.path} defines no method")
        raise unknown(kind or "method", name, known)
    return known[name]

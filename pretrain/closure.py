"""Which code really runs: the source files that modules import, and a digest of what each of them does.

Files are parsed and none is imported. An import inside a function counts, and `import_module` of a name that is written
out; one under `if TYPE_CHECKING:` does not, since it never runs. A digest is of the syntax tree without docstrings, so
that comments and formatting change nothing.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.files import digest, read_sealed, sealed, write_json
from pretrain.core.folders import cache_folder
from pretrain.core.registry import PACKAGE, methods

FORMAT = 1  # of what `as_json` gives; raised when the digests are made otherwise
ALWAYS = ("torch", "transformers", "tokenizers")
SILENT = ("annotated_types", "psutil", "pydantic", "rich", "tqdm", "typer", "yaml")  # these compute nothing
KEPT = 4000  # parsed files in the cache
Home = tuple[str, str]  # a module's name and its file
Import = tuple[int, str, str]  # level, module, name: `from ..a import b` is (2, "a", "b"), `import a` is (0, "a", "")


@dataclass(frozen=True)
class Parsed:
    """What matters of a source file."""

    digest: str
    imports: tuple[Import, ...]


@dataclass(frozen=True)
class Code:
    """A fingerprint of code: a digest by file (its path in the package), a version by library."""

    files: dict[str, str]
    libraries: dict[str, str]

    def as_json(self) -> dict[str, object]:
        """As it is stored."""
        return {"format": FORMAT, "files": self.files, "libraries": self.libraries}


def stored(row: object) -> Code | None:
    """The fingerprint that was stored so; `None` for one of another version, or a damaged one."""
    if not isinstance(row, dict) or row.get("format") != FORMAT:
        return None
    files, libraries = row.get("files"), row.get("libraries")
    return Code(files, libraries) if isinstance(files, dict) and isinstance(libraries, dict) else None


def fingerprint(starts: Iterable[Home]) -> Code:
    """Of the code behind these modules."""
    return _fingerprint(tuple(sorted({(module, str(Path(path).resolve())) for module, path in starts})))


@cache
def _fingerprint(starts: tuple[Home, ...]) -> Code:
    roots = {PACKAGE.name: PACKAGE} | {module.partition(".")[0]: _top(module, Path(path)) for module, path in starts}
    files: dict[str, str] = {}
    outside, seen, waiting = set(ALWAYS), set(starts), list(starts)
    while waiting:
        module, path = waiting.pop()
        parsed = parse(Path(path))
        files[_label(roots[module.partition(".")[0]], Path(path))] = parsed.digest
        for name in _imported(parsed, module, Path(path).name == "__init__.py"):
            top = name.partition(".")[0]
            if top not in roots and (root := _unversioned(top)):
                roots[top] = root
            if top not in roots:
                outside.add(top)
            for home in _homes(name, roots.get(top)):
                if home not in seen:
                    seen.add(home)
                    waiting.append(home)
    _keep()
    versions = {name: _version(name) for name in sorted(outside - {*SILENT, *sys.stdlib_module_names, ""})}
    return Code(dict(sorted(files.items())), {name: version for name, version in versions.items() if version})


def differences(then: Code, now: Code) -> list[str]:
    """What differs, one short phrase each: `pretrain/training/loop.py changed`, `torch 2.6.0 → 2.7.0`."""
    gone, new = then.files.keys() - now.files.keys(), now.files.keys() - then.files.keys()
    moved = {then.files[name] for name in gone} & {now.files[name] for name in new}
    phrases = [f"{name} changed" for name in now.files if now.files[name] != then.files.get(name, now.files[name])]
    phrases += [f"{name} is new" for name in sorted(new) if now.files[name] not in moved]
    phrases += [f"{name} is gone" for name in sorted(gone) if then.files[name] not in moved]
    for name in sorted(then.libraries.keys() | now.libraries.keys()):
        before, after = (side.libraries.get(name, "none") for side in (then, now))
        if before != after:
            phrases.append(f"{name} {before} → {after}")
    return phrases


@cache
def _unversioned(top: str) -> Path | None:
    """The source of a module that is of no installed library: it lies on the path, or is a method from outside."""
    if top in sys.stdlib_module_names or top in SILENT or not top:
        return None
    for row in methods().values():
        if row.module.partition(".")[0] == top:
            return _top(row.module, row.path)
    if _version(top):
        return None
    try:
        spec = find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return None
    origin = spec.origin if spec and spec.origin and spec.origin.endswith(".py") else None
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else Path(origin) if origin else None


def _top(module: str, path: Path) -> Path:
    """The folder of a module's outermost package, or the file of a module that is in none."""
    deep = module.count(".") + (path.name == "__init__.py")
    return path.parents[deep - 1] if deep else path


def _label(root: Path, path: Path) -> str:
    """A file's name in its package, the same wherever that lies."""
    return path.name if root == path else str(Path(root.name) / path.relative_to(root))


def _imported(parsed: Parsed, module: str, package: bool) -> Iterator[str]:
    """Names that a module's imports may mean: of `from a import b` both `a.b` and `a`."""
    for level, base, name in parsed.imports:
        if level:
            steps = module.split(".")
            inside = steps[: len(steps) - level + package]
            base = ".".join([*inside, base] if base else inside)
        if base == PACKAGE.name:
            base = vars(sys.modules[base])["_HOMES"].get(name, base)  # what is public is imported when it is used
        elif base == f"{PACKAGE.name}.methods":
            base = {row.cls: row.module for row in reversed(methods().values())}.get(name, base)
        yield f"{base}.{name}" if name else base


def _homes(name: str, root: Path | None) -> Iterator[Home]:
    """The module of such a name, and the packages that are imported on the way to it.

    The outermost one of ours is left out: it says what is public, and does nothing.
    """
    steps = name.split(".")
    for count in range(1, len(steps) + 1):
        module = ".".join(steps[:count])
        path = _file(module, root) if root is not None else None
        if path is not None and module != PACKAGE.name:
            yield module, str(path)


@cache
def _file(module: str, root: Path) -> Path | None:
    _, *steps = module.split(".")
    if root.suffix == ".py":
        return root if not steps else None
    path = root.joinpath(*steps)
    names = [path / "__init__.py", *([path.with_name(f"{path.name}.py")] if steps else [])]
    return next((file for file in names if file.is_file()), None)


@cache
def _version(name: str) -> str | None:
    """The version of the library that a module is of; `None` where it is not installed."""
    for distribution in {"sklearn": ("scikit-learn",), "PIL": ("pillow",)}.get(name, (name,)):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(distribution)
    known = _distributions().get(name)
    return metadata.version(known[0]) if known else None


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())  # reads all that is installed: only for names of another kind


# Parsing takes most of the time, so what it gave is kept on the disk, by the bytes of the source.
_parsed: dict[str, Parsed] = {}
_fresh: set[str] = set()


def read(path: Path) -> bytes:
    """A source file's bytes."""
    return path.read_bytes()


def syntax_tree(source: bytes) -> ast.Module:
    """A source file parsed: what takes the time."""
    return ast.parse(source)


@cache
def parse(path: Path) -> Parsed:
    """A source file's digest and imports, as it stood when this process first asked: that is what it has imported."""
    try:
        source = read(path)
    except OSError as error:
        raise PretrainError(f"{path} cannot be read: {error.strerror}; accepted: the file that was imported") from error
    key = sha256(source).hexdigest()
    if not _parsed:
        _parsed.update(_on_disk())
    if key not in _parsed:
        try:
            tree = syntax_tree(source)
        except (SyntaxError, ValueError) as error:
            raise PretrainError(f"{path}: not a Python file ({error})") from error
        _parsed[key] = Parsed(sha256(_canonical(tree).encode()).hexdigest()[:16], tuple(_imports(tree.body)))
        _fresh.add(key)
    return _parsed[key]


def _cache_file() -> Path:
    """Where parsed files are kept: another one when this file, or the grammar, is another."""
    return cache_folder() / f"code-{digest([read(Path(__file__)).decode(), sys.version_info[:2]])[:16]}.json"


def _on_disk() -> dict[str, Parsed]:
    try:
        rows = read_sealed(_cache_file())["files"]
        return {key: Parsed(mark, tuple((n, base, name) for n, base, name in imports)) for key, mark, imports in rows}
    except (PretrainError, OSError, ValueError, TypeError):
        return {}  # there is none yet, or it is damaged


def _keep() -> None:
    if _fresh:
        with suppress(OSError, PretrainError):  # where nothing can be written it is parsed anew each time
            rows = {**_on_disk(), **_parsed}
            kept = [[key, row.digest, row.imports] for key, row in rows.items()][-KEPT:]
            write_json(_cache_file(), sealed({"files": kept}))
        _fresh.clear()


def _does_nothing(node: ast.AST) -> bool:
    """A docstring, or another string that stands alone."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _only_types(node: ast.AST) -> bool:
    """`if TYPE_CHECKING:`, whose body never runs."""
    test = node.test if isinstance(node, ast.If) else None
    return getattr(test, "id", getattr(test, "attr", "")) == "TYPE_CHECKING"


def _canonical(node: object) -> str:
    """A syntax tree written out: without places, docstrings and what is only for types; alike in Python's versions."""
    if isinstance(node, list):
        return "[" + ",".join(filter(None, map(_canonical, node))) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if _does_nothing(node):
        return ""
    if isinstance(node, ast.If) and _only_types(node):
        return _canonical(node.orelse) if node.orelse else ""
    fields = (
        f"{name}={_canonical(value)}"
        for name, value in ast.iter_fields(node)
        if value is not None and value != [] and name not in ("ctx", "kind", "type_comment", "type_ignores")
    )
    return f"{type(node).__name__}({','.join(fields)})"


def _imports(statements: Iterable[ast.AST]) -> Iterator[Import]:
    """The imports among statements and in what they hold."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, node.module or "", alias.name) for alias in node.names)
        elif _only_types(node):
            yield from _imports(getattr(node, "orelse", []))
        else:
            if isinstance(node, ast.Call) and (name := _called(node)):
                yield len(name) - len(name.lstrip(".")), name.lstrip("."), ""
            yield from _imports(ast.iter_child_nodes(node))


def _called(node: ast.Call) -> str:
    """The module that a call imports by a name that is written out; else nothing."""
    function = getattr(node.func, "attr", getattr(node.func, "id", ""))
    first = node.args[0] if node.args else None
    if function in ("import_module", "__import__") and isinstance(first, ast.Constant) and isinstance(first.value, str):
        return first.value
    return ""

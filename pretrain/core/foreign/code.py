"""Code that a checkpoint brings: which files it is, whether a user has consented to it, and the classes in it.

`auto_map` in a configuration names classes in files that lie beside it. They are run only inside `consenting`, which
`trust_remote_code` of a stage, a command or `pretrain.load` opens for the folders that were named, and for no other. A
notice says which files they are before the first of them runs. What runs is the bytes that were read for that notice:
they are imported from memory, so that no change meanwhile comes in and nothing is written anywhere. Only files of the
folder are read; an import of one by another is followed as far as it is written out.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path

from pretrain.core.errors import PretrainError, Terminated, warn
from pretrain.core.files import JSON, digest, read_json, write_json
from pretrain.core.foreign.parsing import parsing
from pretrain.core.foreign.reading import read_bytes
from pretrain.core.quick.trust import CODE, CONFIGS, offline

HOME = "pretrain_checkpoint_code"  # the package that their modules are in, one folder's in HOME.DIGEST
PARTS = ("checkpoint", "tokenizer", "processor")  # what a stage's folder has in it
MOST_FILES, MOST_BYTES = 100, 4 << 20  # of a file
REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")  # modeling_x.XForCausalLM
ALLOWED = (
    "is run only with trust_remote_code: true in the stage (--trust-remote-code of a command, trust_remote_code=True "
    "of pretrain.load)"
)
TRUST = "Run the code that the checkpoint brings, after a line that says which files."  # help of a command's option

_consents: ContextVar[Mapping[Path, str]] = ContextVar("consents")
_noticed: set[str] = set()  # packages


@dataclass(frozen=True)
class Code:
    """What a folder's configurations name: classes by keys of `auto_map`, and the files that are run with them."""

    folder: Path
    classes: Mapping[str, tuple[str, ...]]  # AutoConfig -> modeling_x.XConfig; of tokenizers the slow and the fast
    files: Mapping[str, bytes]  # by their names in the folder

    def digests(self) -> dict[str, str]:
        """SHA-256 (hex) of each file."""
        return {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}

    @property
    def package(self) -> str:
        """The package that its modules are in."""
        return f"{HOME}.code_{digest(self.digests())[:24]}"

    def class_named(self, reference: str) -> type:
        """A class of the code, `MODULE.NAME`; the first time its module is run."""
        module, _, name = reference.rpartition(".")
        _sources.setdefault(self.package, self)
        with parsing(f"{self.folder}: its code in {_file_of(module)}", "code that can be imported here"), offline():
            try:
                held = getattr(importlib.import_module(f"{self.package}.{module}"), name, None)
            except Terminated:
                raise
            except SystemExit as error:  # which would end the command without a word
                raise ImportError("it ends the program") from error
        if not isinstance(held, type):
            raise PretrainError(f"{self.folder}: {_file_of(module)} has no class {name!r}, which its {CODE} names")
        return held

    def model_class(self, architecture: str) -> type | None:
        """The class of models that `architectures` in `config.json` names; None where the code has none."""
        every = [each for key, names in self.classes.items() if key.startswith("AutoModel") for each in names]
        named = next((each for each in every if each.rpartition(".")[2] == architecture), None)
        return self.class_named(named) if named else None

    def first_of(self, *keys: str) -> type | None:
        """The class under the first of these keys of `auto_map`, of a tokenizer the fast one; None where none is."""
        known = next((self.classes[key] for key in keys if key in self.classes), None)
        return self.class_named(known[-1]) if known else None


def needs_consent(folder: Path, but: str = "") -> str:
    """What is to be said besides of a folder that cannot be opened and names code to which nobody has consented.

    Empty where it names none; `but` is a configuration whose code is not at fault.
    """
    if _root(folder) is not None:
        return ""
    named = {name: table for name, table in _tables(folder).items() if name != but}
    every = [each for table in named.values() for _, references in _by_key(table) for each in references]
    if not every:
        return ""
    modules = dict.fromkeys(_file_of(each.rpartition("--")[2].rpartition(".")[0]) for each in every)
    return f"; {next(iter(named))} names code, {', '.join(modules)}, which {ALLOWED}"


def code_in(folder: Path) -> Code | None:
    """The code that a folder's configurations name; None where they name none.

    Raises `PretrainError` for what is in another repository, missing, too large or no Python.
    """
    classes: dict[str, tuple[str, ...]] = {}
    for name, table in _tables(folder).items():
        for key, references in _by_key(table):
            for each in references:
                if "--" in each:
                    raise PretrainError(
                        f"{folder / name}: {CODE} {each!r}: code of another repository is never fetched or run; "
                        "accepted: MODULE.CLASS of a file in the folder"
                    )
                if not REFERENCE.fullmatch(each):
                    raise PretrainError(f"{folder / name}: {CODE} {each[:80]!r}: accepted: MODULE.CLASS")
            classes[key] = references
    if not classes:
        return None
    files: dict[str, bytes] = {}
    waiting = [each.rpartition(".")[0] for references in classes.values() for each in references]
    for module in waiting:
        if not (folder / _file_of(module)).is_file():
            raise PretrainError(
                f"{folder}: {_file_of(module)}, which its {CODE} names, is not there, and code is never fetched; "
                "accepted: a folder with its code"
            )
    while waiting:
        held = _existing(folder, waiting.pop())
        if held is None or held in files:  # what is not there is an error of the code that asks for it, if it does
            continue
        if len(files) == MOST_FILES:
            raise PretrainError(f"{folder}: its {CODE} leads to more than {MOST_FILES} files of code")
        try:
            files[held] = read_bytes(folder / held, MOST_BYTES)
        except OSError as error:
            raise PretrainError(f"{folder / held}: {error.strerror or error}") from error
        waiting += _imported(folder / held, held, files[held])
    return Code(folder, classes, dict(sorted(files.items())))


def _tables(folder: Path) -> dict[str, JSON]:
    """`auto_map` of each of a folder's configurations, by the file's name."""
    read = {path.name: read_json(path) for path in (Path(folder, name) for name in CONFIGS) if path.is_file()}
    return {name: held[CODE] for name, held in read.items() if isinstance(held, dict) and held.get(CODE)}


def _by_key(table: JSON) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The classes of an `auto_map` by their keys; a list alone is the tokenizers', the slow one and the fast one."""
    for key, value in (table if isinstance(table, dict) else {"AutoTokenizer": table}).items():
        rows = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]
        if references := tuple(str(each) for each in rows if each is not None):
            yield str(key), references


def _file_of(module: str) -> str:
    return f"{module.replace('.', '/')}.py"


def _existing(folder: Path, module: str) -> str | None:
    """The file of a module in a folder."""
    names = (_file_of(module), _file_of(f"{module}.__init__"))
    return next((name for name in names if module and (folder / name).is_file()), None)


def _imported(path: Path, name: str, source: bytes) -> list[str]:
    """The modules that a file asks for by relative imports, and the packages that they are in."""
    with parsing(str(path), "a file of Python"):
        tree = ast.parse(source)
    home, modules = name.split("/")[:-1], []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and 0 < node.level <= len(home) + 1:
            steps = [*home[: len(home) - node.level + 1], *filter(None, (node.module or "").split("."))]
            inner = [[*steps, alias.name] for alias in node.names]
            modules += [".".join(each[:end]) for each in (steps, *inner) for end in range(1, len(each) + 1)]
    return modules


# Consent


@contextmanager
def consenting(folders: Mapping[Path, str]) -> Iterator[None]:
    """While open, the code of these folders may be run: of each what was consented to, as `consent` gives it."""
    token = _consents.set({**_consents.get({}), **{Path(folder).resolve(): mark for folder, mark in folders.items()}})
    try:
        yield
    finally:
        _consents.reset(token)


def consenting_to(folder: Path, asked: bool) -> AbstractContextManager[None]:
    """While open, the code of a folder may be run if that is asked for."""
    return consenting({folder: consent(folder)} if asked else {})


def codes_in(folder: Path) -> list[Code]:
    """The code of a folder, or of the checkpoint, tokenizer or processor in it that a stage has left."""
    known = [code_in(place) for place in (folder, *(folder / part for part in PARTS)) if place.is_dir()]
    return [code for code in known if code is not None]


def digests_of(codes: Mapping[str, list[Code]]) -> dict[str, dict[str, str]]:
    """The files of code by place, with their digests, as records keep them."""
    return {place: {n: mark for code in each for n, mark in code.digests().items()} for place, each in codes.items()}


def consent(folder: Path) -> str:
    """What is consented to of a folder: the digest of its code as it is now."""
    return digest([code.digests() for code in codes_in(folder)])


def consented(folder: Path) -> Code | None:
    """The code of a folder, if it may be run; the first time in a process a notice says which files it is."""
    root = _root(folder)
    code = code_in(Path(folder)) if root is not None else None
    if root is None or code is None:
        return None
    if _consents.get({})[root] != consent(root):
        raise PretrainError(f"{folder}: its code is not as it was when it was consented to; accepted: to begin again")
    if code.package not in _noticed:
        _noticed.add(code.package)
        warn(f"trust_remote_code: {in_words(code)}")
    return code


def _root(folder: Path) -> Path | None:
    """The folder that was consented to: the one given, or the stage's that it lies in; None where none was."""
    place, consents = Path(folder).resolve(), _consents.get({})
    around = [place, *([place.parent] if place.name in PARTS else [])]
    return next((each for each in around if each in consents), None)


def in_words(code: Code) -> str:
    """Which files are run, with their sizes and digests."""
    rows = [f"{n} ({len(code.files[n]):,} bytes, SHA-256 {mark})" for n, mark in code.digests().items()]
    return f"code of {code.folder} is run: {', '.join(rows)}"


# Running


class _Loader(SourceLoader):
    """A module from bytes."""

    def __init__(self, path: Path, source: bytes) -> None:
        self.path, self.source = path, source

    def get_filename(self, fullname: str) -> str:
        """Where the bytes were read."""
        return str(self.path)

    def get_data(self, path: str | Path) -> bytes:  # type: ignore[override]  # the base says less than it takes
        """The bytes; there are none that were compiled before."""
        if str(path) != str(self.path):
            raise FileNotFoundError(path)
        return self.source


class _Finder(MetaPathFinder):
    """The modules of the code that was consented to."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The module of one of its files, or an empty package that they are in."""
        if fullname == HOME or fullname in _sources:
            return ModuleSpec(fullname, None, is_package=True)
        steps = fullname.split(".")
        code, module = _sources.get(".".join(steps[:2])), ".".join(steps[2:])
        if code is None:
            return None
        for name in (_file_of(module), _file_of(f"{module}.__init__")):
            if name in code.files:
                loader = _Loader(code.folder / name, code.files[name])
                return spec_from_loader(fullname, loader, is_package=name.endswith("/__init__.py"))
        inside = f"{module.replace('.', '/')}/"
        return ModuleSpec(fullname, None, is_package=True) if any(n.startswith(inside) for n in code.files) else None


_sources: dict[str, Code] = {}  # by package
sys.meta_path.append(_Finder())


def brought(thing: object) -> Code | None:
    """The code that a model, a configuration or a processor is an instance of; None of what no checkpoint brought."""
    return _sources.get(".".join(type(thing).__module__.split(".")[:2]))


def keep(work: Path, *things: object) -> None:
    """Write into a checkpoint the code that its model and processor are made of; `auto_map` names that and no other.

    Raises `PretrainError` where two of them bring different files of one name.
    """
    files: dict[str, bytes] = {}
    for code in filter(None, map(brought, things)):
        for name, data in code.files.items():
            if files.setdefault(name, data) != data:
                raise PretrainError(
                    f"{name} of {code.folder} is not that of the model beside it; accepted: one of them"
                )
    for name, data in files.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(data)
    for name, table in _tables(work).items():
        named = [(k, refs) for k, refs in _by_key(table) if all(_file_of(r.rpartition(".")[0]) in files for r in refs)]
        kept = {key: table[key] if isinstance(table, dict) else table for key, _ in named}
        facts = {field: value for field, value in read_json(work / name).items() if field != CODE}
        write_json(work / name, facts | ({CODE: kept} if kept else {}))

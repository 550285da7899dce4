"""The house: imports point one way and in no circle, and rooms stay small enough to look through."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import package_code
import pytest

from pretrain.core.registry import FOLDERS, methods

PACKAGE = Path(__file__).parent.parent / "pretrain"
# From the ground up: what stands later may import what stands before, and nothing else.
FLOORS = (
    ("core",),
    ("corpus", "dial"),
    ("decoding", "optim", "surgery"),
    ("objectives",),
    ("data", "evaluation", "policies"),
    ("training", "records"),
    ("stages",),
    ("recipe",),
    ("papers", "report", "methods"),
    ("closure",),
    ("identity",),
    ("forecast",),
    ("runs",),
    ("engine", "inference"),
    ("adopt", "experiments", "interactive", "new"),
    ("cli_claim", "cli_corpus", "cli_exchange", "cli_papers", "cli_plan"),
    ("cli",),
    ("docs",),
    ("__main__",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
MOST_FILES = 15
MOST_UNTYPED = {"Any": 76, "type: ignore": 12}  # last resorts, in the whole package


@cache
def modules() -> dict[str, Path]:
    """Module name -> file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        steps = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(steps[:-1] if steps[-1] == "__init__" else steps)] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of this package that a module imports, anywhere in its file."""
    found = set()
    for node in package_code.nodes(modules()[module].relative_to(PACKAGE).as_posix()):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in modules()}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            known = inner & set(modules())
            found |= known if known == inner else known | ({node.module} & set(modules()))
    return frozenset(found - {module})


def part(module: str) -> str:
    """The folder or file directly inside the package."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", sorted(m for m in modules() if m != "pretrain"))
def test_imports_point_down(module):
    for other in imports(module) - {"pretrain"}:
        assert part(other) == part(module) or FLOOR[part(other)] < FLOOR[part(module)], f"{module} imports {other}"


def test_no_file_comes_back_to_itself():
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in imports(module):
                walk(other, (*path, module))
            done.add(module)

    for module in modules():
        walk(module, ())


@pytest.mark.parametrize("kind", FOLDERS)
def test_of_another_kind_a_kind_imports_its_base_or_a_method_and_never_a_helper(kind):
    others = [m for m in modules() if part(m) in FOLDERS]
    homes = {info.module for info in methods().values()} | {m for m in others if modules()[m].name == "__init__.py"}
    for module in (m for m in others if part(m) == kind):
        for other in imports(module):
            if part(other) in FOLDERS and part(other) != kind:
                assert other in homes, f"{module} imports {other}"


@pytest.mark.parametrize("kind", FOLDERS)
def test_rooms_of_a_kind_do_not_import_one_anothers_helpers(kind):
    for module in (m for m in modules() if part(m) == kind and m.count(".") == 3):
        for other in imports(module):
            same_room = other.rpartition(".")[0] == module.rpartition(".")[0]
            helper = other.rpartition(".")[2].startswith("_")
            assert part(other) != kind or other.count(".") < 3 or same_room or not helper, f"{module} imports {other}"


def test_no_room_is_too_full_to_look_through():
    for folder in {path.parent for path in modules().values()}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= MOST_FILES, f"{folder} has {len(files)} files"


def test_each_room_says_what_is_in_it():
    for name in package_code.texts():
        assert Path(name).name != "__init__.py" or ast.get_docstring(package_code.nodes(name)[0]), name


def test_variables_are_named_for_what_they_hold():
    """`found`, `said`, `own`, `one` and `told` name no variable, field or function: only `said`, structure-aware intrinsic dimension."""
    for name in package_code.texts():
        nodes = package_code.nodes(name)
        stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        functions = {node.name.lstrip("_") for node in nodes if isinstance(node, ast.FunctionDef)}
        arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
        if "dimension" in Path(name).stem:
            stored -= {"said"}
        odd = (stored | functions | arguments) & {"found", "said", "own", "one", "told"}
        assert not odd, f"{name}: {', '.join(sorted(odd))}"


def test_what_is_not_typed_stays_a_last_resort():
    texts = package_code.texts()
    names = [node for name in texts for node in package_code.nodes(name) if isinstance(node, ast.Name)]
    counts = {
        "Any": sum(node.id == "Any" for node in names),
        "type: ignore": sum(t.count("type: ignore") for t in texts.values()),
    }
    assert all(counts[word] <= most for word, most in MOST_UNTYPED.items()), counts


@pytest.mark.parametrize("mark", ["processes", "claims", "bits"])
def test_what_is_run_apart_is_marked_in_the_file_of_the_test(mark):
    """The Makefile looks for the mark there, and has no other file collected."""
    for path in Path(__file__).parent.glob("*.py"):
        assert path.name.startswith("test_") or f"mark.{mark}" not in path.read_text(encoding="utf-8"), path

"""How methods are found: by parsing, in rooms, and from outside the package without a fork."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pretrain.methods
from pretrain.core import registry
from pretrain.core.errors import PretrainError, PretrainWarning
from pretrain.core.method import method_class
from pretrain.core.quick.outside import MethodFile
from pretrain.core.registry import info, kinds, methods, use_methods

ROOT = Path(__file__).parent.parent
EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "adding-a-method.md").read_text(), re.DOTALL)[1]
RECIPE = """
methods: my_methods
stages:
  - {stage: data, sources: [{files: text}], validation: 0.2, test: 0.2}
  - {stage: tokenizer, corpus: data, vocab_size: 300}
  - stage: train
    corpus: data
    tokenizer: tokenizer
    model: {family: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}
    length: 32
    batch_rows: 2
    schedule: {method: polynomial, warmup: 0, power: 2.0}
    optimizer: {method: adamw, lr: 0.01}
    budget: {steps: 4}
"""


def outside(folder: Path, code: str = EXAMPLE, name: str = "polynomial.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(code)
    return folder


def test_the_kind_follows_from_the_base_class_through_bases_of_ones_own():
    assert list(kinds()) == [
        "data operation", "objective", "optimiser", "schedule", "policy", "surgery", "decoding", "evaluation",
    ]  # fmt: skip
    assert info("classification").kind == "objective"  # by way of FineTuning
    assert info("distillation").kind == "objective"  # by way of Taught, which a helper defines
    for row in methods().values():
        assert method_class(row.name).kind == row.kind
        assert method_class(row.name).families == row.families


def test_listing_imports_no_method():
    program = (
        "import sys; from pretrain.core.registry import methods; methods();"
        "print([m for m in sys.modules if m.startswith('pretrain.') and not m.startswith('pretrain.core')])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


@pytest.mark.processes
def test_a_recipe_uses_a_method_of_a_folder_beside_it(tmp_path):
    outside(tmp_path / "my_methods")
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(f"number {number} of twenty, and {number * 7} more. " * 9)
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("text}", f"{tmp_path}/text}}"))

    def run(*words: str, folder: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "pretrain", *words]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)

    (tmp_path / "elsewhere").mkdir()  # the folder is found from the recipe, not from where one stands
    done = run("run", "../mine.yaml", "--output", "out", folder=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "elsewhere/out/train/log.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in log if row["event"] == "step"]
    assert rates[1:] == pytest.approx([0.01 * (1 - t / 4) ** 2 for t in (1, 2, 3)], rel=0.4)
    rows = json.loads(run("--methods", "my_methods", "methods", "polynomial", "schedule", "--json").stdout)
    assert [(row["name"], row["kind"]) for row in rows] == [("polynomial", "schedule")]
    assert json.loads(run("methods", "polynomial", "schedule", "--json").stdout) == []


def test_an_installed_package_brings_its_methods_by_an_entry_point(tmp_path):
    outside(tmp_path / "guest" / "methods")
    for folder in ("guest", "guest/methods"):
        (tmp_path / folder / "__init__.py").write_text("")
    facts = tmp_path / "guest-1.0.dist-info"
    facts.mkdir()
    outside(tmp_path / "guest" / "methods" / "room", EXAMPLE, "deeper.py")
    (tmp_path / "guest" / "methods" / "broken.py").write_text("def f(:\n")
    (tmp_path / "guest" / "methods" / "cosine.py").write_text(EXAMPLE)  # the name of one of ours
    (tmp_path / "boom").mkdir()
    (tmp_path / "boom" / "__init__.py").write_text("raise RuntimeError('no')")
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: guest\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        "[pretrain.methods]\nguest = guest.methods\nlost = guest.no_such\nboom = boom.methods\n"
    )
    program = (
        "from pretrain.core.method import method_class; from pretrain.core.registry import info;"
        "print(info('polynomial').kind, info('polynomial').ours, method_class('polynomial')(0, 2.0).factor(50, 100),"
        "method_class('deeper')().name)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["schedule", "False", "0.25", "deeper"], done.stderr
    assert "lost = 'guest.no_such'" in done.stderr  # named, and the others are there
    assert "broken.py:1: not a Python file" in done.stderr and "RuntimeError: no" in done.stderr
    assert "two methods are named 'cosine'" in done.stderr


@pytest.mark.parametrize(
    "imports, base",
    [
        ("from guest.bases import Warmed", "Warmed"),
        ("from ..bases import Warmed", "Warmed"),
        ("from .. import bases", "bases.Warmed"),
        ("from . import Warmed", "Warmed"),
        ("try:\n    from guest.bases import Warmed\nexcept ImportError:\n    raise", "Warmed"),
        ("from pretrain.methods import Cosine", "Cosine"),
    ],
)
def test_a_method_is_found_by_a_base_of_its_own_package_or_a_public_one(tmp_path, monkeypatch, imports, base):
    package = tmp_path / "guest"
    code = EXAMPLE.replace("from pretrain.optim import Schedule, warmup_steps", imports).replace(
        "(Schedule)", f"({base})"
    )
    outside(package / "rooms", code)
    (package / "rooms" / "__init__.py").write_text("from ..bases import Warmed")
    (package / "bases.py").write_text(
        "from pretrain.optim import Schedule\n\nclass Warmed(Schedule):\n    families = ('bert',)\n"
    )
    file = MethodFile(package / "rooms" / "polynomial.py", "guest.rooms.polynomial", False)
    monkeypatch.setattr(registry, "installed_files", lambda: [file])
    methods.cache_clear()
    try:
        assert info("polynomial").kind == "schedule"
        assert info("polynomial").families == (() if base == "Cosine" else ("bert",))
    finally:
        monkeypatch.undo()
        methods.cache_clear()


def test_a_class_of_the_name_of_ours_leaves_ours_where_it_is(tmp_path, clean):
    use_methods(outside(tmp_path, EXAMPLE.replace("class Polynomial", "class LoRA")))
    assert pretrain.methods.LoRA is method_class("lora")


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b"# coding: latin-1\n# \xe9\n"])
def test_a_file_is_read_in_its_encoding(tmp_path, clean, start):
    (outside(tmp_path) / "polynomial.py").write_bytes(start + EXAMPLE.encode())
    use_methods(tmp_path)
    assert method_class("polynomial")().power == 0.9


def test_the_same_file_by_an_entry_point_and_by_a_folder_is_no_conflict(tmp_path):
    outside(tmp_path / "guest" / "methods")
    outside(tmp_path / "copy")
    outside(tmp_path / "changed", EXAMPLE.replace("0.9", "0.8"))
    (tmp_path / "guest-1.0.dist-info").mkdir()
    (tmp_path / "guest-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: guest\nVersion: 1.0\n")
    (tmp_path / "guest-1.0.dist-info" / "entry_points.txt").write_text("[pretrain.methods]\nguest = guest.methods\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}

    def listed(folder: str) -> subprocess.CompletedProcess[str]:
        program = (
            "from pretrain.core.registry import info, use_methods; "
            f"use_methods({str(tmp_path / folder)!r}); print(info('polynomial').module)"
        )
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)

    for folder in ("guest/methods", "copy"):
        done = listed(folder)
        assert (done.stdout, done.stderr) == ("guest.methods.polynomial\n", "")
    assert "two methods are named 'polynomial'" in listed("changed").stderr


@pytest.mark.parametrize("other", ["_a", "_b"], ids=["in one file", "in two files"])
def test_base_classes_in_a_circle_are_one_line_that_names_them(tmp_path, clean, other):
    bases = {"_a": "from .{other} import B\nclass A(B): pass\n", "_b": "from ._a import A\nclass B(A): pass\n"}
    if other == "_a":
        bases = {"_a": "class A(B): pass\nclass B(A): pass\n"}
    for name, code in bases.items():
        outside(tmp_path / "mine", code.format(other=other), f"{name}.py")
    code = EXAMPLE.replace("from pretrain.optim import Schedule,", "from ._a import A\nfrom pretrain.optim import")
    circle = f"Polynomial (polynomial.py) → A (_a.py) → B ({other}.py) → A (_a.py)"
    with pytest.raises(PretrainError, match=rf"base classes in a circle: .*{re.escape(circle)}; accepted"):
        use_methods(outside(tmp_path / "mine", code.replace("(Schedule)", "(A)")))


def test_an_entry_point_may_be_to_a_package_without_an_init_file(tmp_path):
    outside(tmp_path / "bare" / "methods")
    (tmp_path / "bare-1.0.dist-info").mkdir()
    (tmp_path / "bare-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: bare\nVersion: 1.0\n")
    (tmp_path / "bare-1.0.dist-info" / "entry_points.txt").write_text("[pretrain.methods]\nbare = bare.methods\n")
    program = "from pretrain.core.method import method_class; print(method_class('polynomial')(0, 2.0).factor(50, 100))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout == "0.25\n" and "no such module" not in done.stderr, done.stderr


def test_files_of_a_folder_may_import_one_another(tmp_path, clean):
    code = EXAMPLE.replace(
        "from pretrain.optim import Schedule, warmup_steps",
        "from pretrain.optim import Schedule\n\nfrom ._helper import warmup_steps",
    )
    outside(tmp_path / "mine", code)
    outside(tmp_path / "mine", "from pretrain.optim import warmup_steps as warmup_steps\n", "_helper.py")
    use_methods(tmp_path / "mine")
    assert method_class("polynomial")().name == "polynomial"


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("x = 1\n", "nothing.py", "no file there defines a method"),
        ("def f(:\n", "broken.py", "broken.py:1: not a Python file"),
        (EXAMPLE, "cosine.py", "two methods are named 'cosine'"),
        (EXAMPLE, "poly.nomial.py", "a method is named as its file; accepted: letters, digits, '_' and '-'"),
        (
            EXAMPLE.replace("    warmup:", "    kind = 'sched' + 'ule'\n    warmup:"),
            "polynomial.py",
            "polynomial.py: kind of Polynomial: accepted: names, written out",
        ),
        (EXAMPLE.replace("(arXiv:1606.00915)", ""), "polynomial.py", "must open with 'Title (arXiv:NUMBER)"),
        (
            EXAMPLE.replace("@dataclass(frozen=True)", ""),
            "polynomial.py",
            "polynomial.py: class Polynomial is no dataclass",
        ),
        (
            EXAMPLE.replace("(frozen=True)", ""),
            "polynomial.py",
            "polynomial.py: the dataclass Polynomial may be changed; accepted: @dataclass(frozen=True)",
        ),
        (EXAMPLE.replace("frozen=True", "frozen=False"), "polynomial.py", "may be changed; accepted: @dataclass(fro"),
        (EXAMPLE.replace("(Schedule)", ""), "polynomial.py", "class Polynomial has no base that says its kind"),
        (
            EXAMPLE.replace("Schedule", "Schedul"),
            "polynomial.py",
            "asks for the base Schedul, which pretrain.optim has not (did you mean 'Schedule'?)",
        ),
    ],
)
def test_a_folder_that_does_not_do_is_one_clear_error_and_leaves_the_list_as_it_was(
    tmp_path, clean, code, name, message
):
    before = list(methods())
    with pytest.raises(PretrainError, match=re.escape(message)):
        use_methods(outside(tmp_path / "mine", code, name))
    assert list(methods()) == before
    with pytest.raises(PretrainError, match="accepted: a folder of Python files"):
        use_methods(tmp_path / "missing")


@pytest.mark.parametrize(
    "changes",
    [
        {"@dataclass(frozen=True)": "@dataclasses.dataclass(frozen=True)", "from dataclasses import dataclass": "import dataclasses"},
        {"@dataclass(frozen=True)": "@dc.dataclass(frozen=True)", "from dataclasses import dataclass": "import dataclasses as dc"},
        {"(Schedule)": "(optim.Schedule)", "from pretrain.optim import": "import pretrain.optim as optim\nfrom pretrain.optim import"},
        {"(Schedule)": "(Mine)", "from pretrain.optim import": "from ._mine import Mine\nfrom pretrain.optim import"},
    ],
    ids=["dataclasses.dataclass", "dc.dataclass", "a base by its module", "a base of a file beside it"],
)  # fmt: skip
def test_a_class_is_a_method_however_its_decorator_and_base_are_written(tmp_path, clean, changes):
    code = EXAMPLE
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    outside(tmp_path / "mine", "from pretrain.optim import Schedule\n\n\nclass Mine(Schedule):\n    pass\n", "_mine.py")
    use_methods(outside(tmp_path / "mine", code))
    assert info("polynomial").kind == "schedule" and method_class("polynomial")().name == "polynomial"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (EXAMPLE + "\nraise SystemExit(3)\n", "SystemExit: 3"),
        (EXAMPLE + "\nX = undefined_name\n", "NameError: name 'undefined_name' is not defined"),
        (EXAMPLE.replace("power: Positive", "power: Sharee"), "NameError: name 'Sharee' is not defined"),
    ],
)
def test_a_method_whose_file_fails_is_one_line_that_names_the_file(tmp_path, clean, code, message):
    use_methods(outside(tmp_path / "mine", code))
    with pytest.raises(PretrainError, match=r"polynomial.py\) cannot be imported: " + re.escape(message)):
        method_class("polynomial")


def test_methods_lie_in_folders_of_the_folder_too_and_what_else_lies_there_is_no_mistake(tmp_path, clean):
    room = outside(
        tmp_path / "mine" / "room" / "inner",
        EXAMPLE.replace("warmup_steps\n", "warmup_steps\nfrom .._helper import X\n"),
    )
    outside(room.parent, "X = 1\n", "_helper.py")
    outside(tmp_path / "mine" / "_left", EXAMPLE, "hidden.py")
    outside(tmp_path / "mine" / "run", EXAMPLE, "old.py").joinpath("run.json").write_text("{}")
    outside(room, "from dataclasses import dataclass\n@dataclass\nclass Row:\n    x: int\n", "rows.py")
    outside(room, "# dataclass\ndef f(:\n", "broken.py")
    (room / "polynomials.py").mkdir()  # a folder
    (room / "again").symlink_to(tmp_path / "mine")
    use_methods(tmp_path / "mine")
    assert [name for name, row in methods().items() if not row.ours] == ["polynomial"]
    assert method_class("polynomial")().name == "polynomial" and "optim" not in info("polynomial").module
    for name, reason in (("broken", "broken.py:2: not a Python file"), ("rows", "Row has no base that says its kind")):
        with pytest.raises(PretrainError, match=reason):
            info(name, "schedule")
    with pytest.raises(PretrainError, match="unknown schedule 'hidden'"):
        info("hidden", "schedule")


def test_two_classes_of_one_name_from_outside_are_told(tmp_path, clean):
    outside(tmp_path / "mine", EXAMPLE + "\n", "other.py")
    use_methods(outside(tmp_path / "mine"))
    with pytest.warns(PretrainWarning, match="methods.Polynomial is of .*other.py; of that name too: .*polynomial.py"):
        assert pretrain.methods.Polynomial().name == "other"


def test_a_method_that_cannot_be_imported_says_why(tmp_path, clean):
    use_methods(
        outside(
            tmp_path / "mine",
            EXAMPLE.replace(
                "from dataclasses import dataclass", "from dataclasses import dataclass\nimport no_such_thing"
            ),
        )
    )
    with pytest.raises(
        PretrainError, match=r"method 'polynomial' \(.*\) cannot be imported: No module named 'no_such_thing'"
    ):
        method_class("polynomial")


def test_the_list_is_kept_until_a_file_changes_and_a_damaged_copy_is_made_anew(tmp_path, monkeypatch, clean):
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path))
    methods.cache_clear()
    first = methods()
    (cache,) = tmp_path.glob("methods-*.json")
    monkeypatch.setattr(registry, "_read", lambda *_: pytest.fail("parsed again"))
    methods.cache_clear()
    assert methods() == first
    monkeypatch.undo()
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path))
    cache.write_text(cache.read_text()[:99])
    methods.cache_clear()
    assert methods() == first
    size = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **more: os.stat_result([*size(path, **more)[:6], 1, *size(path, **more)[7:]]) if path.name == "gptq.py" else size(path, **more))  # fmt: skip
    methods.cache_clear()
    assert methods() == first and len(list(tmp_path.glob("methods-*.json"))) == 2


LACKING = [
    ("data", "DataOperation", "__call__", "def __call__(self, corpus)"),
    ("objectives", "Objective", "loss", "def loss(self, model, batch, modules)"),
    ("objectives", "Objective", "prepare", "def prepare(self, rows, context)"),
    ("objectives.labelled", "FineTuning", "expected", "def expected(self, examples, context)"),
    ("optim", "Optimizer", "build", "def build(self, named_parameters)"),
    ("optim", "Schedule", "factor", "def factor(self, step, total)"),
    ("surgery", "Surgery", "__call__", "def __call__(self, model, inputs)"),
    ("decoding", "Decoding", "decode", "def decode(self, model, input_ids_BL, options)"),
    ("evaluation", "Evaluation", "__call__", "def __call__(self, model, tokenizer, documents)"),
]


@pytest.mark.parametrize(("room", "base", "missing", "words"), LACKING)
def test_a_method_without_what_its_kind_asks_for_is_refused_when_it_is_made(
    tmp_path, clean, room, base, missing, words
):
    every = [name for other_room, _, name, _ in LACKING if other_room == room] + ["predict", "metrics", "prepare"]
    given = "".join(f"\n    def {name}(self, *given):\n        return given\n" for name in {*every} - {missing})
    head = f"from dataclasses import dataclass\n\nfrom pretrain.{room} import {base}\n\n\n@dataclass(frozen=True)\n"
    outside(
        tmp_path / "mine", f'{head}class Half({base}):\n    """Half a method (arXiv:1606.00915)."""\n{given}', "half.py"
    )
    use_methods(tmp_path / "mine")
    with pytest.raises(PretrainError, match=re.escape(f"Half has no {missing}; accepted: {words}")):
        method_class("half")()


def test_a_recipe_with_half_a_method_is_refused_before_anything_runs(tmp_path, clean):
    code = EXAMPLE.replace("def factor(", "def factors(")
    outside(tmp_path / "my_methods", code)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("Some text.\n" * 50)
    (tmp_path / "r.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "pretrain", "run", str(tmp_path / "r.yaml"), "--dry-run"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert (
        done.returncode
        and "train.schedule: schedule 'polynomial': the schedule Polynomial has no factor" in done.stderr
    )

"""The code behind a stage: digests, the closure of imports, methods from outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain import closure, identity
from pretrain.core.registry import PACKAGE, methods
from pretrain.recipe import check, load


def put(folder: Path, **files: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


PLAIN = "import math\n\ndef f(x):\n    return x * 2\n"


@pytest.mark.parametrize(
    "same",
    [
        "# why\nimport math\n\n\ndef f(x):\n    '''Doc.'''\n    return (x\n            * 2)\n",
        "'''A module.'''\nimport math\ndef f(x): return x * 2  # twice\n",
        "import math\nif TYPE_CHECKING:\n    import torch\ndef f(x):\n    return x * 2\n",
    ],
)
def test_comments_docstrings_and_formatting_change_no_digest(tmp_path, same):
    put(tmp_path, one=PLAIN, other=same)
    assert closure.parse(tmp_path / "one.py").digest == closure.parse(tmp_path / "other.py").digest


def test_whatever_else_changes_changes_the_digest(tmp_path):
    others = [
        ("math", "cmath"),
        ("* 2", "* 2.0"),
        ("* 2", "* True"),
        ("* 2", "* None"),
        ("* 2", "* ()"),
        ("* 2", "* []"),
    ]
    others += [
        ("* 2", "* {}"),
        ("* 2", "* ''"),
        ("* 2", "* f()"),
        ("* 2", "* f(None)"),
        ("x * 2", "2 * x"),
        ("* 2", "+ 2"),
    ]
    others += [
        ("(x)", "(x=None)"),
        ("    return", "    x += 0\n    return"),
        ("    return ", "    "),
        ("def", "async def"),
    ]
    others += [
        ("* 2", "* 0"),
        ("* 2", "* False"),
        ("import math\n", ""),
        ("import math", "from math import *"),
        ("import math", "from . import math"),
    ]
    for number, (old, new) in enumerate(others):
        assert old in PLAIN
        (tmp_path / f"{number}.py").write_text(PLAIN.replace(old, new))
    put(tmp_path, plain=PLAIN)
    assert len({closure.parse(path).digest for path in tmp_path.glob("*.py")}) == len(others) + 1


def test_the_closure_follows_what_is_imported_and_nothing_else(tmp_path):
    home = tmp_path / "mine"
    put(
        home,
        start="from typing import TYPE_CHECKING\nfrom . import near\nfrom .room.deep import f\nif TYPE_CHECKING:\n    from mine import types_only\nelse:\n    from mine import really\ndef g():\n    from mine.late import h\n    try:\n        import mine.tried\n    except ImportError:\n        pass\n",
    )
    for name in ("near", "late", "tried", "really", "types_only", "unused", "__init__"):
        (home / f"{name}.py").write_text("x = 1\n")
    (home / "room").mkdir()
    (home / "room" / "__init__.py").write_text("from mine import near\nimport scipy.stats\n")
    (home / "room" / "deep.py").write_text("from ..other import y\nfrom pretrain import load\nimport os.path\n")
    (home / "other.py").write_text("import yaml\n")
    code = closure.fingerprint([("mine.start", str(home / "start.py"))])
    own = {name for name in code.files if name.startswith("mine/")}
    expected = ("__init__", "late", "near", "other", "really", "room/__init__", "room/deep", "start", "tried")
    assert own == {f"mine/{name}.py" for name in expected}
    assert "pretrain/core/checkpoint.py" in code.files and "pretrain/__init__.py" not in code.files
    assert {"torch", "transformers", "tokenizers", "scipy"} <= code.libraries.keys()
    assert code.libraries.keys().isdisjoint({"os", "yaml", "mine", "pretrain"})


def test_what_is_imported_by_a_written_name_or_from_the_path_counts_too(tmp_path, monkeypatch):
    home = tmp_path / "mine"
    put(
        home,
        start="import importlib\nimport loose\ndef f(name):\n    importlib.import_module(name)\n"
        "    return [importlib.import_module('mine.late').x, importlib.import_module('._near', 'mine')]\n",
        late="import packed.inner\n", _near="x = 1\n", __init__="",
    )  # fmt: skip
    put(tmp_path / "path", loose="x = 1\n")
    put(tmp_path / "path" / "packed", __init__="", inner="x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    code = closure.fingerprint([("mine.start", str(home / "start.py"))])
    more = {"loose.py", "packed/__init__.py", "packed/inner.py"}
    assert code.files.keys() == {f"mine/{n}.py" for n in ("__init__", "_near", "late", "start")} | more


def test_a_stages_code_is_its_loop_and_the_methods_that_it_uses():
    stages = load(PACKAGE.parent / "recipes" / "quickstart.yaml")
    code = {item.stage.name: item.code() for item in identity.plan(stages)}
    names = code["model"].files
    assert {"pretrain/stages/train.py", "pretrain/training/loop.py", "pretrain/core/batch.py"} <= names.keys()
    homes = {str(row.path.relative_to(PACKAGE.parent)): row.name for row in methods().values() if row.ours}
    assert {homes[name] for name in names if name in homes} == {
        "causal_lm",
        "muon",
        "linear",
        "sequence_length_warmup",
        "zero_init",
    }
    assert {homes[name] for name in code["evaluation"].files if name in homes} == {"held_out"}
    assert not [name for name in code["corpus"].files if name in homes or "training" in name]
    assert "scikit-learn" not in code["model"].libraries and "sklearn" not in code["model"].libraries


def test_a_warm_cache_parses_nothing_and_a_damaged_one_is_read_over(monkeypatch, edited, tmp_path):
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    start = [("pretrain.stages.train", str(PACKAGE / "stages" / "train.py"))]

    def fresh():
        closure.parse.cache_clear()
        closure._fingerprint.cache_clear()
        monkeypatch.setattr(closure, "_parsed", {})
        return closure.fingerprint(start)

    cold = fresh()
    parsed: list[bytes] = []
    really = closure.syntax_tree
    monkeypatch.setattr(closure, "syntax_tree", lambda source: parsed.append(source) or really(source))
    assert fresh() == cold and parsed == []
    edited("training/loop.py", "settings.clip", "settings.clip * 0.5")
    assert fresh() != cold and len(parsed) == 1
    (file,) = (tmp_path / "cache").glob("code-*.json")
    file.write_text("{" + file.read_text()[: len(file.read_text()) // 2])
    assert fresh().files.keys() == cold.files.keys() and len(parsed) > 20


def test_files_that_moved_as_they_were_are_no_difference():
    then = closure.Code({"p/a.py": "1", "p/b.py": "2", "p/c.py": "3"}, {"torch": "2.6.0", "gone": "1"})
    now = closure.Code({"p/room/a.py": "1", "p/b.py": "4", "p/d.py": "5"}, {"torch": "2.7.0"})
    assert closure.differences(then, now) == [
        "p/b.py changed", "p/d.py is new", "p/c.py is gone", "gone 1 → none", "torch 2.6.0 → 2.7.0"
    ]  # fmt: skip
    assert closure.stored(then.as_json()) == then and closure.stored(then.as_json() | {"format": 0}) is None


def test_methods_from_outside_and_their_helpers_are_part_of_the_code(tmp_path, clean):
    folder = tmp_path / "my_methods"
    put(folder, _power="def power(x, n):\n    return x**n\n")
    (folder / "steep.py").write_text('''from dataclasses import dataclass
from pretrain.optim import Schedule
from ._power import power
@dataclass(frozen=True)
class Steep(Schedule):
    """A steep fall (arXiv:0000.00000)."""
    def factor(self, step, total):
        from pretrain.methods import WSD
        return power(1 - step / total, 2) * WSD().factor(step, total)
''')
    train = {
        "stage": "train", "corpus": str(tmp_path), "tokenizer": str(tmp_path), "budget": {"steps": 1},
        "model": {"family": "llama"}, "schedule": "steep",
    }  # fmt: skip
    (item,) = identity.plan(check({"methods": str(folder), "stages": [train]}, output=tmp_path / "run"))
    files = item.code().files
    assert {"my_methods/steep.py", "my_methods/_power.py", "pretrain/optim/__init__.py"} <= files.keys()
    assert "pretrain/optim/schedules/wsd.py" in files  # by its public name
    assert not any("cosine" in name for name in files)

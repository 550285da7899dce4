"""Identity of a stage: what its address is made of, the code behind it, why it runs, refreshing, adopting."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import PlainSerializer, PlainValidator
from typer.testing import CliRunner

import pretrain.stages
from pretrain import closure, engine, identity
from pretrain.adopt import adopt
from pretrain.core.errors import PretrainError
from pretrain.core.method import InnerObjective, Method, Ref
from pretrain.core.registry import PACKAGE, methods
from pretrain.recipe import check, load
from pretrain.stages import Job, Stage, build_dataclass, dump

RUNS: list[str] = []


@dataclass(frozen=True)
class Tool(Method):
    """A method that may hold another."""

    amount: int = 1
    inner: InnerObjective = None

    def held(self) -> dict[str, Any]:
        return super().held() if self.inner else {}


def build(value):
    return build_dataclass(Tool, value, "tool")


class Fake(Stage):
    stage: Literal["fake"] = "fake"
    tool: Annotated[Any, PlainValidator(build), PlainSerializer(dump)] = None
    neutral = ("speed",)
    source: Ref | None = None
    value: int = 0
    speed: int = 1
    options: dict[str, Any] = {}

    def progress(self, folder: Path) -> str:
        return "at step 3" if (folder / "half").exists() else ""

    def run(self, job: Job) -> dict[str, Any]:
        RUNS.append(job.name)
        if self.value < 0 and not (job.folder / "half").exists():
            (job.folder / "half").write_text("3 steps")
            raise OSError(28, "No space left on device", str(job.folder / "big"))
        (job.folder / "out").write_text(str(len(RUNS)))
        return {"metrics": {"resumed": float((job.folder / "half").exists())}}


@pytest.fixture(autouse=True)
def fake_stages(monkeypatch):
    RUNS.clear()
    known = pretrain.stages.stage_classes() | {"fake": Fake}
    monkeypatch.setattr("pretrain.recipe.stage_classes", lambda: known)


@pytest.fixture
def edited(monkeypatch):
    """`edited("training/loop.py", old, new)`: from here on the package's file reads so."""
    changes: dict[Path, tuple[str, str]] = {}
    really = closure.read

    def read(path: Path) -> bytes:
        old, new = changes.get(path, ("", ""))
        return really(path).replace(old.encode(), new.encode())

    def edit(name: str, old: str, new: str) -> None:
        path = PACKAGE / name if not name.startswith("/") else Path(name)
        assert old.encode() in really(path)
        changes[path] = (old, new)
        forget()

    def forget() -> None:
        closure.parse.cache_clear()
        closure._fingerprint.cache_clear()

    monkeypatch.setattr(closure, "read", read)
    yield edit
    changes.clear()
    forget()


def raw(**first):
    stages = [
        {"stage": "fake", "name": "a"} | first, {"stage": "fake", "name": "b", "source": "a"},
        {"stage": "fake", "name": "c", "value": 7},
    ]  # fmt: skip
    return {"name": "r", "stages": stages}


def go(tmp_path, refresh=(), **first):
    RUNS.clear()
    said: list[str] = []
    engine.run(check(raw(**first), output=tmp_path / "run"), say=said.append, report=False, refresh=refresh)
    return said


def reasons(tmp_path, refresh=(), **first):
    planned = identity.plan(check(raw(**first), output=tmp_path / "run"), refresh=refresh)
    return {item.stage.name: identity.why(item) for item in planned}


# What code there is


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


def test_a_stages_code_is_its_loop_and_the_methods_that_it_uses():
    stages = load(PACKAGE.parent / "recipes" / "quickstart.yaml")
    code = {item.stage.name: item.code() for item in identity.plan(stages)}
    names = code["model"].files
    assert {"pretrain/stages/train.py", "pretrain/training/loop.py", "pretrain/core/batch.py"} <= names.keys()
    homes = {str(row.path.relative_to(PACKAGE.parent)): row.name for row in methods().values() if row.ours}
    assert {homes[name] for name in names if name in homes} == {"causal_lm", "muon", "linear"}
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


def test_methods_from_outside_and_their_helpers_are_part_of_the_code(tmp_path, monkeypatch):
    from pretrain.core import registry

    folder = tmp_path / "my_methods"
    put(folder, _power="def power(x, n):\n    return x**n\n")
    (folder / "steep.py").write_text('''from dataclasses import dataclass
from pretrain.optim import Schedule
from ._power import power
@dataclass(frozen=True)
class Steep(Schedule):
    """A steep fall (arXiv:0000.00000)."""
    def factor(self, step, total):
        return power(1 - step / total, 2)
''')
    monkeypatch.setattr(registry, "_added", [])
    train = {
        "stage": "train", "corpus": str(tmp_path), "tokenizer": str(tmp_path), "budget": {"steps": 1},
        "model": {"family": "llama"}, "schedule": "steep",
    }  # fmt: skip
    (item,) = identity.plan(check({"methods": str(folder), "stages": [train]}, output=tmp_path / "run"))
    registry.methods.cache_clear()
    files = item.code().files
    assert {"my_methods/steep.py", "my_methods/_power.py", "pretrain/optim/__init__.py"} <= files.keys()
    assert not any("cosine" in name for name in files)


# Addresses


def test_versions_of_inner_methods_are_part_of_the_address_and_code_is_not(tmp_path, monkeypatch, edited):
    first = {"tool": {"inner": {"method": "causal_lm"}}}
    address = lambda: identity.plan(check(raw(**first), output=tmp_path))[0].address  # noqa: E731
    before = address()
    edited("core/method.py", "return replace(self, **changed)", "return replace(self, **changed, x=1)")
    assert address() == before
    monkeypatch.setattr("pretrain.objectives.language.causal_lm.CausalLM.version", 2)
    assert address() != before


# Drift


def test_other_code_is_told_once_and_reruns_nothing(tmp_path, edited, monkeypatch):
    assert "[a] done in 0.0 s" in go(tmp_path)
    edited("core/method.py", "class Method:", "class Method:  # a comment")
    assert go(tmp_path) == ["[a] already done", "[b] already done", "[c] already done"] and RUNS == []
    edited("core/method.py", "version: ClassVar[int] = 1", "version: ClassVar[int] = 7")
    other = "made with other code: pretrain/core/method.py changed; going on with what is there"
    assert go(tmp_path) == [f"[{name}] {other} (--refresh {name} runs it again)" for name in "abc"] and RUNS == []
    closure._version.cache_clear()
    monkeypatch.setattr(closure.metadata, "version", lambda name: "9.9")
    closure._fingerprint.cache_clear()
    text = go(tmp_path)[0]
    closure._version.cache_clear()
    assert "core/method.py changed, PIL " in text and "→ 9.9" in text and "more; going on" in text


def test_a_stage_that_goes_on_with_other_code_says_so_then_and_later(tmp_path, edited):
    with pytest.raises(PretrainError, match="No space left"):
        go(tmp_path, value=-1)
    edited("core/method.py", "version: ClassVar[int] = 1", "version: ClassVar[int] = 7")
    assert reasons(tmp_path, value=-1)["a"] == (
        "interrupted at step 3: will resume; begun with other code: pretrain/core/method.py changed"
    )
    said = go(tmp_path, value=-1)
    assert said[1] == (
        "[a] begun with other code: pretrain/core/method.py changed; going on from there (--refresh a begins again)"
    )
    assert go(tmp_path, value=-1)[0].startswith("[a] made with other code: pretrain/core/method.py changed; going on")
    assert "made with other code" not in go(tmp_path, value=-1)[1]


def test_what_begins_again_forgets_the_code_that_began_it(tmp_path, edited):
    with pytest.raises(PretrainError, match="No space left"):
        go(tmp_path, value=-1)
    (folder,) = (path.parent for path in (tmp_path / "run").glob("*/half"))
    (folder / "half").unlink()
    assert reasons(tmp_path, value=-1)["a"] == "interrupted: begins again"
    edited("core/method.py", "version: ClassVar[int] = 1", "version: ClassVar[int] = 7")
    with pytest.raises(PretrainError, match="No space left"):
        go(tmp_path, value=-1)
    assert len(json.loads((folder / "code.json").read_text())) == 1


def test_damaged_or_missing_records_of_code_are_said(tmp_path):
    go(tmp_path)
    folder = tmp_path / "run" / "c"
    for text in ("[{", '[{"format": 99}]', "7"):
        (folder / "code.json").write_text(text)
        assert go(tmp_path)[2].startswith("[c] made with code that is not recorded; going on with what is there")
    (folder / "code.json").unlink()
    assert reasons(tmp_path)["c"].endswith("same address; made with code that is not recorded")


# Why


def test_each_reason_is_named(tmp_path, monkeypatch):
    assert reasons(tmp_path) == {name: "never run" for name in "abc"}
    go(tmp_path, options={"deep": [{"x": 1}]})
    assert all(
        text.startswith("finished on 2") and text.endswith(" UTC, same address")
        for text in reasons(tmp_path, options={"deep": [{"x": 1}]}).values()
    )
    found = reasons(tmp_path, value=4, options={"deep": [{"x": 2}]}, seed=3)
    folder = os.readlink(tmp_path / "run" / "a")
    assert found["a"].startswith(
        f"value changed from 0 to 4, options.deep.0.x changed from 1 to 2, seed changed from 0 to 3 (compared with {folder}, "
    )
    assert found["b"].startswith("its input `source` (a) changed (compared with fake-")
    assert found["c"].startswith("finished on")
    found = reasons(tmp_path, tool={"amount": 3}, options={"deep": [{"x": 1}], "y": None})
    added = "tool.method is new (test_identity), tool.amount is new (3), tool.inner is new (null), options.y is new (null) ("
    assert sorted(found["a"].partition(" (compared")[0].split(", ")) == sorted(added[:-2].split(", "))
    monkeypatch.setattr(Fake, "version", 2)
    assert reasons(tmp_path)["c"].startswith("stage fake: version 1 → 2 (compared with fake-")


def test_a_methods_new_version_and_a_changed_outside_are_named(tmp_path, monkeypatch):
    go(tmp_path, tool={"amount": 2})
    monkeypatch.setattr(Tool, "version", 5)
    assert reasons(tmp_path, tool={"amount": 2})["a"].startswith("method test_identity: version 1 → 5 (compared")
    monkeypatch.setattr(Fake, "outside", lambda self: ["other"])
    assert reasons(tmp_path)["c"].startswith("what it reads from outside changed (compared")


def test_the_newest_finished_folder_of_the_name_is_compared(tmp_path):
    go(tmp_path, value=1)
    go(tmp_path, value=2)
    for path in (tmp_path / "run").glob("fake-*/stage.json"):
        record = json.loads(path.read_text())
        record["finished"] = f"20{10 + record['config']['value']}-01-01T00:00:00+00:00"
        path.write_text(json.dumps(record))
    assert "value changed from 2 to 3 (" in reasons(tmp_path, value=3)["a"]
    assert "finished on 2012-01-01 00:00 UTC)" in reasons(tmp_path, value=3)["a"]


def test_the_command_prints_why_and_runs_nothing(tmp_path):
    from pretrain.cli import app

    (tmp_path / "r.json").write_text(json.dumps(raw()))
    command = ["run", str(tmp_path / "r.json"), "--output", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*command, "--dry-run", "--why"])
    assert result.exit_code == 0 and "a  runs  never run" in result.output and RUNS == []
    go(tmp_path)
    RUNS.clear()
    result = CliRunner().invoke(app, [*command, "--dry-run", "--why", "--refresh", "a"])
    assert "a  runs  asked by --refresh" in result.output and "c  done  finished on" in result.output and RUNS == []
    assert not (tmp_path / "run" / "generations.json").exists()
    assert isinstance(CliRunner().invoke(app, [*command, "--why"]).exception, PretrainError)
    with pytest.raises(PretrainError, match=r"--refresh 'aa' \(did you mean 'a'\?\); accepted: a, b, c"):
        reasons(tmp_path, refresh=["aa"])


# Refresh


def test_a_renamed_stage_is_not_run_again_refreshed_or_not(tmp_path):
    def renamed(refresh=()):
        RUNS.clear()
        text = json.loads(
            json.dumps(raw()).replace('"name": "a"', '"name": "z"').replace('"source": "a"', '"source": "z"')
        )
        engine.run(check(text, output=tmp_path / "run"), say=engine.silent, report=False, refresh=refresh)
        return (tmp_path / "run" / "z" / "out").read_text()

    go(tmp_path)
    first = (tmp_path / "run" / "a" / "out").read_text()
    assert renamed() == first and not RUNS
    go(tmp_path, refresh=["a"])
    (tmp_path / "run" / "a" / "out").write_text("refreshed")
    assert renamed() == "refreshed" and not RUNS
    assert renamed(refresh=["z"]) != "refreshed" and RUNS == ["z", "b"]
    assert renamed() != "refreshed" and not RUNS
    go(tmp_path)
    assert not RUNS and (tmp_path / "run" / "a" / "out").read_text() == (tmp_path / "run" / "z" / "out").read_text()


def ran(output: Path, *stages: dict[str, Any], refresh=(), store: Path | None = None) -> list[str]:
    """The stages that a run of these ran."""
    RUNS.clear()
    recipe = check({"name": "r", "stages": [{"stage": "fake"} | stage for stage in stages]}, output=output)
    engine.run(recipe, store=store, say=engine.silent, report=False, refresh=refresh)
    return list(RUNS)


def test_stages_that_say_the_same_are_one_whatever_their_names(tmp_path):
    """Neither a new name nor a stage that goes brings an older result back, or runs again what is finished."""
    a, twin, z = {"name": "a"}, {"name": "twin"}, {"name": "z"}
    b, of_twin, of_z = ({"name": f"of_{stage['name']}", "source": stage["name"]} for stage in (a, twin, z))
    run, out = tmp_path / "run", lambda name: (tmp_path / "run" / name / "out").read_text()
    assert ran(run, a, twin, b, of_twin) == ["a", "of_a"] and out("a") == out("twin") and out("of_a") == out("of_twin")
    for asked in ("twin", "a"):  # the first of the two runs, whichever is named
        assert ran(run, a, twin, b, of_twin, refresh=[asked]) == ["a", "of_a"]
        (run / "a" / "out").write_text(f"refreshed as {asked}")
        assert out("twin") == f"refreshed as {asked}"
    assert ran(run, twin, of_twin) == [] and out("twin") == "refreshed as a"
    assert ran(run, z, twin, of_z, of_twin) == [] and out("z") == out("twin") == "refreshed as a"
    assert ran(run, z, twin, of_z, of_twin, refresh=["z"]) == ["z", "of_z"]
    (run / "z" / "out").write_text("refreshed as z")
    assert ran(run, a, twin, b, of_twin) == [] and out("a") == out("twin") == "refreshed as z"
    assert ran(run, a, b) == [] and out("a") == "refreshed as z"


def test_an_interrupted_stage_goes_on_under_another_name(tmp_path):
    with pytest.raises(PretrainError, match="No space left"):
        ran(tmp_path / "run", {"name": "a", "value": -1})
    assert ran(tmp_path / "run", {"name": "z", "value": -1}) == ["z"]
    assert json.loads((tmp_path / "run" / "z" / "stage.json").read_text())["metrics"]["resumed"] == 1.0
    assert ran(tmp_path / "run", {"name": "a", "value": -1}) == []


def test_of_two_recipes_with_two_names_for_a_stage_the_second_waits_for_the_first(tmp_path, monkeypatch):
    begun, go_on, lines, run = threading.Event(), threading.Event(), [], Fake.run

    def slow(self, job):
        begun.set()
        assert go_on.wait(30)
        return run(self, job)

    def second():
        recipe = check({"name": "r", "stages": [{"stage": "fake", "name": "z"}]}, output=tmp_path / "two")
        say = lambda text: (lines.append(text), "waiting" in text and go_on.set())  # noqa: E731
        engine.run(recipe, store=tmp_path / "store", say=say, report=False)

    monkeypatch.setattr(Fake, "run", slow)
    first = threading.Thread(target=ran, args=(tmp_path / "one", {"name": "a"}), kwargs={"store": tmp_path / "store"})
    first.start()
    assert begun.wait(30)
    second()
    first.join()
    assert lines == ["[z] another run is at this stage: waiting for it", "[z] already done"] and RUNS == ["a"]


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_that_bears_the_stages_name_is_gone_on_with(tmp_path, finished):
    """As all folders did before they went by the kind of stage."""
    stage = {"name": "a", "value": 1 if finished else -1}
    try:
        ran(tmp_path / "run", stage)
    except PretrainError:
        assert not finished
    (folder,) = (path for path in (tmp_path / "run").glob("fake-*") if not path.is_symlink())
    folder.rename(folder.with_name(folder.name.replace("fake-", "a-")))
    assert ran(tmp_path / "run", stage) == ([] if finished else ["a"])
    assert json.loads((tmp_path / "run" / "a" / "stage.json").read_text())["metrics"]["resumed"] == float(not finished)
    assert ran(tmp_path / "run", stage) == [] and not folder.exists()


def test_a_refresh_runs_the_stage_and_what_depends_on_it_and_keeps_what_was(tmp_path):
    go(tmp_path)
    before = {name: os.readlink(tmp_path / "run" / name) for name in "abc"}
    go(tmp_path, refresh=["a"])
    assert RUNS == ["a", "b"]
    after = {name: os.readlink(tmp_path / "run" / name) for name in "abc"}
    assert after["a"] != before["a"] and after["b"] != before["b"] and after["c"] == before["c"]
    assert all((tmp_path / "run" / folder / "stage.json").exists() for folder in before.values())
    assert go(tmp_path) == ["[a] already done", "[b] already done", "[c] already done"]
    go(tmp_path, refresh=["a", "c"])
    assert RUNS == ["a", "b", "c"] and sorted(
        json.loads((tmp_path / "run" / "generations.json").read_text()).values()
    ) == [1, 2]


def test_an_interrupted_refresh_goes_on_as_one_and_serves_nothing_half_done(tmp_path, monkeypatch):
    go(tmp_path)
    before = os.readlink(tmp_path / "run" / "a")
    whole, run = Fake.run, Fake.run
    monkeypatch.setattr(Fake, "run", lambda self, job: run(self.model_copy(update={"value": -1}), job))
    with pytest.raises(PretrainError, match="No space left"):
        go(tmp_path, refresh=["a"])
    assert os.readlink(tmp_path / "run" / "a") == before  # the run shows what is whole
    assert reasons(tmp_path)["a"] == "interrupted at step 3: will resume; it is a refresh"
    assert reasons(tmp_path)["b"].startswith("its input `source` (a) changed")
    monkeypatch.setattr(Fake, "run", whole)
    assert "[a] done in 0.0 s" in go(tmp_path)
    assert RUNS == ["a", "b"] and os.readlink(tmp_path / "run" / "a") != before
    record = json.loads((tmp_path / "run" / "a" / "stage.json").read_text())
    assert record["metrics"]["resumed"] == 1 and record["identity"]["generation"] == 1


def test_a_refresh_of_what_is_interrupted_goes_on_unless_the_code_is_another(tmp_path, edited):
    with pytest.raises(PretrainError, match="No space left"):
        go(tmp_path, value=-1)
    assert reasons(tmp_path, refresh=["a"], value=-1)["a"] == "interrupted at step 3: will resume"
    edited("core/method.py", "version: ClassVar[int] = 1", "version: ClassVar[int] = 7")
    assert reasons(tmp_path, refresh=["a"], value=-1)["a"] == "asked by --refresh"
    with pytest.raises(PretrainError, match="No space left"):  # begins again, in a folder of its own
        go(tmp_path, refresh=["a"], value=-1)
    assert len(list((tmp_path / "run").glob("fake-*/half"))) == 2


def test_runs_that_share_a_store_follow_a_refresh(tmp_path):
    def share(output, **more):
        RUNS.clear()
        recipe = check(raw(), output=tmp_path / output)
        engine.run(recipe, store=tmp_path / "store", say=engine.silent, report=False, **more)
        return list(RUNS)

    assert share("one") == ["a", "b", "c"] and share("two") == []
    assert share("one", refresh=["a"]) == ["a", "b"] and share("two") == []
    assert os.readlink(tmp_path / "one" / "a") == os.readlink(tmp_path / "two" / "a")
    (tmp_path / "store" / "generations.json").write_text('{"a": "x"}')
    with pytest.raises(PretrainError, match=r"generations.json: accepted: a mapping"):
        share("two")


# What was made before


def older(folder: Path) -> None:
    """Make a run look as it did when addresses were of code: other names, digests of methods, no fingerprints."""
    run = json.loads((folder / "run.json").read_text())
    for entry in run["stages"]:
        home = folder / entry["folder"]
        record = json.loads((home / "stage.json").read_text())
        record["methods"] = {name: "0123456789abcdef" for name in record["methods"]}
        record["address"] = entry["address"] = "f" * 12 + record["address"][12:]
        del record["identity"]
        (home / "code.json").unlink()
        (home / "stage.json").write_text(json.dumps(record))
        entry["folder"] = f"{entry['name']}-{'f' * 12}"
        home.rename(folder / entry["folder"])
        (folder / entry["name"]).unlink()
        (folder / entry["name"]).symlink_to(entry["folder"])
    (folder / "run.json").write_text(json.dumps(run))


SMALL = {
    "stages": [
        {"stage": "data", "name": "corpus", "sources": [], "validation": 0.1, "test": 0.1},
        {"stage": "tokenizer", "corpus": "corpus", "vocab_size": 300},
        {
            "stage": "train", "name": "model", "corpus": "corpus", "tokenizer": "tokenizer", "length": 32, "batch_rows": 2,
            "model": {"family": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
            "budget": {"steps": 3}, "save_every": 0,
        },
        {"stage": "evaluate", "checkpoint": "model", "corpus": "corpus", "max_documents": 4, "compressors": False},
    ]
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, stories):
    """A finished small run and its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text").mkdir()
    for number, story in enumerate(stories[:40]):
        (folder / "text" / f"{number}.py").write_text(story["text"])
    recipe = json.loads(json.dumps(SMALL))
    recipe["stages"][0]["sources"] = [{"files": str(folder / "text")}]
    (folder / "small.yaml").write_text(json.dumps(recipe))
    engine.run(load(folder / "small.yaml", output=folder / "run"), say=engine.silent)
    return folder


def test_a_run_of_an_earlier_version_still_opens_and_why_says_so(tmp_path, finished):
    from pretrain.cli import app
    from pretrain.report.page import collect

    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    older(tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    invoke = lambda *words: CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)  # noqa: E731
    assert invoke("report", tmp_path / "run").exit_code == 0 and (tmp_path / "run" / "report.html").exists()
    assert collect(tmp_path / "run")["stages"][2]["methods"].keys() == {"adamw", "causal_lm", "cosine"}
    model = tmp_path / "run" / "model"
    result = invoke("generate", model, "--prompt", "def ", "--max-new-tokens", 3)
    assert result.exit_code == 0 and result.output.startswith("def ")
    data = ("--data", tmp_path / "run" / "corpus", "--max-documents", 2)
    assert json.loads(invoke("evaluate", model, *data, "--json").stdout)["metrics"]["loss"] > 0
    planned = identity.plan(load(finished / "small.yaml", output=tmp_path / "run"))
    assert all(
        identity.why(item).startswith("made by an earlier version: address differs (compared with ") for item in planned
    )


# Adopting


def recipe_at(finished, output):
    return load(finished / "small.yaml", output=output)


@pytest.mark.parametrize("link", [False, True])
def test_an_adopted_checkpoint_is_run_on_and_says_where_it_is_from(tmp_path, finished, tiny, link):
    from pretrain.core import checkpoint

    given = finished / "run" / "model" / "checkpoint"
    source = tmp_path / "given"  # as from elsewhere: no pretrain.json, other files beside
    shutil.copytree(given, source, ignore=shutil.ignore_patterns("pretrain.json", "checksums.json"))
    for name in ("modeling_x.py", "pytorch_model.bin", ".git/config", "notes/more.txt"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("x")
    folder = adopt(recipe_at(finished, tmp_path / "run"), "model", source, link=link)
    made = folder / "checkpoint"
    names = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    assert names == {path.name for path in given.iterdir()} | {"notes/more.txt"}
    assert (made / "model.safetensors").is_symlink() == link and not (made / "pretrain.json").is_symlink()
    result = engine.run(recipe_at(finished, tmp_path / "run"), say=(said := []).append)
    assert "[model] already done" in said and "[evaluate] evaluate" in said
    assert result.stages["model"]["adopted"]["source"] == str(source) and result.report.exists()
    before = json.loads((finished / "run" / "evaluate" / "stage.json").read_text())["metrics"]["loss"]
    # Near, not equal: the length that it was trained at is not known, so that windows are others.
    assert result.stages["evaluate"]["metrics"]["loss"] == pytest.approx(before, rel=0.01)
    lineage = checkpoint.lineage(made)
    assert lineage["made_by"]["adopted"]["linked"] == link and lineage["made_by"]["name"] == "model"
    assert not (source / "pretrain.json").exists()
    (item,) = [i for i in identity.plan(recipe_at(finished, tmp_path / "run")) if i.stage.name == "model"]
    assert identity.why(item).startswith(f"adopted from {source} on 2") and identity.why(item).endswith("same address")
    if link:
        model, tokenizer = checkpoint.load(source)
        model.get_input_embeddings().weight.data += 1
        checkpoint.save(model, tokenizer, source)
        with pytest.raises(PretrainError, match="its checksum is not the one in checksums.json"):
            checkpoint.load(made)
        assert "where its files are linked from, has changed since" in identity.why(item)
    else:
        shutil.rmtree(source)
        assert checkpoint.load(made)[1] is not None


def test_an_adopted_corpus_and_tokenizer_are_trained_on(tmp_path, finished):
    recipe = recipe_at(finished, tmp_path / "run")
    adopt(recipe, "corpus", finished / "run" / "corpus")
    adopt(recipe, "tokenizer", finished / "run" / "tokenizer" / "tokenizer")
    result = engine.run(recipe, say=(said := []).append, report=False)
    said = [line for line in said if not line.startswith("warning")]
    assert said[:2] == ["[corpus] already done", "[tokenizer] already done"] and "[model] train" in said
    before = json.loads((finished / "run" / "evaluate" / "stage.json").read_text())
    assert result.stages["evaluate"]["metrics"]["loss"] == pytest.approx(before["metrics"]["loss"])
    assert result.stages["corpus"]["metrics"]["documents/train"] > 0
    lineage = json.loads((tmp_path / "run" / "model" / "checkpoint" / "pretrain.json").read_text())["lineage"]
    assert [bool(stage.get("adopted")) for stage in lineage["stages"]] == [True, True]


def test_what_was_made_before_an_adoption_is_kept_and_what_came_of_it_is_not_served(tmp_path, finished):
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    recipe = recipe_at(finished, tmp_path / "run")
    before = os.readlink(tmp_path / "run" / "model")
    adopt(recipe, "model", finished / "run" / "model")
    engine.run(recipe, say=(said := []).append, report=False)
    assert "[model] already done" in said and "[evaluate] evaluate" in said
    assert os.readlink(tmp_path / "run" / "model") != before and (tmp_path / "run" / before / "stage.json").exists()


def test_a_refreshed_stage_and_what_follows_it_take_no_tokens_made_before(tmp_path, finished, monkeypatch):
    """Tokens lie beside the stages and are shared by them: the text is the same, the code that cuts it is not."""
    from pretrain.corpus import shards

    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    tokens = lambda: sorted(path.parent for path in (tmp_path / "run" / ".tokens").glob("*/train/tokens.json"))  # noqa: E731
    before, written = tokens(), []
    really = shards._write
    monkeypatch.setattr(
        shards, "_write", lambda work, corpus, split, *more: written.append(split) or really(work, corpus, split, *more)
    )
    recipe = recipe_at(finished, tmp_path / "run")
    engine.run(recipe, say=engine.silent, report=False)
    assert written == [] and tokens() == before
    engine.run(recipe, say=engine.silent, report=False, refresh=["corpus"])
    assert "train" in written and len(tokens()) == len(before) + 1
    written.clear()
    engine.run(recipe, say=engine.silent, report=False, refresh=["model"])
    assert "train" in written and len(tokens()) == len(before) + 2
    written.clear()
    engine.run(recipe, say=engine.silent, report=False)
    engine.run(recipe, say=engine.silent, report=False, refresh=["evaluate"])
    assert written == []


def test_of_two_adoptions_the_second_is_measured(tmp_path, finished):
    from pretrain.core import checkpoint

    recipe = recipe_at(finished, tmp_path / "run")
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    losses = []
    for scale in (1.0, 0.5):
        model, tokenizer = checkpoint.load(finished / "run" / "model" / "checkpoint")
        model.get_output_embeddings().weight.data *= scale
        checkpoint.save(model, tokenizer, tmp_path / f"given-{scale}")
        folder = adopt(recipe, "model", tmp_path / f"given-{scale}")
        result = engine.run(recipe, say=(lines := []).append, report=False)
        assert "[model] already done" in lines and "[evaluate] evaluate" in lines
        assert result.stages["model"]["adopted"]["source"] == str(tmp_path / f"given-{scale}")
        losses.append(result.stages["evaluate"]["metrics"]["loss"])
        shutil.rmtree(folder)
    expected = json.loads((finished / "run" / "evaluate" / "stage.json").read_text())["metrics"]["loss"]
    assert losses[0] == pytest.approx(expected, rel=0.01) and abs(losses[1] - losses[0]) > 1e-4


def spoil(finished, tmp_path, name, file, text):
    shutil.copytree(finished / "run" / name, tmp_path / "bad", symlinks=False)
    (tmp_path / "bad" / file).write_bytes(text)
    for sums in (tmp_path / "bad").rglob("checksums.json"):
        sums.unlink()
    return tmp_path / "bad"


@pytest.mark.parametrize(
    "stage, file, text, said",
    [
        ("model", "checkpoint/model.safetensors", b"\x10", "truncated or damaged"),
        ("model", "checkpoint/config.json", b"{", "not valid JSON"),
        ("model", "checkpoint/config.json", b'{"model_type": "nix"}', "model_type 'nix'.*accepted"),
        ("tokenizer", "tokenizer/tokenizer.json", b"{", "no tokenizer can be loaded"),
        ("corpus", "corpus/corpus.json", b"{}", "documents.train None: accepted: a whole number"),
        ("corpus", "corpus/train/part-00000.parquet", b"PAR1", "not a whole Parquet file"),
    ],
)
def test_a_folder_that_could_not_be_opened_is_refused_and_leaves_nothing(tmp_path, finished, stage, file, text, said):
    bad = spoil(finished, tmp_path, stage, file, text)
    with pytest.raises(PretrainError, match=said) as error:
        adopt(recipe_at(finished, tmp_path / "run"), stage, bad)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run").glob("*/stage.json")) and not list((tmp_path / "run").glob("*/*/*"))


def test_a_corpus_with_fewer_documents_than_it_says_is_refused(tmp_path, finished):
    bad = spoil(finished, tmp_path, "corpus", "note", b"")
    next((bad / "corpus" / "train").glob("*.parquet")).unlink()
    with pytest.raises(PretrainError, match=r"train: 0 documents; accepted: \d+ by corpus.json"):
        adopt(recipe_at(finished, tmp_path / "run"), "corpus", bad)


def test_the_wrong_stage_or_folder_is_named(tmp_path, finished):
    from pretrain.cli import app

    recipe = recipe_at(finished, tmp_path / "run")
    with pytest.raises(
        PretrainError, match=r"no stage 'mode' \(did you mean 'model'\?\); accepted: corpus, tokenizer, model"
    ):
        adopt(recipe, "mode", tmp_path)
    with pytest.raises(
        PretrainError, match="'evaluate' is of kind evaluate, which leaves nothing for others; accepted"
    ):
        adopt(recipe, "evaluate", tmp_path)
    with pytest.raises(PretrainError, match="nowhere is no folder; accepted: a checkpoint made elsewhere"):
        adopt(recipe, "model", tmp_path / "nowhere")
    for name, what in (("model", "no checkpoint at"), ("corpus", "is not a corpus"), ("tokenizer", "is no tokenizer")):
        with pytest.raises(PretrainError, match=what):
            adopt(recipe, name, finished / "text")
    command = ["adopt", str(finished / "small.yaml"), "tokenizer", str(finished / "run" / "tokenizer"), "--link"]
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "run")])
    assert result.exit_code == 0 and result.output.startswith("[tokenizer] tokenizer linked from ")


# For real: the package, copied and edited


def test_a_comment_retrains_nothing_and_other_arithmetic_never_passes_in_silence(tmp_path, finished):
    shutil.copytree(PACKAGE, tmp_path / "pretrain", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    loop = tmp_path / "pretrain" / "training" / "loop.py"
    helper = tmp_path / "pretrain" / "objectives" / "language" / "_masking.py"
    command = [sys.executable, "-m", "pretrain", "run", str(finished / "small.yaml"), "--output", str(tmp_path / "run")]

    def run(*more):
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [*command, *more], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        )
        return [line for line in done.stderr.splitlines() if line.startswith("[")]

    helper.write_text(helper.read_text() + "\nUNUSED = 1\n")
    text = loop.read_text()
    loop.write_text(text.replace("def train(", "# A comment.\ndef train(", 1).replace('"""', '"""\nMore words. ', 1))
    before = os.readlink(tmp_path / "run" / "model")
    assert run() == [f"[{name}] already done" for name in ("corpus", "tokenizer", "model", "evaluate")]
    assert "settings.clip" in text
    loop.write_text(text.replace("settings.clip", "0.5 * settings.clip"))
    other = "[model] made with other code: pretrain/training/loop.py changed; going on with what is there (--refresh model runs it again)"
    assert run() == ["[corpus] already done", "[tokenizer] already done", other, "[evaluate] already done"]
    assert os.readlink(tmp_path / "run" / "model") == before
    said = run("--refresh", "model")
    assert (
        said[:3] == ["[corpus] already done", "[tokenizer] already done", "[model] train"]
        and "[evaluate] evaluate" in said
    )
    assert os.readlink(tmp_path / "run" / "model") != before

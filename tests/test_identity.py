"""Identity of a stage: what its address is made of, drift of its code, why it runs."""

from __future__ import annotations

import json
import os
import re

import pytest
from identity_cases import RUNS, Fake, Tool, go, raw, reasons
from typer.testing import CliRunner

from pretrain import closure, engine, identity
from pretrain.cli import app
from pretrain.core.errors import PretrainError
from pretrain.recipe import check, load

pytestmark = pytest.mark.usefixtures("fake_stages")


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
    edited("core/method.py", "class Method(metaclass=Fielded):", "class Method(metaclass=Fielded):  # a comment")
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
    added = "tool.method is new (identity_cases), tool.amount is new (3), tool.inner is new (null), options.y is new (null) ("
    assert sorted(found["a"].partition(" (compared")[0].split(", ")) == sorted(added[:-2].split(", "))
    monkeypatch.setattr(Fake, "version", 2)
    assert reasons(tmp_path)["c"].startswith("stage fake: version 1 → 2 (compared with fake-")


def test_a_methods_new_version_and_a_changed_outside_are_named(tmp_path, monkeypatch):
    go(tmp_path, tool={"amount": 2})
    monkeypatch.setattr(Tool, "version", 5)
    assert reasons(tmp_path, tool={"amount": 2})["a"].startswith("method identity_cases: version 1 → 5 (compared")
    monkeypatch.setattr(Fake, "outside", lambda self: ["other"])
    assert reasons(tmp_path)["c"].startswith("what it reads from outside changed (compared")


def test_the_newest_finished_folder_of_the_name_is_compared(tmp_path):
    go(tmp_path, value=1)
    go(tmp_path, value=2)
    for path in (tmp_path / "run").glob("fake-*/stage.json"):
        record = json.loads(path.read_text())
        del record["seal"]
        record["finished"] = f"20{10 + record['config']['value']}-01-01T00:00:00+00:00"
        path.write_text(json.dumps(record))
    assert "value changed from 2 to 3 (" in reasons(tmp_path, value=3)["a"]
    assert "finished on 2012-01-01 00:00 UTC)" in reasons(tmp_path, value=3)["a"]


def test_the_command_prints_why_and_runs_nothing(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(raw()))
    command = ["run", str(tmp_path / "r.json"), "--output", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*command, "--dry-run", "--why"])
    assert result.exit_code == 0 and "a  to run    never run" in result.output and RUNS == []
    go(tmp_path)
    RUNS.clear()
    result = CliRunner().invoke(app, [*command, "--dry-run", "--why", "--refresh", "a"])
    assert (
        "a  to run    asked by --refresh" in result.output
        and "c  finished  finished on" in result.output
        and RUNS == []
    )
    assert not (tmp_path / "run" / "generations.json").exists()
    assert isinstance(CliRunner().invoke(app, [*command, "--why"]).exception, PretrainError)
    with pytest.raises(PretrainError, match=r"--refresh 'aa' \(did you mean 'a'\?\); accepted: a, b, c"):
        reasons(tmp_path, refresh=["aa"])


@pytest.mark.parametrize("shared", [False, True], ids=["of this run", "of one with the same store"])
def test_a_stage_that_another_process_is_at_is_said_to_be_running(tmp_path, monkeypatch, shared):
    (tmp_path / "r.yaml").write_text(json.dumps(raw()))
    store = ["--store", str(tmp_path / "store")] if shared else []
    outputs, folders, really = [], [tmp_path / "run", tmp_path / ("other" if shared else "run")], Fake.run

    def watched(self, job):
        if job.name == "b":
            command = ["run", str(tmp_path / "r.yaml"), "--output", str(folders[1]), *store, "--dry-run", "--why"]
            outputs.append(CliRunner().invoke(app, command, catch_exceptions=False).output)
        return really(self, job)

    monkeypatch.setattr(Fake, "run", watched)
    recipe = load(tmp_path / "r.yaml", (), folders[0])
    engine.run(recipe, store=tmp_path / "store" if shared else None, say=engine.silent, report=False)
    (output,) = outputs
    why, table = output.split("about", 1)
    assert "finished" in why.splitlines()[0] and "never run" in why.splitlines()[2]
    assert re.search(r"^b +running +running now: it is in use by another run$", why, re.M) and "interrupted" not in why
    assert re.search(r"^ *b +fake +running ", table, re.M)
    assert (f"note: {folders[1]} is in use by another run" in " ".join(output.split())) is not shared

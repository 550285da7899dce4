"""Refreshing: a stage and what depends on it runs again, and what was is kept."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from identity_cases import RUNS, Fake, go, raw, reasons

from pretrain import engine
from pretrain.core.errors import PretrainError
from pretrain.recipe import check

pytestmark = pytest.mark.usefixtures("fake_stages")


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
    counts = json.loads((tmp_path / "run" / "generations.json").read_text())
    assert RUNS == ["a", "b", "c"] and sorted(n for name, n in counts.items() if name != "seal") == [1, 2]


@pytest.mark.promise("Faults", "A note of refreshes that is damaged is an error, and is not passed over.")
def test_results_of_before_a_refresh_never_come_back_because_its_note_is_damaged(tmp_path):
    go(tmp_path)
    go(tmp_path, refresh=["a"])
    path, shown = tmp_path / "run" / "generations.json", os.readlink(tmp_path / "run" / "a")
    whole = path.read_text()
    for text in (whole.replace(": 1", ": 0"), whole.replace(": 1", ": 3"), whole.replace("fake-", "fbke-"), ""):
        path.write_text(text)
        with pytest.raises(PretrainError, match=r"generations.json"):
            go(tmp_path)
    assert not RUNS and os.readlink(tmp_path / "run" / "a") == shown


@pytest.mark.promise("Faults", "Where a note of refreshes is lost, or an older one, that is an error as well.")
def test_results_of_before_a_refresh_never_come_back_because_its_note_is_lost(tmp_path):
    go(tmp_path)
    go(tmp_path, refresh=["a"])
    path = tmp_path / "run" / "generations.json"
    first = path.read_text()
    go(tmp_path, refresh=["a"])
    for lose in (lambda: path.write_text(first), path.unlink):
        lose()
        RUNS.clear()
        with pytest.raises(PretrainError, match=r"generations.json is lost or of before: .* a later refresh of 'a'"):
            go(tmp_path)
    assert not RUNS
    go(tmp_path, refresh=["a"])
    assert RUNS == ["a", "b"] and go(tmp_path) == ["[a] already done", "[b] already done", "[c] already done"]


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

"""Runs as things: a path of a recipe means the result that it is said to mean, and only what none needs is removed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
from processor import libraries
from test_quick import command
from typer.testing import CliRunner

import pretrain.stages
from pretrain import engine, identity
from pretrain.core.errors import PretrainError
from pretrain.core.files import locked, read_json, read_sealed, write_json
from pretrain.core.folders import corpus_at, newest_checkpoint, place_of, run_of
from pretrain.core.method import Ref
from pretrain.recipe import check
from pretrain.runs import shelf
from pretrain.runs.command import _few, app
from pretrain.runs.comparison import THEIRS, _measured_on
from pretrain.runs.shelf import Run
from pretrain.runs.targets import made, repointed
from pretrain.stages import Job, Stage


class Fake(Stage):
    stage: Literal["fake"] = "fake"
    accepts: ClassVar[dict[str, tuple[str, ...]]] = Stage.accepts | {"init": ("fake",)}
    writes: ClassVar[str] = "checkpoint"
    init: Ref | None = None
    value: int = 0

    def run(self, job: Job) -> dict[str, Any]:
        before = int((job.inputs["init"] / "out").read_text()) if self.init else 0
        (job.folder / "checkpoint").mkdir()
        (job.folder / "checkpoint" / "config.json").write_text("{}")
        (job.folder / "out").write_text(str(self.value + before))
        return {"metrics": {"value": self.value + before}, "flops": 7}


@pytest.fixture(autouse=True)
def fake_stages(monkeypatch, tmp_path):
    known = pretrain.stages.stage_classes() | {"fake": Fake}
    monkeypatch.setattr("pretrain.recipe.stage_classes", lambda: known)
    monkeypatch.chdir(tmp_path)


def recipe(name, **stages):
    return check({"name": name, "stages": [{"stage": "fake", "name": n} | fields for n, fields in stages.items()]})


def run(name, store=None, say=lambda text: None, **stages):
    engine.run(recipe(name, **stages), store=store, report=False, say=say)
    return Path("runs") / name


def invoke(*words):
    return CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False).output


def out(path):
    return int((place_of(path) / "out").read_text())


def stable(path):
    return f"{path}@{os.readlink(path).rpartition('-')[2]}"


@pytest.mark.promise("What others have written", "Runs are looked for in at most 5,000 folders that are none.")
def test_a_tree_of_folders_that_are_no_runs_is_refused(tmp_path, monkeypatch):
    for number in range(30):
        (tmp_path / "many" / str(number)).mkdir(parents=True)
    assert shelf.find_runs(tmp_path) == []
    monkeypatch.setattr(shelf, "FOLDERS", 20)
    said = CliRunner().invoke(app, ["list", str(tmp_path)])
    assert isinstance(said.exception, PretrainError)
    assert "holds more than 20 folders that are no runs; accepted: a folder of runs" in str(said.exception)


def test_a_result_has_a_name_that_no_later_run_changes(tmp_path):
    base = run("base", model={"value": 1})
    first = stable(base / "model")
    said = []
    run("base", say=said.append, model={"value": 2})
    second = stable(base / "model")
    assert any("shows fake-" in line and "is kept" in line for line in said)
    assert out(base / "model") == 2 and out(first) == 1 and out(second) == 2
    assert out(first[: first.index("@") + 7]) == 1  # the beginning of an address is enough
    run("next", tuned={"init": first, "value": 10})
    assert out("runs/next/tuned") == 11
    assert newest_checkpoint(first) == place_of(first) / "checkpoint"
    assert newest_checkpoint(first + "/checkpoint") == place_of(first) / "checkpoint"
    assert made(base) == [f"model: {second}"]
    folder = place_of(base / "model")
    (folder / "export").mkdir()  # as a stage leaves that exports
    assert made(base) == [f"model: {second}", f"export: {second}"]
    (folder / "export").rmdir()
    with pytest.raises(PretrainError, match=r"model@0123: no such result; accepted: model@\w{12}, model@\w{12}$"):
        place_of(base / "model@0123")
    with pytest.raises(PretrainError, match="recipe: tuned.init: .*model@0123: no such result"):
        recipe("next", tuned={"init": "runs/base/model@0123"})


def test_an_address_that_two_results_begin_with_is_refused(tmp_path):
    base = run("base", model={"value": 1})
    twin = base / f"fake-{os.readlink(base / 'model').rpartition('-')[2][:6]}000000"
    (base / os.readlink(base / "model")).rename(base / (twin.name[:-6] + "abcdef"))
    twin.mkdir()
    (twin / "stage.json").write_text('{"name": "model"}')
    with pytest.raises(PretrainError, match="2 results begin so; accepted: model@"):
        place_of(base / f"model@{twin.name[5:9]}")


def test_in_a_store_the_names_are_the_same(tmp_path):
    one = run("one", store="store", model={"value": 1})
    first = stable(one / "model")
    run("one", store="store", model={"value": 2})
    assert out(first) == 1 and place_of(first).parent.name == "store"


def test_a_file_of_such_a_name_is_the_file(tmp_path):
    run("base", model={"value": 1})
    Path("runs/base/model@home").mkdir()
    assert place_of("runs/base/model@home") == Path("runs/base/model@home")
    assert place_of("elsewhere/a@b") == Path("elsewhere/a@b")


def test_a_path_that_leads_elsewhere_is_told_before_anything_runs():
    base = run("base", model={"value": 1})
    first = stable(base / "model")
    run("next", tuned={"init": "runs/base/model"})
    said = []
    run("next", say=said.append, tuned={"init": "runs/base/model"})
    assert not any("warning" in line for line in said)
    run("base", model={"value": 2})
    (item,) = engine.plan(recipe("next", tuned={"init": "runs/base/model"}))
    (line,) = repointed(item)
    assert line.startswith("warning: init runs/base/model leads to fake-") and "(value changed from 1 to 2)" in line
    assert line.endswith(f"{first} is the earlier one")
    run("next", say=said.append, tuned={"init": "runs/base/model"})
    assert [text for text in said if "warning" in text or text.endswith("] fake")] == [
        f"[tuned] {line}",
        "[tuned] fake",
    ]
    run("base", model={"value": 1})  # back again: what is finished is used, and that is told as well
    (item,) = engine.plan(recipe("next", tuned={"init": "runs/base/model"}))
    assert item.finished and len(repointed(item)) == 1


def test_at_first_use_a_path_with_a_choice_of_results_is_told():
    run("base", model={"value": 1})
    one, other = recipe("next", tuned={"init": "runs/base/model"}), {"init": stable(Path("runs/base/model"))}
    assert repointed(engine.plan(one)[0]) == []  # there is no choice
    run("base", model={"value": 2})
    (line,) = repointed(engine.plan(one)[0])
    assert "one of 2 results of its name" in line and "(value changed from 1 to 2)" in line
    assert repointed(engine.plan(recipe("next", tuned=other))[0]) == []  # which says what it means


def test_a_link_that_moves_while_a_run_is_at_work_changes_nothing():
    base = run("base", model={"value": 1})
    (item,) = engine.plan(recipe("next", tuned={"init": "runs/base/model"}))
    run("base", model={"value": 2})
    assert (item.inputs["init"] / "out").read_text() == "1" and item.inputs["init"].parent == base


def test_of_a_run_with_several_corpora_that_of_the_checkpoint_is_taken(tmp_path):
    names = ("corpus", "model", "texts")
    shown = [{"name": name, "stage": "data", "folder": name, "address": name} for name in names]
    for place, value in {
        "run.json": {"stages": shown}, "corpus/corpus/corpus.json": {}, "texts/corpus/corpus.json": {},
        "model/stage.json": {"inputs": {"corpus": "corpus"}},
    }.items():  # fmt: skip
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(json.dumps(value))
    assert corpus_at(tmp_path, tmp_path / "model" / "checkpoint") == tmp_path / "corpus" / "corpus"
    assert corpus_at(tmp_path) == corpus_at(tmp_path, tmp_path / "none" / "checkpoint") == tmp_path / "texts" / "corpus"


def test_what_was_printed_of_a_run_is_taken_for_it():
    base = run("base", model={"value": 1})
    for place in (base, base / "report.html", base / "model", place_of(base / "model"), base / "model" / "checkpoint"):
        assert run_of(place) == base
    assert newest_checkpoint(base / "report.html") == newest_checkpoint(base)
    assert corpus_at(base) is None and corpus_at("no/*.txt") is None
    with pytest.raises(PretrainError, match="elsewhere does not exist; accepted: the folder that"):
        run_of("elsewhere")


def test_a_run_in_place_of_one_of_its_stages_is_refused_with_their_names():
    run("base", model={"value": 1}, other={"value": 2})
    with pytest.raises(PretrainError, match=r"'runs/base' is a run; .* stages \(runs/base/model, runs/base/other\)$"):
        recipe("next", tuned={"init": "runs/base"})


def test_a_checkpoint_that_a_later_stage_is_still_to_write_is_said_to_be_missing():
    base = run("base", model={"value": 1})
    record = read_sealed(base / "run.json")
    for kind, expected in {"evaluate": [], "train": [f"{base}: 'later' is not finished; the newest checkpoint is "
                                                     "that of 'model'"]}.items():  # fmt: skip
        write_json(base / "run.json", record | {"stages": [*record["stages"], {"name": "later", "stage": kind}]})
        with warnings.catch_warnings(record=True) as caught:
            assert newest_checkpoint(base).parent.samefile(base / "model")
        assert [str(each.message) for each in caught] == expected


def test_the_list_counts_stages_sizes_and_what_runs():
    base = run("base", model={"value": 1})
    (base / "model" / "weights").write_bytes(b"x" * 3_000_000)
    os.link(base / "model" / "weights", base / "model" / "again")
    line = next(line for line in invoke("list").splitlines() if line.startswith("runs/base"))
    assert "finished" in line and "1 of 1" in line and "value 1" in line
    assert 3.0 <= float(re.search(r"([\d.]+) MB", line)[1]) < 3.1  # what a disk keeps, and what is linked once
    with locked(base / ".lock"):
        assert "running" in invoke("list")
    assert "interrupted" not in invoke("list")
    (place_of(base / "model") / "stage.json").unlink()
    assert "interrupted  0 of 1" in invoke("list")


def test_a_run_shows_names_that_stay_and_what_else_it_has():
    base = run("base", model={"value": 1})
    first = stable(base / "model")
    run("base", model={"value": 2})
    shown = invoke("show", base / "report.html")
    assert stable(base / "model") in shown and f"{first}" in shown.partition("beside these")[2]
    assert "value changed from 1 to 2" in shown.partition("beside these")[2]
    (place_of(base / "model") / "stage.json").unlink()  # as while it is made
    others = invoke("show", base / "report.html").partition("beside these")[2]
    assert "with other settings than those of now, which are not finished" in others


def test_runs_are_compared_in_what_was_said_and_what_came_of_it():
    for name, value in (("a", 1), ("b", 2)):
        run(name, model={"value": value}, same={"value": 5})
    rows = {line.split()[0]: line.split()[1:] for line in invoke("compare", "runs/a", "runs/b").splitlines() if line}
    assert rows["model.value"] == ["1", "2"] and "same.value" not in rows
    lines = invoke("compare", "runs/a", "runs/b").splitlines()
    assert lines[0].split() == ["runs/a", "runs/b", "difference"]
    assert next(line for line in lines if line.startswith("model: value")).split()[2:] == ["1", "2", "+1,", "+100.0%"]
    assert next(line for line in lines if line.startswith("same: value")).split()[4:] == ["the", "same"]
    assert next(line for line in lines if line.startswith("status")).split() == ["status", "finished", "finished"]
    write_json(place_of("runs/b/model") / "evaluation.json", {"intervals": {"value": [1.5, 2.25]}})
    lines = invoke("compare", "runs/a", "runs/b").splitlines()
    below = lines[next(n for n, line in enumerate(lines) if line.startswith("model: value")) + 1]
    assert below.split() == ["95%", "interval", "1.5", "to", "2.25"] and below.index("1.5") == lines[0].index("runs/b")
    for name, texts in (("a", "xyz"), ("b", "xy")):
        write_json(
            place_of(f"runs/{name}/model") / "documents.json", {"held_out": [{"digest": text} for text in texts]}
        )
    shown = invoke("compare", "runs/a", "runs/b")
    assert re.search(r"model: measured on +3 documents +2 documents +other documents: the difference is theirs", shown)
    write_json(place_of("runs/b/model") / "documents.json", {"held_out": [{"digest": text} for text in "zyx"]})
    assert "measured on" not in invoke("compare", "runs/a", "runs/b")
    with pytest.raises(PretrainError, match=r"runs/a/model@\w+ and runs/a are of the same run"):
        invoke("compare", stable(Path("runs/a/model")), "runs/a")
    three = invoke("compare", "runs/a", "runs/b", "runs/a")
    assert "2 (+1, +100.0%)" in three and "1 (the same)" in three


def test_a_run_that_has_not_come_to_its_evaluation_is_said_to_be_so():
    for name, value in (("a", 1), ("b", 2)):
        run(name, model={"value": value})
    row = read_sealed(Path("runs/b/run.json"))
    row["stages"].append({"name": "judged", "stage": "evaluate", "folder": "evaluate-012345678901", "address": "01"})
    Path("runs/b/run.json").write_text(json.dumps(row))
    assert "interrupted: judged to run; did not finish its own evaluation yet" in invoke("compare", "runs/a", "runs/b")


def test_recipes_that_have_been_run_and_comparisons_are_compared_too():
    for name, value in (("a", 1), ("b", 2)):
        stages = [{"stage": "fake", "name": "model", "value": value}]
        Path(f"{name}.yaml").write_text(json.dumps({"name": name, "stages": stages}))
    run("a", model={"value": 1})
    with pytest.raises(PretrainError, match=r"b.yaml has not been run in runs/b"):
        invoke("compare", "a.yaml", "b.yaml")
    run("b", model={"value": 2})
    assert invoke("compare", "a.yaml", "b.yaml") == invoke("compare", "runs/a", "runs/b")
    verdict = {"word": "better", "difference": -0.5}
    table = {"one": {"mean": 2.0, "deviation": 0.1}, "two": {"mean": 1.5, "deviation": 0.1, "verdict": verdict}}
    written = {"metric": "loss", "flops": 1e9, "table": table, "runs": {"one": [{}, {}], "two": [{}, {}]}}
    for name in ("first", "second"):
        Path(name).mkdir()
        Path(name, "comparison.json").write_text(json.dumps(written))
    shown = invoke("compare", "first", "second")
    assert shown.count("better (-0.5000)") == 2 and shown.count("baseline") == 2 and "2.0000 ± 0.1000" in shown
    with pytest.raises(PretrainError, match="accepted: runs alone, or comparisons alone"):
        invoke("compare", "first", "runs/a")


def test_one_run_is_not_called_runs():
    run("a", model={"value": 1})
    assert "\n1 run, " in invoke("list")
    with pytest.raises(PretrainError, match="1 run given"):
        invoke("compare", "runs/a")


def gone(base):
    """What a cleaning would take, by what each result has put out."""
    going, _, _ = shelf.unused(base, [Path("runs")])
    return {int((folder / "out").read_text()) for folder in going}


def test_only_what_no_run_needs_is_removed():
    base = run("base", model={"value": 1})
    first = stable(base / "model")
    for value in (2, 3, 4, 5):
        run("base", model={"value": value})
    assert gone(base) == {1, 2, 3, 4}
    run("next", tuned={"init": first})
    assert gone(base) == {2, 3, 4}  # another run was made of it
    names = {int((path / "out").read_text()): path for path in shelf.stored(base)}
    Path("mine.yaml").write_text(f"# {base}/model@{names[2].name[5:10]}\n")
    assert gone(base) == {3, 4}  # a recipe that has not run names it
    with locked(names[3] / ".lock"):
        assert gone(base) == {4}  # a process is at it
    listed = invoke("clean", base)
    assert "mine.yaml names it" in listed and "next/tuned is made of it" in listed and "without --yes" in listed
    assert gone(base) == {3, 4}
    assert "freed" in invoke("clean", base, "--yes")
    assert gone(base) == set() and out(base / "model") == 5 and out(first) == 1 and names[2].exists()
    assert not names[3].exists() and not list(base.glob(".tmp-*"))


def test_a_stage_that_waits_keeps_what_it_is_to_be_made_of(monkeypatch):
    base = run("base", model={"value": 1})
    plain, seen = Fake.run, []

    def busy(stage, job):
        if stage.init:
            run("base", model={"value": 2})  # the link moves on while the run that has taken it is at work
            seen.append(gone(base))
        return plain(stage, job)

    monkeypatch.setattr(Fake, "run", busy)
    run("next", tuned={"init": "runs/base/model"})
    assert seen == [set()] and out("runs/next/tuned") == 1


def test_nothing_is_removed_of_a_run_at_work():
    base = run("base", model={"value": 1})
    run("base", model={"value": 2})
    with locked(base / ".lock"), pytest.raises(PretrainError, match="in use by a run"):
        invoke("clean", base, "--yes")
    assert gone(base) == {1}


def test_a_store_is_cleaned_of_what_none_of_its_runs_shows():
    run("one", store="store", model={"value": 1})
    engine.run(recipe("two", model={"value": 2}), store="store", report=False, say=lambda text: None)
    run("two", store="store", model={"value": 3})
    assert gone(Path("store")) == {2}
    Path("runs/one").rename("elsewhere")  # out of the folders that are searched, and out of its noted place
    assert gone(Path("store")) == {1, 2}
    assert "--yes" in invoke("clean", "store")


def test_linked_adoptions_keep_what_they_link_to(tmp_path):
    base = run("base", model={"value": 1})
    source = place_of(base / "model") / "checkpoint" / "config.json"
    taken = place_of(run("other", model={"value": 7}) / "model")
    (taken / "checkpoint" / "config.json").unlink()
    (taken / "checkpoint" / "config.json").symlink_to(source.resolve())
    record = read_json(taken / "stage.json") | {"adopted": {"source": "x", "fingerprint": "", "linked": True}}
    del record["seal"]
    (taken / "stage.json").write_text(json.dumps(record))
    run("base", model={"value": 2})
    assert gone(base) == set()


def test_the_commands_need_no_torch():
    run("base", model={"value": 1})
    run("more", model={"value": 2})
    for words in (["list"], ["show", "runs/base"], ["compare", "runs/base", "runs/more"], ["clean", "runs/base"]):
        done, imported, seconds = command("runs", *words)
        assert done.returncode == 0 and imported == [] and seconds < 4 * libraries(), done.stderr  # 0.7 to 1.1


def test_a_killed_removal_is_finished_by_the_next(monkeypatch):
    base = run("base", model={"value": 1})
    for value in (2, 3):
        run("base", model={"value": value})
    going = shelf.unused(base, [])[0]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shelf.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        shelf.remove(base, going)
    assert len(list(base.glob(".tmp-removed-*"))) == 1 and len(gone(base)) == 1
    invoke("clean", base)
    assert not list(base.glob(".tmp-removed-*")) and len(gone(base)) == 1


def test_where_there_are_no_runs_that_is_told():
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "runs", "list"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stderr.startswith("error: runs: no run there")


def test_a_run_shows_what_its_model_is_worth_and_a_name_nearby_is_offered():
    records = {
        "judged": {"stage": "evaluate", "metrics": {"loss/a": 2.0, "loss": 1.0}},
        "samples": {"stage": "decode", "metrics": {"tokens_per_second": 9.0}},
    }
    made = Run(Path("x"), {}, {}, records)
    assert made.metrics == records["judged"]["metrics"] and _few(made.metrics) == "loss 1, loss/a 2"
    run("base", model={"value": 1})
    for wrong in ("bsae", "run/base", "runs/bse"):
        with pytest.raises(PretrainError, match=r"did you mean 'runs/base'\?"):
            newest_checkpoint(wrong)
        with pytest.raises(PretrainError, match=r"does not exist \(did you mean 'runs/base'\?"):
            run_of(wrong)


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"address": 3}', '{"name": "model", "metrics": []}'])
def test_a_damaged_record_is_one_line_and_stands_in_no_other_runs_way(text):
    base, other = run("base", model={"value": 1}), run("other", model={"value": 2})
    run("base", model={"value": 5})
    (place_of(base / "model") / "stage.json").write_text(text)
    listed = invoke("list")
    assert "runs/other" in listed and "model-" not in listed.partition("stage.json")[2]
    for words in (["show", base], ["compare", base, other], ["clean", base]):
        with pytest.raises(PretrainError, match="stage.json is (damaged or was replaced|not valid JSON)"):
            invoke(*words)
    assert out(run("next", model={"init": "runs/base/model", "value": 3}) / "model") == 8  # its checkpoint is whole
    (item,) = identity.plan(recipe("base", model={"value": 5}))
    assert re.search(r"stage.json is .*; accepted: `--refresh model`, which runs the stage again", identity.why(item))


def test_what_a_stage_has_left_and_is_gone_is_told():
    base, lines = run("base", model={"value": 1}), []
    shutil.rmtree(base / "model" / "checkpoint")
    run("base", say=lines.append, model={"value": 1})
    where = place_of(base / "model") / "checkpoint"
    assert f"warning: {where} is gone; --refresh model makes it again" in lines


def test_trainings_that_were_measured_on_other_text_are_said_to_be_so():
    def of(address="a", tokens=100, budget=1):
        train = {
            "stage": "train",
            "inputs": {"corpus": "texts"},
            "config": {"evaluate_tokens": tokens, "length": 64, "budget": {"flops": budget}},
        }
        return SimpleNamespace(records={"model": train, "texts": {"stage": "data", "address": address}}, stages={})

    def shown(*runs):
        return [row for row in _measured_on(runs) if row[0] == "model: measured on"]

    assert shown(of(), of()) == shown(of(budget=1), of(budget=2)) == shown(of(tokens="auto"), of(tokens="auto")) == []
    ((_, first, second, words),) = shown(of(), of(tokens=50))
    assert (first, second, words) == ("100 validation tokens", "50 validation tokens", THEIRS)
    assert shown(of(), of("b")) and shown(of(tokens="auto", budget=1), of(tokens="auto", budget=2))

"""A first afternoon's slips are answered with what was meant: a recipe's file, a unit of time, a file beside."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml
from test_dial import RECIPE
from typer.testing import CliRunner

from pretrain import recipe as recipes
from pretrain.cli import app
from pretrain.core.errors import PretrainError
from pretrain.core.system.shipped import recipe_file
from pretrain.inference.rows import check


def refused(*words):
    with pytest.raises(PretrainError) as error:
        CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    return str(error.value)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def test_a_recipe_without_its_ending_is_answered_with_its_file(here):
    assert "no such file (did you mean 'mine.yaml'?)" in refused("run", "mine")
    (here / "mine").mkdir()
    assert "recipe mine is a folder (did you mean 'mine.yaml'?); accepted: a recipe's path" in refused("run", "mine")
    (here / "other").mkdir()
    with pytest.raises(PretrainError, match="recipe other is a folder; accepted"):
        recipe_file("other")


def test_a_budget_without_its_unit_is_answered_with_one(here):
    assert "(did you mean 300s, of seconds?)" in refused("plan", "mine.yaml", "--budget", "300")
    assert "did you mean" not in refused("plan", "mine.yaml", "--budget", "100M")
    compared = ("compare", "mine.yaml", "other.yaml", "--budget")
    assert "(did you mean flops=1e13?)" in refused(*compared, "1e13")
    assert "did you mean" not in refused(*compared, "tokens=1e6") + refused(*compared, "nan")


@pytest.mark.parametrize(("written", "entries"), [("16k", 16_000), ("2K", 2000), (4096, 4096), ("auto", None)])
def test_a_vocabulary_is_written_as_any_number_is_beside_a_size_that_is_chosen(here, written, entries):
    (chosen,) = recipes.load(here / "mine.yaml", [f"tokenizer.vocab_size={written}"], here / "run").sizes
    assert chosen.task.vocabulary == entries
    if entries:
        stage = recipes.load(here / "mine.yaml", [f"tokenizer.vocab_size={written}"], here / "run").stages[1]
        assert stage.vocab_size == entries
    with pytest.raises(PretrainError, match="vocab_size '16 thousand': accepted: a whole number, or auto"):
        recipes.load(here / "mine.yaml", ["tokenizer.vocab_size=16 thousand"], here / "run")


def test_a_file_to_predict_that_is_not_there_is_answered_with_the_one_beside(here):
    (here / "tickets.csv").write_text("text\na\n")
    with pytest.raises(
        PretrainError, match=r"tikets.csv: no such file \(did you mean 'tickets.csv'\?\); accepted: a file"
    ):
        check("tikets.csv", None)
    with pytest.raises(PretrainError, match="nowhere.csv: no such file; accepted"):
        check("nowhere.csv", None)


def test_a_run_that_another_process_holds_is_refused_before_torch_is_imported(tmp_path, monkeypatch):
    from pretrain.core.folders import check_unused

    check_unused(tmp_path / "none")
    (tmp_path / ".lock").touch()
    check_unused(tmp_path)
    holder = "import sys, time; from pathlib import Path; from pretrain.core.files import locked\n"
    holder += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    held = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert held.stdout.readline() == "held\n"
        with pytest.raises(PretrainError, match="in use by another run; accepted: wait for it"):
            check_unused(tmp_path)
    finally:
        held.kill()
        held.communicate()


@pytest.mark.parametrize("shared", [False, True])
def test_a_run_whose_newest_variant_has_no_model_takes_the_one_before_it(shared, tmp_path):
    """Of the last stage that has one the newest, and one line says so; of a store that others fill, it only names it."""
    from pretrain.core.files import sealed, write_json
    from pretrain.core.folders import newest_checkpoint
    from pretrain.records import write_stage

    run, home = tmp_path / "run", tmp_path / ("store" if shared else "run")
    run.mkdir()

    def made(name, address, second):
        folder = home / f"train-{address}"
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "checkpoint" / "config.json").write_text("{}")
        record = {
            "name": name, "stage": "train", "address": address, "config": {}, "methods": {}, "metrics": {},
            "finished": "2026-01-01T00:00:00+00:00", "seconds": 1.0, "flops": 0, "files": {},
        }  # fmt: skip
        write_stage(folder / "stage.json", record)
        os.utime(folder / "stage.json", (second, second))

    def shown(**stages):
        rows = [
            {
                "name": name,
                "stage": "train",
                "folder": os.path.relpath(home / f"train-{address}", run),
                "address": address,
            }
            for name, address in stages.items()
        ]
        write_json(run / "run.json", sealed({"name": "r", "recipe": "", "seed": 0, "stages": rows}))

    made("encoder", "0a0a0a0a0a0a", 4)
    made("classifier", "1b1b1b1b1b1b", 2)
    made("classifier", "0123456789ab", 3)
    shown(encoder="ffffffffffff", classifier="ba9876543210")  # of which nothing is there
    if shared:
        with pytest.raises(PretrainError, match=r"as it is set now, .*; of other settings there are .*@0123456789ab"):
            newest_checkpoint(run)
    else:
        with pytest.warns(
            UserWarning, match=r"'classifier' is not finished as it is set now; .*/classifier@0123456789ab"
        ):
            assert newest_checkpoint(run) == home / "train-0123456789ab" / "checkpoint"
    shown(encoder="0a0a0a0a0a0a", classifier="ba9876543210")  # what it began with is finished
    with pytest.warns(UserWarning, match="'classifier' is not finished"):
        assert newest_checkpoint(run).parent.name == ("train-0a0a0a0a0a0a" if shared else "train-0123456789ab")
    shown(encoder="0a0a0a0a0a0a", classifier="1b1b1b1b1b1b")
    assert newest_checkpoint(run).parent.name == "train-1b1b1b1b1b1b"  # which the run shows, though another is newer


def test_a_misspelt_run_is_not_taken_for_a_name_of_the_hub(tmp_path, monkeypatch):
    from pretrain.new.start import start_of

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "texts").mkdir(parents=True)
    (tmp_path / "runs" / "texts" / "run.json").write_text("{}")
    with pytest.raises(PretrainError, match=r"no such folder \(did you mean 'runs/texts'\?\)"):
        start_of("run/texts")
    assert start_of("org/model").name == "org/model"


@pytest.fixture()
def under(tmp_path, monkeypatch):
    """Two cores at a load that can be set."""
    from pretrain.core.quick import machine

    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)

    def loaded(load):
        monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
        return machine

    return loaded


def test_a_plan_says_where_others_want_the_cores(under):
    assert under(1.4).others_at_work() == ""
    busy = under(6.0).others_at_work()
    assert "load 6.0" in busy and "a minute may take 4," in busy


def test_a_load_that_the_machines_rate_was_measured_under_is_not_counted_again(under):
    under(6.0).remember_rate("cpu", 1e10)
    assert "may take" not in (alike := under(8.0).others_at_work())
    assert "load 8.0" in alike and "measured while others wanted its cores (load 6.0)" in alike
    assert "may take 3," in (busier := under(20.0).others_at_work()) and "(load 6.0)" in busier  # 22 / 8
    assert "times may be shorter" in under(0.3).others_at_work()
    under(0.3).remember_rate("cpu", 5e10)  # the better one, on the quiet machine
    assert under(0.3).others_at_work() == "" and "may take 4," in under(6.0).others_at_work()


def test_the_help_shows_a_type_of_a_value_that_may_be_missing_with_its_bounds():
    shown = " ".join(CliRunner().invoke(app, ["predict", "--help"]).output.split())
    assert "Annotated" not in shown and "<int range> [x>=1]" in shown


@pytest.mark.parametrize(("name", "meant"), [
    ("lr", "optimizer.lr"), ("num_train_epochs", "budget.epochs"), ("warmup_steps", "schedule.warmup"),
    ("bf16", "precision"), ("hidden_size", "model.hidden_size"), ("batch_size", "batch_rows"),
])  # fmt: skip
def test_a_field_by_the_name_and_at_the_place_of_other_trainers_is_answered_with_ours(here, name, meant):
    assert f"unknown field (did you mean '{meant}'?)" in refused("run", "mine.yaml", "--set", f"model.{name}=3")


@pytest.mark.parametrize(("method", "option"), [("greedy", "--temperature 0"), ("top_p", "--top-p 0.95")])
def test_plain_ways_to_decode_are_answered_with_their_options(here, method, option):
    assert f"accepted: {option}, without --method" in refused("generate", "nowhere", "--method", method)


def test_a_stage_that_is_called_by_its_kind_is_answered_with_its_name(here):
    assert "no stage 'train' (did you mean 'model'?); accepted: corpus, tokenizer, model" in refused(
        "run", "mine.yaml", "--set", "train.budget.steps=3"
    )

"""What a run writes is never mixed with what others have put in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pretrain import engine
from pretrain.adopt import adopt
from pretrain.cli import app
from pretrain.core.errors import PretrainError
from pretrain.experiments.compare import compare
from pretrain.recipe import load
from pretrain.runs.shelf import check_output

RECIPE = "stages: [{stage: data, name: corpus, sources: [text]}]\n"
LINE = (
    r"^output mine is no run and not empty: it holds a.txt, b.txt, c.txt and 1 more; accepted: a new or an empty folder"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    Path("text/a.txt").write_text("hello\n" * 50)
    Path("mine").mkdir()
    for name in "abcd":
        Path(f"mine/{name}.txt").write_text("precious")
    for name in ("r", "q"):
        Path(f"{name}.yaml").write_text(RECIPE)


def commands():
    recipe = load("r.yaml", output="mine")
    return {
        "run": lambda: engine.run(recipe, say=lambda text: None),
        "adopt": lambda: adopt(recipe, "corpus", Path("text")),
        "compare": lambda: compare(["r.yaml", "q.yaml"], flops=1e9, output="mine"),
    }


@pytest.mark.parametrize("command", ["run", "adopt", "compare"])
def test_a_folder_of_others_is_refused_and_nothing_is_written_in_it(command):
    with pytest.raises(PretrainError, match=LINE):
        commands()[command]()
    assert sorted(path.name for path in Path("mine").iterdir()) == ["a.txt", "b.txt", "c.txt", "d.txt"]


def test_a_dry_run_says_so_too():
    refused = CliRunner().invoke(app, ["run", "r.yaml", "--output", "mine", "--dry-run"])
    assert "output mine is no run and not empty" in str(refused.exception)


@pytest.mark.parametrize("name", [".git", "notes.md", "model.safetensors", "data"])
def test_any_file_of_others_counts(name, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / name).mkdir()
    with pytest.raises(PretrainError, match=f"it holds {name}; accepted"):
        check_output(tmp_path / "other")


@pytest.mark.parametrize(
    "names",
    [
        [],
        [".lock", "recipe.yaml"],
        ["ladder"],
        ["data-0123456789ab", ".tmp-x"],
        ["seed-0", "stages"],
        ["run.json", "my notes"],
    ],
)
def test_what_a_run_has_left_that_was_stopped_early_is_gone_on_with(names, tmp_path):
    (tmp_path / "run").mkdir()
    for name in names:
        (tmp_path / "run" / name).touch()
    check_output(tmp_path / "run")
    check_output(tmp_path / "not there yet")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("r.yaml", "output r.yaml is no folder"),
        ("r.yaml/run", "output r.yaml/run cannot be made: r.yaml is no folder"),
        ("r.yaml/deep/run", "output r.yaml/deep/run cannot be made: r.yaml is no folder"),
        ("/dev/null/run", "cannot be made: /dev/null is no folder"),
        ("/proc/nothing/run", "output /proc/nothing/run cannot be made in /proc: "),
    ],
)
def test_a_dry_run_refuses_a_folder_that_cannot_be_made(output, message):
    before = sorted(path.name for path in Path().iterdir())
    for command in (["--dry-run"], []):
        outcome = CliRunner().invoke(app, ["run", "r.yaml", "--output", output, *command])
        said_of = str(outcome.exception)
        assert isinstance(outcome.exception, PretrainError) and "accepted: a folder that can be written" in said_of
        assert message in said_of or not command
    assert sorted(path.name for path in Path().iterdir()) == before


def test_a_dry_run_refuses_a_store_that_cannot_be_made():
    outcome = CliRunner().invoke(app, ["run", "r.yaml", "--output", "new", "--dry-run", "--store", "r.yaml"])
    assert "store r.yaml is no folder; accepted: a folder that can be written" in str(outcome.exception)


@pytest.mark.parametrize("overrides", ["corpus.test=0.1", {"corpus.test": 0.1}])
def test_overrides_that_are_no_list_are_one_clear_error(overrides):
    with pytest.raises(PretrainError, match=r"^overrides .*corpus.test.*: accepted: a list of STAGE.field=value"):
        load("r.yaml", overrides)


@pytest.mark.parametrize(
    ("kind", "meant"),
    [("optimizer", "optimiser"), ("optimizers", "optimiser"), ("decode", "decoding"), ("Surgeries", "surgery")],
)
def test_a_kind_in_another_spelling_is_answered_with_the_one_that_is_meant(kind, meant):
    outcome = CliRunner().invoke(app, ["methods", "--kind", kind])
    assert f"kind {kind!r} (did you mean {meant!r}?): accepted: " in str(outcome.exception)

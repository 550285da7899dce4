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

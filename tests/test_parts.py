"""What an interrupted stage has taken is the sum of its parts, in its record, in `runs show` and in the report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

import pytest
from typer.testing import CliRunner

import pretrain.stages
from pretrain import engine
from pretrain.core.errors import PretrainError
from pretrain.core.files import read_json, read_sealed
from pretrain.core.folders import place_of
from pretrain.recipe import check
from pretrain.report.data import collect
from pretrain.runs.command import _table, app
from pretrain.runs.comparison import _apart
from pretrain.runs.shelf import open_run
from pretrain.stages import Job, Stage

ENDS: list[BaseException | None] = []
SLEEP = 0.35  # three of them are more than a second, the unit of a record's times
STATES: list[dict[str, str]] = []


def states() -> dict[str, str]:
    """The one word for the run's state that each place has: `run.json` and what is read from it, a list, a page."""
    rows = read_json(Path("runs/r/run.json"))["stages"]
    listed = CliRunner().invoke(app, ["list"], catch_exceptions=False).output.splitlines()[1].split()[1]
    shown = CliRunner().invoke(app, ["show", "runs/r"], catch_exceptions=False).output.splitlines()
    page = collect(Path("runs/r"))["stages"][0]["status"]
    return {"run.json": rows[0]["status"], "list": listed, "show": shown[0].split()[1].strip(","), "page": page}


class Slow(Stage):
    stage: Literal["slow"] = "slow"
    keeps: bool = True
    looks: bool = False
    counts: float = 0.0

    def progress(self, folder: Path) -> str:
        return "at step 1" if (folder / "kept").exists() else ""

    def run(self, job: Job) -> dict[str, Any]:
        time.sleep(SLEEP)
        if self.looks:
            STATES.append(states())
        if self.keeps:
            (job.folder / "kept").touch()
        if error := ENDS.pop(0):
            raise error
        return {"metrics": {"seconds": self.counts}, "flops": 7}


@pytest.fixture(autouse=True)
def slow_stages(monkeypatch, tmp_path):
    known = pretrain.stages.stage_classes() | {"slow": Slow}
    monkeypatch.setattr("pretrain.recipe.stage_classes", lambda: known)
    monkeypatch.chdir(tmp_path)


def go(*ends: BaseException | None, **fields: object) -> None:
    """Runs of the stage, each of which ends so."""
    ENDS[:] = list(ends)
    recipe = check({"name": "r", "stages": [{"stage": "slow", "name": "model"} | fields]})
    for end in ends:
        if end is None:
            engine.run(recipe, report=False, say=lambda text: None)
        else:
            with pytest.raises(type(end)):
                engine.run(recipe, report=False, say=lambda text: None)


def run(*ends: BaseException | None, **fields: object) -> dict[str, Any]:
    """The stage's record after such runs."""
    go(*ends, **fields)
    return read_json(Path("runs/r/model/stage.json"))


def test_the_time_of_a_stage_is_that_of_all_its_parts():
    record = run(KeyboardInterrupt(), SystemExit(143), None)
    assert record["seconds"] >= 3 * SLEEP
    assert record["started"] < record["finished"]
    assert not (place_of("runs/r/model") / "parts.json").exists()


def test_a_part_that_nothing_is_left_of_does_not_count():
    assert SLEEP <= run(KeyboardInterrupt(), None, keeps=False)["seconds"] < 1.9 * SLEEP


def test_of_a_killed_part_counts_what_the_training_has_counted():
    assert run(None, counts=500.0)["seconds"] == 500.0


def test_a_training_that_is_begun_is_shown_with_what_it_has_taken_so_far():
    ENDS[:] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        engine.run(check({"name": "r", "stages": [{"stage": "slow", "name": "model"}]}), report=False, say=print)
    folder = next(Path("runs/r").glob("slow-*"))
    (folder / "log.jsonl").write_text('{"event": "step", "step": 7, "tokens": 900, "flops": 5e9, "seconds": 61}\n')
    shown = CliRunner().invoke(app, ["show", "runs/r"], catch_exceptions=False).output
    assert "interrupted" in shown and "1 min 1 s" in shown and "5 G" in shown and "step 7, tokens 900" in shown
    row = '{"event": "step", "step": 8, "tokens": 950, "flops": 5e9, "seconds": 61, "elapsed": 130.0}\n'
    (folder / "log.jsonl").write_text(row)  # one of today has a clock that counts all that it does
    assert "2 min 10 s" in CliRunner().invoke(app, ["show", "runs/r"], catch_exceptions=False).output


def test_a_list_and_a_comparison_count_what_is_begun_as_the_run_shows_it():
    ENDS[:] = [None, KeyboardInterrupt()]
    stages = [{"stage": "slow", "name": name, "counts": number} for number, name in enumerate(("first", "model"))]
    with pytest.raises(KeyboardInterrupt):
        engine.run(check({"name": "r", "stages": stages}), report=False, say=lambda text: None)
    folder = next(path for path in Path("runs/r").glob("slow-*") if not (path / "stage.json").exists())

    def output(*words: str) -> str:
        return CliRunner().invoke(app, [*words], catch_exceptions=False).output

    opened = open_run(Path("runs/r"))
    assert opened.spent("model")["seconds"] >= SLEEP, "a stage without a log has what its parts have noted"
    assert opened.total("seconds") == opened.spent("first")["seconds"] + opened.spent("model")["seconds"]
    row = {"event": "step", "step": 8, "tokens": 950, "flops": 5e9, "seconds": 61, "elapsed": 130.0}
    (folder / "log.jsonl").write_text(json.dumps(row) + "\n")
    assert open_run(Path("runs/r")).total("flops") == 7 + 5e9
    listed = output("list").splitlines()[1]
    assert "2 min 10 s" in listed and " 5 G" in listed and "1 of 2" in listed
    assert "2 min 10 s" in output("show", "runs/r")
    (folder / "parts.json").write_text("no note")
    assert open_run(Path("runs/r")).spent("model") == {"step": 8, "tokens": 950, "flops": 5e9, "seconds": 130.0}


@pytest.mark.parametrize(
    ("texts", "shown"),
    [
        (["a", "bc"], ["a", "bc"]),
        (["x" * 200 + "one", "x" * 200 + "two"], ["…" + "x" * 11 + "one", "…" + "x" * 11 + "two"]),
        (["p" * 90, "q"], ["p" * 79 + "…", "q"]),
        (["", "q" * 81], ["", "q" * 79 + "…"]),
        (["s" * 50 + "1" * 100, "s" * 50], ["…" + "s" * 11 + "1" * 67 + "…", "…" + "s" * 11]),
    ],
)
def test_long_values_are_cut_to_what_tells_them_apart(texts, shown):
    assert _apart(texts) == shown and all(len(text) <= 80 for text in shown)


def test_a_terminal_gets_lines_that_fit_it(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    _table([("", "runs/a", "runs/b"), ("samples.prompts", "once upon a time " * 6, "b" * 70)], fit=True)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60 and len(lines) > 2
    assert "".join(lines).count("b") == 71, "nothing is lost"
    _table([("", "b" * 70)])
    assert capsys.readouterr().out == f"  {'b' * 70}\n"


def test_a_run_has_the_same_word_for_its_state_everywhere():
    STATES.clear()
    for end, word in (
        (KeyboardInterrupt(), "interrupted"),
        (PretrainError("no such thing"), "failed"),
        (None, "finished"),
    ):
        go(end, looks=True)
        assert set(states().values()) == {word}
        assert set(STATES.pop().values()) == {"running"}
        if word == "failed":
            shown = CliRunner().invoke(app, ["show", "runs/r"], catch_exceptions=False).output
            assert "model failed: stage 'model': no such thing" in shown


def test_a_run_that_was_killed_is_interrupted():
    run(None)
    row = read_sealed(Path("runs/r/run.json"))
    row["stages"][0]["status"] = "running"  # as the killed process has left it
    Path("runs/r/run.json").write_text(json.dumps(row))
    (place_of("runs/r/model") / "stage.json").unlink()
    assert set(states().values()) == {"running", "interrupted"} and states()["list"] == "interrupted"

"""`pretrain watch`: a running run's page loads itself until the run is over."""

from __future__ import annotations

import fcntl
import json

import pytest

from pretrain.core.errors import PretrainError
from pretrain.report import watch as following
from pretrain.report.advice import spent_share
from pretrain.report.data import collect
from pretrain.report.summary import summarise
from pretrain.report.watch import _line, running, watch


def run_folder(folder, status="to run"):
    (folder / "model").mkdir(exist_ok=True)
    stages = [{"name": "model", "stage": "train", "folder": "model", "address": "0" * 8, "status": status}]
    (folder / "run.json").write_text(json.dumps({"name": "r", "recipe": "r.yaml", "seed": 0, "stages": stages}))
    (folder / "recipe.yaml").write_text("stages:\n- {name: model, stage: train, budget: {steps: 8}}\n")
    return folder


def log(folder, steps):
    row = {
        "tokens": 64,
        "flops": 1.0,
        "seconds": 1.0,
        "lr": 0.1,
        "grad_norm": 1.0,
        "tokens_per_second": 1.0,
        "mfu": 0.1,
    }
    lines = [{"event": "step", "step": i, "steps": i, "loss": 4.0} | row for i in range(1, steps + 1)]
    lines.append({"event": "evaluation", "step": steps, "steps": steps, "metrics": {"loss": 4.0 / steps}} | row)
    (folder / "model" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_page_follows_a_run_until_it_is_over(tmp_path):
    folder, lines = run_folder(tmp_path), []
    log(folder, 2)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert running(folder) == "model"

        def say(line):
            lines.append(line)
            if line.endswith(": finished"):
                return
            page = (folder / "report.html").read_text()
            assert '"reload": 1' in page and "Still running: “model”" in page
            if len(lines) == 2:
                log(folder, 4)
            if len(lines) == 3:
                (folder / "model" / "stage.json").write_text("{}")
                fcntl.flock(lock, fcntl.LOCK_UN)

        path = watch(folder, every=0.01, say=say)
    assert lines == [
        f"report: {path}",
        "[model] 25% validation 2.000 nats",
        "[model] 50% validation 1.000 nats",
        f"{folder}: finished",
    ]
    assert '"reload": 0' in path.read_text() and "Still running" not in path.read_text()


def test_a_held_out_number_of_before_says_when_it_was_measured(tmp_path):
    folder = run_folder(tmp_path)
    log(folder, 2)
    lines = [json.loads(line) for line in (folder / "model" / "log.jsonl").read_text().splitlines()]
    lines = [row | {"tokens": 100 * row["step"]} for row in lines]
    lines.append({"event": "step", "step": 4, "steps": 4, "loss": 4.0, "tokens": 400})
    (folder / "model" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert _line(folder, "model") == "[model] 50% validation 2.000 nats at 25%"


def test_of_epochs_a_page_says_how_many_are_done(tmp_path):
    folder = run_folder(tmp_path)
    (folder / "recipe.yaml").write_text("stages:\n- {name: model, stage: train, budget: {epochs: 8}}\n")
    log(folder, 2)
    assert spent_share(collect(folder), "model") is None  # a log of before says it nowhere
    lines = [json.loads(line) for line in (folder / "model" / "log.jsonl").read_text().splitlines()]
    rows = [line | {"progress": 0.3} if line["event"] == "step" else line for line in lines]
    (folder / "model" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert spent_share(collect(folder), "model") == 0.3
    assert "“model”, 30% of its budget spent" in summarise(collect(folder), "model").advice


def test_an_interrupt_leaves_a_page_that_no_longer_loads_itself(tmp_path):
    folder = run_folder(tmp_path)

    def say(line):
        raise KeyboardInterrupt

    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(KeyboardInterrupt):
            watch(folder, every=0.01, say=say)
    assert '"reload": 0' in (folder / "report.html").read_text()


def test_a_run_that_is_over_is_written_once_and_a_run_may_start_after(tmp_path):
    folder, lines = run_folder(tmp_path), []
    (folder / ".lock").touch()
    assert "Interrupted at “model”" in watch(folder, say=lines.append).read_text()
    assert lines == [f"{folder}: interrupted at “model”"]
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # watching holds nothing


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(PretrainError, match="is not a run"):
        watch(tmp_path)


def test_a_run_that_is_only_beginning_is_waited_for_and_what_never_begins_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(following, "PAUSE", 0.01)
    lines = []

    def say(line):
        lines.append(line)
        if "waiting" in line:
            (tmp_path / "r").mkdir()
            run_folder(tmp_path / "r", "finished")

    watch(tmp_path / "r", say=say)
    assert "no run is there yet: waiting 30 s at most" in lines[0] and lines[-1].startswith(f"{tmp_path / 'r'}: ")
    monkeypatch.setattr(following, "BEGINNING", 0.05)
    with pytest.raises(PretrainError, match="is not a run"):
        watch(tmp_path / "nowhere", say=lines.append)

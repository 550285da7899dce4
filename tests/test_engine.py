"""The engine: nothing runs twice, a change re-runs from there on, interruption and errors lose nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any, Literal

import pytest

import pretrain.stages
from pretrain import engine
from pretrain.core.errors import PretrainError
from pretrain.recipe import check
from pretrain.stages import Job, Ref, Stage

RUNS: list[str] = []


class Fake(Stage):
    stage: Literal["fake"] = "fake"
    neutral = ("speed",)
    source: Ref | None = None
    others: list[Ref] = []
    value: int = 0
    speed: int = 1

    def run(self, job: Job) -> dict[str, Any]:
        RUNS.append(job.name)
        before = [int((f / "out").read_text()) for f in [job.inputs[n] for n in ("source",) if n in job.inputs]]
        if self.value < 0:
            raise OSError(28, "No space left on device", str(job.folder / "big"))
        (job.folder / "out").write_text(str(self.value + sum(before)))
        return {"metrics": {"value": self.value, "lineage": len(job.lineage)}, "flops": 7}


@pytest.fixture(autouse=True)
def fake_stages(monkeypatch):
    RUNS.clear()
    known = pretrain.stages.stage_classes() | {"fake": Fake}
    monkeypatch.setattr("pretrain.recipe.stage_classes", lambda: known)


def raw(a=1, b=2, c=3, **more):
    stages = [
        {"stage": "fake", "name": "a", "value": a} | more, {"stage": "fake", "name": "b", "value": b, "source": "a"},
        {"stage": "fake", "name": "c", "value": c, "source": "b", "others": ["a"]},
    ]  # fmt: skip
    return {"name": "r", "stages": stages}


def go(tmp_path, **values):
    RUNS.clear()
    return engine.run(check(raw(**values), output=tmp_path / "run"), say=lambda text: None)


def test_stages_run_once_and_pass_their_folders_on(tmp_path):
    result = go(tmp_path)
    assert RUNS == ["a", "b", "c"]
    assert (tmp_path / "run" / "c" / "out").read_text() == "6"
    assert result.stages["c"]["metrics"] == {"value": 3, "lineage": 2} and result.stages["c"]["flops"] == 7
    assert result.report == tmp_path / "run" / "report.html" and result.report.exists()
    go(tmp_path)
    assert RUNS == []


def test_a_change_runs_from_there_on_and_going_back_runs_nothing(tmp_path):
    go(tmp_path)
    go(tmp_path, b=5)
    assert RUNS == ["b", "c"] and (tmp_path / "run" / "c" / "out").read_text() == "9"
    go(tmp_path)
    assert RUNS == [] and (tmp_path / "run" / "c" / "out").read_text() == "6"


def test_a_neutral_field_or_an_added_stage_changes_nothing_before(tmp_path):
    go(tmp_path)
    go(tmp_path, speed=9)
    assert RUNS == []
    longer = raw()
    longer["stages"].append({"stage": "fake", "name": "d", "source": "c"})
    engine.run(check(longer, output=tmp_path / "run"), say=lambda text: None)
    assert RUNS == ["d"]


def test_the_seed_and_the_code_of_methods_are_part_of_the_address(tmp_path, monkeypatch):
    recipe = raw() | {"seed": 1}
    first = [p.address for p in engine.plan(check(raw(), output=tmp_path))]
    assert all(
        a != b for a, b in zip(first, [p.address for p in engine.plan(check(recipe, output=tmp_path))], strict=True)
    )
    stages = [{"stage": "data", "sources": ["stdlib"], "operations": ["deduplicate"]}]
    one = engine.plan(check({"stages": stages}, output=tmp_path))[0].address
    monkeypatch.setattr("pretrain.stages.code_version", lambda name: "other")
    assert engine.plan(check({"stages": stages}, output=tmp_path))[0].address != one


def test_an_outside_input_is_followed_by_its_state(tmp_path):
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "out").write_text("40")
    recipe = {"stages": [{"stage": "fake", "value": 2, "source": str(tmp_path / "given")}]}
    first = engine.plan(check(recipe, output=tmp_path / "run"))[0].address
    engine.run(check(recipe, output=tmp_path / "run"), say=lambda text: None)
    assert (tmp_path / "run" / "fake" / "out").read_text() == "42"
    (tmp_path / "given" / "out").write_text("100")
    assert engine.plan(check(recipe, output=tmp_path / "run"))[0].address != first


def test_a_full_disk_names_the_stage_and_keeps_what_was_done(tmp_path):
    with pytest.raises(PretrainError, match=r"stage 'b': No space left on device \(.*big\); run again to go on"):
        go(tmp_path, b=-1)
    assert RUNS == ["a", "b"]
    go(tmp_path)
    assert RUNS == ["b", "c"]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [s["status"] for s in run["stages"]] == ["cached", "done", "done"]


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PretrainError, match="is in use by another run"):
            go(tmp_path)


REAL = """\
name: killed
stages:
  - {stage: data, name: corpus, sources: [{files: %s}], validation: 0.1, test: 0.1}
  - {stage: tokenizer, corpus: corpus, vocab_size: 400, mask: true}
  - stage: train
    corpus: corpus
    tokenizer: tokenizer
    model: {family: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2}
    length: 64
    batch_rows: 4
    budget: {steps: 30}
    save_every: 4
  - {stage: evaluate, checkpoint: train, corpus: corpus, split: validation}
  - {stage: decode, checkpoint: train, prompts: ["def "], max_new_tokens: 8}
"""


def test_a_real_recipe_killed_while_training_goes_on_where_it_was(tmp_path, stories):
    (tmp_path / "text").mkdir()
    for number, story in enumerate(stories[:60]):
        (tmp_path / "text" / f"{number}.py").write_text(story["text"])
    (tmp_path / "r.yaml").write_text(REAL % (tmp_path / "text"))
    command = [sys.executable, "-m", "pretrain", "run", str(tmp_path / "r.yaml"), "--output"]
    process = subprocess.Popen([*command, str(tmp_path / "killed")])
    state = lambda: list((tmp_path / "killed").glob("train-*/state/step-*"))  # noqa: E731
    while process.poll() is None and not state():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "killed").glob("train-*/stage.json"))
    subprocess.run([*command, str(tmp_path / "killed")], check=True)
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / name / "train" / "checkpoint" / "model.safetensors") for name in ("killed", "whole"))
    assert all((a[name] == b[name]).all() for name in b)
    evaluation = json.loads((tmp_path / "killed" / "evaluate" / "evaluation.json").read_text())
    assert evaluation["metrics"]["bits_per_byte"] > 0 and set(evaluation["compressors"]) == {"xz -9e", "zstd -19"}
    assert json.loads((tmp_path / "killed" / "decode" / "samples.json").read_text())["samples"][0]["prompt"] == "def "
    again = subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True, text=True)
    assert again.stderr.count("already done") == 5
    lineage = json.loads((tmp_path / "killed" / "train" / "checkpoint" / "pretrain.json").read_text())["lineage"]
    assert [s["stage"] for s in lineage["stages"]] == ["data", "tokenizer"] and lineage["tokens"] > 0
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pretrain"]
    subprocess.run([*two, *command[3:], str(tmp_path / "two")], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    one, both = (json.loads((tmp_path / n / "evaluate" / "evaluation.json").read_text()) for n in ("whole", "two"))
    assert both["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-3)


def test_a_users_own_folder_or_recipe_is_never_touched(tmp_path):
    (tmp_path / "run" / "b").mkdir(parents=True)
    (tmp_path / "run" / "b" / "mine.txt").write_text("precious")
    with pytest.raises(PretrainError, match="run/b exists and is no stage of a run"):
        go(tmp_path)
    assert RUNS == [] and (tmp_path / "run" / "b" / "mine.txt").read_text() == "precious"
    (tmp_path / "recipe.yaml").write_text("# mine\n")
    with pytest.raises(PretrainError, match="holds the recipe itself"):
        engine.run(check(raw(), tmp_path / "recipe.yaml", output=tmp_path), say=lambda text: None)
    assert (tmp_path / "recipe.yaml").read_text() == "# mine\n"

"""The engine: nothing runs twice, a change re-runs from there on, interruption and errors lose nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import PlainSerializer, PlainValidator

import pretrain.stages
from pretrain import engine
from pretrain.core.errors import PretrainError
from pretrain.core.method import Method, Ref
from pretrain.recipe import check, load
from pretrain.stages import Job, Stage, build_dataclass, dump

RUNS: list[str] = []


@dataclass(frozen=True)
class Guided(Method):
    """A method that needs what earlier stages made."""

    teacher: Ref | None = None
    others: tuple[Ref, ...] = ()
    amount: int = 1


@dataclass(frozen=True)
class Weighted:
    method: Guided

    def model_copy(self, update):
        return Weighted(update["method"])


def guided(value):
    return build_dataclass(Guided, value, "guided")


class Fake(Stage):
    stage: Literal["fake"] = "fake"
    guide: Annotated[Any, PlainValidator(guided), PlainSerializer(dump)] = None
    guides: list[Annotated[Any, PlainValidator(guided), PlainSerializer(dump)]] = []
    neutral = ("speed",)
    accepts: ClassVar[dict[str, tuple[str, ...]]] = Stage.accepts | {"teacher": ("fake",)}
    source: Ref | None = None
    others: list[Ref] = []
    value: int = 0
    speed: int = 1
    sleep: float = 0

    def run(self, job: Job) -> dict[str, Any]:
        RUNS.append(job.name)
        before = [int((f / "out").read_text()) for f in [job.inputs[n] for n in ("source",) if n in job.inputs]]
        for guide in [self.guide, *self.guides]:
            for folder in [guide.teacher, *guide.others] if guide else ():
                before += [int((Path(folder) / "out").read_text())] if folder else []
        time.sleep(self.sleep)
        if self.value < 0:
            raise OSError(28, "No space left on device", str(job.folder / "big"))
        (job.folder / "out").write_text(str(self.value + sum(before)))
        return {"metrics": {"value": self.value, "lineage": len(job.lineage), "seed": job.seed}, "flops": 7}


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
    assert result.stages["c"]["metrics"] == {"value": 3, "lineage": 2, "seed": 0} and result.stages["c"]["flops"] == 7
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


def test_the_seed_and_the_versions_of_methods_and_stages_are_part_of_the_address(tmp_path, monkeypatch):
    recipe = raw() | {"seed": 1}
    first = [p.address for p in engine.plan(check(raw(), output=tmp_path))]
    assert all(
        a != b for a, b in zip(first, [p.address for p in engine.plan(check(recipe, output=tmp_path))], strict=True)
    )
    stages = [{"stage": "data", "sources": ["stdlib"], "operations": ["deduplicate"]}]
    address = lambda: engine.plan(check({"stages": stages}, output=tmp_path))[0].address  # noqa: E731
    found = [address()]
    monkeypatch.setattr("pretrain.data.deduplication.deduplicate.Deduplicate.version", 99)
    found.append(address())
    monkeypatch.setattr("pretrain.stages.data.Data.version", 99)
    found.append(address())
    assert len(set(found)) == 3


def test_an_outside_input_is_followed_by_its_state(tmp_path):
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "out").write_text("40")
    recipe = {"stages": [{"stage": "fake", "value": 2, "source": str(tmp_path / "given")}]}
    first = engine.plan(check(recipe, output=tmp_path / "run"))[0].address
    engine.run(check(recipe, output=tmp_path / "run"), say=lambda text: None)
    assert (tmp_path / "run" / "fake" / "out").read_text() == "42"
    (tmp_path / "given" / "out").write_text("100")
    assert engine.plan(check(recipe, output=tmp_path / "run"))[0].address != first


@pytest.mark.promise("Faults", "A full disk is one line, and what was there stays.")
def test_a_full_disk_names_the_stage_and_keeps_what_was_done(tmp_path):
    with pytest.raises(PretrainError, match=r"stage 'b': No space left on device \(.*big\); run again to go on"):
        go(tmp_path, b=-1)
    assert RUNS == ["a", "b"]
    go(tmp_path)
    assert RUNS == ["b", "c"]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [s["status"] for s in run["stages"]] == ["finished"] * 3


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PretrainError, match="is in use by another run"):
            go(tmp_path)


@pytest.mark.promise(
    "Faults",
    "A recipe is read once, when its run begins. A source, a checkpoint or another file from outside of it that changes "
    "while the stage that reads it runs is named, and the next run makes the stage again.",
)
def test_what_changes_while_it_is_read_is_named_and_the_stage_made_again(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(9):
        (tmp_path / "text" / f"{number}.txt").write_text(f"some words {number}\n" * 9)
    stage = {"stage": "data", "name": "corpus", "sources": [{"files": str(tmp_path / "text")}], "validation": 0.3}
    recipe, said = tmp_path / "r.yaml", []
    recipe.write_text(json.dumps({"stages": [stage]}))

    def say(line):
        said.append(line)
        if line == "[corpus] data" and len(said) < 5:
            (tmp_path / "text" / "1.txt").write_text("other words")
            recipe.write_text("{}")

    first = engine.run(recipe, output=tmp_path / "run", say=say)
    assert [line for line in said if "changed" in line] == [
        "warning: what it reads from outside has changed since this run began: the next run makes 'corpus' again"
    ]
    recipe.write_text(json.dumps({"stages": [stage]}))
    said += [""] * 5
    again = engine.run(recipe, output=tmp_path / "run", say=say)
    assert again.stages["corpus"]["address"] != first.stages["corpus"]["address"]
    assert len([line for line in said if "changed" in line]) == 1


def with_guides(tmp_path, **changed):
    stages = raw()["stages"]
    if not (tmp_path / "given").exists():
        (tmp_path / "given").mkdir()
        (tmp_path / "given" / "out").write_text("1000")
    stages[2] |= {"guide": {"teacher": "b", "amount": 3}, "guides": [{}, {"others": ["a", str(tmp_path / "given")]}]}
    stages[2] |= changed
    return {"name": "r", "stages": stages}


def test_references_inside_methods_are_followed_like_those_of_stages(tmp_path):
    recipe = check(with_guides(tmp_path), output=tmp_path / "run")
    assert recipe.stages[2].references() == {
        "source": "b", "others": ["a"], "guide.teacher": "b", "guides.1.others.0": "a",
        "guides.1.others.1": str(tmp_path / "given"),
    }  # fmt: skip
    result = engine.run(recipe, say=lambda text: None)
    assert (tmp_path / "run" / "c" / "out").read_text() == str(3 + 3 + 3 + 1 + 1000)
    said = result.stages["c"]
    assert said["config"]["guide"]["teacher"] == "b" and said["inputs"]["guides.1.others.0"] == "a"
    assert str(tmp_path / "run") not in json.dumps(said)
    plan = lambda raw: engine.plan(check(raw, output=tmp_path / "run"))  # noqa: E731
    before = [p.address for p in plan(with_guides(tmp_path))]
    other = with_guides(tmp_path, guide={"teacher": "a", "amount": 3})
    assert [p.address for p in plan(other)][:2] == before[:2] and plan(other)[2].address != before[2]
    renamed = json.loads(json.dumps(with_guides(tmp_path)).replace('"a"', '"first"'))
    assert plan(renamed)[2].address == before[2]  # what is named counts, not its name
    changed = raw(b=7)["stages"][1]
    deeper = with_guides(tmp_path)
    deeper["stages"][1] = changed
    assert plan(deeper)[2].address != before[2]


def test_a_methods_reference_to_the_wrong_kind_of_stage_is_named(tmp_path):
    (tmp_path / "text.txt").write_text("import os\n" * 50)
    train = {
        "name": "m", "stage": "train", "corpus": "c", "tokenizer": "t", "model": {"family": "llama"},
        "objective": {"method": "distillation", "teacher": "c"}, "budget": {"steps": 1},
    }  # fmt: skip
    data = {"name": "c", "stage": "data", "sources": [str(tmp_path / "text.txt")]}
    raw = {"stages": [data, {"name": "t", "stage": "tokenizer", "corpus": "c", "vocab_size": 300}, train]}
    with pytest.raises(PretrainError, match="m.objective.teacher: 'c' is a data stage; accepted: .* train or surgery"):
        check(raw, output=tmp_path / "run")


def test_a_wrong_reference_inside_a_method_is_named_with_its_line(tmp_path):
    text = json.dumps(with_guides(tmp_path, guides=[{}, {"others": ["a", "bb"]}]), indent=1)
    (tmp_path / "r.yaml").write_text(text)
    line = next(i for i, row in enumerate(text.splitlines(), 1) if '"bb"' in row)
    with pytest.raises(PretrainError, match=rf"r.yaml:{line}: c.guides.1.others.1: 'bb' .*did you mean 'b'.*earlier"):
        load(tmp_path / "r.yaml")


def test_what_methods_hold_is_replaced_in_sums_of_objectives_too():
    stage = Fake(stage="fake", guide={"teacher": "x"}, guides=[{"others": ["y", "z"]}])
    stage = stage.model_copy(update={"guides": [Weighted(stage.guides[0])]})
    found = stage.pointing_to({"guide.teacher": Path("/p"), "guides.0.others.1": Path("/q"), "source": Path("/r")})
    assert found.guide.teacher == "/p" and found.guides[0].method.others == ("y", "/q") and found.guide.amount == 1
    assert stage.guide.teacher == "x" and found.source is None


def test_a_stage_of_another_kind_than_the_field_takes_is_refused(tmp_path):
    stages = [{"stage": "data", "name": "corpus", "sources": ["stdlib"]}, {"stage": "tokenizer", "corpus": "corpus"}]
    wrong = [*stages, {"stage": "evaluate", "checkpoint": "tokenizer", "corpus": "corpus"}]
    with pytest.raises(
        PretrainError,
        match=r"evaluate.checkpoint: 'tokenizer' is a tokenizer stage; accepted: a stage of kind train or surgery",
    ):
        check({"stages": wrong})
    wrong = [*stages, {"stage": "evaluate", "checkpoint": str(tmp_path), "corpus": "tokenizer"}]
    with pytest.raises(
        PretrainError, match=r"evaluate.corpus: 'tokenizer' is a tokenizer stage; accepted: .*data \(corpus\)"
    ):
        check({"stages": wrong})


def share(tmp_path, output, say=lambda text: None, **values):
    recipe = check({"name": "r"} | raw(**values), output=tmp_path / output)
    return engine.run(recipe, store=tmp_path / "shared" / "store", say=say)


def test_runs_with_one_store_share_finished_stages(tmp_path):
    from pretrain.report.page import collect

    share(tmp_path, "one")
    RUNS.clear()
    result = share(tmp_path, "two", c=9)
    assert RUNS == ["c"] and result.stages["c"]["metrics"]["value"] == 9
    assert sorted(p.name for p in (tmp_path / "two").iterdir() if p.is_symlink()) == ["a", "b", "c"]
    assert os.readlink(tmp_path / "two" / "a") == os.readlink(tmp_path / "one" / "a")
    assert os.readlink(tmp_path / "two" / "a").startswith("../shared/store/fake-")
    assert (tmp_path / "two" / "c" / "out").read_text() == "12" and (tmp_path / "one" / "c" / "out").read_text() == "6"
    found = collect(tmp_path / "two")
    assert [s["status"] for s in found["stages"]] == ["finished"] * 3
    assert [s["flops"] for s in found["stages"]] == [7, 7, 7] and result.report.exists()
    tmp_path.rename(tmp_path.with_name("moved"))  # the links are relative
    assert (tmp_path.with_name("moved") / "two" / "c" / "out").read_text() == "12"
    tmp_path.with_name("moved").rename(tmp_path)
    assert engine.plan(check(raw(), output=tmp_path / "one"), tmp_path / "shared" / "store")[0].finished
    assert not engine.plan(check(raw(), output=tmp_path / "one"))[0].finished


def test_of_two_runs_that_want_a_stage_at_once_the_second_waits_and_takes_it(tmp_path):
    said: list[str] = []
    threads = [
        threading.Thread(target=share, args=(tmp_path, f"run-{number}", said.append), kwargs={"sleep": 0.5})
        for number in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(RUNS) == ["a", "b", "c"]
    assert "[a] another run is at this stage: waiting for it" in said and said.count("[a] already done") == 1
    assert all((tmp_path / f"run-{number}" / "c" / "out").read_text() == "6" for number in range(2))


def test_a_store_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "shared").write_text("a file")
    with pytest.raises(PretrainError, match="cannot write .*shared"):
        share(tmp_path, "one")


def test_a_stage_with_a_seed_of_its_own_is_the_same_whatever_the_recipes(tmp_path):
    def addresses(whole, **more):
        return [p.address for p in engine.plan(check(raw(**more) | {"seed": whole}, output=tmp_path))]

    own = [addresses(seed, seed=5) for seed in (0, 1)]
    assert own[0][0] == own[1][0] and own[0][1] != own[1][1]  # the second stage takes the recipe's
    assert addresses(5)[0] == own[0][0]
    result = go(tmp_path, seed=5)
    assert [result.stages[name]["metrics"]["seed"] for name in "abc"] == [5, 0, 0]
    assert [result.stages[name]["seed"] for name in "abc"] == [5, 0, 0]
    stages = [{"stage": "data", "sources": ["stdlib"]}, {"stage": "tokenizer", "corpus": "data"}]
    for raws in ({"stages": stages}, {"stages": [stages[0] | {"validation": 0.1}, stages[1]]}):
        found = [[p.address for p in engine.plan(check(raws | {"seed": s}, output=tmp_path))] for s in (0, 1)]
        assert found[0] == found[1]  # nothing in them is random


def test_the_lineage_is_of_the_stages_that_are_behind(tmp_path):
    stages = [*raw()["stages"], {"stage": "fake", "name": "d", "source": "a", "guide": {"others": ["b"]}}]
    stages += [{"stage": "fake", "name": "alone"}, {"stage": "fake", "name": "e", "source": "d"}]
    planned = engine.plan(check({"stages": stages}, output=tmp_path))
    assert {p.stage.name: p.behind for p in planned} == {
        "a": (), "b": ("a",), "c": ("a", "b"), "d": ("a", "b"), "alone": (), "e": ("a", "b", "d"),
    }  # fmt: skip


def test_a_checkpoint_remembers_all_that_went_into_it(tmp_path, stories):
    from pretrain.core import checkpoint

    (tmp_path / "text").mkdir()
    for number, story in enumerate(stories[:40]):
        (tmp_path / "text" / f"{number}.py").write_text(story["text"])
    small = {
        "stage": "train", "corpus": "corpus", "length": 32, "batch_rows": 2, "budget": {"steps": 2}, "save_every": 0,
    }  # fmt: skip
    model = {
        "family": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    source = [{"files": str(tmp_path / "text")}]
    first = [
        {"stage": "data", "name": "corpus", "sources": source, "validation": 0.1},
        {"stage": "data", "name": "aside", "sources": source, "validation": 0.2},
        {"stage": "tokenizer", "corpus": "corpus", "vocab_size": 300},
        small | {"name": "one", "tokenizer": "tokenizer", "model": model},
        small | {"name": "two", "init": "one"},
        {"stage": "surgery", "checkpoint": "two", "surgeries": [{"method": "g_stack", "growth": 2}]},
    ]
    records = engine.run(check({"stages": first}, output=tmp_path / "a"), say=lambda text: None, report=False).stages
    lineages = {n: checkpoint.lineage(tmp_path / "a" / n / "checkpoint") for n in ("one", "two", "surgery")}
    names = lambda lineage: [stage["name"] for stage in lineage["stages"]]  # noqa: E731
    assert names(lineages["one"]) == ["corpus", "tokenizer"]
    assert names(lineages["two"]) == ["corpus", "tokenizer", "one"]
    assert names(lineages["surgery"]) == ["corpus", "tokenizer", "one", "two"]
    assert lineages["two"]["made_by"]["name"] == "two" and lineages["two"]["made_by"]["methods"].keys() >= {"adamw"}
    assert lineages["two"]["flops"] == records["one"]["flops"] + records["two"]["flops"]
    assert lineages["two"]["tokens"] == sum(records[n]["metrics"]["tokens"] for n in ("one", "two"))
    assert records["two"]["metrics"]["flops"] == records["two"]["flops"] < lineages["two"]["flops"]
    assert lineages["surgery"]["flops"] == lineages["two"]["flops"] + records["surgery"]["flops"]
    # From outside: what the checkpoint says of itself is kept.
    outside = str(tmp_path / "a" / "surgery")
    second = [
        first[0], small | {"name": "three", "init": outside},
        {"stage": "surgery", "checkpoint": outside, "surgeries": [{"method": "g_stack", "growth": 2}]},
    ]  # fmt: skip
    records = engine.run(check({"stages": second}, output=tmp_path / "b"), say=lambda text: None, report=False).stages
    three, again = (checkpoint.lineage(tmp_path / "b" / n / "checkpoint") for n in ("three", "surgery"))
    assert names(three) == ["corpus", "tokenizer", "one", "two", "surgery"]
    assert three["flops"] == lineages["surgery"]["flops"] + records["three"]["flops"]
    assert names(again) == ["corpus", "tokenizer", "one", "two", "surgery"] and again["made_by"]["name"] == "surgery"
    assert str(tmp_path / "a" / "one") not in json.dumps(three)


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


@pytest.mark.processes
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

"""Faults: runs that are killed at any moment, go on with damaged files, lose a process, a disk or the time of day."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import begun, damaged, differing, files, killed, outcome
from test_training import equal, finish, log, weights

from pretrain.core.errors import PretrainWarning
from pretrain.data._work import Desk
from pretrain.report.data import collect

pytestmark = pytest.mark.processes

JOB = Path(__file__).with_name("killed_rank_job.py")
BOUND = 1800.0  # seconds that the long tests take at most


@pytest.fixture(scope="module")
def bases(small_run):
    return begun(small_run, 6)


# Kills


@pytest.mark.promise(
    "Faults",
    "A run that is killed, at any moment and as often as one likes, and run again makes the same corpus, tokens, weights and measures to the bit, and nothing of a killed process is left over.",
)
@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.long)])
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(small_run, kills):
    done, runs = killed(small_run, kills, seed=kills, until=time.monotonic() + BOUND)
    assert done == kills and runs


# Damage


@pytest.mark.promise(
    "Faults",
    "Whichever file of a run is damaged, cut, emptied, exchanged or deleted, going on makes the same weights, or says which file it is; never others in silence, and never a traceback.",
)
@pytest.mark.parametrize("first", range(0, 60, 10))
def test_a_damaged_file_is_named_or_changes_nothing(small_run, bases, first):
    verdicts = [damaged(small_run, bases, seed) for seed in range(first, first + 10)]
    assert [f"{case}: {verdict}" for case, verdict in verdicts if verdict.startswith("WRONG")] == []
    assert len({case for case, _ in verdicts}) == 10


@pytest.mark.long
def test_500_damaged_files_are_named_or_change_nothing(small_run, bases):
    until, wrong = time.monotonic() + BOUND, []
    for seed in range(1000, 1500):
        case, verdict = damaged(small_run, bases, seed)
        wrong += [f"{case}: {verdict}"] if verdict.startswith("WRONG") else []
        assert time.monotonic() < until, f"{seed - 1000} in {BOUND:.0f} s; {wrong}"
    assert wrong == []


def test_every_kind_of_file_is_among_those_that_are_damaged(bases):
    names = " ".join(str(path) for run in bases for path in files(run))
    for name in ("corpus.json", ".parquet", "tokens.bin", "length_P.npy", "tokenizer.json", "config.json", "model.safetensors", "stage.json",
                 "run.json", "training.json", "rank-00000.safetensors", "log.jsonl", "code.json", "checksums.json", "evaluation.json", "samples.json"):  # fmt: skip
        assert name in names, name


@pytest.mark.promise(
    "Faults",
    "A folder of a stage (corpus, tokenizer, checkpoint, export, tokens, rows, a training state) in whose place another's "
    "was put, whole and with its own checksums, is named: it is refused, passed over or made anew. `stage.json` holds the "
    "seals of the folders, a training state the address of its stage; what was written before those were opens unchecked.",
)
@pytest.mark.parametrize("kind", ["corpus", "tokenizer", "checkpoint", "tokens", "rows", "validation"])
def test_a_whole_folder_of_another_is_named_where_it_is_opened(small_run, tmp_path, kind):
    run, other = tmp_path / "run", small_run.other
    shutil.copytree(small_run.folder / "whole", run, symlinks=True)
    shutil.rmtree((run / ("model" if kind == "tokenizer" else "more")).resolve())
    (mine,), (its,) = run.glob(".tokens/*/train"), other.glob(".tokens/*/train")
    here, there = {
        "corpus": (run / "corpus" / "corpus", other / "corpus" / "corpus"),
        "tokenizer": (run / "tokenizer" / "tokenizer", other / "tokenizer" / "tokenizer"),
        "checkpoint": (run / "grown" / "checkpoint", other / "model" / "checkpoint"),
        "tokens": (mine, its),
        "rows": (mine / "rows-32", its / "rows-32"),
        "validation": (mine, mine.with_name("validation")),
    }[kind]
    aside = tmp_path / "aside"
    shutil.copytree(there, aside)
    shutil.rmtree(here)
    shutil.copytree(aside, here)
    ended = small_run.go_on(run)
    assert "Traceback" not in ended.text
    if kind in ("tokens", "rows", "validation"):
        assert ended.status == 0 and re.search(rf"^warning: {here} was replaced: .* anew$", ended.text, re.M), (
            ended.text
        )
        assert differing(small_run.first, outcome(run)) == []
    else:
        assert ended.status == 1 and re.search(
            rf"^error: .*/{kind} was replaced: it is whole, and another's; accepted: `--refresh \w+` makes it again",
            ended.text,
            re.M,
        ), ended.text


@pytest.mark.promise(
    "Faults",
    "A training state of another stage, or of another step under this one's name, is passed over with a warning.",
)
@pytest.mark.parametrize("of", ["another stage", "another step"])
def test_the_state_of_another_is_passed_over(small_run, tmp_path, of):
    run = tmp_path / "run"
    shutil.copytree(small_run.folder / "whole", run, symlinks=True)
    home = (run / "more").resolve()
    (home / "stage.json").unlink()
    states = sorted((home / "state").glob("step-*"))
    source = small_run.other / "more" / "state" / states[-1].name if of == "another stage" else states[0]
    shutil.rmtree(states[-1])
    shutil.copytree(source, states[-1])
    ended = small_run.go_on(run)
    assert ended.status == 0, ended.text
    assert re.search(
        rf"^warning: the training state .*{states[-1].name} is another stage's and passed over", ended.text, re.M
    )
    assert differing(small_run.first, outcome(run)) == []
    if of == "another stage":
        (home / "stage.json").unlink()
        shutil.rmtree(home / "state")
        shutil.copytree(small_run.other / "more" / "state", home / "state")
        ended = small_run.go_on(run)
        assert (
            ended.status == 1
            and "all training states are another stage's" in ended.text
            and "`--refresh`" in ended.text
        )


def test_what_nothing_reads_again_is_named_when_the_run_comes_to_it(small_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run.folder / "whole", run, symlinks=True)
    shutil.rmtree(run / "more" / "checkpoint")
    shutil.copytree(run / "grown" / "checkpoint", run / "more" / "checkpoint")
    ended = small_run.go_on(run)
    assert ended.status == 0 and re.search(r"^warning: .*/checkpoint is not as the stage has left it", ended.text, re.M)


def test_a_record_of_before_has_no_seals_and_its_folders_open(small_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run.folder / "whole", run, symlinks=True)
    shutil.rmtree((run / "evaluate").resolve())
    path = run / "more" / "stage.json"
    record = json.loads(path.read_text())
    assert record.pop("folders").keys() == {"checkpoint"} and record.pop("seal")
    path.write_text(json.dumps(record))
    assert small_run.go_on(run).status == 0


def changed_digit(path):
    text = path.read_text()
    place = re.search(r'"bits_per_byte": \d', text).end() - 1
    path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])


@pytest.mark.promise(
    "Faults",
    "A run that comes to a finished stage says which of its measures, samples and logs is not as the stage has left it; the report leaves it out. A damaged `stage.json` is an error.",
)
def test_a_digit_changed_in_what_a_finished_stage_says_is_named(small_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run.folder / "whole", run, symlinks=True)
    changed_digit(run / "evaluate" / "evaluation.json")
    ended = small_run.go_on(run)
    assert ended.status == 0 and re.search(
        r"^warning: .*evaluation.json is not as the stage has left it", ended.text, re.M
    )
    assert [row["name"] for row in collect(run)["evaluations"]] == []
    changed_digit(run / "evaluate" / "stage.json")
    ended = small_run.go_on(run)
    assert ended.status == 1 and "stage.json is damaged" in ended.text and "`--refresh evaluate`" in ended.text
    again = small_run.warm.run("run", small_run.recipe, "--output", run, "--refresh", "evaluate")
    assert again.status == 0 and differing(small_run.first, outcome(run)) == []


@pytest.mark.promise(
    "Faults",
    "What a data operation has computed before an interrupt is found again; where that is damaged it is made anew, with a warning.",
)
def test_what_an_operation_has_kept_is_found_again_unless_it_is_damaged(tmp_path):
    makes = []

    def make():
        makes.append(1)
        return {"nll": [1.5, 2.5], "flops": 10}

    desk = Desk(tmp_path)
    assert desk.kept("a", make)["nll"] == desk.kept("a", make)["nll"] == [1.5, 2.5] and len(makes) == 1
    assert desk.flops == 10
    whole = (tmp_path / "a.json").read_text()
    for number, text in enumerate([whole.replace("2.5", "3.5"), whole[:20], "[]", '{"nll": [1], "flops": 1}'], start=2):
        (tmp_path / "a.json").write_text(text)
        with pytest.warns(PretrainWarning, match=r"a\.json.* made anew"):
            assert desk.kept("a", make)["nll"] == [1.5, 2.5] and len(makes) == number
    shutil.copy(tmp_path / "a.json", tmp_path / "b.json")  # another one's, whole
    with pytest.warns(PretrainWarning, match=r"b\.json"):
        desk.kept("b", make)


def test_an_estimate_of_a_damaged_checkpoint_leaves_the_telling_to_the_stage(small_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run.folder / "whole", run, symlinks=True)
    (run / "grown" / "checkpoint" / "config.json").write_text("[]")
    (run / "more").resolve().joinpath("stage.json").unlink()
    ended = small_run.go_on(run)
    assert ended.status == 1 and "Traceback" not in ended.text
    assert re.search(
        r"^error: stage 'more': .*config.json is damaged or was replaced.*`--refresh grown`", ended.text, re.M
    )


# Other faults


BROKEN_LOADER = """
import errno
from pretrain.training.loader import Loader
plain = Loader._prepare
def prepare(self, step, *more):
    if step == 4:
        raise OSError(errno.EIO, "Input/output error", "tokens.bin")
    return plain(self, step, *more)
Loader._prepare = prepare
"""


@pytest.mark.promise(
    "Faults", "Where a loader's worker fails, that is one line, and the next run goes on from the newest state."
)
def test_a_failure_of_a_loaders_worker_is_one_line_and_the_next_run_goes_on(small_run, tmp_path):
    ended = small_run.warm.run("run", small_run.recipe, "--output", tmp_path / "run", prelude=BROKEN_LOADER)
    assert ended.status == 1 and "Traceback" not in ended.text
    assert ended.text.splitlines()[-1] == "error: stage 'model': Input/output error (tokens.bin); run again to go on"
    assert small_run.go_on(tmp_path / "run").status == 0 and not differing(small_run.first, outcome(tmp_path / "run"))


JUMPS = """
import datetime, itertools, random, time
day, rng, plain = 86400.0, random.Random(%d), time.time
jump = lambda: rng.choice((-400, -1, 0, 1, 400)) * day
time.time = lambda: plain() + jump()
import pretrain.engine as engine
class Jumping(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.fromtimestamp(plain() + jump(), tz)
engine.datetime = Jumping
"""


@pytest.mark.promise("Faults", "A clock that jumps, forwards or backwards, changes nothing of what is made.")
def test_a_clock_that_jumps_changes_nothing(small_run, tmp_path):
    ended = small_run.warm.run(
        "run", small_run.recipe, "--output", tmp_path / "run", at=small_run.events // 2, prelude=JUMPS % 1
    )
    assert ended.status == -signal.SIGKILL
    ended = small_run.warm.run("run", small_run.recipe, "--output", tmp_path / "run", prelude=JUMPS % 2)
    assert ended.status == 0 and "Traceback" not in ended.text, ended.text
    assert not differing(small_run.first, outcome(tmp_path / "run"))


@pytest.mark.promise(
    "Faults",
    "Under `torchrun --max-restarts`, where one process is killed, all begin again from the newest state and end with the same weights to the bit.",
)
def test_a_killed_process_among_several_is_started_again(prepared, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=2",
        str(JOB),
    ]
    for name, job in (("killed", JOB), ("whole", JOB.with_name("training_job.py"))):
        subprocess.run(
            [*command[:-1], str(job), str(tmp_path / name), str(prepared), "8", "ddp"],
            check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert [row["loss"] for row in log(tmp_path / "killed")] == [row["loss"] for row in log(tmp_path / "whole")]


@pytest.mark.promise(
    "Determinism", "A training that goes on with 1, 2 or 4 processes has the losses of one process, to rounding."
)
def test_a_training_that_goes_on_with_4_and_then_2_processes_has_the_losses_of_one(prepared, tmp_path):
    for steps, processes in ((3, 1), (6, 4), (8, 2)):
        finish(tmp_path / "changing", prepared, steps, "ddp", "0", processes=processes)
        finish(tmp_path / "alone", prepared, steps, "ddp", "0")
    one, other = ([row["loss"] for row in log(tmp_path / name)] for name in ("alone", "changing"))
    assert len(one) == 8 and other == pytest.approx(one, rel=1e-4)

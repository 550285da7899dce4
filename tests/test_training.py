"""The training loop: it learns, resumes bit for bit, counts, stops, and several processes agree with one."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import select
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_job import parts

from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError, PretrainWarning
from pretrain.core.meter import Meter, count_flops
from pretrain.corpus.shards import Shards
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.optim.optimizers.adamw import AdamW
from pretrain.optim.schedules.constant import Constant
from pretrain.optim.schedules.cosine import Cosine
from pretrain.policies import Policy
from pretrain.training import loop, running, state
from pretrain.training.budget import Budget
from pretrain.training.loader import Loader
from pretrain.training.loop import Settings, train

JOB = Path(__file__).with_name("training_job.py")


WARM = f"""
import os, sys
sys.path.insert(0, {str(JOB.parent)!r})
from pathlib import Path
import tensorboard, training_job
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

for line in sys.stdin:
    folder, prepared, steps, *more = line.rstrip().split("\\t")
    child = os.fork()
    if not child:
        training_job.main(Path(folder), Path(prepared), int(steps), *more[:1], *map(float, more[1:2]))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forked:
    """A training in a fork of a process that has imported what it needs, which takes longer than the training."""

    warm: subprocess.Popen | None = None

    def __init__(self, *words):
        cls = type(self)
        if cls.warm is None:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            cls.warm = subprocess.Popen([sys.executable, "-c", WARM], env=environment, text=True, **pipes)
        print(*words, sep="\t", file=cls.warm.stdin, flush=True)
        self.pid, self.status = int(cls.warm.stdout.readline()), None

    def poll(self):
        if self.status is None and select.select([self.warm.stdout], [], [], 0)[0]:
            self.wait()
        return self.status

    def wait(self):
        if self.status is None:
            self.status = int(self.warm.stdout.readline())
        return self.status

    def send_signal(self, number):
        if self.status is None:
            os.kill(self.pid, number)


@pytest.fixture(scope="module", autouse=True)
def warm():
    yield
    if Forked.warm is not None:
        Forked.warm.stdin.close()
        Forked.warm.wait()
        Forked.warm.stdout.close()
        Forked.warm = None


def start(folder, prepared, steps=20, *more, processes=1):
    if processes == 1:
        return Forked(folder, prepared, steps, *more)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(JOB)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, str(folder), str(prepared), str(steps), *more], env=environment)


def finish(*arguments, **more):
    assert start(*arguments, **more).wait() == 0


def weights(folder):
    return load_file(folder / "checkpoint" / "model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log(folder, event="step"):
    return [row for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if row["event"] == event]


def small(
    prepared,
    tiny,
    folder,
    *,
    settings=None,
    objective=None,
    policies=(),
    optimizer=None,
    batch_rows=8,
    micro_rows=8,
    family="llama",
    **model,
):
    vocabulary = Vocabulary.of(load_tokenizer(prepared / "tokenizer"))
    objective = objective or CausalLM()
    net = tiny(family, vocab_size=512, **model)
    loader = Loader(
        Shards(prepared / "tokens" / "train"),
        [objective],
        vocabulary,
        length=64,
        batch_rows=batch_rows,
        micro_rows=micro_rows,
    )
    settings = settings or Settings(budget=Budget(steps=5), save_every=0, bar=False)
    return train(net, loader, [objective], optimizer or AdamW(lr=1e-2), Constant(), settings, folder, policies=policies)


def test_what_a_micro_batch_costs_is_worked_out_once_a_step(prepared, tiny, tmp_path, monkeypatch):
    asked, known = [], Meter.known

    @dataclass(frozen=True)
    class Begin(Policy):
        name = "begin"

        def before_step(self, training, state, batches):
            asked.clear()

    def counted(self, work, zeros=()):
        asked.append(work)
        return known(self, work, zeros)

    monkeypatch.setattr(Meter, "known", counted)
    small(prepared, tiny, tmp_path, micro_rows=2, policies=[Begin()])
    assert len([work for work in asked if not work.shapes.startswith("optimizer")]) == 8 // 2


@dataclass(frozen=True)
class Telling(CausalLM):
    """Reports the parts that it is told to."""

    tells: tuple[tuple[str, float], ...] = ()
    name = "telling"

    def loss(self, model, batch, modules=None):
        parts = {part: torch.tensor(value) for part, value in self.tells}
        return super().loss(model, batch, modules)._replace(parts=parts)


def test_parts_that_several_objectives_have_are_told_apart(prepared, tiny, tmp_path):
    class Other(Telling):
        name = "other"

    objectives = [
        Telling(tells=(("soft", 1.0), ("hard", 2.0))),
        Other(tells=(("soft", 4.0),)),
        Telling(tells=(("soft", 8.0),)),
    ]
    vocabulary = Vocabulary.of(load_tokenizer(prepared / "tokenizer"))
    loader = Loader(
        Shards(prepared / "tokens" / "train"), objectives, vocabulary, length=64, batch_rows=8, micro_rows=4
    )
    settings = Settings(budget=Budget(steps=1), save_every=0, bar=False)
    train(tiny("llama", vocab_size=512), loader, objectives, AdamW(lr=1e-2), Constant(), settings, tmp_path)
    (row,) = log(tmp_path)
    assert row["parts"] == pytest.approx({"telling.1/soft": 1, "hard": 2, "other/soft": 4, "telling.3/soft": 8})


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory):
    """In a process of its own: what others go on to must be the same whatever the seed of Python's hashes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run([sys.executable, str(JOB), str(folder), str(prepared), "20"], check=True)
    return folder


def killed_and_resumed(folder, prepared, undisturbed, kills, seed):
    rng = random.Random(seed)
    for _ in range(kills):
        process = start(folder, prepared)
        aim = rng.randrange(1, 19)
        while process.poll() is None and (not (folder / "log.jsonl").exists() or len(log_lines(folder)) < aim):
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finish(folder, prepared)
    assert equal(weights(folder), weights(undisturbed))
    mine, theirs = ([(r["step"], r["loss"]) for r in log(f)] for f in (folder, undisturbed))
    assert mine == theirs


def log_lines(folder):
    return (folder / "log.jsonl").read_text().splitlines()


def test_it_learns_and_logs(undisturbed):
    steps, evaluations = log(undisturbed), log(undisturbed, "evaluation")
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.7
    assert [row["step"] for row in evaluations] == [7, 14, 20]
    assert evaluations[-1]["metrics"]["bits_per_byte"] > 0
    assert {
        "tokens",
        "flops",
        "seconds",
        "grad_norm",
        "lr",
        "tokens_per_second",
        "mfu",
        "memory_bytes",
        "progress",
    } <= steps[0].keys()
    assert evaluations[-1]["measuring"] > steps[-1]["measuring"] > steps[6]["measuring"] == 0, (
        "of the evaluations so far"
    )
    assert list((undisturbed / "tensorboard").iterdir())
    assert len(list((undisturbed / "state").iterdir())) == 2


@pytest.mark.processes
@pytest.mark.promise("Determinism", "A training that is resumed after any of its steps gives the same bits")
@pytest.mark.bits
def test_killed_twice_it_ends_with_the_same_weights(tmp_path, prepared, undisturbed):
    killed_and_resumed(tmp_path, prepared, undisturbed, 2, seed=0)


@pytest.mark.long
def test_killed_at_ten_random_moments_it_ends_with_the_same_weights(tmp_path, prepared, undisturbed):
    for seed in range(10):
        (tmp_path / str(seed)).mkdir()
        killed_and_resumed(tmp_path / str(seed), prepared, undisturbed, 1 + seed % 3, seed)


@pytest.mark.processes
@pytest.mark.promise(
    "Faults", "SIGINT, SIGTERM and SIGHUP (a terminal that is closed) save the state of a training first."
)
@pytest.mark.bits
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.skipif(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, reason="under nohup")
def test_an_interrupt_saves_and_the_next_run_goes_on(tmp_path, prepared, undisturbed, number):
    process = start(tmp_path, prepared)
    while process.poll() is None and (not (tmp_path / "log.jsonl").exists() or len(log_lines(tmp_path)) < 5):
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait() == 128 + number
    saved = state.newest(tmp_path / "state")
    assert saved is not None and json.loads((saved / "training.json").read_text())["step"] >= 5
    finish(tmp_path, prepared)
    assert equal(weights(tmp_path), weights(undisturbed))


@pytest.mark.promise(
    "Faults",
    "A training state that is damaged is passed over with a warning for the one before; where all are, training begins again only with `--refresh`.",
)
def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path, prepared, undisturbed):
    finish(tmp_path, prepared, 12)
    for path in sorted((tmp_path / "state").glob("step-*"))[-1:]:
        data = (path / "rank-00000.safetensors").read_bytes()
        (path / "rank-00000.safetensors").write_bytes(data[:-9])
    assert state.newest(tmp_path / "state").name == "step-000000009"


@pytest.mark.promise(
    "Faults",
    "What the log of a training told before an interrupt is checked when it goes on; a log that is damaged or gone is named, kept beside the new one, and drawn in no curve.",
)
@pytest.mark.parametrize("damaged", ["a digit", "the end", "all"])
def test_a_log_that_was_changed_while_training_stood_still_is_set_aside(tiny, prepared, tmp_path, damaged):
    def go(steps):
        small(prepared, tiny, tmp_path, settings=Settings(budget=Budget(steps=steps), save_every=2, bar=False))

    go(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PretrainWarning)
        go(6)
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3, 4, 5, 6]
    path = tmp_path / "log.jsonl"
    before = path.read_text()
    if damaged == "all":
        path.unlink()
    else:
        at = before.index('"loss": ') + 8
        path.write_text(before[:at] + "9" + before[at + 1 :] if damaged == "a digit" else before[: len(before) // 2])
    with pytest.warns(
        PretrainWarning, match=r"log\.jsonl is (damaged, it is kept as log\.damaged\.jsonl|gone): training"
    ):
        go(8)
    assert [row["step"] for row in log(tmp_path)] == [7, 8]
    assert (tmp_path / "log.damaged.jsonl").exists() == (damaged != "all")


@pytest.mark.processes
@pytest.mark.promise(
    "Determinism", "A training that goes on with 1, 2 or 4 processes has the losses of one process, to rounding"
)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_to_the_curve_of_one(tmp_path, prepared, strategy):
    finish(tmp_path / "one", prepared, 8, "ddp", "0")
    finish(tmp_path / "two", prepared, 8, strategy, "0", processes=2)
    one, two = ([row["loss"] for row in log(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)
    assert [r["tokens"] for r in log(tmp_path / "one")] == [r["tokens"] for r in log(tmp_path / "two")]
    assert log(tmp_path / "two")[-1]["flops"] == log(tmp_path / "one")[-1]["flops"]
    for name, value in weights(tmp_path / "one").items():
        assert torch.allclose(value, weights(tmp_path / "two")[name], atol=2e-3), name


def test_micro_batches_give_the_gradient_of_the_whole_batch(tiny, prepared, tmp_path):
    losses = []
    for micro_rows in (8, 2):
        small(prepared, tiny, tmp_path / str(micro_rows), micro_rows=micro_rows)
        losses.append([row["loss"] for row in log(tmp_path / str(micro_rows))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_activation_checkpointing_changes_flops_and_not_losses(tiny, prepared, tmp_path):
    rows = {}
    for on in (False, True):
        settings = Settings(budget=Budget(steps=3), save_every=0, bar=False, checkpointing=on)
        small(prepared, tiny, tmp_path / str(on), settings=settings)
        rows[on] = log(tmp_path / str(on))
    assert [r["loss"] for r in rows[True]] == pytest.approx([r["loss"] for r in rows[False]], rel=1e-5)
    assert rows[True][-1]["flops"] > 1.1 * rows[False][-1]["flops"]


@pytest.mark.parametrize("unit", ["tokens", "flops", "seconds", "steps"])
def test_each_budget_stops_training_when_it_is_spent(tiny, prepared, tmp_path, unit):
    limit = {"tokens": 2000, "flops": 2e8, "seconds": 0.3, "steps": 4}[unit]
    training = small(
        prepared, tiny, tmp_path, settings=Settings(budget=Budget(**{unit: limit}), save_every=0, bar=False)
    )
    rows = log(tmp_path)
    assert training.spent[unit] >= limit
    before = {"steps": "step"}.get(unit, unit)
    assert len(rows) == 1 or rows[-2][before] < limit


def test_the_flops_of_a_step_are_those_of_its_forward_and_backward_pass(tiny, prepared, tmp_path):
    seen = []

    @dataclass(frozen=True)
    class Watch(Policy):
        name = "watch"

        def before_step(self, training, state, batches):
            seen.append(batches)

    training = small(prepared, tiny, tmp_path, policies=[Watch()], micro_rows=2)
    spent = [
        sum(count_flops(lambda b=b: CausalLM().loss(training.model, b).value.backward())[1] for b in batches)
        for batches in seen
    ]
    assert len(set(spent)) > 1  # rows differ in how many tokens have a target
    assert [row["flops"] for row in log(tmp_path)] == list(itertools.accumulate(spent))


@dataclass
class Clock:
    """A time that stands still but for the loader, which takes what is asked of it."""

    now: float = 0.0

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize("slower", [1, 3])
def test_seconds_give_the_same_schedule_whatever_the_speed_and_leave_compilation_out(
    prepared, tmp_path, monkeypatch, slower
):
    model, loader, objectives, optimizer, _, settings, folder = parts(tmp_path, prepared, 1)
    clock, made = Clock(), loader.step
    for module in (loop, running):
        monkeypatch.setattr(module, "time", clock)

    def slow(number, progress):
        late = folder.exists() and clock.now > 500 + 20
        clock.now += 250 if number < 2 else 1 * (slower if late else 1)
        return made(number, progress)

    loader.step = slow
    settings = replace(settings, budget=Budget(seconds=40), save_every=0, evaluate_every=0, log_every=1)
    train(model, loader, objectives, optimizer, Cosine(warmup=0.25, final=0), settings, folder)
    rows = log(folder)
    assert 1 <= [row["seconds"] for row in rows].count(0) <= 3  # the steps that count and compile

    def factor(t):
        return t / 0.25 if t < 0.25 else (1 + math.cos(math.pi * min(1, (t - 0.25) / 0.75))) / 2

    for before, row in itertools.pairwise(rows[3:]):
        low, high = sorted(factor(r["seconds"] / 40) for r in (before, row))  # as the step begins, and as it ends
        assert low - 0.06 <= row["lr"] / optimizer.lr <= high + 0.06, row["seconds"]  # a step is 1/10 of the warm-up
    assert rows[3]["lr"] < 0.25 * optimizer.lr and rows[-1]["seconds"] >= 40


def test_policies_see_each_step_and_remember_over_a_resume(tiny, prepared, tmp_path):
    seen = []

    @dataclass(frozen=True)
    class Watch(Policy):
        name = "watch"

        def start(self, training, state):
            state.setdefault("sum", torch.zeros(2))
            state.setdefault("steps", [])

        def before_step(self, training, state, batches):
            batches[0]["token_weight_BL"] = torch.full(batches[0]["target_BL"].shape, 2.0)

        def after_step(self, training, state, batches, losses):
            state["sum"] += torch.tensor([1.0, float(losses[0].nll_BL.sum())])
            state["steps"].append(training.step)
            seen.append(float(losses[0].value) / float(losses[0].nll_BL.sum() / batches[0]["weight"]))

    for steps in (4, 6):
        settings = Settings(budget=Budget(steps=steps), save_every=2, bar=False)
        training = small(prepared, tiny, tmp_path, settings=settings, policies=[Watch()])
    assert training.state["watch"]["steps"] == [1, 2, 3, 4, 5, 6] and training.state["watch"]["sum"][0] == 6
    assert seen == pytest.approx([2.0] * 6, rel=1e-5)


@pytest.mark.parametrize("given", [{}, {"tokens": 1, "steps": 1}, {"flops": 0}])
def test_a_wrong_budget_is_refused(given):
    with pytest.raises(PretrainError, match="accepted"):
        Budget(**given)


def test_a_wrong_precision_is_refused(tiny, prepared, tmp_path):
    with pytest.raises(PretrainError, match="precision 'half': accepted: auto, float32, bfloat16"):
        small(prepared, tiny, tmp_path, settings=Settings(budget=Budget(steps=1), precision="half", bar=False))


@pytest.mark.processes
def test_training_from_shards_needs_no_data_or_recipe_library(tmp_path, prepared):
    block = (
        "import sys; sys.modules.update({name: None for name in ('datasets', 'pyarrow', 'pydantic', 'tensorboard')}); "
    )
    program = (
        block
        + f"import sys; sys.path.insert(0, {str(JOB.parent)!r}); import training_job as j; from pathlib import Path; "
    )
    program += f"j.main(Path({str(tmp_path)!r}), Path({str(prepared)!r}), 2)"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert len(log(tmp_path)) == 2

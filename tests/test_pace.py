"""A training beside its plan: what its speed comes to, what its time goes to, what measurements may take, an interrupt."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import dataclass
from types import SimpleNamespace

import psutil
import pytest
import torch

from pretrain.core import hardware
from pretrain.core.batch import Vocabulary
from pretrain.core.quick import machine
from pretrain.core.quick.plan import Plan
from pretrain.corpus.shards import Shards
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.optim.optimizers.adamw import AdamW
from pretrain.optim.schedules.constant import Constant
from pretrain.policies import Policy
from pretrain.training import state as states
from pretrain.training.budget import MEASURING, Budget
from pretrain.training.interrupts import Interrupts, tell
from pretrain.training.loader import Loader
from pretrain.training.loop import Settings, train
from pretrain.training.measuring import Measuring
from pretrain.training.pace import Pace, projection, stopping, times

CPU = torch.device("cpu")
TIGHT = Plan(steps=1e6, flops=1e15, seconds=100.0, measurement=0.0)  # far more than any machine makes here


@dataclass(frozen=True)
class Stopping(Policy):
    """Asks the training to stop, as Ctrl-C does, within the step of number `at`."""

    name = "stopping"
    at: int = 0

    def before_update(self, training, state):
        if training.step == self.at:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def trained(prepared, tiny):
    """`trained(folder, budget=…, evaluate=…, policies=…)`, which trains a small model, and what it says in `.said`."""
    said = []

    def run(folder, *, evaluate=None, policies=(), say=said.append, **settings):
        loader = Loader(
            Shards(prepared / "tokens" / "train"), [CausalLM()], Vocabulary.of(load_tokenizer(prepared / "tokenizer")),
            length=32, batch_rows=2,
        )  # fmt: skip
        settings = Settings(**{"budget": Budget(steps=6), "save_every": 100, "bar": False} | settings)
        said.clear()
        return train(
            tiny("llama", vocab_size=512), loader, [CausalLM()], AdamW(lr=1e-2), Constant(), settings, folder,
            policies=policies, evaluate=evaluate, say=say,
        )  # fmt: skip

    run.said = said
    return run


def test_from_where_a_training_goes_on_is_told(trained, tmp_path):
    trained(tmp_path, save_every=2, budget=Budget(steps=4))
    assert not any("going on" in line for line in trained.said)
    trained(tmp_path, save_every=2)
    assert trained.said[0] == "going on from step 4"


def rows(folder, event):
    return [row for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if row["event"] == event]


def kept(folder):
    return json.loads((states.newest(folder / "state") / "training.json").read_text())


class Fake(SimpleNamespace):
    """Of a training what its pace is told by."""

    @property
    def stopping(self):
        return self.interrupts.agreed


def running(budget, plan, *, steps, seconds, flops=0.0):
    spent = {"steps": steps, "seconds": seconds, "flops": flops, "tokens": 0}
    settings = SimpleNamespace(plan=plan, budget=budget)
    world = SimpleNamespace(device=CPU, size=1, main=True, sum=list)
    return Fake(settings=settings, spent=spent, timed=steps, step=steps, progress=budget.progress(spent), world=world)


PLAN = Plan(steps=1000, flops=1e12, seconds=100.0, measurement=1.0)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (
            25.0,
            "the 1 min 40 s make about 40 steps, where 1,000 were planned: 4.0% of the FLOPs",
        ),  # ten steps took them
        (2.0, "make about 500 steps, where 1,000 were planned: 50% of the FLOPs"),
        (1.2, ""),
        (0.8, ""),
        (0.5, "make about 2,000 steps, where 1,000 were planned: 200% of the FLOPs"),
    ],
)
def test_what_a_budget_of_seconds_comes_to_is_said_where_it_is_far_from_the_plan(seconds, words):
    line, slower = projection(running(Budget(seconds=100), PLAN, steps=10, seconds=seconds, flops=1e10), seconds / 10)
    assert line.endswith(words) and bool(line) == bool(words)
    assert slower == (seconds > 1)


@pytest.mark.parametrize(
    ("seconds", "words"), [(5.0, "training takes about 8 min 20 s, where 1 min 40 s were"), (1.2, ""), (0.1, "")]
)
def test_of_other_budgets_it_is_said_when_they_take_far_longer(seconds, words):
    line, _ = projection(running(Budget(steps=1000), PLAN, steps=10, seconds=seconds), seconds / 10)
    assert words in line and bool(line) == bool(words)


def test_it_is_said_once_and_when_the_speed_is_known(monkeypatch):
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    pace = Pace(running(Budget(seconds=100), PLAN, steps=0, seconds=0.0))
    pace.training = running(Budget(seconds=100), PLAN, steps=2, seconds=2.0, flops=1e9)
    assert not pace.line()  # neither ten steps nor a fifth of the budget
    for steps, seconds, said in ((2, 24.0, True), (3, 30.0, False)):
        pace.training = running(Budget(seconds=100), PLAN, steps=steps, seconds=seconds, flops=1e9)
        assert bool(pace.line()) == said
    assert Pace(running(Budget(seconds=100), None, steps=50, seconds=90.0)).line() == ""


def test_the_speed_is_that_of_the_part_which_runs():
    pace = Pace(running(Budget(seconds=100), PLAN, steps=20, seconds=40.0, flops=2e10))  # when it was busy
    pace.training = running(Budget(seconds=100), PLAN, steps=120, seconds=50.0, flops=12e10)
    assert pace.line() == ""  # 620 steps of 1,000
    pace = Pace(running(Budget(seconds=100), PLAN, steps=20, seconds=40.0, flops=2e10))
    pace.training = running(Budget(seconds=100), PLAN, steps=22, seconds=44.0, flops=2.2e10)
    assert "make about 50 steps" in pace.line()


def test_a_machine_that_becomes_busy_later_is_told_too(monkeypatch):
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    pace = Pace(running(Budget(seconds=100), PLAN, steps=0, seconds=0.0))

    def at(steps, seconds):
        pace.training = running(Budget(seconds=100), PLAN, steps=steps, seconds=seconds, flops=steps * 1e9)
        return pace.line()

    assert at(100, 10.0) == "" == at(101, 12.0)  # as planned; and a slow moment is no course
    assert "make about 182 steps" in at(110, 21.0)
    assert at(111, 40.0) == "", "once"


@pytest.mark.parametrize(
    ("threads", "cores", "load", "words"),
    [
        (16, 2, 1.0, "OMP_NUM_THREADS=2"),  # more than the process may use
        (2, 2, 4.2, "OMP_NUM_THREADS=1"),  # others want both cores
        (8, 8, 12.0, "torch has 8 threads, and 4 cores of 8 are free for them (load 12.0): OMP_NUM_THREADS=4"),
        (2, 2, 2.1, ""), (1, 2, 9.0, ""), (4, 8, 4.0, ""),
    ],
)  # fmt: skip
def test_threads_that_outnumber_the_free_cores_are_told(monkeypatch, threads, cores, load, words):
    monkeypatch.setattr(machine.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    line = machine.crowding(threads)
    assert words in line and bool(line) == bool(words)


def free_hands(monkeypatch, load, percent):
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "")  # so that what is set here is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: percent)


@pytest.mark.parametrize(
    ("load", "percent", "policy"),
    [(3.0, 90.0, "passive"), (0.1, 90.0, None), (1.5, 3.0, None)],
    ids=["busy", "busy for a moment", "busy before"],
)
def test_threads_sleep_while_they_wait_where_others_want_the_cores(monkeypatch, load, percent, policy):
    free_hands(monkeypatch, load, percent)
    machine.share_cores()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    told = machine.crowding(4)
    assert ("OMP_NUM_THREADS" in told) == (policy is None) and (policy is None or told.startswith("; others want"))


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT"])
def test_how_threads_wait_is_left_to_who_says_it(monkeypatch, name):
    free_hands(monkeypatch, 9.0, 100.0)
    monkeypatch.setenv(name, "2")
    machine.share_cores()
    assert os.environ.get("OMP_WAIT_POLICY") == ("2" if name == "OMP_WAIT_POLICY" else None)


def test_a_training_tells_early_how_far_from_its_plan_it_is(trained, tmp_path):
    training = trained(tmp_path, budget=Budget(seconds=0.5), plan=TIGHT)
    (line,) = trained.said
    assert "where 1,000,000 were planned" in line
    assert re.fullmatch(r"training 0\.\d s, (measuring .*, )?(preparing .* s, )?.*total .* s", times(training))


def simulated(each, *, step=0.125, seconds=100.0, plan=None, measured=0, every=0.04):
    """How many held-out measurements of so many seconds a training makes, and the seconds they take; what it says."""
    said, training = [], running(Budget(seconds=seconds), plan, steps=0, seconds=0.0)
    training.measuring, training.measured, training.settings.evaluate_every = 0.0, measured, every
    measuring = Measuring(training, SimpleNamespace(say=said.append), lambda trainee: {})
    while training.progress < 1:
        training.spent["steps"] += 1
        training.spent["seconds"] += step
        training.timed += 1
        training.progress = training.settings.budget.progress(training.spent)
        if measuring.due(done=training.progress >= 1):
            training.measuring, training.measured = training.measuring + each, training.measured + 1
    return training.measured, training.measuring, said


def test_measurements_are_thinned_to_their_share_of_a_budget_of_seconds():
    assert simulated(0.9) == (25, pytest.approx(22.5), [])
    count, seconds, said = simulated(4.0)
    assert count == 6 and seconds <= MEASURING * 100.0
    (line,) = said
    assert "takes about 4.0 s: some are left out, so that they take no more than 25% of the 1 min 40 s" in line
    assert simulated(60.0)[:2] == (2, 120.0)  # nobody knew of the first
    planned = Plan(steps=1000, flops=1e9, seconds=100.0, measurement=60.0)
    assert simulated(60.0, plan=planned)[:2] == (1, 60.0)
    busy = Plan(steps=10_000, flops=1e9, seconds=100.0, measurement=2.0)  # steps take ten times as long
    assert simulated(20.0, plan=busy)[0] == 1


def test_of_a_budget_of_steps_all_measurements_are_made(trained, tmp_path):
    long = Plan(steps=5, flops=1e9, seconds=1.0, measurement=60.0)
    given = {"evaluate": lambda trainee: {"loss": 1.0}, "plan": long}
    assert trained(tmp_path / "steps", budget=Budget(steps=5), evaluate_every=1, **given).measured == 5
    assert trained(tmp_path / "seconds", budget=Budget(seconds=0.2), evaluate_every=0.1, **given).measured == 1
    assert any("a held-out measurement takes about" in line for line in trained.said)


def test_several_processes_measure_where_the_first_can_afford_it_and_none_was_asked_to_stop():
    training = running(Budget(seconds=100), PLAN, steps=10, seconds=50.0)
    training.measured, training.measuring, training.settings.evaluate_every = 1, 30.0, 0.1
    evaluated = []
    measuring = Measuring(training, SimpleNamespace(say=print), evaluated.append)
    for firsts, due in ((1.0, True), (0.0, False)):
        training.world = SimpleNamespace(main=False, size=2, sum=lambda values, first=firsts: [first + sum(values)])
        assert measuring._affordable() is due
    training.world.sum = lambda values: [1.0 + sum(values)]  # another one was asked
    training.interrupts, training.unmeasured = Interrupts(), True
    measuring.make()
    assert not evaluated and training.unmeasured


def test_there_is_one_yardstick_for_all_parts_and_no_share_above_the_whole(trained, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(hardware, "matrix_rate", lambda device: measured.append(device) or 10.0)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, policies=[Stopping(2)])
    trained(tmp_path, policies=[Stopping(2)])
    assert len(measured) == 1 and list(kept(tmp_path)["rates"].values()) == [10.0]
    assert [row["mfu"] for row in rows(tmp_path, "step")] == [1.0] * 6


def test_one_clock_counts_all_parts(trained, tmp_path, capsys):
    evaluate = lambda trainee: time.sleep(0.05) or {"loss": 1.0}  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, evaluate=evaluate, evaluate_every=1, policies=[Stopping(2)])
    before = kept(tmp_path)["elapsed"]
    training = trained(tmp_path, evaluate=evaluate, evaluate_every=1, begun=time.perf_counter() - 5.0, bar=True)
    steps = rows(tmp_path, "step")
    clock = [row["elapsed"] for row in steps]
    assert clock == sorted(clock) and clock[2] <= before + 0.1 and clock[3] >= before + 5.0
    assert steps[-1]["seconds"] < 1.0 and rows(tmp_path, "evaluation")[-1]["elapsed"] > clock[-1]
    assert training.opening >= 5.0 and training.measuring >= 6 * 0.05
    assert training.elapsed > before + 5.0 + 4 * 0.05  # steps 1 and 2 were measured before
    assert "preparing 5." in times(training)


def test_states_of_before_open(trained, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, policies=[Stopping(2)])
    load, new = states.load, ("elapsed", "opening", "timed", "measuring", "measured", "unmeasured", "rates")

    def older(*given):
        record, policies = load(*given)
        return {name: value for name, value in record.items() if name not in new}, policies

    monkeypatch.setattr(states, "load", older)
    training = trained(tmp_path, policies=[Stopping(2)])
    assert training.step == 6 and training.timed >= 3 and training.before <= training.seconds


def test_an_interrupt_is_answered_at_once_and_the_state_saved_before_any_measurement(trained, tmp_path, capsys):
    evaluated = []

    def evaluate(trainee):
        evaluated.append(trainee.training)
        return {"loss": 1.0}

    often = {"evaluate": evaluate, "evaluate_every": 3}
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, policies=[Stopping(2)], **often)  # in the third step, after which it would be measured
    assert not evaluated and kept(tmp_path)["step"] == 3 and kept(tmp_path)["unmeasured"]
    assert "stopping: the state is saved after this step; after another Ctrl-C" in capsys.readouterr().err
    trained(tmp_path, policies=[Stopping(2)], **often)
    assert [row["step"] for row in rows(tmp_path, "evaluation")] == [3, 6] and evaluated == [False, False]


def test_an_interrupt_ends_a_measurement_that_is_made_when_the_training_goes_on(trained, tmp_path, capsys):
    whole = trained(tmp_path / "whole", evaluate=lambda trainee: {"loss": 1.0}, evaluate_every=3)

    for answers, stopped in ((["cut"], 3), (["cut"], 3), (["good", "cut"], 6)):
        given = iter(answers)

        def evaluate(trainee, given=given):
            if next(given) == "cut":
                signal.raise_signal(signal.SIGINT)
                raise AssertionError("went on measuring")
            return {"loss": 1.0}

        with pytest.raises(KeyboardInterrupt, match=f"after step {stopped}"):
            trained(tmp_path / "cut", evaluate=evaluate, evaluate_every=3)
        assert "the state is saved now, and measured when it goes on" in capsys.readouterr().err
        assert kept(tmp_path / "cut")["unmeasured"] and kept(tmp_path / "cut")["step"] == stopped
    cut = trained(tmp_path / "cut", evaluate=lambda trainee: {"loss": 1.0}, evaluate_every=3)
    logs = [[(row["step"], row.get("loss")) for row in rows(tmp_path / name, "step")] for name in ("whole", "cut")]
    assert logs[0] == logs[1] and cut.metrics == whole.metrics
    assert [row["step"] for row in rows(tmp_path / "cut", "evaluation")] == [3, 6]
    weights = zip(whole.model.parameters(), cut.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_an_averaging_policy_has_its_weights_back_after_a_measurement_that_was_ended(trained, tmp_path):
    from pretrain.policies.averaging.ema import EMA

    def long(trainee):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", evaluate=long, evaluate_every=3, policies=[EMA()])
    good = {"evaluate": lambda trainee: {"loss": 1.0}, "evaluate_every": 3, "policies": [EMA()]}
    cut, whole = trained(tmp_path / "cut", **good), trained(tmp_path / "whole", **good)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True))


def test_a_second_interrupt_stops_at_once(trained, tmp_path):
    class Twice(Stopping):
        def before_update(self, training, state):
            super().before_update(training, state)
            if training.step == self.at:
                signal.raise_signal(signal.SIGINT)
                raise AssertionError("went on")

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, policies=[Twice(2)], save_every=1)
    assert kept(tmp_path)["step"] == 2


def test_what_is_said_of_an_interrupt_is_what_happens():
    training = SimpleNamespace(
        world=SimpleNamespace(main=True, size=1), settings=SimpleNamespace(save_every=0), unmeasured=False, saved=None
    )
    assert "nothing is saved, since save_every is 0" in stopping(training)
    training.settings.save_every = 200
    assert stopping(training).endswith("which stops at once, it begins again")
    training.saved = 1200
    assert stopping(training).endswith("it goes on from step 1,200")
    training.unmeasured, training.world.size = True, 2
    assert "saved after the next step" in stopping(training)
    training.world.main = False
    assert stopping(training) == ""


def test_a_signal_within_another_write_is_told_all_the_same(monkeypatch, capfd):
    def broken(*_, **__):
        raise RuntimeError("reentrant call")

    monkeypatch.setattr("builtins.print", broken)
    tell("stopping")
    assert capfd.readouterr().err == "stopping\n"


def test_only_the_first_signal_is_told_and_only_while_it_is_open(capsys):
    with Interrupts(lambda: "stopping") as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.asked
    assert capsys.readouterr().err == "stopping\n"

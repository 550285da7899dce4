"""The queue of claims, without a training: a run is a formula, so that what is run, kept and said can be looked at."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from small_recipe import small_recipe

from pretrain.core.errors import PretrainError, PretrainWarning
from pretrain.experiments import queue
from pretrain.experiments.claims import load_claim
from pretrain.experiments.queue import POOL, run
from pretrain.experiments.results import recorded
from pretrain.experiments.sequential import LOOKS
from pretrain.experiments.table import markdown, rows

ROOT = Path(__file__).parent.parent
CLAIM = """\
title: "Decoupled Weight Decay Regularization"
arxiv: "1711.05101"
claim: Half the steps.
base: small
metric: model.loss
curve: null
baseline: {{name: slow, set: {{model.schedule: constant}}}}
method: {{name: quick, set: {{model.optimizer.beta1: {beta}}}}}
tune: {{field: model.optimizer.lr, baseline: [1e-3, 3e-3, 1e-2], method: [1e-3, 3e-3, 1e-2]}}
scales: {{cpu: 5e8}}
"""
BEST = 3e-3


class World:
    """Stands for the workers: what runs come to follows from their recipes; `effects` are by `beta1`."""

    def __init__(self, effects, noise=0.1):
        self.effects, self.noise, self.ran = effects, noise, []

    @contextmanager
    def workers(self, jobs=1, ray=None):
        yield self.start

    def start(self, trial):
        self.ran.append(trial)
        future = Future()
        try:
            future.set_result(self.outcome(trial))
        except PretrainError as error:
            future.set_exception(error)
        return future

    def outcome(self, trial):
        optimizer = trial.recipe["stages"][-1]["optimizer"]
        effect = self.effects.get(optimizer.get("beta1"), 0.0)
        if effect is None:
            raise PretrainError("it cannot be run")
        rng = np.random.default_rng([trial.recipe["seed"], int(1e6 * optimizer.get("beta1", 0)), trial.unit == "flops"])
        final = 3.0 + effect + math.log(optimizer["lr"] / BEST) ** 2 + self.noise * rng.standard_normal()
        return {
            "final": final, "also": {}, "flops": trial.amount, "curve": [], "wall": 10.0,
            "seconds": 9.0,
        }  # fmt: skip


@pytest.fixture
def several(tmp_path, stories, monkeypatch):
    """`several(effects)`: claims a, b, … of one base, each with the effect that is said, and the world they run in."""
    base = small_recipe(tmp_path, stories[:5], optimizer={"method": "adamw"}, budget={"steps": 1})
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "small-cpu.yaml").write_text(base)
    monkeypatch.setattr(queue, "check_leaks", lambda *_: None)

    def make(*effects):
        betas = [round(0.5 + 0.01 * number, 3) for number, _ in enumerate(effects)]
        world = World(dict(zip(betas, effects, strict=True)))
        monkeypatch.setattr(queue, "workers", world.workers)
        made = []
        for name, beta in zip("abcdefgh", betas, strict=False):
            path = tmp_path / f"{name}.yaml"
            path.write_text(CLAIM.format(beta=beta))
            made.append(load_claim(path))
        return made, world

    return make


def go(claims, folder, **given):
    said = []
    places = {"output": folder / "runs", "results": folder / "results"}
    found, failed = run(claims, "cpu", **places | given, say=said.append)
    return {r["name"]: r for r in found}, failed, said


def test_claims_come_to_their_words_and_share_the_baselines_runs(several, tmp_path):
    claims, world = several(-0.5, 0.5, 0.0)
    found, failed, said = go(claims, tmp_path)
    assert not failed and {name: r["word"] for name, r in found.items()} == {
        "a": "reproduced", "b": "not reproduced", "c": found["c"]["word"],
    }  # fmt: skip
    assert found["c"]["word"] in ("equal", "undecided") and found["c"]["verdict"]["seeds"] == LOOKS[-1]
    assert found["a"]["verdict"]["seeds"] == found["b"]["verdict"]["seeds"] == LOOKS[0]
    assert len({trial.key for trial in world.ran}) == len(world.ran)  # nothing twice
    baselines = [t for t in world.ran if "beta1" not in t.recipe["stages"][-1]["optimizer"] and t.recipe["seed"] < 1000]
    assert len(baselines) == POOL  # of all three claims together
    assert all(r["verdict"]["noise"]["freedom"] >= POOL - 1 for r in found.values())
    assert [r["name"] for r in recorded(tmp_path / "results")] and "3 of 3 claims" not in said[0]
    assert any("min left" in line for line in said)


def test_outcomes_lie_beside_the_results_and_serve_another_machine_and_other_claims(several, tmp_path):
    (first, second), world = several(-0.5, 0.5)
    found, _, _ = go([first], tmp_path / "here")
    lines = tmp_path / "here" / "outcomes" / "small-cpu.jsonl"
    ran = {trial.key for trial in world.ran}
    assert {key for line in lines.read_text().splitlines() for key in json.loads(line)} == ran | {"seal"}
    assert str(tmp_path) not in lines.read_text() + "".join(map(str, found["a"]["runs"].values()))  # no path of here
    lines.write_text(lines.read_text() + '{"cut": {"fin')  # as a crash leaves it
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "outcomes").rename(tmp_path / "there" / "outcomes")
    world.ran.clear()
    again, _, _ = go([first, second], tmp_path / "there")
    assert again["a"]["verdict"] == found["a"]["verdict"] and again["b"]["word"] == "not reproduced"
    assert world.ran and all("beta1" in t.recipe["stages"][-1]["optimizer"] for t in world.ran if t.recipe["seed"] < 3)
    assert not {trial.key for trial in world.ran} & ran
    world.ran.clear()
    again, _, _ = go([first, second], tmp_path / "there" / "again", results=tmp_path / "there" / "results")
    assert again["b"]["word"] == "not reproduced" and not world.ran


def test_the_noise_of_a_base_is_known_by_the_runs_of_claims_that_are_not_asked_for(several, tmp_path):
    (first, second), world = several(-0.5, -0.5)
    other = "schedule: {method: linear, warmup: 0.1}"  # another recipe, whose runs are a group of their own
    second.path.write_text(second.path.read_text().replace("model.schedule: constant", f"model.{other}"))
    second = load_claim(second.path)
    go([first], tmp_path)
    world.ran.clear()
    found, _, _ = go([second], tmp_path)
    judged = [t for t in world.ran if t.name.startswith("b-baseline") and t.recipe["seed"] < 1000]
    assert len(judged) == LOOKS[0] and found["b"]["verdict"]["noise"]["freedom"] >= POOL - 1


def test_an_outcome_that_is_damaged_is_named_and_its_run_made_again(several, tmp_path):
    (claim,), world = several(-0.5)
    found, _, _ = go([claim], tmp_path)
    for path in ((tmp_path / "outcomes" / "small-cpu.jsonl"), *(tmp_path / "runs").rglob("outcomes/*.json")):
        text = path.read_text()
        place = text.index('"final":') + text[text.index('"final":') :].index(".") + 1
        path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
    count, _ = len(world.ran), world.ran.clear()
    with pytest.warns(
        PretrainWarning, match=r"(the line of \w+ is damaged: |it does not hold what was sealed; )that run is made"
    ):
        again, _, _ = go([claim], tmp_path / "again", output=tmp_path / "runs", results=tmp_path / "results")
    assert again["a"]["verdict"] == found["a"]["verdict"] and len(world.ran) == 1 < count


def test_what_is_finished_is_not_run_again_and_what_was_stopped_goes_on(several, tmp_path):
    claims, world = several(-0.5, 0.0)
    found, _, _ = go(claims, tmp_path, seconds=0.0)
    assert not found and not world.ran
    monotonic, at = queue.time.monotonic, [0.0]

    def clock():
        at[0] += 1.0
        return at[0]

    queue.time.monotonic = clock
    try:
        found, _, _ = go(claims, tmp_path, seconds=10.0)
    finally:
        queue.time.monotonic = monotonic
    before = len(world.ran)
    assert not found and 5 < before < 15
    found, _, _ = go(claims, tmp_path)
    assert len(found) == 2 and len({trial.key for trial in world.ran}) == len(world.ran) > before
    ran = len(world.ran)
    again, _, _ = go(claims, tmp_path)
    assert len(world.ran) == ran and {n: r["runs"] for n, r in again.items()} == {
        n: r["runs"] for n, r in found.items()
    }
    assert len(recorded(tmp_path / "results")) == 2


def test_a_verdict_stands_when_more_becomes_known_of_the_noise_and_falls_with_its_runs(several, tmp_path):
    claims, world = several(-0.5, 0.0)
    first, _, _ = go(claims[:1], tmp_path)
    pool = queue.Noise.of_runs
    queue.Noise.of_runs = staticmethod(lambda groups: queue.Noise(50.0, 500))  # with which nothing is decided
    try:
        world.ran.clear()
        again, _, said = go(claims, tmp_path)
        assert again["a"] == first["a"] and any(line.startswith("a: reproduced, as recorded on 20") for line in said)
        assert again["b"]["verdict"]["noise"]["deviation"] == pytest.approx(50.0, rel=0.1)
        assert not any(trial.name.startswith("a-") and trial.recipe["seed"] >= LOOKS[0] for trial in world.ran)
        claims[0].path.write_text(claims[0].path.read_text().replace("cpu: 5e8", "cpu: 4e8"))  # other runs
        anew, _, said = go([load_claim(claims[0].path)], tmp_path)
        assert anew["a"]["word"] == "equal" and not any("as recorded" in line for line in said)
    finally:
        queue.Noise.of_runs = pool


def test_a_claim_that_cannot_be_run_is_set_aside_and_the_others_go_on(several, tmp_path):
    claims, _ = several(-0.5, None)
    found, failed, said = go(claims, tmp_path)
    assert list(found) == ["a"] and "it cannot be run" in failed["b"]
    assert any(line.startswith("b: set aside:") for line in said)


def test_the_cheapest_claim_comes_first(several, tmp_path):
    claims, world = several(-0.5, -0.5)
    dear = claims[1].model_copy(update={"scales": {"cpu": claims[1].scales["cpu"].model_copy(update={"budget": 5e9})}})
    outcome = world.outcome
    world.outcome = lambda trial: outcome(trial) | {"wall": trial.amount / 5e7}
    go([dear, claims[0]], tmp_path)
    last = {name: max(i for i, t in enumerate(world.ran) if t.name.startswith(f"{name}-method")) for name in "ab"}
    assert last["a"] < last["b"]


def test_a_best_at_an_edge_decides_nothing(several, tmp_path):
    claims, world = several(-5.0)
    world.outcome, inner = lambda trial: inner(trial), world.outcome
    outcome = inner

    def falling(trial):
        optimizer = trial.recipe["stages"][-1]["optimizer"]
        found = outcome(trial)
        return found | {"final": found["final"] - 50 * math.log(optimizer["lr"]) * ("beta1" in optimizer)}

    world.outcome = falling
    found, _, _ = go(claims, tmp_path)
    assert found["a"]["edges"] == {"baseline": False, "method": True} and found["a"]["word"] == "undecided"


def test_a_baseline_that_has_learnt_less_than_bigrams_is_under_trained(several, tmp_path):
    claims, world = several(-0.5)
    outcome = world.outcome
    for regime in ({"bigram": 2.5, "tokens_per_weight": 9.0}, {"bigram": 9.0, "tokens_per_weight": 0.5}):
        world.outcome = lambda trial, regime=regime: outcome(trial) | {"regime": regime}
        found, _, _ = go(claims, tmp_path / str(regime["bigram"]))
        assert found["a"]["word"] == "under-trained" and found["a"]["regime"] == regime
    world.outcome = lambda trial: outcome(trial) | {"regime": {"bigram": 9.0, "tokens_per_weight": 4.0}}
    found, _, _ = go(claims, tmp_path / "good")
    assert found["a"]["word"] == "reproduced"


def test_a_claim_is_tested_at_each_of_its_sizes_and_the_table_shows_the_trend(several, tmp_path):
    (claim,), world = several(-0.5)
    text = claim.path.read_text()
    claim.path.write_text(
        text.replace("{cpu: 5e8}", "{cpu: {budget: 5e8, sizes: {large: {budget: 4e9, set: {model.batch_rows: 4}}}}}")
    )
    said = []
    found, failed = run(
        [load_claim(claim.path)], "cpu", output=tmp_path / "runs", results=tmp_path / "results", say=said.append
    )
    assert not failed and [r["size"] for r in found] == ["", "large"]
    assert {r["claim"]["scales"]["cpu"]["budget"] for r in found} == {5e8, 4e9}
    assert {t.recipe["stages"][-1]["batch_rows"] for t in world.ran if t.amount == 4e9} == {4}
    shown = rows(recorded(tmp_path / "results"))
    assert [row["size"] for row in shown] == ["", "large"]
    assert shown[0]["trend"] == shown[1]["trend"] == "trend: more than all at 500 M, more than all at 4 G"
    assert "cpu, large" in markdown(found)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_runs_end_with_the_queue_that_began_them(tmp_path, number):
    (tmp_path / "sleeper.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "from pretrain.experiments.trials import workers\n"
        "class Sleeper:\n"
        "    def run(self):\n"
        "        pathlib.Path(sys.argv[0]).with_name(f'{os.getpid()}.pid').touch()\n"
        "        time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background has it ignored
        "    with workers(2) as start:\n"
        "        [start(Sleeper()) for _ in range(9)][0].result()\n"
    )
    queue = subprocess.Popen([sys.executable, str(tmp_path / "sleeper.py")], env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        until(lambda: len(list(tmp_path.glob("*.pid"))) == 2, seconds=300.0)  # which a busy machine takes its time for
        queue.send_signal(number)
        until(lambda: queue.poll() is not None)
    finally:
        queue.kill()
    for worker in [int(path.stem) for path in tmp_path.glob("*.pid")]:
        until(lambda worker=worker: gone(worker))


def gone(process):
    """Whether a process has ended."""
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or "Z" in stat.read_text().split()[2]


def until(true, seconds=60.0):
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)

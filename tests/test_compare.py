"""Comparisons at equal compute: budgets are equal, a method that does nothing is undecided, a real one is found."""

from __future__ import annotations

import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_recipe import small_recipe

from pretrain.core.errors import PretrainError
from pretrain.experiments.compare import _check_left, _loaded, _metric_of, _undecided, compare, summarise, training_of
from pretrain.experiments.trials import Trial, run_all
from pretrain.experiments.verdict import BETTER, UNDECIDED, WORSE, judge, reached, seeds_to_decide, share_to_reach

MODEL = {
    "family": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
OFTEN = {"length": 64, "batch_rows": 4, "evaluate_every": 5, "save_every": 0}
GROWN = (
    {"stage": "surgery", "name": "stacked", "checkpoint": "model", "surgeries": [{"method": "g_stack", "growth": 2}]},
    {"stage": "train", "name": "deep", "corpus": "corpus", "init": "stacked", "budget": {"steps": 1}, **OFTEN},
)


@pytest.fixture
def recipes(tmp_path, stories):
    fields = {"model": MODEL, "optimizer": {"method": "adamw", "lr": 1e-2}, **OFTEN}
    for name, more, steps in (("base", (), 1), ("grown", GROWN, 8)):
        text = small_recipe(tmp_path, stories[:60], *more, budget={"steps": steps}, **fields)
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "slow.yaml").write_text("base: base.yaml\nset: {model.optimizer.lr: 1e-6}\n")
    return [tmp_path / f"{name}.yaml" for name in ("base", "slow", "grown")]


def test_budgets_are_equal_and_a_recipe_that_does_not_learn_is_worse(recipes, tmp_path):
    flops = 6e8
    found = compare(recipes, flops=flops, seeds=2, output=tmp_path / "out", say=lambda text: None)
    for name, runs in found["runs"].items():
        for run in runs:
            assert flops <= run["flops"] < 1.1 * flops, name  # by less than the last step
    assert (
        found["table"]["slow"]["verdict"]["difference"] > 0.3
        and found["table"]["slow"]["compute_to_reach"]["baseline's end"] is None
    )
    assert 0 < found["table"]["slow"]["compute_to_reach"]["end by baseline"] < 1
    assert found["runs"]["grown"][0]["curve"][0][0] > 1e8  # the small model's training is counted
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["baseline"] == "base"
    again = compare(recipes, flops=flops, seeds=2, output=tmp_path / "out", say=lambda text: None)
    assert again["runs"] == json.loads(json.dumps(found["runs"])) or again["runs"] == found["runs"]
    log = tmp_path / "out" / "seed-1" / "base" / "model" / "log.jsonl"
    log.write_text(log.read_text().replace('"loss": ', '"loss": 1', 1))
    with pytest.raises(PretrainError, match=rf"{log} is not as the stage has left it.*: then it is made again"):
        compare(recipes, flops=flops, seeds=2, output=tmp_path / "out", say=lambda text: None)


def test_alone_an_error_ends_a_queue_before_the_next_run_begins(monkeypatch):
    begun, lines = [], []

    def fake(trial):
        begun.append(trial.name)
        if trial.name == "b":
            raise PretrainError("the stages before 'model' spend all FLOPs")
        return {"final": 1.0}

    monkeypatch.setattr(Trial, "run", fake)
    trials = [Trial(name, {}, "", "", "model", "flops", 1.0, "model.loss") for name in "abc"]
    with pytest.raises(PretrainError, match="spend all"):
        run_all(trials, say=lines.append)
    assert begun == ["a", "b"] and lines == ["1/3 a: model.loss 1.0000"]


def test_a_metric_that_is_not_logged_is_refused_before_anything_runs(recipes, tmp_path):
    assert not (tmp_path / "o").exists()  # nothing was run for that
    with pytest.raises(
        PretrainError, match="--metric 'bits_per_bite': base logs no such one .did you mean 'bits_per_b"
    ):
        compare(recipes, flops=6e8, seeds=2, metric="bits_per_bite", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_budget_that_is_too_small_is_refused_at_once_with_the_least_that_is_enough(recipes, tmp_path, monkeypatch):
    monkeypatch.setattr(Trial, "run", lambda trial: pytest.fail("a run was begun"))
    for chosen, flops in (([recipes[0], recipes[2]], 1e8), (recipes[:2], 1e4)):
        with pytest.raises(PretrainError, match="--budget flops=") as refused:
            compare(chosen, flops=flops, seeds=2, output=tmp_path / "o", say=lambda text: None)
        enough = float(re.search(r"--budget flops=(\S+)", str(refused.value))[1])
        sides = {path.stem: _loaded(path, 0, enough, ()) for path in chosen}
        assert enough > flops
        _check_left(sides, enough)


def test_an_open_verdict_says_how_many_seeds_would_decide_it():
    differences = [-1.0, -0.2, -1.4]
    assert judge(differences).word == UNDECIDED
    needed = seeds_to_decide(differences)
    assert 3 < needed < 20 and seeds_to_decide([1.0, -1.01, 0.01]) is None
    assert seeds_to_decide([0.05, -0.03, 0.02]) is None  # 47, which nobody runs
    runs = {"base": [{"final": 0.0}] * 3, "other": [{"final": value} for value in differences]}
    table = {"base": {}, "other": {"verdict": {"word": UNDECIDED}}}
    (line,) = _undecided(table, runs)
    assert f"--seeds {needed} " in line and "--budget" in line
    assert not [*_undecided({"base": {}, "other": {"verdict": {"word": BETTER}}}, runs)]


@pytest.mark.parametrize(
    ("objective", "metric", "better"),
    [("causal_lm", "loss", "lower"), ("classification", "accuracy", "higher"), ("regression", "mse", "lower"),
     ({"method": "smart", "objective": "classification"}, "accuracy", "higher")],
)  # fmt: skip
def test_what_learns_labels_is_compared_by_its_metric(recipes, tmp_path, objective, metric, better):
    recipe, trained = _loaded(recipes[0], 0, 1e9, [f"model.objective={json.dumps(objective)}"])
    chosen = _metric_of([training_of(recipe, trained)])
    assert chosen == metric
    runs = {
        name: [{"final": v + seed / 99, "curve": [[1.0, v]]} for seed in range(3)]
        for name, v in (("a", 0.1), ("b", 0.9))
    }
    made = summarise(runs, 1e9, chosen)
    assert made["better"] == better
    assert made["table"]["b"]["verdict"]["word"] == (BETTER if better == "higher" else WORSE)


def test_how_far_a_comparison_is_stands_on_standard_error(recipes, tmp_path, capfd):
    compare(recipes[:2], flops=6e7, seeds=2, output=tmp_path / "out", say=lambda text: None, progress=True)
    lines = capfd.readouterr().err
    assert "base, seed 0: [model] train" in lines and "slow, seed 1: [model]" in lines and "100%" in lines


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("noise", ["gauss", "uniform", "expovariate"])
def test_a_method_that_does_nothing_is_undecided_in_95_of_100(seeds, noise):
    rng = random.Random(0)
    draw = {
        "gauss": lambda: rng.gauss(0, 1),
        "uniform": lambda: rng.uniform(-1, 1),
        "expovariate": lambda: rng.expovariate(1),
    }[noise]
    # Each side's runs differ by chance alone, as two runs of one recipe with other seeds do.
    words = [judge([draw() - draw() for _ in range(seeds)]).word for _ in range(600)]
    assert words.count(UNDECIDED) / len(words) >= 0.95


def test_what_is_better_is_said_by_the_metric():
    assert judge([0.5, 0.6, 0.55], "higher").word == BETTER
    assert judge([0.5, 0.6, 0.55], "lower").word == WORSE


def test_a_clear_difference_is_told_with_its_direction():
    assert judge([-1.0, -1.1, -0.9]).word == BETTER
    assert judge([1.0, 1.1, 0.9]).word == WORSE
    assert judge([1.0, -1.1, 0.9]).word == UNDECIDED
    verdict = judge([-1.0, -1.1, -0.9])
    assert verdict.low < verdict.difference < verdict.high


@given(
    st.lists(st.floats(0.1, 10, allow_subnormal=False), min_size=2, max_size=20),
    st.floats(0.05, 11, allow_subnormal=False),
)
def test_the_point_where_a_curve_reaches_a_value_lies_on_the_curve(values, target):
    curve = [(float(i), v) for i, v in enumerate(values)]
    found = reached(curve, target)
    assert (found is None) == all(v > target for v in values)
    if found is not None:
        left = int(found)
        assert found == 0 or values[max(0, left - (found == left))] >= target - 1e-9


def test_the_compute_to_reach_the_others_end_needs_every_seed():
    quick, slow = [(0.0, 5.0), (50.0, 3.0), (100.0, 1.0)], [(0.0, 5.0), (100.0, 3.0)]
    assert share_to_reach([quick, quick], [slow, slow]) == pytest.approx(0.5)
    assert share_to_reach([quick, slow], [slow, quick]) is None
    assert share_to_reach([quick[-1:]], [slow]) is None  # measured at its end alone: nobody knows when it got there
    up = [[(0.0, 0.1), (100.0, 0.9)]]
    assert share_to_reach(up, [[(0.0, 0.1), (100.0, 0.5)]], "higher") == pytest.approx(0.5)


def test_what_makes_sides_differ_beside_their_methods_is_told(recipes, tmp_path):
    from pretrain.experiments.compare import _unlike
    from pretrain.recipe import load

    def told(*changes, metric="loss"):
        sides = {"base": [], "other": changes}
        loaded = {name: (load(recipes[0], given, tmp_path / name), "model") for name, given in sides.items()}
        return list(_unlike(loaded, metric))

    assert told("model.optimizer={method: lion}") == []
    assert told("corpus.test=0.3") == [
        "other is trained and measured on other text than base: their loss does not compare"
    ]
    (line,) = told("tokenizer.vocab_size=333")
    assert line == "other has other tokens than base: a loss does not compare, but bits_per_byte does"
    assert told("tokenizer.vocab_size=333", metric="bits_per_byte") == []


def test_impossible_comparisons_are_refused(recipes, tmp_path):
    with pytest.raises(PretrainError, match="a baseline and at least one other"):
        compare(recipes[:1], flops=1e9)
    with pytest.raises(PretrainError, match="seeds 1: accepted: 2 or more"):
        compare(recipes[:2], flops=1e9, seeds=1)
    with pytest.raises(PretrainError, match="the stages before 'deep' spend all"):
        compare([recipes[0], recipes[2]], flops=1e8, seeds=2, output=tmp_path / "o", say=lambda text: None)
    with pytest.raises(
        PretrainError, match="--metric 'accuracy': base logs no such one; accepted: loss, perplexity, bits_per_byte"
    ):
        compare(recipes[:2], flops=1e8, seeds=2, metric="accuracy", output=tmp_path / "o", say=lambda text: None)

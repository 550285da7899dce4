"""The rates of a comparison: who has chosen each stands beside the verdict, and some may be searched for each side."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from test_compare import recipes as recipes
from test_dial import RECIPE

from pretrain.core.errors import PretrainError
from pretrain.experiments import compare as comparing
from pretrain.experiments import rates
from pretrain.experiments.rates import UNTUNED, Rate, best_rates, rate_of, with_rate
from pretrain.experiments.trials import Trial
from pretrain.recipe import check, load

SOURCES = "corpus.sources=[{files: a.txt}]"


@pytest.fixture
def sized(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("words\n" * 100)
    Path("auto.yaml").write_text(yaml.safe_dump(RECIPE))
    return lambda *sets: load("auto.yaml", [SOURCES, *sets])


def test_it_is_told_who_chose_a_rate(sized):
    assert rate_of(sized(), "model").chosen_by == "the dial's"
    assert rate_of(sized("model.optimizer=lion"), "model").chosen_by == "the dial's"
    assert rate_of(sized("model.optimizer={lr: 0.01}"), "model") == Rate(0.01, "the recipe's")
    plain = check(sized().asked | {"stages": [_plain(row) for row in sized().raw["stages"]]})
    assert rate_of(plain, "model").chosen_by == UNTUNED


def _plain(row):
    """A stage whose sizes stand in the recipe, and whose optimiser is only named."""
    return {k: v for k, v in row.items() if k != "size"} | ({"optimizer": "soap"} if row["stage"] == "train" else {})


def test_a_recipe_of_size_auto_is_sized_for_the_budget_of_the_comparison(sized):
    sizes = {}
    for flops in (1e10, 1e14):
        recipe, trained = comparing._loaded("auto.yaml", 0, flops, [SOURCES, "model.budget={seconds: 9}"])
        sizes[flops] = recipe.sizes[0].choice
        assert trained == "model" and sizes[flops].flops == flops
    assert sizes[1e10].shape.weights < sizes[1e14].shape.weights


def trial(side, seed):
    stages = [{"stage": "train", "name": "model", "optimizer": {"method": "muon", "lr": 0.01, "adamw_lr": 0.02}}]
    recipe = {"name": side, "seed": seed, "stages": stages}
    return Trial(side, recipe, f"out/{side}", "out/stages", "model", "flops", 9.0, "model.loss", "loss")


def test_another_rate_keeps_the_proportion_of_the_others():
    changed = with_rate(trial("a", 0), 0.03, 0.01)
    assert changed.recipe["stages"][0]["optimizer"] == {"method": "muon", "lr": 0.03, "adamw_lr": pytest.approx(0.06)}
    assert trial("a", 0).recipe["stages"][0]["optimizer"]["lr"] == 0.01


def test_each_side_gets_its_best_rate_from_as_many_short_runs(monkeypatch):
    best, seen = {"a": 0.01, "b": 0.4}, []

    def run_all(trials, **_):
        seen.extend(trials)
        rate = [t.recipe["stages"][0]["optimizer"]["lr"] for t in trials]
        return [
            {"final": None if lr > 5 else abs(math.log(lr / best[t.recipe["name"]]))}
            for lr, t in zip(rate, trials, strict=True)
        ]

    monkeypatch.setattr(rates, "run_all", run_all)
    chosen = best_rates({"a": 0.01, "b": 0.01}, trial, rates=3, say=lambda text: None)
    assert chosen["a"].lr == 0.01 and not chosen["a"].edge and not chosen["b"].edge
    assert chosen["b"].lr == pytest.approx(0.27) and "best of" in str(chosen["b"])
    counts = [sum(t.recipe["name"] == side for t in seen) for side in "ab"]
    assert counts[0] == counts[1] > 3  # what widens one range widens both
    assert all(t.amount == pytest.approx(3.0) and t.recipe["seed"] == 1000 for t in seen)
    assert len({t.output for t in seen}) == len(seen)


@pytest.mark.parametrize("number", [0, 2, 4])
def test_an_even_number_of_rates_has_no_middle(number):
    with pytest.raises(PretrainError, match=f"rates {number}: accepted: 3, 5"):
        best_rates({"a": 0.1}, trial, rates=number)


def test_notes_say_what_is_not_tuned():
    notes = comparing._notes(
        {"a": Rate(1e-3, UNTUNED), "b": Rate(1e-3, "the dial's"), "c": Rate(1.0, "best of 7", True)}
    )
    assert "the rate of a is the method's default" in notes[0] and "--rates 3" in notes[0]
    assert "best rate of c is the last" in notes[1] and len(notes) == 2


def test_the_comparison_holds_the_rates_and_the_notes(recipes, tmp_path):
    found = comparing.compare(recipes[:2], flops=3e8, seeds=2, output=tmp_path / "out", say=lambda text: None)
    assert found["table"]["base"]["rate"]["words"] == "0.01 (the recipe's)" and found["notes"] == []
    tuned = comparing.compare(recipes[:2], flops=3e8, seeds=2, rates=3, output=tmp_path / "out", say=lambda text: None)
    assert "best of" in tuned["table"]["slow"]["rate"]["words"]
    assert tuned["table"]["slow"]["rate"]["lr"] > 1e-6

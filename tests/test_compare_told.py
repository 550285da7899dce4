"""What a comparison refuses, and what it says beside its verdict: equal recipes, other tokens, little learnt, noise."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processor import libraries
from small_recipe import small_recipe
from test_quick import command

from pretrain.core.errors import PretrainError
from pretrain.experiments import compare as comparing
from pretrain.experiments.compare import _loaded, _usual_metric, compare, summarise, to_reach
from pretrain.experiments.trials import Trial
from pretrain.experiments.verdict import smoothed


@pytest.fixture
def base(tmp_path, stories):
    text = small_recipe(tmp_path, stories[:60], budget={"steps": 5}, evaluate_every=4, save_every=0)
    (tmp_path / "base.yaml").write_text(text)
    return tmp_path / "base.yaml"


def variant(base, name, **fields):
    path = base.parent / f"{name}.yaml"
    path.write_text(f"base: base.yaml\nset: {json.dumps(fields)}\n")
    return path


def test_recipes_that_say_the_same_are_named_before_anything_runs(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Trial, "run", lambda trial: pytest.fail("a run was begun"))
    same = variant(base, "same", **{"model.length": 32})  # which the base says too
    with pytest.raises(PretrainError, match="base and same say the same: every stage has the same settings"):
        compare([base, same], flops=1e9, output=tmp_path / "out", say=lambda text: None)
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_a_path_or_a_recipe_is_told_at_once_and_without_torch(base, tmp_path):
    wrong = variant(base, "wrong", **{"model.lenght": 3})
    for other, words in ((tmp_path / "bass.yaml", "no such file"), (wrong, "did you mean 'length'")):
        done, imported, seconds = command("compare", base, other, "--budget", "flops=1e9", cwd=tmp_path)
        assert done.returncode and words in done.stderr, done.stderr
        assert imported == [] and seconds < 8 * libraries()


def test_another_budget_than_flops_is_refused_with_the_reason(base, tmp_path):
    for budget in ("tokens=1e6", "seconds=60", "10min"):
        done, _, _ = command("compare", base, base, "--budget", budget, cwd=tmp_path)
        assert "accepted: flops=NUMBER" in done.stderr and "compared at equal compute" in done.stderr
    done, _, _ = command("compare", base, base, "--budget", "flops=many", cwd=tmp_path)
    assert "accepted: flops=NUMBER" in done.stderr and "equal compute" not in done.stderr


def test_recipes_of_other_tokens_are_judged_in_bits_per_byte(base):
    other = variant(base, "other", **{"tokenizer.vocab_size": 500})
    loaded = {
        path.stem: _loaded(path, 0, 1e9, ()) for path in (base, other, variant(base, "longer", **{"model.length": 48}))
    }
    assert _usual_metric(loaded) == "bits_per_byte"
    del loaded["other"]
    assert _usual_metric(loaded) == "loss"


def test_a_comparison_of_models_that_have_learnt_little_says_so(base, tmp_path):
    slow = variant(base, "slow", **{"model.optimizer": {"method": "adamw", "lr": 1e-6}})
    result = compare([base, slow], flops=1e7, seeds=2, output=tmp_path / "out", say=lambda text: None)
    (note,) = (line for line in result["notes"] if "counting which token follows which" in line)
    assert note.startswith("warning: none of the recipes is better than") and "where that gives" in note


def test_it_says_where_no_side_is_better_than_the_commonest_class(monkeypatch):
    def notes(**finals):
        monkeypatch.setattr(comparing, "_line", lambda training, folder, store, metric: 0.6)
        monkeypatch.setattr(comparing, "training_of", lambda recipe, trained: None)
        runs = {name: [{"final": value}] * 2 for name, value in finals.items()}
        return list(comparing._beneath(dict.fromkeys(finals, (None, "")), runs, comparing.Path(), "accuracy"))

    assert notes(a=0.7, b=0.8) == [] == notes(a=0.7, b=0.6)  # of a single one the verdict says enough
    (line,) = notes(a=0.5, b=0.6)
    assert "none of the recipes is better than always answering the commonest class" in line
    assert "(a 0.5 where that gives 0.6, b 0.6 where that gives 0.6)" in line


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30), st.sampled_from(["lower", "higher"]))
def test_a_smoothed_curve_never_gets_worse_keeps_its_places_and_its_mean(values, better):
    curve = [(float(place), value) for place, value in enumerate(values)]
    smooth = smoothed(curve, better)
    assert [place for place, _ in smooth] == [place for place, _ in curve]
    steps = [(b - a) * (1 if better == "lower" else -1) for (_, a), (_, b) in pairwise(smooth)]
    assert max(steps, default=0) <= 1e-9
    assert math.fsum(v for _, v in smooth) == pytest.approx(math.fsum(values))
    again = smoothed(smooth, better)
    assert [v for _, v in again] == pytest.approx([v for _, v in smooth])


def outcome(*values):
    return {"final": values[-1], "curve": [(float(n + 1), value) for n, value in enumerate(values)]}


def test_a_dip_of_a_noisy_curve_is_no_place_to_have_reached_the_baselines_end():
    base = [outcome(5.0, 4.0, 3.0, 2.0) for _ in range(3)]
    dipping = [outcome(5.0, 1.9, 4.0, 1.9) for _ in range(3)]
    table = summarise({"base": base, "other": dipping}, 1e9, "loss")["table"]
    assert table["other"]["compute_to_reach"]["baseline's end"] > 0.9  # and not 0.48, where the dip is


def test_a_share_whose_interval_reaches_the_whole_budget_is_within_the_noise():
    def cell(share, *ends):
        return to_reach({"compute_to_reach": {"baseline's end": share, "interval": ends or None}})

    assert cell(0.7, 0.55, 0.86) == "70% (55% to 86%)" and cell(0.3, -0.1, 0.7) == "30% (0% to 70%)"
    assert cell(0.9, 0.7, 1.1) == "within the noise" == cell(0.9)
    assert cell(None) == "" == to_reach({})


def test_sides_that_do_not_say_are_measured_on_the_same_tokens_which_fit_the_budget(tmp_path, stories):
    def side(name, width, **more):
        model = {"family": "llama", "hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
        fields = {"evaluate_every": 0.25, "save_every": 0, "model": model | {"intermediate_size": 48}} | more
        (tmp_path / f"{name}.yaml").write_text(small_recipe(tmp_path, stories[:60], budget={"steps": 5}, **fields))
        return tmp_path / f"{name}.yaml"

    paths = [side("narrow", 16), side("wide", 32), side("own", 16, evaluate_tokens=300)]

    def measured(output):
        compare(paths, flops=3e8, seeds=2, output=output, say=lambda text: None)
        records = {p.stem: json.loads((output / "seed-0" / p.stem / "model" / "stage.json").read_text()) for p in paths}
        return {name: (record["config"]["evaluate_tokens"], record["address"]) for name, record in records.items()}

    first = measured(tmp_path / "out")
    assert {name: tokens for name, (tokens, _) in first.items()} == {"narrow": 8000, "wide": 8000, "own": 300}
    assert measured(tmp_path / "out") == first, "a comparison that goes on has the same runs"

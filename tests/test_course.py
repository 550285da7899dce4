"""What a training says at its end of the measurements it made: which weights were kept, that its loss has risen."""

from __future__ import annotations

import pytest
from policy_run import run
from small_recipe import small_recipe
from test_averaging import losses

from pretrain import engine
from pretrain.policies.averaging.keep_best import KeepBest
from pretrain.recipe import load
from pretrain.training.budget import Budget
from pretrain.training.measuring import course, risen

RISING = (5, 4, 3.2, 3, 3.3, 3.6, 4, 4.5, 4.8, 5)


def told(prepared, tiny, folder, values, *policies, steps=None, **given):
    """The lines of a training whose measurements, one a step, are these."""
    training = run(
        prepared, tiny(vocab_size=512), folder, *policies, evaluate=losses(*values), evaluate_every=1,
        budget=Budget(steps=steps or len(values)), **given,
    )  # fmt: skip
    return list(course(training))


def test_a_loss_that_has_risen_is_told_with_its_best_step_and_what_to_do(prepared, tiny, tmp_path):
    (line,) = told(prepared, tiny, tmp_path, RISING)
    assert line == (
        "warning: the validation loss was best at step 4 of 10 (3), and rose to 4.8: policies: [keep_best] keeps the "
        "best weights; try a budget of about 40% of this one, or more documents"
    )


def test_where_the_best_weights_are_kept_their_step_is_told(prepared, tiny, tmp_path):
    kept, rose = told(prepared, tiny, tmp_path, RISING, KeepBest())
    assert kept == "kept the weights of step 4 of 10: the best loss of 10 measurements, 3"
    assert rose.startswith("the validation loss was best at step 4 of 10 (3), and rose to 4.8: try a budget")


def test_patience_that_has_ended_a_training_is_told(prepared, tiny, tmp_path):
    (kept,) = told(prepared, tiny, tmp_path, RISING, KeepBest(patience=2))
    assert kept == (
        "kept the weights of step 4 of 6, which ended there for want of a better one (patience): the best loss of 6 "
        "measurements, 3"
    )


@pytest.mark.parametrize("values", [
    (5, 4, 3.2, 3, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4),  # falls
    (5, 4, 3, 3.2, 2.9, 3.1, 3, 3.2, 2.9, 3.1),  # swings
    (5, 4, 3.2, 3, 2.995, 2.99, 2.995, 2.996, 3, 3),  # by less than a hundredth
    (3, 3.3, 3.6, 4, 4.5),  # too few
    (3, float("nan"), 3.6, float("inf"), 3, 3, 3, 3, 3, 3),
])  # fmt: skip
def test_what_falls_swings_or_is_too_short_has_not_risen(prepared, tiny, tmp_path, values):
    assert told(prepared, tiny, tmp_path, values) == []


def test_measurements_before_an_interrupt_count(prepared, tiny, tmp_path):
    assert told(prepared, tiny, tmp_path, RISING[:5], steps=5, save_every=1) == []
    (line,) = told(prepared, tiny, tmp_path, RISING[5:], steps=10, save_every=1)
    assert "best at step 4 of 10 (3)" in line


def test_where_a_loss_lies_that_has_risen_is_the_middle_of_its_last_fifth():
    assert risen([3.0] * 8 + [9.0, 9.0, 9.0]) == 9.0
    assert risen([3.0] * 10 + [9.0]) is None  # a single one


def test_the_run_says_it(tmp_path, stories, monkeypatch):
    monkeypatch.setattr("pretrain.training.measuring.risen", lambda losses: 7.0)
    (tmp_path / "r.yaml").write_text(
        small_recipe(tmp_path, stories, budget={"steps": 2}, evaluate_every=1, policies=["keep_best"])
    )
    said = []
    engine.run(load(tmp_path / "r.yaml", [], tmp_path / "out"), say=said.append)
    assert any("kept the weights of step" in line for line in said)
    assert any("and rose to 7: try a budget" in line for line in said)

"""What the report advises of a held-out curve: measured too rarely, on too much text at a time, or on too little."""

from __future__ import annotations

import pytest
from test_report import page_of

from pretrain.report.numbers import swing
from pretrain.report.summary import summarise

SWINGING = [3.0, 3.1, 2.98, 3.12, 3.0, 3.1, 3.0]
FEW = [3.0, 2.9]


def advice(held_out, budget=None, **config):
    page = page_of(held_out=held_out, budget=budget)
    page["stages"][0]["config"] |= config
    page["stages"][0]["metrics"] = {"steps": 1000.0}
    return summarise(page)


@pytest.mark.parametrize("every", [0.05, 100])
def test_where_each_measurement_took_too_long_fewer_tokens_are_advised_and_not_more_measurements(every):
    summary = advice(FEW, evaluate_every=every, evaluate_tokens=100_000)
    assert "measure on fewer tokens" in summary.advice and "more often" not in summary.advice
    assert f"not about {20 if every < 1 else 10} times as the recipe asks" in summary.advice
    assert summary.command.endswith("--set model.evaluate_tokens=20000")


@pytest.mark.parametrize(
    "config", [{"evaluate_every": 0}, {"evaluate_every": 0.5}, {"evaluate_every": 0.05, "budget": {"steps": 1000}}]
)
def test_where_few_were_asked_for_or_none_was_left_out_more_are_advised(config):
    summary = advice(FEW, evaluate_tokens=100_000, **config)
    assert "measure more often; validation documents were looked at 2 times" in summary.advice
    assert summary.command.endswith("--set model.evaluate_every=0.05")


def test_a_curve_that_swings_on_few_tokens_is_measured_on_more_before_anything_else_is_advised():
    summary = advice(SWINGING, evaluate_tokens=8000, evaluate_every=0.1)
    assert "measure on more validation text" in summary.advice and "on 8,000 tokens each" in summary.advice
    assert summary.command.endswith("--set model.evaluate_tokens=100000")


@pytest.mark.parametrize(
    ("held_out", "tokens"), [(SWINGING, 100_000), ([5, 4, 3.5, 3.2, 3.0, 2.9], 8000), ([5, 4, 3, 3.2, 3.4, 3.6], 8000)]
)
def test_a_curve_of_many_tokens_or_with_a_course_is_advised_by_its_course(held_out, tokens):
    assert "more validation text" not in advice(held_out, evaluate_tokens=tokens).advice


def test_a_straight_line_does_not_swing():
    assert swing([5.0, 4.0, 3.0, 2.0, 1.0]) == 0 == swing([5, 1, 5])
    assert swing([1.0, 1.1, 1.0, 1.1, 1.0, 1.1]) == pytest.approx(0.095, abs=0.01)

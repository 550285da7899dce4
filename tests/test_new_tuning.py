"""The budget of a fine-tuning in a recipe of `pretrain new`: passes that fit the time, and what is said where few do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pretrain.new.tuning import FEW, ROWS, Tuned, plan

SMALL = Tuned(128, 4, [31.0] * 90 + [173.0] * 10, 2000.0, 200.0, 256, 5e10)
LARGE = replace(SMALL, width=768, blocks=12, adapted=True)


@pytest.mark.parametrize("tuned", [SMALL, LARGE, replace(SMALL, documents=2e5), replace(SMALL, documents=90.0)])
@pytest.mark.parametrize("seconds", [60.0, 600.0, 7200.0])
def test_no_more_passes_than_the_time_allows(tuned, seconds):
    made = plan(tuned, seconds, 8, "T")
    if "epochs" in made.budget:
        passes = int(made.budget.strip("{}").split(": ")[1])
        assert 1 <= passes <= 8
        steps = passes * tuned.documents / made.rows
        assert steps * tuned.step(made.rows) <= max(seconds, 3 * (seconds - tuned.measuring()))
    else:
        assert made.budget == "{seconds: T}" and made.steps * made.rows < tuned.documents


def test_where_there_is_time_all_passes_are_made_and_no_more():
    assert plan(SMALL, 36000.0, 8, "T").budget == "{epochs: 8}"


def test_dear_steps_are_made_smaller_and_too_few_are_told():
    cheap, dear = plan(SMALL, 600.0, 8, "T"), plan(LARGE, 120.0, 3, "T")
    assert cheap.rows == ROWS[0] and not cheap.warning
    assert dear.rows < ROWS[0]
    short = plan(LARGE, 10.0, 3, "T")
    assert short.steps < FEW and "only about" in short.warning and "a longer --budget" in short.warning


def test_what_a_step_takes_grows_with_the_longest_document_and_is_less_with_an_adapter():
    assert SMALL.step(16) > 2.5 * replace(SMALL, sizes=[31.0]).step(16)
    assert replace(SMALL, adapted=True).step(16) < SMALL.step(16)
    assert replace(SMALL, width=16, blocks=1).step(4) >= 4e-3  # what every block takes in a step

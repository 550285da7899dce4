"""Re-warming: from where the pretraining ended to the peak, and down again."""

from __future__ import annotations

import itertools
import math

import pytest

from pretrain.core.errors import PretrainError
from pretrain.optim.schedules.cosine import Cosine
from pretrain.optim.schedules.infinite import Infinite
from pretrain.optim.schedules.rewarm import Rewarm


def test_it_rises_in_a_straight_line_and_falls_by_half_a_cosine():
    factors = [Rewarm(warmup=10, initial=0.1, final=0.2).factor(step, 110) for step in range(111)]
    assert factors[:10] == pytest.approx([0.1 + 0.9 * n / 10 for n in range(1, 11)])
    assert factors[10] == 1 and factors[60] == pytest.approx(0.6) and factors[110] == pytest.approx(0.2)
    assert factors[35] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert all(b <= a for a, b in itertools.pairwise(factors[10:]))


def test_from_nothing_it_is_warm_up_and_cosine():
    rewarm, cosine = Rewarm(warmup=0.05, initial=0.0), Cosine(warmup=0.05, final=0.1)
    assert [rewarm.factor(s, 200) for s in range(200)] == pytest.approx([cosine.factor(s, 200) for s in range(200)])


def test_without_a_rise_it_begins_at_the_peak():
    assert Rewarm(warmup=0).factor(0, 100) == 1


def test_it_goes_on_where_a_cosine_ended():
    before, after = Cosine(final=0.1).factor(999, 1000), Rewarm().factor(0, 1000)
    assert before <= after <= before + 0.1


@pytest.mark.parametrize(
    "given", [{"final": 0.0}, {"final": 0.9}, {"constant": 2.0}, {"cooldown": 0.9}, {"anneal": -1}]
)
def test_phases_of_the_infinite_schedule_that_do_not_fit_are_refused(given):
    with pytest.raises(PretrainError, match="infinite: .*accepted: (shares of|from 0 to 1|0 or more)"):
        Infinite(**given)

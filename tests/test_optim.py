"""Schedules and optimisers against their formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pretrain.optim.adamw import AdamW
from pretrain.optim.constant import Constant
from pretrain.optim.cosine import Cosine
from pretrain.optim.infinite import Infinite
from pretrain.optim.linear import Linear
from pretrain.optim.wsd import WSD


@pytest.mark.parametrize("schedule", [Cosine(), Linear(), Constant(warmup=0.1), WSD(), Infinite()])
def test_a_schedule_warms_up_and_stays_between_zero_and_one(schedule):
    factors = [schedule.factor(step, 200) for step in range(200)]
    assert all(0 <= f <= 1 for f in factors) and max(factors) == pytest.approx(1, abs=0.02)
    assert factors[0] < 0.6


def test_cosine_is_half_way_in_the_middle_and_final_at_the_end():
    schedule = Cosine(warmup=0, final=0.1)
    assert schedule.factor(50, 100) == pytest.approx(0.55)
    assert schedule.factor(100, 100) == pytest.approx(0.1)
    assert schedule.factor(25, 100) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_linear_falls_by_equal_steps_to_zero():
    factors = [Linear(warmup=10).factor(step, 110) for step in range(111)]
    assert factors[9] == 1 and factors[10] == 1 and factors[60] == pytest.approx(0.5) and factors[110] == 0


def test_wsd_is_flat_until_its_decay_and_ends_at_final():
    schedule = WSD(warmup=0.1, decay=0.2, final=0.01)
    assert [schedule.factor(s, 100) for s in (10, 50, 80)] == [1.0, 1.0, 1.0]
    assert schedule.factor(90, 100) == pytest.approx(0.1) and schedule.factor(100, 100) == pytest.approx(0.01)


def test_adamw_decays_matrices_only_and_equals_the_formula():
    matrix, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW(lr=0.1, weight_decay=0.5).build([("m", matrix), ("b", bias)])
    matrix.grad, bias.grad = torch.full((2, 2), 3.0), torch.full((2,), 3.0)
    optimizer.step()
    assert torch.allclose(matrix, torch.full((2, 2), 1 - 0.1 * 0.5 - 0.1), atol=1e-6)
    assert torch.allclose(bias, torch.full((2,), 0.9), atol=1e-6)


def test_the_infinite_schedule_has_four_phases_that_join():
    schedule = Infinite(warmup=10, cooldown=20, anneal=30, constant=0.5, final=0.05)
    factors = [schedule.factor(step, 200) for step in range(201)]
    assert factors[4] == 0.5 and factors[9] == factors[10] == 1
    assert factors[20] == pytest.approx(0.75) and factors[30:171] == [0.5] * 141
    assert factors[185] == pytest.approx(0.5 * 0.1**0.5) and factors[200] == pytest.approx(0.05)
    assert all(b <= a for a, b in itertools.pairwise(factors[10:]))
    endless = Infinite(warmup=0, cooldown=0, anneal=0)
    assert {endless.factor(step, 100) for step in range(1000)} == {0.5}

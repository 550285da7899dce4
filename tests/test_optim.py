"""Schedules and optimisers against their formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pretrain.core.errors import PretrainError
from pretrain.core.models.parameters import described
from pretrain.optim.optimizers.adamw import AdamW
from pretrain.optim.optimizers.conda import Conda
from pretrain.optim.schedules.cosine import Cosine
from pretrain.optim.schedules.infinite import Infinite
from pretrain.optim.schedules.linear import Linear
from pretrain.optim.schedules.wsd import WSD


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


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_a_fall_to_zero_is_at_zero_only_at_the_end(shape, middle):
    schedule = WSD(warmup=0, decay=0.2, final=0.0, shape=shape)
    factors = [schedule.factor(step, 100) for step in range(101)]
    assert factors[80] == 1 and factors[90] == pytest.approx(middle) and factors[99] > 0 == factors[100]
    with pytest.raises(PretrainError, match=r"wsd: final 0: accepted: above 0, or shape linear or sqrt"):
        WSD(final=0.0)


def test_a_warm_up_longer_than_the_training_is_refused_and_clipped_where_its_length_is_a_guess():
    with pytest.raises(PretrainError, match=r"linear: warmup 300: accepted: at most the 200 steps of the budget"):
        Linear(warmup=300).check(200)
    Linear(warmup=0.5).check(1), Linear(warmup=200).check(200)
    assert Cosine(warmup=300).factor(199, 200) == 1


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


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_conda_steps_in_the_basis_of_its_momentum(shape):
    g = torch.Generator().manual_seed(0)
    start, grads = torch.randn(shape, generator=g), [torch.randn(shape, generator=g) for _ in range(5)]
    matrix = torch.nn.Parameter(start.clone())
    optimizer = Conda(lr=0.1, update_gap=3, weight_decay=0.2).build([("block.weight", matrix)])
    expected, m, v, u = start.double(), torch.zeros(shape).double(), torch.zeros(shape).double(), None
    for t, grad in enumerate(grads):
        matrix.grad = grad.clone()
        optimizer.step()
        x = grad.double()
        m = 0.9 * m + 0.1 * x
        if t % 3 == 0:
            left, _, right = torch.linalg.svd(m, full_matrices=False)
            u = left if shape[0] < shape[1] else right.T
        tall = shape[0] >= shape[1]
        project = (lambda y, u=u: y @ u) if tall else (lambda y, u=u: u.T @ y)
        v = 0.99 * v + 0.01 * project(x) ** 2
        step = project(m) / (v.sqrt() + 1e-8)
        step = 0.25 * (step @ u.T if tall else u @ step)
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * math.sqrt(1 - 0.99 ** (t + 1)) / (1 - 0.9 ** (t + 1)) * step
    assert torch.allclose(matrix.double(), expected, atol=1e-4)


def test_condas_projections_and_bases_are_metered(tmp_path, tiny):
    from pretrain.core.meter import Meter, Work

    layer = torch.nn.Linear(6, 10, bias=False)
    optimizer = Conda(update_gap=3).build([("blocks.0.up.weight", layer.weight)])
    meter, spent, phases = Meter(), [], []
    for _ in range(5):
        layer.weight.grad = torch.randn(10, 6)
        phases.append(optimizer.phase)
        spent.append(meter.run(Work(f"optimizer {optimizer.phase}"), optimizer.step)[1])
    products, bases = 3 * 2 * 10 * 6 * 6, 6 * 10 * 6**2 + 20 * 6**3
    assert phases == ["new bases", "rotated", "rotated", "new bases", "rotated"]
    assert spent == [products + bases, products, products, products + bases, products]


def test_conda_without_rotation_is_adam():
    g, net = torch.Generator().manual_seed(0), torch.nn.Sequential(torch.nn.LayerNorm(7), torch.nn.Embedding(9, 3))
    mine = Conda(lr=0.1, beta2=0.99).build(described(net))
    ours = list(net.parameters())
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    reference = torch.optim.Adam(theirs, lr=0.1, betas=(0.9, 0.99))
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn(a.shape, generator=g)
        mine.step()
        reference.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))

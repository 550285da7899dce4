"""What every optimiser and every schedule owes: from a recipe, resumed to the bit, on narrow weights; bounded, finite."""

from __future__ import annotations

import copy
import math
from dataclasses import fields, replace
from typing import Literal, get_args, get_origin

import pytest
import torch
from examples_training import Material, example, names, reread
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pretrain.core.bounds import hints
from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.core.models.parameters import described
from pretrain.training import state
from pretrain.training.background import Background
from pretrain.training.distributed import World

OPTIMISERS, SCHEDULES = names("optimiser"), names("schedule")
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def material(prepared, stories, tmp_path_factory):
    return Material(prepared, tmp_path_factory.mktemp("material"), stories)


class Net(torch.nn.Module):
    """An embedding, a tall and a wide matrix and a norm: what optimisers treat apart."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = torch.nn.Embedding(7, 6, dtype=dtype)
        self.up, self.norm = torch.nn.Linear(6, 10, dtype=dtype), torch.nn.LayerNorm(10, dtype=dtype)
        self.down = torch.nn.Linear(10, 6, bias=False, dtype=dtype)
        self.frozen = torch.nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)

    def step(self, optimiser, number):
        """One step on a loss that is another one each time."""
        torch.manual_seed(number)
        states = self.down(self.norm(self.up(self.embed_tokens(torch.randint(7, (5,))))))
        (states - torch.randn_like(states)).float().square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("name", [*OPTIMISERS, *SCHEDULES])
def test_a_recipe_gives_it_back(material, tmp_path, name):
    method = example(name, material)
    assert reread(method, tmp_path) == method


@pytest.mark.bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_state_that_is_saved_and_loaded_gives_the_same_next_steps(material, tmp_path, name, dtype):
    method = example(name, material)

    def made():
        net = Net(dtype)
        return net, method.build(described(net))

    whole, first, again = made(), made(), made()
    for number in range(7):
        whole[0].step(whole[1], number)
    for number in range(3):
        first[0].step(first[1], number)
    tensors = [value for values in first[1].state.values() for value in values.values() if torch.is_tensor(value)]
    assert all(tensor.is_contiguous() for tensor in tensors)  # as those that are read: kernels round by the layout
    with Background(ALONE) as background:
        state.save(tmp_path, 3, *first, {}, {}, ALONE, 1, background)
    state.load(state.newest(tmp_path), *again)
    assert getattr(again[1], "phase", "") == getattr(first[1], "phase", "")  # it costs what it would have
    for number in range(3, 7):
        again[0].step(again[1], number)
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), again[0].parameters(), strict=True))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_weights_in_bfloat16_go_where_those_in_float32_go(material, name):
    """With the same gradients: what parts the two is the rounding of weights and moments, a share of what is moved.

    A weight w of bfloat16 is off by 2⁻⁹·|w| at most after each of six steps of 5e-2, whose direction is off by as little
    as moments of eight bits are: for weights of 2, as the embedding has them, that is a tenth of the way even of steps
    that do not add up, as those of an optimiser without momentum, where a wrong step is all of it.
    """
    method, number = replace(example(name, material), lr=5e-2, weight_decay=0.0), 6
    narrow, wide = Net(torch.bfloat16), Net()
    wide.load_state_dict(narrow.state_dict())
    before, built = copy.deepcopy(wide), [method.build(described(net)) for net in (wide, narrow)]
    for step in range(number):
        torch.manual_seed(step)
        for one, other in zip(wide.parameters(), narrow.parameters(), strict=True):
            if one.requires_grad:
                other.grad = torch.randn(one.shape).bfloat16()
                one.grad = other.grad.float()
        for optimiser in built:
            optimiser.step()
    for (which, one), other, start in zip(
        wide.named_parameters(), narrow.parameters(), before.parameters(), strict=True
    ):
        assert other.dtype == torch.bfloat16 and other.isfinite().all()
        moved, moved_narrow = (p.detach().float() - start.detach() for p in (one, other))
        assert bool(moved.any()) == bool(moved_narrow.any()) == (which != "frozen")
        assert float((moved - moved_narrow).norm()) <= 0.12 * float(moved.norm()), which


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_rate_of_zero_moves_nothing_and_decay_is_for_matrices(material, name):
    method = example(name, material)
    for chosen, still in ((replace(method, lr=0.0), True), (replace(method, lr=1e-2, weight_decay=0.5), False)):
        net, optimiser = Net(), None
        before, optimiser = copy.deepcopy(net), chosen.build(described(net))
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        for one, other in zip(net.parameters(), before.parameters(), strict=True):
            decayed = not still and one.requires_grad and one.ndim >= 2
            torch.testing.assert_close(one, other * (1 - 1e-2 * 0.5) if decayed else other, rtol=1e-6, atol=0)


def values(hint):
    """What a schedule's field may be: a share, or a number of steps where it may be more than one."""
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    top = {part for mark in getattr(hint, "__metadata__", ()) for part in (getattr(mark, "le", None),)}
    shares = st.floats(0, 1, allow_subnormal=False)
    return shares if 1 in top else shares | st.integers(1, 300)


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=60)
@given(data=st.data())
def test_a_factor_is_a_share_of_the_peak_at_any_step_of_any_training(name, data):
    cls = method_class(name)
    given = {item.name: data.draw(values(hints(cls)[item.name]), item.name) for item in fields(cls)}
    try:
        schedule = cls(**given)
    except PretrainError:
        assume(False)
    total = data.draw(st.integers(0, 400), "total")
    for step in {
        0,
        1,
        total // 2,
        max(0, total - 1),
        total,
        total + 1,
        2 * total,
        data.draw(st.integers(0, 900), "step"),
    }:
        factor = schedule.factor(step, total)
        assert math.isfinite(factor) and 0 <= factor <= 1, (step, total)


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_reaches_the_peak_after_its_warm_up_and_rises_no_more(name):
    cls = method_class(name)
    for warmup, steps in ((0, 0), (7, 7), (0.25, 50)):
        schedule = cls(warmup=warmup)
        factors = [schedule.factor(step, 200) for step in range(200)]
        rise, rest = factors[:steps], factors[max(0, steps - 1) :]
        assert rise == sorted(rise) and len(set(rise)) == steps and max(factors) == pytest.approx(1)
        assert rest == sorted(rest, reverse=True)

"""The chunked linear cross-entropy against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.core.meter import count_flops
from pretrain.core.models import cross_entropy
from pretrain.core.models.cross_entropy import linear_cross_entropy


def problem(rows=3, length=50, width=16, vocabulary=97, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, width, dtype=dtype, generator=g, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, generator=g, requires_grad=True)
    bias = torch.randn(vocabulary, dtype=dtype, generator=g, requires_grad=True)
    target = torch.randint(0, vocabulary, (rows, length), generator=g)
    return hidden, weight, bias, target


def gradients(value, *leaves):
    return torch.autograd.grad(value, leaves)


@settings(max_examples=25)
@given(st.integers(1, 60), st.integers(2, 120), st.integers(0, 60), st.integers(1, 64), st.integers(0, 999))
def test_value_and_gradients_equal_pytorchs(length, vocabulary, ignored, chunk_rows, seed):
    hidden, weight, bias, target = problem(2, length, 8, vocabulary, seed=seed)
    target.flatten()[: min(ignored, target.numel() - 1)] = -100
    before = cross_entropy.CHUNK_BYTES["cpu"]
    cross_entropy.CHUNK_BYTES["cpu"] = 4 * vocabulary * chunk_rows
    least, cross_entropy.LEAST_ROWS = cross_entropy.LEAST_ROWS, 1
    try:
        value, nll = linear_cross_entropy(hidden, weight, target, bias_V=bias)
        ours = gradients(3 * value, hidden, weight, bias)
    finally:
        cross_entropy.CHUNK_BYTES["cpu"], cross_entropy.LEAST_ROWS = before, least
    logits = hidden @ weight.T + bias
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    assert torch.allclose(value, expected, rtol=1e-12)
    each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    assert torch.allclose(nll, each, atol=1e-12)
    for mine, theirs in zip(ours, gradients(3 * expected, hidden, weight, bias), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


def test_token_weights_scale_each_targets_share():
    hidden, weight, _, target = problem()
    weights = torch.rand(target.shape, dtype=torch.float64)
    value, nll = linear_cross_entropy(hidden, weight, target, weight_BL=weights)
    each = F.cross_entropy((hidden @ weight.T).flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    expected = (each * weights).mean()
    assert torch.allclose(value, expected) and torch.allclose(nll, each)
    assert torch.allclose(gradients(value, weight)[0], gradients(expected, weight)[0])


def test_huge_logits_stay_finite():
    hidden, weight, _, target = problem(dtype=torch.float32)
    value, nll = linear_cross_entropy(hidden * 1000, weight, target)
    expected = F.cross_entropy((hidden * 1000 @ weight.T).flatten(0, 1), target.flatten())
    assert torch.isfinite(nll).all() and torch.allclose(value, expected, rtol=1e-4)
    assert torch.isfinite(gradients(value, weight)[0]).all()


def test_tied_weights_receive_both_gradients():
    hidden, weight, _, target = problem()
    embedded = F.embedding(target, weight)
    value, _ = linear_cross_entropy(embedded, weight, target)
    expected = F.cross_entropy((F.embedding(target, weight) @ weight.T).flatten(0, 1), target.flatten())
    assert torch.allclose(gradients(value, weight)[0], gradients(expected, weight)[0])
    assert hidden is not None


def test_no_targets_give_a_loss_of_zero_and_zero_gradients():
    hidden, weight, _, target = problem()
    value, nll = linear_cross_entropy(hidden, weight, torch.full_like(target, -100))
    assert value == 0 and nll.abs().sum() == 0
    assert gradients(value, hidden)[0].abs().sum() == 0


@pytest.mark.parametrize("grad", [True, False])
def test_its_flops_are_its_matrix_products(grad):
    hidden, weight, _, target = problem(dtype=torch.float32)
    with torch.set_grad_enabled(grad):
        _, flops = count_flops(lambda: linear_cross_entropy(hidden, weight, target))
    one = 2 * target.numel() * hidden.shape[-1] * weight.shape[0]
    assert flops == (3 if grad else 1) * one


def test_bfloat16_autocast_is_near_float32():
    hidden, weight, _, target = problem(dtype=torch.float32)
    exact, _ = linear_cross_entropy(hidden, weight, target)
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = linear_cross_entropy(hidden, weight, target)
    assert torch.allclose(value, exact, rtol=2e-2)
    assert torch.allclose(gradients(value, weight)[0], gradients(exact, weight)[0], atol=3e-2)


@pytest.mark.parametrize("targets", [7, 601])
def test_the_mean_over_states_of_bfloat16_is_taken_in_float32(targets):
    """1/7 rounded to bfloat16 would move the loss and its gradient by 0.2%, 1/601 by 0.04%."""
    g = torch.Generator().manual_seed(0)
    hidden_BLE = torch.randn(1, targets, 16, generator=g).bfloat16()
    weight_VE, target_BL = torch.randn(50, 16, generator=g).bfloat16(), torch.randint(0, 50, (1, targets), generator=g)
    value, nll_BL = linear_cross_entropy(hidden_BLE, weight_VE, target_BL)
    assert float(value) == pytest.approx(float(nll_BL.double().mean()), rel=1e-6)

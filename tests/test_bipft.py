"""BiPFT: what has one bit, its gradients, the estimators, and where the scales begin."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.core.errors import PretrainError
from pretrain.core.models.families import base, blocks, embeddings, linears
from pretrain.surgery import Inputs
from pretrain.surgery.compression.bipft import (
    LEAST,
    BinaryAttention,
    BinaryEmbedding,
    BinaryLinear,
    BiPFT,
    binarised,
    signs,
)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("alpha", [0.7, 1.3, 0.0])
def test_a_signed_number_is_its_sign_with_the_gradients_of_a_learned_step(alpha):
    x, scale = numbers(40).requires_grad_(), torch.tensor([alpha], dtype=torch.float64, requires_grad=True)
    out, g, step = binarised(x, scale), numbers(40, seed=1), max(alpha, LEAST)
    assert torch.equal(out.detach(), step * x.detach().sign())
    out.backward(g)
    assert torch.allclose(x.grad, g * (x.detach().abs() <= step), atol=0, rtol=1e-12)
    assert scale.grad.item() == pytest.approx((x.detach().sign() * g).sum().item() / 40**0.5, rel=1e-12)


def test_a_probability_is_nothing_or_the_scale_with_the_gradients_of_a_learned_step():
    x = torch.tensor([0.0, 0.1, 0.3, 0.31, 0.5, 0.6, 0.61, 2.0], dtype=torch.float64, requires_grad=True)
    scale, g = torch.tensor([0.6], dtype=torch.float64, requires_grad=True), numbers(8)
    out = binarised(x, scale, signed=False)
    assert torch.allclose(out.detach(), torch.tensor([0, 0, 0, 0.6, 0.6, 0.6, 0.6, 0.6], dtype=torch.float64))
    out.backward(g)
    ratio = x.detach() / 0.6
    assert torch.allclose(x.grad, g * (ratio <= 1))
    slope = torch.where(ratio <= 1, ratio.round() - ratio, 1.0)
    assert scale.grad.item() == pytest.approx((slope * g).sum().item() / 8**0.5, rel=1e-12)


def test_weights_are_signs_about_their_mean_and_their_gradient_goes_straight_through():
    w, g = (numbers(5, 7) + 0.3).requires_grad_(), numbers(5, 7, seed=1)
    whole, rows = signs(w, (0, 1)), signs(w, (1,))
    kept, mean = w.detach(), w.detach().mean()
    assert torch.allclose(whole, (kept - mean).sign() * kept.abs().mean())
    assert torch.allclose(rows, (kept - mean).sign() * kept.abs().mean(1, keepdim=True))
    whole.backward(g)
    assert torch.equal(w.grad, g)


def test_a_layer_multiplies_bits(tiny):
    layer = BinaryLinear(nn.Linear(6, 4, dtype=torch.float64)).train()
    layer.move.data.copy_(numbers(6))
    layer.binarise.scale.data.fill_(0.4)
    x, w = numbers(3, 6, seed=2), layer.weight.detach()
    bits = (x + layer.move).sign() @ (w - w.mean()).sign().T
    assert set(bits.abs().flatten().tolist()) <= {0.0, 2.0, 4.0, 6.0}  # of six products of ±1
    assert torch.allclose(layer(x), 0.4 * w.abs().mean() * bits + layer.bias)


@pytest.mark.parametrize("estimators", [True, False])
def test_attention_is_between_bits_and_estimators_add_the_residuals(tiny, estimators):
    model = BiPFT(estimators=estimators)(tiny("bert").double()).eval()
    layer = next(m for m in model.modules() if isinstance(m, BinaryAttention))
    assert len(layer.estimators) == (5 if estimators else 0)
    for module in layer.estimators.values():
        module.weight.data.normal_(generator=torch.Generator().manual_seed(3))
        module.bias.data.fill_(0.2)
    states, mask = numbers(2, 5, model.config.hidden_size), torch.zeros(2, 1, 5, 5, dtype=torch.float64)
    mask[..., 3:] = -1e9
    heads = lambda x: x.view(2, 5, layer.heads, -1).transpose(1, 2)  # noqa: E731
    q, k, v = (
        scale.scale * heads(project(states)).sign()
        for scale, project in ((layer.of_query, layer.query), (layer.of_key, layer.key), (layer.of_value, layer.value))
    )
    score = q @ k.mT
    if estimators:
        q_p, k_p, q_m, k_m, v_p = (layer.estimators[n](states) for n in ("q_p", "k_p", "q_m", "k_m", "v_p"))
        score = score + (q_m @ k_p.mT + q_p @ k_m.mT + q_p @ k_p.mT)[:, None]
    p = (score / q.shape[-1] ** 0.5 + mask).softmax(-1)
    alpha = layer.of_probability.scale
    p = alpha * (p / alpha).round().clamp(0, 1)
    expected = p @ v + (p @ v_p[:, None] if estimators else 0)
    out, seen = layer(states, mask)
    assert torch.allclose(seen, p) and (p[..., 3:] == 0).all()
    assert torch.allclose(out, expected.transpose(1, 2).reshape(2, 5, -1))


def test_scales_begin_at_twice_the_mean_size_of_what_they_binarise_on_the_stages_text(tiny):
    ids = torch.arange(3, 19)[None]
    plain = tiny("bert").eval()
    model = BiPFT()(tiny("bert"), Inputs(batches=[{"input_ids": ids}]))
    seen = base(model.eval()).embeddings(ids)
    first = blocks(model)[0].attention.self.query
    assert first.binarise.scale.item() == pytest.approx(2 * seen.abs().mean().item(), rel=1e-5)
    query = first(seen)
    assert blocks(model)[0].attention.self.of_query.scale.item() == pytest.approx(
        2 * query.abs().mean().item(), rel=1e-5
    )
    table = embeddings(model)
    assert isinstance(table, BinaryEmbedding) and torch.equal(table.weight, embeddings(plain).weight)
    row = table(torch.tensor([5]))[0]
    assert torch.allclose(row.abs(), table.weight[5].abs().mean().expand_as(row))
    head = model.get_output_embeddings()
    assert head.weight is table.weight  # which keeps all its bits
    again = BiPFT()(tiny("bert"), Inputs(seed=1))
    scales = [m.binarise.scale.item() for m in linears(again).values() if isinstance(m, BinaryLinear)]
    assert scales and all(0 < scale < 10 for scale in scales) and scales[0] != first.binarise.scale.item()


def test_it_learns_and_every_trained_number_has_a_gradient(tiny):
    torch.manual_seed(0)
    ids = torch.randint(3, 90, (4, 12))
    model = BiPFT()(tiny("bert", initializer_range=0.3), Inputs(batches=[{"input_ids": ids}])).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    inside = dict(blocks(model)[0].named_parameters())
    assert len(inside) > 30 and not [n for n, p in inside.items() if p.grad is None or not p.grad.abs().sum() > 0]


def test_what_does_not_fit_is_one_clear_error(tiny):
    with pytest.raises(PretrainError, match="bipft: family 'llama': accepted: bert"):
        BiPFT()(tiny())
    with pytest.raises(PretrainError, match=r"bipft: .*BinaryLinear: accepted: plain linear layers"):
        BiPFT()(BiPFT()(tiny("bert")))

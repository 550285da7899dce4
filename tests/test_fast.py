"""The faster arithmetic gives what `transformers` gives."""

from __future__ import annotations

import copy

import pytest
import torch
from closeness import assert_rounding, assert_same_model, products

from pretrain.core.models.fast import accelerate, rotary


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert"])
def test_outputs_and_gradients_are_unchanged_up_to_rounding(tiny, name):
    model = tiny(name)
    quick = copy.deepcopy(model)
    accelerate(quick)
    tokens_BL = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    expected, got = model(tokens_BL).logits, quick(tokens_BL).logits
    assert_same_model(got, expected, model)
    expected.square().sum().backward()
    got.square().sum().backward()
    terms, steps = products(model)
    for slow, fast in zip(model.modules(), quick.modules(), strict=True):
        own = list(slow.parameters(recurse=False))
        # Of a layer's largest: the gradient of keys' biases is 0, what is left of it rounding of terms of that size.
        largest = max((p.grad.abs().max().item() for p in own), default=0.0)
        for p, q in zip(own, fast.parameters(recurse=False), strict=True):
            assert_rounding(q.grad, p.grad, terms, steps=3 * steps, size=terms**0.5 * largest)  # two backward for one
    assert model.state_dict().keys() == quick.state_dict().keys()


def test_rotary_equals_the_plain_formula_and_its_gradient():
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 5, 8, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    angles = torch.randn(2, 5, 4, generator=g, dtype=torch.float64)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)

    def plain(x):
        turned = torch.cat([-x[..., 4:], x[..., :4]], -1)
        return x * cos[:, None] + turned * sin[:, None]

    for ours, x in zip(rotary(q, k, cos, sin), (q, k), strict=True):
        assert torch.allclose(ours, plain(x))
        assert torch.allclose(*(torch.autograd.grad((y * y.detach().cos()).sum(), x)[0] for y in (ours, plain(x))))

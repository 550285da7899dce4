"""The compute meter counts what runs: forward, backward, recomputation."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from pretrain.core.meter import Meter, count_flops, peak_memory


def test_forward_and_backward_of_a_linear_layer():
    layer, x_BE = torch.nn.Linear(8, 16, bias=False), torch.randn(32, 8, requires_grad=True)
    _, flops = count_flops(lambda: layer(x_BE).sum().backward())
    assert flops == 3 * 2 * 32 * 8 * 16


def test_attention_on_the_cpu_is_counted():
    q, k, v = (torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 64 * 64 * 16
    _, flops = count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert flops == 2 * product
    _, flops = count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward())
    assert flops == 7 * product  # backward: the scores again, and four products


def test_recomputed_activations_count_again():
    layer, x_BE = torch.nn.Linear(8, 8, bias=False), torch.randn(4, 8, requires_grad=True)
    _, plain = count_flops(lambda: layer(x_BE).relu().sum().backward())
    _, again = count_flops(lambda: checkpoint(lambda x: layer(x).relu(), x_BE, use_reentrant=False).sum().backward())
    assert again == plain + 2 * 4 * 8 * 8


def test_a_shape_is_counted_once_and_remembered():
    meter, runs = Meter(), []

    def work():
        runs.append(1)
        return torch.randn(4, 4) @ torch.randn(4, 4)

    first, second = meter.run("4x4", work)[1], meter.run("4x4", work)[1]
    assert first == second == 2 * 4**3 and len(runs) == 2
    assert Meter(meter.counts).run("4x4", lambda: None) == (None, first)


def test_peak_memory_is_of_this_process():
    assert 10e6 < peak_memory() < 1e12

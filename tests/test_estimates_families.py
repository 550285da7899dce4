"""A model's size and the work of its forward pass as estimates have them, from its configuration alone, by type."""

from __future__ import annotations

import pytest
import torch
import zoo

from pretrain.core.meter import count_flops
from pretrain.dial.configs import shape_from

LENGTH = 64
# At these tiny sizes: what weighs there and at no size in use, or blocks of which estimates know no better.
ROUGH = {
    "diffllama": "its attention runs twice", "deepseek_v3": "its attention's matrices are factors",
    "lfm2": "its feed-forwards are rounded up to 256", "falcon_h1": "blocks without attention among others",
    "bamba": "blocks without attention among others", "jamba": "blocks without attention among others",
    "qwen3_next": "blocks of linear attention among others", "albert": "all blocks share their weights",
    "roformer": "a table of sines of its positions", "longformer": "its attention is in windows",
    "layoutlm": "positions on a page", "led": "its attention is in windows",
    "granitemoehybrid": "blocks without attention among others",
}  # fmt: skip
KINDS = [kind for kind, task in zoo.TASKS.items() if task != "seq2seq" and kind not in ROUGH] + [
    "bart",
    "mbart",
    "plbart",
    "mvp",
]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_work_are_near_those_of_the_model(kind):
    model = zoo.make(kind)
    shape = shape_from(model.config.to_dict())
    if shape is None:
        assert kind in ("mamba", "mamba2", "falcon_mamba", "recurrent_gemma")
        return
    with torch.no_grad():
        _, flops = count_flops(lambda: model(torch.arange(3, 3 + LENGTH)[None]))
    assert shape.weights == pytest.approx(sum(weight.numel() for weight in model.parameters()), rel=0.1)
    assert shape.forward(LENGTH) * LENGTH == pytest.approx(flops, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "experts"), [("mixtral", "num_local_experts"), ("olmoe", "num_experts"), ("glm4_moe", "n_routed_experts")]
)
def test_more_experts_weigh_more_and_a_token_passes_as_many(kind, experts):
    few, many = (shape_from(zoo.make(kind, **{experts: number}).config.to_dict()) for number in (4, 16))
    assert many.weights > 1.5 * few.weights and many.forward(LENGTH) == few.forward(LENGTH)

"""SmoothQuant and AWQ: scales that change nothing, and what rounding loses with them and without."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import TASK, TINY

from pretrain.core.errors import PretrainError
from pretrain.core.models.families import new_model
from pretrain.surgery import Inputs
from pretrain.surgery._calibration import Blocks, weight_of
from pretrain.surgery.compression._smoothing import fold, places
from pretrain.surgery.compression.awq import AWQ
from pretrain.surgery.compression.gptq import GPTQ, PackedLinear
from pretrain.surgery.compression.smooth_quant import SmoothQuant
from pretrain.surgery.compression.w8a8 import W8A8

FAMILIES = ("llama", "qwen3", "gpt2", "modernbert")


def lively(kind):
    """A model with outliers: its norms' weights differ by 15 times."""
    torch.manual_seed(0)
    model = new_model(kind, TINY[kind], task=TASK[kind]).double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(5 if parameter.ndim > 1 else 0.2 + 3 * torch.rand_like(parameter))
    return model


def text():
    ids_BL = torch.randint(3, 90, (6, 40), generator=torch.Generator().manual_seed(1))
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[0, 30:] = 0
    return {"input_ids": ids_BL, "attention_mask": mask_BL, "position_ids": torch.arange(40).expand(6, -1)}


def logits(model):
    with torch.no_grad():
        return model(text()["input_ids"]).logits


def operated(method, model):
    return method(copy.deepcopy(model), Inputs(batches=[text()]))


@pytest.mark.parametrize("kind", FAMILIES)
def test_scales_of_any_size_change_no_logits(kind):
    model, source = lively(kind), torch.Generator().manual_seed(2)
    before = logits(model)
    for block in Blocks(model, [text()]).blocks:
        pairs = places(model, block)
        assert sum(pair.norm for pair in pairs) >= 1 and any(not pair.norm for pair in pairs)
        for pair in pairs:
            inputs = weight_of(block.get_submodule(pair.layers[0])).shape[1]
            fold(block, pair, torch.rand(inputs, generator=source, dtype=torch.float64) * 9 + 0.1)
    assert torch.allclose(logits(model), before, rtol=1e-9, atol=1e-9)


def test_smoothing_shares_the_greatest_sizes_of_inputs_and_weights():
    model = lively("llama")
    made = operated(SmoothQuant(0.4), model)
    before, after = (Blocks(each, [text()]) for each in (model, made))
    for name in ("self_attn.q_proj", "mlp.gate_proj"):
        group = [n for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
                 if n.split(".")[0] == name.split(".")[0]]  # fmt: skip
        (whole,), (smooth,) = (list(stack.seen(0, stack.layers(0, [name]))) for stack in (before, after))
        x_I = whole[name][0].abs().amax(0)
        w_I = torch.stack([weight_of(before.layers(0, [n])[n]).abs().amax(0) for n in group]).amax(0)
        assert torch.allclose(smooth[name][0].abs().amax(0), x_I / (x_I**0.4 / w_I**0.6), rtol=1e-5)
    assert torch.allclose(logits(made), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_activations_of_eight_bits_lose_less_when_smoothed(kind):
    model = lively(kind)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and any(
            norm in name for norm in ("layernorm.", "ln_1", "ln_2", "attn_norm", "mlp_norm")
        ):
            parameter.data[3] *= 40  # one place of what enters the layers is an outlier
    rounded, smoothed = W8A8("int8"), lambda m, i: W8A8("int8")(SmoothQuant()(m, i))
    lost, less = ((logits(operated(method, model)) - logits(model)).square().mean() for method in (rounded, smoothed))
    assert less < lost


@pytest.mark.parametrize("kind", FAMILIES)
def test_three_bits_lose_less_with_the_scales_and_less_again_with_the_clipping(kind):
    model = lively(kind)
    methods = (GPTQ(3, 16, solver="rtn", pack=False), AWQ(3, 16, pack=False, clip_tokens=0), AWQ(3, 16, pack=False))
    lost = [float((logits(operated(method, model)) - logits(model)).square().mean()) for method in methods]
    assert lost[0] > lost[1] > lost[2] > 0


@torch.no_grad()
def test_the_scales_are_the_best_of_the_grid_for_the_modules_output():
    model, method = lively("llama"), AWQ(3, 16, ratios=5)
    stack = Blocks(model, [text()])
    block, pair = stack.blocks[0], places(model, stack.blocks[0])[1]
    assert pair.inside == "mlp" and pair.layers == ("mlp.gate_proj", "mlp.up_proj")
    found = method._scale(stack, 0, pair)
    ((x_NI, _),) = (seen["mlp.gate_proj"] for seen in stack.seen(0, stack.layers(0, ["mlp.gate_proj"])))
    losses = []
    for ratio in (0, 0.2, 0.4, 0.6, 0.8):
        scale_I = x_NI.abs().mean(0) ** ratio
        scale_I /= (scale_I.max() * scale_I.min()).sqrt()
        mlp = copy.deepcopy(block.mlp)
        for layer in (mlp.gate_proj, mlp.up_proj):
            layer.weight.data = method._rounded(layer.weight.data * scale_I) / scale_I
        losses.append((float((mlp(x_NI) - block.mlp(x_NI)).square().mean()), scale_I))
    assert torch.allclose(found.double(), min(losses, key=lambda pair: pair[0])[1], rtol=1e-5)


def test_clipping_takes_the_bounds_that_lose_least():
    method, source = AWQ(3, 8), torch.Generator().manual_seed(3)
    weight_OI = torch.randn(5, 16, generator=source)
    weight_OI[2, 3] = 9.0  # an outlier that a clipped grid does better without
    x_NI = torch.randn(64, 16, generator=source)
    x_NI[:, 3] *= 1e-3
    clipped_OI = method.clipped(weight_OI, x_NI)
    assert clipped_OI[2, 3] == pytest.approx(9 * 0.55) and torch.equal(clipped_OI[2, :3], weight_OI[2, :3])

    def lost(weights):
        return (method._rounded(weights) @ x_NI.T - weight_OI @ x_NI.T).square().mean()

    assert lost(clipped_OI) < lost(weight_OI)


def test_it_is_packed_as_gptq_packs():
    model = lively("llama").float()
    packed, dense = (operated(AWQ(4, 16, ratios=3, pack=pack), model) for pack in (True, False))
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    assert torch.allclose(logits(packed), logits(dense), atol=1e-4)


def test_families_whose_norms_do_not_stand_before_the_layers_and_no_text_are_refused(tiny):
    for method in (AWQ(), SmoothQuant()):
        with pytest.raises(PretrainError, match=f"{method.name}: family 'bert': accepted: llama, gpt2, modernbert"):
            method(tiny("bert"), Inputs(batches=[text()]))
        with pytest.raises(PretrainError, match=f"{method.name}: it needs text to calibrate on"):
            method(tiny("llama"))

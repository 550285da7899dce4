"""Pre-calibration: the rule is the adaptive Lasso's, no penalty is rounding to nearest, divergence never rises."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import linears
from pretrain.surgery import Inputs, operate
from pretrain.surgery._calibration import weight_of
from pretrain.surgery.compression._grid import round_to_nearest
from pretrain.surgery.compression.gptq import GPTQ
from pretrain.surgery.compression.pre_calibration import PreCalibration, divergence, on_two_grids, shrunk

TOKENS = torch.arange(3, 23)[None]


def heavy(outputs=24, inputs=40, seed=0):
    """Weights with a few that are far greater than the rest."""
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, (outputs, inputs))).float() * 0.02


def batches():
    return [{"input_ids": torch.randint(3, 97, (2, 16), generator=torch.Generator().manual_seed(i))} for i in range(2)]


def test_the_rule_is_the_minimum_of_the_adaptive_lasso():
    weight, penalty = heavy(1, 60).double()[0], 4e-4
    found = shrunk(weight, penalty)
    grid = torch.linspace(-0.2, 0.2, 40001, dtype=torch.double)
    for w, v in zip(weight, found, strict=True):
        cost = 0.5 * (w - grid) ** 2 + penalty * grid.abs() / w.abs()
        assert abs(grid[cost.argmin()] - v) < 1.1e-5 or abs(w) > 0.2
    assert torch.equal(found != 0, weight**2 > penalty) and 5 < (found != 0).sum() < 55
    assert shrunk(torch.zeros(3), 0.1).tolist() == [0, 0, 0] == shrunk(torch.zeros(3), 0.0).tolist()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("penalty", [0.0, 1e-12])
def test_without_a_penalty_it_rounds_to_the_nearest_point_of_gptqs_grid(tiny, penalty, symmetric):
    method = PreCalibration(3, 16, symmetric=symmetric, penalty=penalty)
    made, nearest = method(tiny()), GPTQ(3, 16, symmetric, solver="rtn", pack=False)(tiny())
    for name, layer in linears(made).items():
        assert torch.equal(layer.weight, linears(nearest)[name].weight)


def test_so_it_does_where_no_weight_is_left():
    weight = heavy()
    nearest = round_to_nearest(weight, 3, 16, False).dense()
    assert torch.equal(on_two_grids(weight, 1e3, 3, 16, False), nearest)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_salient_weights_and_the_rest_have_a_grid_each(bits, group_size):
    weight, penalty = heavy(), 2e-3
    salient = weight**2 > penalty
    made = on_two_grids(weight, penalty, bits, group_size, False)
    size = 40 if group_size == -1 else group_size
    for row in range(len(weight)):
        for start in range(0, 40, size):
            part, sort = (x[row, start : start + size] for x in (made, salient))
            assert len(part[sort].unique()) <= 2**bits and len(part[~sort].unique()) <= 2**bits
    core = round_to_nearest(weight.masked_fill(salient, 0), bits, group_size, False).dense()
    assert torch.equal(made[~salient], core[~salient])


def test_the_divergence_is_scipys():
    weight, other = heavy(), round_to_nearest(heavy(), 3, -1, False).dense()
    low, high = weight.min().item(), weight.max().item()
    p, q = (np.histogram(x.clamp(low, high), 32, (low, high))[0] + 1 for x in (weight, other))
    assert divergence(weight, other, 32) == pytest.approx(entropy(p, q), rel=1e-6)
    assert divergence(weight, weight, 32) == 0 and divergence(torch.ones(2, 2), torch.zeros(2, 2), 32) == 0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_divergence_is_the_least_of_those_tried_and_never_that_of_rounding_to_nearest_or_more(bits):
    gains = []
    for seed in range(4):
        weight, method = heavy(48, 64, seed), PreCalibration(bits, 32, salient=0.2, steps=8)
        made, found = method.rounded(weight)
        penalties = method.penalties(weight)
        shares = [(weight**2 > penalty).float().mean().item() for penalty in penalties]
        assert len(penalties) == 8 and shares == pytest.approx([0.025 * n for n in range(1, 9)], abs=1e-3)
        every = [on_two_grids(weight, penalty, bits, 32, False) for penalty in (0, *penalties)]
        least = min(divergence(weight, one, 64) for one in every)
        nearest = round_to_nearest(weight, bits, 32, False).dense()
        assert found["kl"] == least == divergence(weight, made, 64) <= found["kl_nearest"]
        assert found["kl_nearest"] == divergence(weight, nearest, 64)
        assert found["error"] == pytest.approx(((made - weight) ** 2).sum().item() / (weight**2).sum().item())
        gains.append((found["kl_nearest"] - found["kl"], found["error_nearest"] / found["error"]))
    assert min(gain for gain, _ in gains) > 0 and min(less for _, less in gains) > 1.2  # of weights with heavy tails


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "modernbert", "t5"])
def test_only_the_linear_layers_change_and_each_is_told_of(tiny, family):
    plain, inputs = tiny(family), Inputs()
    made = PreCalibration(3, 16)(tiny(family), inputs)
    changed = {n for n, p in made.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    assert changed == {f"{path}.weight" for path in linears(plain)}
    told = inputs.extra["metrics"]
    for path, layer in linears(plain).items():
        rounded, found = PreCalibration(3, 16).rounded(weight_of(layer))
        assert torch.equal(weight_of(linears(made)[path]), rounded)
        assert {n: told[f"pre_calibration/{path}/{n}"] for n in found} == found
        assert found["kl"] <= found["kl_nearest"]
    mean = np.mean([told[f"pre_calibration/{path}/kl"] for path in linears(plain)])
    assert told["pre_calibration/kl"] == pytest.approx(mean)
    assert not checkpoint.surgery_of(made)


@pytest.mark.bits
def test_gptq_goes_on_from_its_weights_and_writes_what_it_always_writes(tiny, tmp_path):
    inputs = Inputs(batches=batches())
    pre, gptq = PreCalibration(4, 16, penalty=3.0), GPTQ(4, 16)
    chained, _, _ = operate([pre, gptq], tiny(), inputs)
    alone, by_hand = gptq(tiny(), inputs), gptq(pre(tiny()), inputs)
    for (name, mine), (other, its) in zip(chained.state_dict().items(), alone.state_dict().items(), strict=True):
        assert name == other and mine.shape == its.shape and mine.dtype == its.dtype
        assert torch.equal(mine, by_hand.state_dict()[name])
    first = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(linears(chained)[first].dense(), linears(alone)[first].dense())
    checkpoint.save(chained, None, tmp_path / "c")
    config = json.loads((tmp_path / "c/config.json").read_text())
    assert config["quantization_config"] == gptq.quantization_config() and config["model_type"] == "llama"
    assert [entry["method"] for entry in checkpoint.read_record(tmp_path / "c")["surgery"]] == ["gptq"]
    assert torch.equal(checkpoint.load(tmp_path / "c")[0](TOKENS).logits, chained(TOKENS).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "bits 1: accepted: from 2 to 8"), ({"group_size": 0}, "group_size 0: accepted: -1, or 1 or more"),
        ({"salient": 1.0}, "salient 1.0: accepted: above 0, below 1"), ({"steps": 0}, "steps 0: accepted: 1 or more"),
        ({"bins": 1}, "bins 1: accepted: 2 or more"), ({"penalty": -1.0}, "penalty -1.0: accepted: 0 or more, or null"),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(PretrainError, match=f"^pre_calibration: {message}"):
        PreCalibration(**fields)


def test_layers_that_are_no_plain_ones_are_refused(tiny):
    with pytest.raises(PretrainError, match="pre_calibration: .*q_proj is a PackedLinear: accepted: plain linear"):
        PreCalibration()(GPTQ(solver="rtn")(tiny()))

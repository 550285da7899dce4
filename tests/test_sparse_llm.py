"""SparseLLM: each of its subproblems is solved, its baselines are the papers', and the asked sparsity is reached."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import linears, new_model
from pretrain.surgery import Inputs
from pretrain.surgery._calibration import Blocks, parts, weight_of
from pretrain.surgery.compression.sparse_llm import (
    FeedForward,
    SparseLLM,
    best_p,
    best_z_gated,
    best_z_relu,
    descended_s,
    fitted,
    magnitude,
    sparsegpt,
    wanda,
)

TOKENS = torch.arange(3, 23)[None]
RELU = {"gpt2": {"activation_function": "relu"}, "bert": {"hidden_act": "relu"}}


def batches(rows=8, length=24, seed=0):
    """Two documents a row and padding at the end, in batches of two rows."""
    ids = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))
    documents = torch.tensor([1] * 12 + [2] * 9 + [0] * 3).expand(rows, length)
    positions = torch.cat([torch.arange(12), torch.arange(9), torch.arange(3)]).expand(rows, length)
    whole = {"input_ids": ids, "attention_mask": documents, "position_ids": positions}
    return [{k: v[b : b + 2] for k, v in whole.items()} for b in range(0, rows, 2)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(outputs=6, inputs=20, tokens=300, seed=0):
    """A weight and inputs that are correlated, as a layer's are."""
    x_NI = normal(tokens, inputs, seed=seed) @ normal(inputs, inputs, seed=seed + 1)
    return normal(outputs, inputs, seed=seed + 2), x_NI, 2 * x_NI.T @ x_NI / tokens


def loss(weight_OI, pruned_OI, x_NI):
    return (x_NI @ (weight_OI - pruned_OI).T).pow(2).sum().item()


def test_magnitude_drops_the_smallest_of_the_whole_matrix():
    weight_OI = torch.tensor([[0.1, -0.2, 3.0], [-0.3, 4.0, 5.0]])
    assert torch.equal(magnitude(weight_OI, 0.5), torch.tensor([[0, 0, 3.0], [0, 4.0, 5.0]]))


def test_wandas_score_is_the_weight_times_the_norm_of_its_inputs_and_rows_are_compared_apart():
    weight_OI, x_NI, hessian_II = problem()
    pruned_OI = wanda(weight_OI, hessian_II, 0.5)
    for row, kept in zip(weight_OI, pruned_OI, strict=True):
        score = [abs(float(row[i])) * float(x_NI[:, i].pow(2).sum().sqrt()) for i in range(20)]
        dropped = sorted(range(20), key=score.__getitem__)[:10]
        assert [i for i in range(20) if kept[i] == 0] == sorted(dropped)
        assert all(kept[i] == row[i] for i in range(20) if i not in dropped)


def test_sparsegpt_is_optimal_brain_surgery_in_a_fixed_order():
    weight_OI, _, hessian_II = problem()
    W, H = weight_OI.clone(), hessian_II + 0.01 * hessian_II.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    for start in range(0, 20, 7):
        size = min(7, 20 - start)
        pivots = torch.stack([torch.linalg.inv(H[i:, i:])[0, 0] for i in range(start, start + size)])
        score = (W[:, start : start + size] ** 2 / pivots).flatten()
        mask = torch.zeros_like(score).scatter(0, score.argsort()[: round(score.numel() * 0.6)], 1).view(-1, size)
        for i in range(start, start + size):
            inverse = torch.linalg.inv(H[i:, i:])
            error = W[:, i] * mask[:, i - start] / inverse[0, 0]
            W[:, i:] -= error[:, None] * inverse[0][None]
    found = sparsegpt(weight_OI, hessian_II, 0.6, 0.01, 7)
    torch.testing.assert_close(found, W)
    assert int((found == 0).sum()) == 25 + 25 + 22


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_the_layers_own_loss_falls_from_magnitude_to_wanda_to_sparsegpt(sparsity):
    for seed in range(5):
        weight_OI, x_NI, hessian_II = problem(outputs=32, seed=10 * seed)
        x_NI = x_NI * torch.logspace(-1, 1, 20, dtype=torch.float64)  # inputs of unlike sizes
        hessian_II = 2 * x_NI.T @ x_NI / len(x_NI)
        losses = [
            loss(weight_OI, pruned, x_NI)
            for pruned in (
                magnitude(weight_OI, sparsity), wanda(weight_OI, hessian_II, sparsity),
                sparsegpt(weight_OI, hessian_II, sparsity, 0.01, 128),
            )
        ]  # fmt: skip
        assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("solver", ["sparse_llm", "sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_half_of_each_group_of_neighbours_becomes_zero(tiny, solver, pattern):
    method, group = SparseLLM(0.5, pattern, epochs=2, block_size=16, solver=solver), int(pattern[-1])
    model = method(tiny("llama"), Inputs(batches=batches()))
    for layer in linears(model).values():
        assert ((layer.weight.unflatten(1, (-1, group)) == 0).sum(-1) == group // 2).all()


def test_a_pattern_takes_the_least_harmful_of_each_group():
    weight_OI, hessian_II = normal(6, 16), normal(16, 40, seed=1)
    hessian_II = 2 * hessian_II @ hessian_II.T
    kept_OI = sparsegpt(weight_OI, hessian_II, 0.5, 0.01, 8, 4) != 0
    U_II = torch.linalg.cholesky(
        torch.linalg.inv(hessian_II + 0.01 * hessian_II.diagonal().mean() * torch.eye(16)), upper=True
    )
    first_O4 = (weight_OI[:, :4] / U_II.diagonal()[:4]).abs()
    assert torch.equal(kept_OI[:, :4], first_O4 >= first_O4.sort(-1).values[:, 2:3])
    lost = [
        float(((made_OI - weight_OI) @ hessian_II @ (made_OI - weight_OI).T).trace())
        for made_OI in (sparsegpt(weight_OI, hessian_II, 0.5, 0.01, 8, 4), magnitude(weight_OI, 0.5, 4))
    ]
    assert lost[0] < lost[1]
    for fields, wrong in (
        ({"sparsity": 0.7}, "sparsity 0.7 with pattern 2:4: accepted: 0.5"),
        ({"sparsity": 0.5, "block_size": 6}, "block_size 6 with pattern 2:4: accepted: multiples of 4"),
    ):
        with pytest.raises(PretrainError, match=f"sparse_llm: {wrong}"):
            SparseLLM(pattern="2:4", **fields)


def test_weights_are_fitted_by_least_squares_even_where_inputs_depend_on_one_another():
    x_NI, y_NO = normal(50, 8), normal(50, 3, seed=1)
    torch.testing.assert_close(
        fitted([(x_NI[:17], y_NO[:17]), (x_NI[17:], y_NO[17:])]), torch.linalg.lstsq(x_NI, y_NO).solution.T
    )
    x_NI[:, 3] = 0
    torch.testing.assert_close(
        fitted([(x_NI[:17], y_NO[:17]), (x_NI[17:], y_NO[17:])]), (torch.linalg.pinv(x_NI) @ y_NO).T
    )


def test_the_best_p_has_no_slope():
    down_EH, y_NE, after_NH = normal(6, 10), normal(40, 6, seed=1), normal(40, 10, seed=2)
    p_NH = best_p(down_EH, y_NE, after_NH, 3.0, 2.0).requires_grad_()
    cost = 3 * (p_NH @ down_EH.T - y_NE).pow(2).sum() + 2 * (p_NH - after_NH).pow(2).sum()
    (slope,) = torch.autograd.grad(cost, p_NH)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-10, rtol=0)


def test_the_best_z_is_the_lowest_of_all():
    made, p, gate = normal(200), normal(200, seed=1) * 2, normal(200, seed=2)
    grid = torch.linspace(-8, 8, 16001, dtype=torch.float64)[:, None]

    def lowest(cost, z):
        assert (cost(z) <= cost(grid).amin(0) + 1e-9).all()

    lowest(lambda z: 3 * (z - made) ** 2 + 2 * (p - gate * z) ** 2, best_z_gated(made, p, gate, 3.0, 2.0))
    lowest(lambda z: 3 * (z - made) ** 2 + 2 * (p - z.relu()) ** 2, best_z_relu(made, p, 3.0, 2.0))


def test_the_gate_goes_down_the_true_slope():
    made, p, z = normal(30), normal(30, seed=1), normal(30, seed=2)
    s = normal(30, seed=3).requires_grad_()
    cost = 3 * (s - made).pow(2).sum() + 2 * (p - F.silu(s) * z).pow(2).sum()
    (slope,) = torch.autograd.grad(cost, s)
    method = SparseLLM(alpha=3.0, gamma=2.0, gate_steps=1, gate_rate=0.01)
    torch.testing.assert_close(descended_s(s.detach(), made, p, z, method), s.detach() - 0.01 * slope)
    twice = descended_s(descended_s(s.detach(), made, p, z, method), made, p, z, method)
    torch.testing.assert_close(descended_s(s.detach(), made, p, z, SparseLLM(alpha=3.0, gamma=2.0)), twice)


@pytest.mark.parametrize("solver", ["sparse_llm", "sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_asked_share_of_the_linears_is_zero_and_the_model_is_plain(tiny, name, solver):
    plain = tiny(name, **RELU.get(name, {}))
    made = SparseLLM(0.5, solver=solver)(tiny(name, **RELU.get(name, {})), Inputs(batches=batches()))
    for path, layer in linears(made).items():
        assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2, path
    changed = {n for n, p in made.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    assert changed == {f"{path}.weight" for path in linears(plain)}
    assert not checkpoint.surgery_of(made) and not made.training


@pytest.mark.parametrize("name", ["qwen3", "modernbert", "gpt2"])
def test_the_baselines_take_any_activation(tiny, name):
    for solver in ("sparsegpt", "wanda", "magnitude"):
        made = SparseLLM(0.75, solver=solver)(tiny(name), Inputs(batches=batches()))
        assert all(int((m.weight == 0).sum()) == m.weight.numel() * 3 // 4 for m in linears(made).values())


def feed_forward_loss(plain, made, given):
    """The first block's: what the pruned feed-forward makes of the dense one's inputs, against what that makes."""
    whole = Blocks(plain, given)
    names = [*parts(plain)["up"], *parts(plain)["down"]]
    mine, total = Blocks(made, given).layers(0, names), 0.0
    for seen in whole.seen(0, whole.layers(0, names)):
        x_NE, y_NE = seen[names[0]][0], seen[names[-1]][1]
        if len(names) == 3:
            after = F.silu(mine[names[0]](x_NE)) * mine[names[1]](x_NE)
        else:
            after = mine[names[0]](x_NE).relu()
        total += (mine[names[-1]](after) - y_NE).pow(2).sum().item()
    return total


@pytest.mark.parametrize("name, sparsity", [("llama", 0.5), ("llama", 0.7), ("gpt2", 0.7), ("bert", 0.9)])
@torch.no_grad()
def test_the_feed_forwards_loss_is_below_that_of_magnitude_and_of_pruning_each_matrix_alone(tiny, name, sparsity):
    plain, given, losses = tiny(name, **RELU.get(name, {})), batches(rows=16), {}
    for layer in linears(plain).values():
        layer.weight.mul_(10)  # feed-forwards that do something
    for solver in ("sparse_llm", "sparsegpt", "magnitude"):
        model = tiny(name, **RELU.get(name, {}))
        model.load_state_dict(plain.state_dict())
        made = SparseLLM(sparsity, solver=solver)(model, Inputs(batches=given))
        losses[solver] = feed_forward_loss(plain, made, given)
    assert losses["sparse_llm"] < losses["sparsegpt"] < losses["magnitude"]


@pytest.mark.bits
def test_one_epoch_is_sparsegpt(tiny):
    inputs = Inputs(batches=batches())
    one = SparseLLM(0.7, epochs=1)(tiny(), inputs)
    alone = SparseLLM(0.7, solver="sparsegpt")(tiny(), inputs)
    two = SparseLLM(0.7, epochs=2)(tiny(), inputs)
    for path, layer in linears(one).items():
        assert torch.equal(layer.weight, linears(alone)[path].weight)
        if path.startswith("model.layers.0."):
            assert torch.equal(layer.weight, linears(two)[path].weight) == ("self_attn" in path)


@pytest.mark.bits
def test_blocks_are_pruned_on_what_the_pruned_ones_before_them_give(tiny):
    given = batches()
    made = SparseLLM(0.7, solver="wanda")(tiny(), Inputs(batches=given))
    half = tiny()
    half.model.layers[0].load_state_dict(made.model.layers[0].state_dict())
    whole = Blocks(half, given)
    whole.advance(0)
    layer = whole.layers(1, ["mlp.down_proj"])
    hessian_II = whole.hessians(1, layer)["mlp.down_proj"]
    wanted = wanda(weight_of(layer["mlp.down_proj"]), hessian_II, 0.7)
    assert torch.equal(made.model.layers[1].mlp.down_proj.weight, wanted)


def test_biases_are_not_fitted_into_the_weights():
    fields = {
        "vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "hidden_act": "relu",
    }  # fmt: skip
    models = [new_model("bert", fields, task="masked").eval() for _ in range(2)]
    block = models[1].bert.encoder.layer[0]
    torch.nn.init.uniform_(block.intermediate.dense.bias, 0.2, 1.0)  # no unit is always off
    torch.nn.init.normal_(block.output.dense.bias, std=5.0)
    method, given = SparseLLM(0.05, epochs=2), batches(rows=32)
    dense = weight_of(block.output.dense)
    made = method(models[1], Inputs(batches=given))
    assert (weight_of(made.bert.encoder.layer[0].output.dense) - dense).abs().max() < 0.05


@torch.no_grad()
def test_the_second_epoch_fits_and_prunes_on_the_new_activations():
    up, down = torch.nn.Linear(8, 12).double(), torch.nn.Linear(12, 5).double()
    x_NE = normal(200, 8) + 1
    z_NH = up(x_NE)
    y_NE, method = down(z_NH.relu()), SparseLLM(0.5, alpha=3.0, beta=2.0, gamma=1.5, epochs=2)

    def pruned(weight_OI, entered):
        return sparsegpt(weight_OI.double(), 2 * entered.T @ entered / 200, 0.5, 0.01, 128)

    first, second = pruned(up.weight, x_NE), pruned(down.weight, z_NH.relu())
    p_NH = best_p(second, y_NE - down.bias, z_NH.relu(), 2.0, 1.5)
    new_NH = best_z_relu(x_NE @ first.T + up.bias, p_NH, 3.0, 1.5)
    wanted = pruned(fitted([(x_NE, new_NH - up.bias)]), x_NE), pruned(fitted([(p_NH, y_NE - down.bias)]), p_NH)
    hessians = 2 * x_NE.T @ x_NE / 200, 2 * z_NH.relu().T @ z_NH.relu() / 200
    parts = (x_NE, y_NE - down.bias, z_NH.relu(), z_NH)
    halves = [FeedForward(*(part[rows] for part in parts), None) for rows in (slice(130), slice(130, None))]
    method._prune_jointly([up], down, halves, hessians)
    torch.testing.assert_close((up.weight.data, down.weight.data), wanted)


def test_wrong_fields_and_models_are_refused(tiny):
    for name, value, accepted in (
        ("sparsity", 1.0, "above 0, below 1"), ("damping", 0.0, "above 0, below 1"), ("alpha", 0.0, "above 0"),
        ("gamma", -1.0, "above 0"), ("epochs", 0, "1 or more"), ("block_size", 0, "1 or more"),
        ("gate_steps", -1, "0 or more"), ("solver", "movement", "sparse_llm, sparsegpt, wanda, magnitude"),
    ):  # fmt: skip
        with pytest.raises(PretrainError, match=f"sparse_llm: {name} {value!r}: accepted: {accepted}"):
            SparseLLM(**{name: value})
    with pytest.raises(PretrainError, match="sparse_llm: it needs text to calibrate on"):
        SparseLLM()(tiny())
    with pytest.raises(
        PretrainError, match="activation 'gelu_new' of model type 'gpt2': accepted: silu with a gate, or"
    ):
        SparseLLM()(tiny("gpt2"), Inputs(batches=batches()))
    with pytest.raises(PretrainError, match="activation 'gelu' of model type 'modernbert'"):
        SparseLLM()(tiny("modernbert"), Inputs(batches=batches()))

"""eDKM and palettes: unique values give what all weights give, with less kept; hard limits are k-means; bytes on disk."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import nn
from transformers.pytorch_utils import Conv1D

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import linears
from pretrain.surgery import Inputs, operate
from pretrain.surgery.compression._clusters import Line, assign, kmeans
from pretrain.surgery.compression.edkm import EDKM, ClusteredLinear, Patterns
from pretrain.surgery.compression.gptq import GPTQ
from pretrain.surgery.compression.palettise import Palettise, PalettisedLinear

TOKENS = torch.arange(3, 23)[None]
FAMILIES = ["llama", "gpt2", "bert", "modernbert"]
SAME = {"atol": 1e-6, "rtol": 1e-6}


def layer_of(method, kind="linear", outputs=24, inputs=40, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    plain = nn.Linear(inputs, outputs) if kind == "linear" else Conv1D(outputs, inputs)
    with torch.no_grad():
        plain.weight.copy_(torch.randn_like(plain.weight).mul_(20).round_().div_(200))  # of few values
    layer = ClusteredLinear(plain.to(dtype), method)
    layer.move(kmeans(layer.weight, 2**method.bits, way="quantiles", iterations=1))
    return layer


def by_hand(weight, start_K, tau, iterations):
    """Differentiable k-means as the formula has it, weight by weight."""
    flat = (weight + (weight.to(torch.bfloat16).to(weight.dtype) - weight).detach()).flatten()
    c = start_K.to(weight.dtype)
    for _ in range(iterations):
        share = torch.exp(-((flat[:, None] - c[None]) ** 2) / tau)
        share = share / share.sum(1, keepdim=True)
        c = (share * flat[:, None]).sum(0) / share.sum(0)
    return (share @ c).view_as(weight), c


def passed(layer, x, target):
    """Output and gradients of one pass."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    ((y - target) ** 2).sum().backward()
    return y.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone(), layer.centroids.clone()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_unique_values_give_the_products_and_gradients_of_all_weights(kind, iterations):
    x, target = torch.randn(2, 5, 40, dtype=torch.float64), torch.randn(2, 5, 24, dtype=torch.float64)
    unique, dense = (layer_of(EDKM(tau=1e-3, iterations=iterations, uniquify=u), kind).train() for u in (True, False))
    hand = layer_of(EDKM(tau=1e-3), kind)
    assert len(Patterns(hand.narrow(hand.weight), torch.float64).value_U) < 0.2 * hand.weight.numel()
    made, end_K = by_hand(hand.weight, hand.centroids, 1e-3, iterations)
    given = x.clone().requires_grad_()
    y = given @ (made.T if kind == "linear" else made) + hand.bias
    ((y - target) ** 2).sum().backward()
    wanted = (y.detach(), given.grad, hand.weight.grad, hand.bias.grad, end_K.float())
    for mine, plain, its in zip(passed(unique, x, target), passed(dense, x, target), wanted, strict=True):
        torch.testing.assert_close(mine, its.detach(), **SAME)
        torch.testing.assert_close(plain, its.detach(), **SAME)
    assert wanted[2].abs().max() > 1e-3  # there is something to compare


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_so_they_do_in_the_types_of_training(dtype):
    x, target = torch.randn(7, 40).to(dtype), torch.randn(7, 24).to(dtype)
    unique, dense = (passed(layer_of(EDKM(uniquify=u), dtype=dtype).train(), x, target) for u in (True, False))
    near = {torch.float32: 2e-5, torch.bfloat16: 0.05, torch.float16: 5e-3}[dtype]
    for mine, its in zip(unique, dense, strict=True):
        assert mine.dtype == its.dtype and (mine - its).norm() <= near * its.norm()


def test_patterns_are_the_values():
    narrow = torch.tensor([[0.5, -1.25, 0.5], [3.0, -1.25, 0.0]], dtype=torch.bfloat16)
    found = Patterns(narrow, torch.float32)
    assert sorted(zip(found.value_U.tolist(), found.count_U.tolist(), strict=True)) == [
        (-1.25, 2), (0.0, 1), (0.5, 2), (3.0, 1)
    ]  # fmt: skip
    assert torch.equal(found.spread(found.value_U), narrow.float())
    sums = dict(zip(found.value_U.tolist(), found.gathered(torch.arange(6.0).view(2, 3)).tolist(), strict=True))
    assert sums == {0.5: 2.0, -1.25: 5.0, 3.0: 3.0, 0.0: 5.0}


@pytest.mark.parametrize("uniquify", [True, False])
def test_without_temperature_it_is_hard_k_means(uniquify):
    layer = layer_of(EDKM(tau=1e-12, iterations=4, uniquify=uniquify)).train()
    value = layer.weight.detach().to(torch.bfloat16).double()
    c = layer.centroids.double()
    for _ in range(4):
        code = (value.flatten()[:, None] - c).abs().argmin(1)
        c = torch.stack([value.flatten()[code == k].mean() for k in range(8)])
    eye = torch.eye(40, dtype=torch.float64)
    torch.testing.assert_close((layer(eye) - layer.bias).T, c[code].view(24, 40), **SAME)
    torch.testing.assert_close(c, line_moves(value, layer.centroids, 4), **SAME)
    layer(eye).sum().backward()
    torch.testing.assert_close(layer.centroids.double(), c, **SAME)


def line_moves(value, centroids_K, times):
    line, c = Line(value), centroids_K.double().numpy()
    for _ in range(times):
        c = line.moved(c)
    return torch.from_numpy(c)


def saved_bytes(layer, x):
    """What the graph holds on to for the backward pass, each storage once."""
    held = {}
    keep = lambda t: held.setdefault(t.untyped_storage().data_ptr(), t) is None or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x)
    del y
    return sum(t.untyped_storage().nbytes() for place, t in held.items() if place != layer.weight.data_ptr())


def test_nothing_but_the_input_and_the_centroids_is_kept_for_the_backward_pass():
    x = torch.randn(3, 256)
    kept = {}
    for uniquify in (True, False):
        layer = layer_of(EDKM(uniquify=uniquify), outputs=128, inputs=256, dtype=torch.float32).train()
        kept[uniquify] = saved_bytes(layer, x)
    assert kept[True] == x.nbytes + 4 * 8
    assert kept[False] > 3 * 8 * 4 * 128 * 256  # at least the map of each iteration
    narrow = layer_of(EDKM(), outputs=128, inputs=256, dtype=torch.bfloat16).train()
    assert saved_bytes(narrow, x.bfloat16()) == x.nbytes // 2 + 4 * 8


@pytest.mark.bits
def test_centroids_go_on_with_each_backward_pass_and_not_before():
    layer, x = layer_of(EDKM(tau=1e-3)).train(), torch.randn(3, 40, dtype=torch.float64)
    start = layer.centroids.clone()
    first = layer(x)
    assert torch.equal(layer(x), first) and torch.equal(layer.centroids, start)
    first.sum().backward()
    _, end_K = by_hand(layer.weight.detach(), start, 1e-3, 3)
    torch.testing.assert_close(layer.centroids, end_K.float(), **SAME)


@pytest.mark.bits
def test_recomputed_activations_change_nothing(tiny):
    grads = []
    for checkpointing in (False, True):
        model = EDKM(bits=2)(tiny()).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(TOKENS, labels=TOKENS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
        grads[-1] |= {n: b for n, b in model.named_buffers() if "centroids" in n}
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0]) and len(grads[0]) > 20


def test_under_autocast_only_the_product_is_narrow():
    layer, x = layer_of(EDKM(), dtype=torch.float32).train(), torch.randn(3, 40)
    wide = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.weight.grad.dtype == layer.centroids.dtype == torch.float32
    torch.testing.assert_close(y.float(), wide, atol=0.03, rtol=0.03)


@pytest.mark.bits
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_stored_gives_the_logits_of_what_was_trained(tiny, family):
    model = EDKM(bits=2)(tiny(family))
    assert all(isinstance(layer, ClusteredLinear) for layer in linears(model).values())
    before, inputs = model(TOKENS).logits, Inputs()
    made = Palettise(2)(copy.deepcopy(model), inputs)
    torch.testing.assert_close(made(TOKENS).logits, before, **SAME)
    for path, layer in linears(made).items():
        assert isinstance(layer, PalettisedLinear) and len(layer.dense().unique()) <= 4
        code_OI, sorted_K = linears(model)[path].codes()
        assert torch.equal(layer.dense(), sorted_K[code_OI])
    assert [entry["method"] for entry in checkpoint.surgery_of(made)] == ["palettise"]
    assert inputs.extra["metrics"]["palettise/error"] > 0


def test_training_draws_the_loss_down_and_the_stored_model_with_it(tiny):
    model = EDKM(bits=2)(tiny(num_hidden_layers=1, initializer_range=0.1)).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    ids = torch.arange(1, 41).view(2, 20)
    first = model(ids, labels=ids).loss.item()
    for _ in range(15):
        optimiser.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
    stored = Palettise(2)(model.eval())
    assert loss < 0.6 * first and stored(ids, labels=ids).loss < 0.75 * first


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_bytes_on_disk_are_indices_and_codebooks(tiny, tmp_path, bits):
    plain, inputs = tiny(), Inputs()
    sizes = [layer.weight.numel() for layer in linears(plain).values()]
    rest = 4 * (plain.num_parameters() - sum(sizes))
    made = Palettise(bits, restarts=1)(plain, inputs)
    checkpoint.save(made, None, tmp_path / "c")
    file = tmp_path / "c" / "pretrain.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert all(size * bits % 32 == 0 for size in sizes)
    stored = sum(bits * size // 8 + 4 * 2**bits for size in sizes)
    assert file.stat().st_size == 8 + header + rest + stored
    told = inputs.extra["metrics"]["palettise/bits_per_weight"]
    assert told == pytest.approx(8 * stored / sum(sizes)) and told >= bits
    loaded, _ = checkpoint.load(tmp_path / "c")
    assert torch.equal(loaded.generate(TOKENS, max_new_tokens=4), made.generate(TOKENS, max_new_tokens=4))


def test_more_bits_err_less_and_a_count_that_fills_no_word_is_kept():
    weight = torch.randn(7, 5)
    errors = []
    for bits in (1, 2, 3, 4):
        book = kmeans(weight, 2**bits, source=torch.Generator().manual_seed(0))
        layer = PalettisedLinear(nn.Linear(5, 7), bits)
        layer.fill(assign(weight, book), book)
        assert layer.codes.nbytes == 4 * -(-35 * bits // 32)
        assert torch.equal(layer.dense(), book[(weight[..., None] - book).abs().argmin(-1)])
        errors.append((layer.dense() - weight).square().sum().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]


@pytest.mark.parametrize("clusters", [2, 8, 16])
def test_k_means_is_as_good_as_scikit_learns(clusters):
    value = torch.from_numpy(np.random.default_rng(1).standard_t(4, 3000)).float()
    theirs = KMeans(clusters, n_init=8, random_state=0, tol=0, max_iter=300).fit(value.numpy()[:, None].astype(float))
    source = torch.Generator().manual_seed(0)
    mine = kmeans(value, clusters, source=source, restarts=8)
    inertia = (value.double()[:, None] - mine.double()).square().amin(1).sum().item()
    assert inertia <= 1.01 * theirs.inertia_
    assert Line(value).inertia(mine.double().numpy()) == pytest.approx(inertia, rel=1e-9)
    start = np.sort(theirs.cluster_centers_[:, 0])  # where it ended nothing moves
    np.testing.assert_allclose(Line(value).moved(start), start, atol=1e-6, rtol=0)


@pytest.mark.parametrize("clusters", [2, 8, 16])
def test_each_further_centroid_is_drawn_by_its_squared_distance_from_those_before(clusters):
    """As the definition has it, number by number; the running sums draw the same ones."""
    value_N = torch.from_numpy(np.random.default_rng(1).standard_t(4, 3000)).float()
    for seed in range(20):
        source = torch.Generator().manual_seed(seed)
        sorted_N, weight_N, centroids = value_N.double().sort().values, torch.ones(3000, dtype=torch.double), []
        for _ in range(clusters):
            running_N = weight_N.cumsum(0)
            goal = torch.rand((), generator=source, dtype=torch.double) * running_N[-1]
            centroids.append(sorted_N[torch.searchsorted(running_N, goal, right=True)].item())
            weight_N = (sorted_N[:, None] - torch.tensor(centroids)).square().amin(1)
        mine = Line(value_N).start(clusters, "kmeans++", torch.Generator().manual_seed(seed))
        np.testing.assert_array_equal(mine, np.sort(centroids))


def test_where_there_are_fewer_values_than_clusters_each_value_is_a_centroid():
    value = torch.tensor([0.1, 0.7, -3.3]).repeat(1000)
    book = kmeans(value, 8, source=torch.Generator().manual_seed(0))
    assert set(book.tolist()) == set(value.tolist()) and len(book) == 8


def test_the_seed_decides_where_k_means_begins_and_quantiles_need_none(tiny):
    def books(seed, **fields):
        made = Palettise(3, restarts=1, **fields)(tiny(), Inputs(seed=seed))
        return torch.stack([layer.codebook for layer in linears(made).values()])

    assert torch.equal(books(1), books(1)) and not torch.equal(books(1), books(2))
    assert torch.equal(books(1, initialisation="quantiles"), books(2, initialisation="quantiles"))
    assert len(kmeans(torch.ones(5), 4)) == 4  # fewer values than clusters


def test_one_after_the_other_in_one_list(tiny):
    both, _, _ = operate([EDKM(), Palettise()], tiny(), Inputs())
    assert [entry["method"] for entry in checkpoint.surgery_of(both)] == ["palettise"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0}, "bits 0: accepted: from 1 to 8"), ({"tau": 0.0}, "tau 0.0: accepted: above 0"),
        ({"iterations": 0}, "iterations 0: accepted: 1 or more"),
        ({"initialisation": "random"}, r"initialisation 'random': accepted: kmeans\+\+, quantiles"),
        ({"dtype": "float32"}, "dtype 'float32': accepted: bfloat16, float16"),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(PretrainError, match=f"^edkm: {message}"):
        EDKM(**fields)


def test_what_does_not_fit_is_named(tiny):
    with pytest.raises(PretrainError, match="palettise: bits 9: accepted: from 1 to 8"):
        Palettise(9)
    with pytest.raises(PretrainError, match="palettise: restarts 0: accepted: 1 or more"):
        Palettise(restarts=0)
    with pytest.raises(PretrainError, match="palettise: initialisation 'x': accepted: kmeans"):
        Palettise(initialisation="x")
    with pytest.raises(PretrainError, match="palettise: bits 3: accepted: 2, as edkm trained model.layers.0"):
        Palettise(3)(EDKM(2)(tiny()))
    packed = GPTQ(solver="rtn")(tiny())
    for method in (EDKM(), Palettise()):
        with pytest.raises(PretrainError, match=f"{method.name}: .*q_proj is a PackedLinear: accepted: plain linear"):
            method(packed)

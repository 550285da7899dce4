"""DSEE: a low-rank and a sparse update, over weights that may be sparse."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_same_model
from examples import IDS, logits, trained
from transformers import AutoModelForCausalLM

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.core.models.families import linears
from pretrain.surgery import Inputs
from pretrain.surgery.adapters._adapters import adapters
from pretrain.surgery.adapters.dsee import decompose

dsee = method_class("dsee")
merge = method_class("merge_adapters")
FAMILIES = ("llama", "gpt2", "bert", "t5")


def source():
    return torch.Generator().manual_seed(3)


def frozen(model):
    """The frozen weights of the blocks, by whether they are adapted."""
    found = {True: [], False: []}
    for name, module in linears(model).items():
        adapted = name in adapters(model)
        found[adapted].append((module.layer if adapted else module).weight.detach())
    return found


def planted(outputs=40, inputs=24):
    """A matrix of rank 3 with 12 spikes, the matrix without them, and their places."""
    generator = source()
    low = torch.randn(outputs, 3, generator=generator) @ torch.randn(3, inputs, generator=generator)
    places = torch.randperm(outputs * inputs, generator=generator)[:12].sort().values
    return low.flatten().index_add(0, places, torch.full((12,), 15.0)).view(outputs, inputs), low, places


def test_the_decomposition_finds_the_sparse_part_of_a_low_rank_matrix() -> None:
    weight, low, places = planted()
    U, V, found = decompose(weight, 3, 12, source())
    assert torch.equal(found, places)
    torch.testing.assert_close(U.T @ U, torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(U @ V, low, atol=1e-2, rtol=0)


@pytest.mark.parametrize(("family", "layer", "outputs"), [("gpt2", "c_attn", 96), ("bert", "query", 32)])
def test_the_sparse_numbers_are_where_the_layers_weight_has_its_sparse_part(tiny, family, layer, outputs) -> None:
    model = tiny(family)
    weight, _, places = planted(outputs, 32)
    for name, module in linears(model).items():
        if name.endswith(layer):
            module.weight.data.copy_(weight.T if family == "gpt2" else weight)
    for module in adapters(dsee(rank=3, nonzero=12, targets=(layer,))(model)).values():
        assert torch.equal(module.places, places)


def test_without_a_sparse_part_it_is_close_to_the_best_low_rank_matrix() -> None:
    weight = torch.randn(48, 32, generator=source()) * torch.logspace(0, -2, 32)
    for rank in (1, 5, 12):
        U, V, _ = decompose(weight, rank, 0, source())
        best = torch.linalg.svdvals(weight)[rank:].norm()
        assert U.shape == (48, rank) and V.shape == (rank, 32)
        assert best <= (weight - U @ V).norm() * (1 + 1e-5) and (weight - U @ V).norm() < 1.01 * best


def test_the_sparse_part_takes_off_more_than_the_largest_entries_beside_the_best_low_rank_matrix() -> None:
    weight = torch.distributions.StudentT(2.0)
    torch.manual_seed(0)
    weight = weight.sample((48, 32))
    U, V, places = decompose(weight, 4, 30, source())
    left = (weight - U @ V).flatten().index_fill(0, places, 0.0).norm()
    U, s, Vh = torch.linalg.svd(weight)
    beside = (weight - (U[:, :4] * s[:4]) @ Vh[:4]).flatten()
    assert left < beside.index_fill(0, beside.abs().topk(30).indices, 0.0).norm()


@pytest.mark.bits
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_nothing_changes_at_first_and_only_the_adapter_is_trained(tiny, family) -> None:
    model = dsee(rank=4, nonzero=10, where="all")(tiny(family))
    assert torch.equal(logits(model), logits(tiny(family)))
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"A", "B", "values"}
    found = adapters(model)
    assert found.keys() == linears(tiny(family)).keys()
    for module in found.values():
        numbers = sum(p.numel() for p in module.parameters() if p.requires_grad)
        assert numbers == (module.out_features + module.in_features) * 4 + 10
    extra = {"decoder_input_ids": IDS} if family == "t5" else {}
    model(IDS, **extra).logits.square().sum().backward()
    assert all(module.B.grad.abs().max() > 0 and module.values.grad.abs().max() > 0 for module in found.values())


def test_the_default_has_the_papers_numbers_of_trained_parameters(tiny) -> None:
    inputs = Inputs()
    dsee(rank=16)(tiny("bert"), inputs)
    assert inputs.extra["metrics"] == {"trained_parameters": 2 * 2 * ((32 + 32) * 16 + 64)}  # queries and values


def test_the_gradient_of_the_sparse_numbers_is_the_dense_one_at_their_places(tiny) -> None:
    model = trained(dsee(rank=3, nonzero=9, where="all")(tiny("gpt2")))
    for name, module in adapters(model).items():
        weight = linears(tiny("gpt2"))[name].weight.detach().T
        x = torch.randn(2, 5, module.in_features)
        dense = (weight + module.change().detach()).requires_grad_(True)
        torch.testing.assert_close(module(x), x @ dense.T + module.layer.bias, atol=1e-5, rtol=1e-4)
        target = torch.randn(2, 5, module.out_features)
        (module(x) * target).sum().backward()
        ((x @ dense.T) * target).sum().backward()
        torch.testing.assert_close(
            module.values.grad, dense.grad.flatten()[module.places] * module.scale, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(("family", "sparsity"), [("llama", 0.5)])
def test_merging_keeps_all_parts_in_a_plain_checkpoint(tiny, tmp_path, family, sparsity) -> None:
    model = trained(dsee(rank=4, nonzero=20, sparsity=sparsity)(tiny(family)))
    before = logits(model)
    merged = merge()(model)
    torch.testing.assert_close(logits(merged), before, atol=1e-5, rtol=1e-4)
    checkpoint.save(merged, None, tmp_path / "c")
    assert_same_model(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "c")), logits(merged), merged)


@pytest.mark.bits
def test_the_smallest_frozen_weights_of_all_layers_are_zero(tiny, tmp_path) -> None:
    inputs, plain = Inputs(), frozen(dsee(rank=4)(tiny()))
    model = dsee(rank=4, sparsity=0.25)(tiny(), inputs)
    for adapted, weights in frozen(model).items():
        zeros = torch.cat([weight.flatten() == 0 for weight in weights])
        numbers = torch.cat([weight.flatten().abs() for weight in plain[adapted]])
        assert zeros.sum() == round(0.25 * len(zeros)) and numbers[zeros].max() <= numbers[~zeros].min()
    assert inputs.extra["metrics"]["zeros"] == pytest.approx(0.25, abs=1e-3)
    checkpoint.save(trained(model), None, tmp_path / "c")
    assert not (tmp_path / "c" / "adapter").exists()  # a LoRA over other weights would be another function
    again, _ = checkpoint.load(tmp_path / "c")
    assert torch.equal(logits(again), logits(model)) and all(
        torch.equal(a, b) for a, b in zip(frozen(again)[True], frozen(model)[True], strict=True)
    )


@pytest.mark.bits
def test_after_tuning_it_prunes_the_same_adapted_model_by_its_updates(tiny, tmp_path) -> None:
    checkpoint.save(trained(dsee(rank=4)(tiny())), None, tmp_path / "tuned")
    tuned, _ = checkpoint.load(tmp_path / "tuned")
    small = {n: p.detach().clone() for n, p in tuned.named_parameters() if p.requires_grad}
    scores = torch.cat([module.change().detach().abs().flatten() for module in adapters(tuned).values()])
    pruned = dsee(rank=4, sparsity=0.5, scores="updates")(tuned)
    zeros = torch.cat([module.layer.weight.flatten() == 0 for module in adapters(pruned).values()])
    assert zeros.sum() == len(zeros) // 2 and scores[zeros].max() <= scores[~zeros].min()
    assert all(torch.equal(small[n], p) for n, p in pruned.named_parameters() if p.requires_grad)
    checkpoint.save(pruned, None, tmp_path / "pruned")
    again, _ = checkpoint.load(tmp_path / "pruned")
    assert torch.equal(logits(again), logits(pruned)) and not (tmp_path / "pruned" / "adapter").exists()
    more = frozen(dsee(rank=4, sparsity=0.75)(again))
    assert sum(int((w == 0).sum()) for w in more[False]) == round(0.75 * sum(w.numel() for w in more[False]))
    with pytest.raises(PretrainError, match=r"sparsity 0.6: accepted: above 0.75"):
        dsee(rank=4, sparsity=0.6)(again)
    with pytest.raises(PretrainError, match=r"rank 5: accepted: 4, by which the model is adapted"):
        dsee(rank=5, sparsity=0.9)(again)


def test_what_does_not_fit_is_one_clear_error(tiny) -> None:
    with pytest.raises(PretrainError, match="rank 0: accepted: 1 or more"):
        dsee(rank=0)
    with pytest.raises(PretrainError, match="nonzero -1: accepted: 0 or more"):
        dsee(nonzero=-1)
    with pytest.raises(PretrainError, match="sparsity 1.0: accepted: from 0 to below 1"):
        dsee(sparsity=1.0)
    with pytest.raises(PretrainError, match="scores 'updated': accepted: weights, updates"):
        dsee(scores="updated")
    with pytest.raises(PretrainError, match=r"rank 16: accepted: below 16, the smaller side of .*v_proj"):
        dsee()(tiny())
    with pytest.raises(PretrainError, match=r"nonzero 600: accepted: at most 512, the numbers of .*v_proj"):
        dsee(rank=4, nonzero=600)(tiny())
    with pytest.raises(PretrainError, match="scores 'updates': accepted: a model that dsee has adapted"):
        dsee(rank=4, scores="updates", sparsity=0.5)(tiny())
    with pytest.raises(PretrainError, match="adapted already"):
        dsee(rank=4)(method_class("svfit")()(tiny()))

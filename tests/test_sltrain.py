"""SLTrain: weights of low rank plus a fixed sparse part, their gradients, their bytes, and the way back to plain models."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_rounding, assert_same_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import linears
from pretrain.surgery import Inputs
from pretrain.surgery.architecture.sltrain import SLTrain, SparseLowRank

TOKENS = torch.arange(3, 23)[None]


def filled(model, rank=4, delta=0.1, seed=0):
    """The operated model with B no longer zero, as after some training."""
    model = SLTrain(rank, delta, 8.0)(model, Inputs(seed=seed))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in linears(model).values():
            module.B.normal_(0, 0.1, generator=generator)
            if module.bias is not None:
                module.bias.normal_(0, 0.1, generator=generator)
    return model


def layer_of(kind=nn.Linear, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    plain = Conv1D(10, 6) if kind is Conv1D else nn.Linear(6, 10, bias=bias)
    layer = SparseLowRank(plain.to(dtype), 3, 12, 2.5)
    layer.initialise(torch.Generator().manual_seed(3))
    nn.init.normal_(layer.B)
    return layer


def by_hand(layer, x):
    """The formula, with S as a matrix of its own, entry by entry."""
    S = torch.zeros(10, 6, dtype=x.dtype)
    for k, place in enumerate(layer.indices.tolist()):
        S[place // 6, place % 6] = S[place // 6, place % 6] + layer.values[k]
    W = 2.5 * layer.B @ layer.A + S
    out = torch.einsum("...i,oi->...o", x, W)
    return out if layer.bias is None else out + layer.bias


@pytest.mark.parametrize("kind, bias", [(nn.Linear, True), (nn.Linear, False), (Conv1D, True)])
def test_forward_and_gradients_are_those_of_the_dense_formula(kind, bias):
    layer = layer_of(kind, bias)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    mine, theirs = layer(x), by_hand(layer, x)
    torch.testing.assert_close(mine, theirs)
    weights = torch.randn_like(mine)
    for a, b in zip(
        torch.autograd.grad((mine * weights).sum(), wanted),
        torch.autograd.grad((theirs * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(layer, (x,))


def test_no_dense_weight_is_kept_for_the_backward_pass():
    layer, kept = layer_of(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(7, 6, dtype=torch.float64, requires_grad=True))
    assert sorted(tuple(t.shape) for t in kept) == [(3, 6), (7, 6), (10, 3), (12,), (12,)]


def test_frozen_factors_get_no_gradient_and_autocast_narrows_the_whole_product():
    layer = layer_of(dtype=torch.float32)
    for part in (layer.A, layer.B, layer.values):
        part.requires_grad_(False)
    layer(torch.randn(3, 6)).sum().backward()
    assert layer.A.grad is None and torch.equal(layer.bias.grad, torch.full((10,), 3.0))
    layer.requires_grad_(True)
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = layer(x)
    assert narrow.dtype == torch.bfloat16
    narrow.float().sum().backward()
    assert layer.A.grad.dtype == torch.float32
    torch.testing.assert_close(narrow.float(), by_hand(layer, x).detach(), atol=0.1, rtol=0.05)


def test_the_start_is_the_papers():
    layer = SparseLowRank(nn.Linear(400, 300, bias=False), 50, 3600, 1.0)
    layer.initialise(torch.Generator().manual_seed(0))
    assert not layer.B.any()
    for part in (layer.A, layer.values):
        assert part.abs().max() <= 1 / 20 and abs(part.std().item() * 20 - 3**-0.5) < 0.02  # uniform in ±1/√400
    places = layer.indices
    assert places.dtype == torch.int32 and places.unique().numel() == 3600 and (places.diff() > 0).all()
    assert abs(places.double().mean().item() / (400 * 300) - 0.5) < 0.02
    other = SparseLowRank(nn.Linear(400, 300, bias=False), 50, 3600, 1.0)
    other.initialise(torch.Generator().manual_seed(1))
    assert not torch.equal(places, other.indices)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert", "modernbert"])
def test_all_linears_of_the_blocks_and_nothing_else_are_replaced(tiny, name):
    plain, model = tiny(name), SLTrain(4, 0.1)(tiny(name))
    sizes = {n: m.weight.numel() for n, m in linears(plain).items()}
    made = linears(model)
    assert set(made) == set(sizes) and all(isinstance(m, SparseLowRank) for m in made.values())
    same = {n for n, _ in plain.named_parameters()} & {n for n, _ in model.named_parameters()}
    assert all(torch.equal(plain.get_parameter(n), model.get_parameter(n)) for n in same)
    assert {n for n, _ in plain.named_parameters()} - same == {f"{n}.weight" for n in sizes}
    again, other = SLTrain(4, 0.1)(tiny(name)), SLTrain(4, 0.1)(tiny(name), Inputs(seed=1))
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())
    first = next(iter(made))
    assert not torch.equal(made[first].indices, linears(other)[first].indices)


def test_parameters_and_optimiser_states_are_as_many_as_the_paper_counts(tiny):
    from pretrain.optim.optimizers.adamw import AdamW

    rank, delta = 4, 0.1
    plain, model = tiny("llama"), SLTrain(rank, delta)(tiny("llama"))
    shapes = [m.weight.shape for m in linears(plain).values()]
    counted = sum((o + i) * rank + int(delta * o * i) for o, i in shapes)
    others = sum(p.numel() for p in plain.parameters()) - sum(o * i for o, i in shapes)
    assert sum(p.numel() for p in model.parameters()) == others + counted
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer = AdamW().build(model.named_parameters())
    optimizer.step()
    moments = sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if k.startswith("exp_avg"))
    assert moments == 2 * 4 * (others + counted)
    indices = sum(m.indices.nbytes for m in linears(model).values())
    assert indices == 4 * sum(int(delta * o * i) for o, i in shapes)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert", "modernbert"])
def test_merging_gives_a_plain_model_of_equal_logits(tiny, tmp_path, name, tied):
    import transformers

    model = filled(tiny(name, tie_word_embeddings=tied))
    before = model(TOKENS).logits
    merged = SLTrain(merge=True)(model)
    assert not checkpoint.surgery_of(merged)
    assert {n: tuple(p.shape) for n, p in merged.named_parameters()} == {
        n: tuple(p.shape) for n, p in tiny(name, tie_word_embeddings=tied).named_parameters()
    }
    checkpoint.save(merged, None, tmp_path / "c")
    auto = transformers.AutoModelForMaskedLM if "bert" in name else transformers.AutoModelForCausalLM
    after = auto.from_pretrained(tmp_path / "c").eval()(TOKENS).logits
    assert_same_model(after, before, merged)


@pytest.mark.bits
@pytest.mark.parametrize("name, tied", [("llama", True)])
def test_saved_and_loaded_it_is_the_same_model(tiny, tmp_path, name, tied):
    model = filled(tiny(name, tie_word_embeddings=tied))
    checkpoint.save(model, None, tmp_path / "c")
    loaded, _ = checkpoint.load(tmp_path / "c")
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert checkpoint.surgery_of(loaded) == checkpoint.surgery_of(model)
    assert next(iter(linears(loaded).values())).indices.dtype == torch.int32
    assert not checkpoint.surgery_of(SLTrain(merge=True)(loaded))


@pytest.mark.bits
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_killed_training_goes_on_exactly(tiny, prepared, tmp_path, checkpointing):
    from pretrain.core.batch import Vocabulary
    from pretrain.core.models.families import new_model
    from pretrain.corpus.shards import Shards
    from pretrain.corpus.tokenizers import load_tokenizer
    from pretrain.objectives.language.causal_lm import CausalLM
    from pretrain.optim.optimizers.adamw import AdamW
    from pretrain.optim.schedules.constant import Constant
    from pretrain.training.budget import Budget
    from pretrain.training.loader import Loader
    from pretrain.training.loop import Settings, train

    vocabulary, objective = Vocabulary.of(load_tokenizer(prepared / "tokenizer")), CausalLM()
    fields = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }

    def run(steps, folder):
        model = SLTrain(4, 0.1)(new_model("llama", fields, vocabulary=vocabulary))
        shards = Shards(prepared / "tokens" / "train")
        loader = Loader(shards, [objective], vocabulary, length=32, batch_rows=4, micro_rows=2)
        settings = Settings(budget=Budget(steps=steps), save_every=2, bar=False, checkpointing=checkpointing)
        return train(model, loader, [objective], AdamW(), Constant(), settings, folder)

    whole = run(4, tmp_path / "whole")
    run(2, tmp_path / "halves")
    resumed = run(4, tmp_path / "halves")
    assert resumed.step == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert any(m.B.any() for m in linears(resumed.model).values())


def test_without_sparse_entries_it_is_plain_low_rank(tiny):
    model = filled(tiny(), 4, 0.0)
    module = next(iter(linears(model).values()))
    assert module.values.numel() == 0 and torch.linalg.matrix_rank(module.dense()) == 4
    x = torch.randn(3, 32, requires_grad=True)
    wanted = [x, module.A, module.B]
    mine, theirs = module(x), x @ (2.0 * module.B @ module.A).T
    assert_rounding(mine, theirs, 32, steps=2)
    for a, b in zip(torch.autograd.grad(mine.sum(), wanted), torch.autograd.grad(theirs.sum(), wanted), strict=True):
        assert_rounding(a, b, 48, steps=3)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(SLTrain(merge=True)(model)(TOKENS).logits, filled(tiny(), 4, 0.0)(TOKENS).logits)


@pytest.mark.parametrize("delta", [0.0, 0.1])
def test_every_factor_moves_in_training(tiny, delta):
    model = SLTrain(4, delta)(tiny())
    before = {n: m.dense().detach().clone() for n, m in linears(model).items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(m.B.any() and not torch.equal(m.dense(), before[n]) for n, m in linears(model).items())


def test_a_rank_below_one_is_a_share_of_the_width(tiny):
    module = next(iter(linears(SLTrain(0.25)(tiny())).values()))
    assert module.A.shape == (8, 32) and module.scale == 32 / 8


def test_wrong_fields_and_models_are_refused(tiny):
    with pytest.raises(
        PretrainError, match=r"sltrain: rank 17: accepted: 1 to 16, the smaller side of model.layers.0.self_attn.k_proj"
    ):
        SLTrain(17)(tiny())
    with pytest.raises(PretrainError, match="sltrain: delta 1.0: accepted: from 0 to below 1"):
        SLTrain(4, 1.0)(tiny())
    with pytest.raises(PretrainError, match="this one has none of its layers"):
        SLTrain(merge=True)(tiny())
    with pytest.raises(PretrainError, match="q_proj is a SparseLowRank: accepted: plain linear layers"):
        SLTrain(4)(SLTrain(4)(tiny()))

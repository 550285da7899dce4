"""Spike No More: the deviations of the start, embeddings beside sub-layers, and the way back to plain models."""

from __future__ import annotations

import math

import pytest
import torch
from closeness import assert_same_model
from torch import nn

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import blocks, embeddings, linears, norms
from pretrain.surgery import Inputs
from pretrain.surgery.architecture.sltrain import SLTrain
from pretrain.surgery.architecture.spike_no_more import SpikeNoMore

TOKENS = torch.arange(3, 23)[None]
WIDE = {"llama": {"hidden_size": 128, "intermediate_size": 160, "head_dim": 32}, "gpt2": {"n_embd": 128}}
SMALL = math.sqrt(2 / (5 * 128))


def spread(tensor):
    return tensor.detach().std().item()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_deviations_at_the_start_are_the_papers(tiny, name, tied):
    model = SpikeNoMore()(tiny(name, tie_word_embeddings=tied, **WIDE[name]))
    last = ("o_proj", "down_proj", "c_proj")
    found = linears(model)
    assert len([n for n in found if n.endswith(last)]) == 2 * len(blocks(model)) == 4
    for path, layer in found.items():
        wanted = SMALL / math.sqrt(2 * 2) if path.endswith(last) else SMALL
        assert spread(layer.weight) == pytest.approx(wanted, rel=0.05), path
        assert getattr(layer, "bias", None) is None or not layer.bias.any()
    head = model.get_output_embeddings().weight
    assert spread(head) == pytest.approx(SMALL, rel=0.05)
    assert (head is embeddings(model).weight) == tied
    assert all(torch.equal(m.weight, torch.ones_like(m.weight)) for m in norms(model).values())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_embeddings_are_as_large_as_the_paper_says(tiny, name):
    for kind, wanted in (("scaled", math.sqrt(2 / 5)), ("layer_norm", 1.0), ("none", SMALL)):
        model = SpikeNoMore(kind)(tiny(name, **WIDE[name]))
        out = embeddings(model)(torch.arange(1, 97))
        assert spread(out) == pytest.approx(wanted, rel=0.03 if kind != "layer_norm" else 1e-2)
        assert spread(embeddings(model).weight[1:]) == pytest.approx(SMALL, rel=0.03)
    each = embeddings(SpikeNoMore("layer_norm")(tiny(name, **WIDE[name])))(torch.arange(1, 97))
    torch.testing.assert_close(each.std(-1, correction=0), torch.ones(96), atol=5e-3, rtol=0)


def test_scaled_is_the_table_times_the_root_of_the_width_in_value_and_gradient(tiny):
    model = SpikeNoMore("scaled")(tiny())
    layer, ids = embeddings(model), torch.tensor([[5, 7, 5]])
    weights = torch.randn(1, 3, 32)
    out = layer(ids)
    assert torch.equal(out, layer.weight[ids] * math.sqrt(32))
    (grad,) = torch.autograd.grad((out * weights).sum(), layer.weight)
    torch.testing.assert_close(grad[5], math.sqrt(32) * (weights[0, 0] + weights[0, 2]))


def test_a_large_shortcut_bounds_the_growth_of_gradients_through_many_blocks(tiny):
    """What the paper's analysis says, measured: the gradient at the bottom against that at the top."""

    def growth(kind):
        model = SpikeNoMore(kind)(tiny("llama", num_hidden_layers=12, **WIDE["llama"]))
        states = []
        for block in blocks(model):
            block.register_forward_pre_hook(lambda _, args: args[0].retain_grad() or states.append(args[0]))
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        return (states[0].grad.norm() / states[-1].grad.norm()).item()

    vanilla, scaled, normed = (growth(kind) for kind in ("none", "scaled", "layer_norm"))
    assert scaled < 1.5 and normed < 1.5 and vanilla > 2 * scaled


@pytest.mark.bits
@pytest.mark.parametrize("kind", ["scaled", "layer_norm"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_saved_loaded_and_merged_it_is_the_same_function(tiny, tmp_path, name, tied, kind):
    import transformers

    model = SpikeNoMore(kind)(tiny(name, tie_word_embeddings=tied))
    if kind == "layer_norm":
        nn.init.normal_(embeddings(model).norm.weight)
        nn.init.normal_(embeddings(model).norm.bias)
    logits = model(TOKENS).logits
    checkpoint.save(model, None, tmp_path / "own")
    loaded, _ = checkpoint.load(tmp_path / "own")
    assert torch.equal(loaded(TOKENS).logits, logits)
    assert (loaded.get_output_embeddings().weight is embeddings(loaded).weight) == tied
    merged = SpikeNoMore(merge=True)(loaded)
    checkpoint.save(merged, None, tmp_path / "plain")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert_same_model(plain(TOKENS).logits, logits, model)


def test_without_a_changed_embedding_the_model_is_a_plain_one(tiny):
    model = SpikeNoMore("none")(tiny())
    assert not checkpoint.surgery_of(model) and type(embeddings(model)) is nn.Embedding


def test_numbers_come_from_the_seed(tiny):
    one, again, other = (SpikeNoMore()(tiny(), Inputs(seed=s)).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(v, again[n]) for n, v in one.items())
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.bits
def test_surgeries_chain_and_wrong_models_are_refused(tiny, tmp_path):
    model = SLTrain(4, 0.1)(SpikeNoMore()(tiny()))
    checkpoint.save(model, None, tmp_path / "c")
    assert torch.equal(checkpoint.load(tmp_path / "c")[0](TOKENS).logits, model(TOKENS).logits)
    with pytest.raises(PretrainError, match="draw first, then factorise"):
        SpikeNoMore()(SLTrain(4)(tiny()))
    with pytest.raises(PretrainError, match="embedding is a ScaledEmbedding: accepted: a plain nn.Embedding"):
        SpikeNoMore()(SpikeNoMore()(tiny()))
    with pytest.raises(PretrainError, match="embedding 'big': accepted: scaled, layer_norm, none"):
        SpikeNoMore("big")(tiny())
    with pytest.raises(PretrainError, match="merge True: accepted: a model of spike_no_more"):
        SpikeNoMore(merge=True)(tiny())

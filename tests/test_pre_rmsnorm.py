"""Pre-RMSNorm: the converted model is the LayerNorm model, before, during and after training."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import head, hidden, linears, norms
from pretrain.surgery.architecture.pre_rmsnorm import CRMSNorm, PreRMSNorm
from pretrain.surgery.growth.g_stack import GStack

TOKENS = torch.arange(3, 43).view(2, 20)
FORMS = [{}, {"training": False}, {"crms": True}]


@pytest.fixture
def plain(tiny):
    """A GPT-2 whose main branch has a mean that matters, with no bias at 0 and no gain at 1."""

    def make(**fields):
        model = tiny("gpt2", **fields)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                centre = 1 if ".ln_" in name and name.endswith("weight") else 0.3 if "wte" in name else 0.1
                parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


def spread(one, other):
    return float((one - other).detach().abs().max() / other.detach().std())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_the_logits_are_those_of_the_layernorm_model(plain, form, tied):
    model = plain(tie_word_embeddings=tied)
    before = model(TOKENS).logits
    converted = PreRMSNorm(**form)(model)
    assert not any(type(n) is nn.LayerNorm for n in norms(converted).values())
    assert spread(converted(TOKENS).logits, before) < 1e-5
    double = plain(tie_word_embeddings=tied).double()
    exact = double(TOKENS).logits
    assert spread(PreRMSNorm(**form)(double)(TOKENS).logits, exact) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_the_main_branch_of_the_converted_model_has_no_mean(plain, form):
    inputs = []
    model = PreRMSNorm(**form)(plain().double())
    for norm in norms(model).values():
        norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model(TOKENS)
    assert len(inputs) == 5
    for x in inputs:
        if "crms" in form:
            assert x.shape[-1] == 31
        else:
            assert x.mean(-1).abs().max() < 1e-12 < x.abs().max()


def test_the_compressed_norm_is_layernorm_without_the_last_entry():
    x = torch.randn(5, 12, dtype=torch.float64)
    zero_mean = x - x.mean(-1, keepdim=True)
    norm = CRMSNorm(12, 1e-3)
    assert torch.allclose(norm(zero_mean[:, :-1]), nn.functional.layer_norm(x, (12,), eps=1e-3)[:, :-1])
    assert norm(zero_mean[:, :-1].bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_takes_the_layernorm_models_steps(plain, optimizer, dropout):
    fields = {"embd_pdrop": dropout, "resid_pdrop": dropout, "attn_pdrop": dropout}
    original = plain(**fields).double().train()
    converted = PreRMSNorm()(copy.deepcopy(original))
    assert converted.training
    start = {n: p.clone() for n, p in original.named_parameters()}
    for model in (original, converted):
        steps = optimizer(model.parameters(), lr=1e-2, weight_decay=0.1)
        for seed in range(4):
            torch.manual_seed(seed)
            model(TOKENS, labels=TOKENS).loss.backward()
            steps.step()
            steps.zero_grad()
    for name, parameter in original.named_parameters():
        assert not torch.equal(parameter, start[name])
        assert torch.allclose(converted.get_parameter(name), parameter, atol=1e-9), name
    assert spread(converted.eval()(TOKENS).logits, original.eval()(TOKENS).logits) < 1e-7


@pytest.mark.bits
@pytest.mark.parametrize("form", FORMS)
def test_a_converted_model_is_saved_loaded_and_never_opened_as_plain(plain, tmp_path, form):
    model = PreRMSNorm(**form)(plain())
    checkpoint.save(model, None, tmp_path / "c")
    again = checkpoint.load(tmp_path / "c")[0]
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert checkpoint.surgery_of(again) == checkpoint.surgery_of(model)
    for kind in (transformers.AutoModelForCausalLM, transformers.GPT2LMHeadModel):
        with pytest.raises((ValueError, OSError)):
            kind.from_pretrained(tmp_path / "c")


@pytest.mark.parametrize("form", FORMS)
def test_a_converted_model_generates_and_its_parts_are_found(plain, form):
    model = plain()
    wanted = model.generate(TOKENS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    PreRMSNorm(**form)(model)
    for cached in (True, False):
        got = model.generate(TOKENS, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=cached)
        assert torch.equal(got, wanted)
    weight_VE, bias_V = head(model)
    states = hidden(model, input_ids=TOKENS)
    logits = states @ weight_VE.T + (0 if bias_V is None else bias_V)
    assert torch.allclose(logits, model(TOKENS).logits, atol=1e-5) and len(linears(model)) == 8
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.bits
def test_after_training_the_recentring_is_done_once_and_for_all(plain, tmp_path):
    model = PreRMSNorm()(plain())
    wanted = model(TOKENS).logits
    once = PreRMSNorm(training=False)(copy.deepcopy(model))
    assert spread(once(TOKENS).logits, wanted) < 1e-5 and len(checkpoint.surgery_of(once)) == 1
    small = PreRMSNorm(crms=True)(model)
    assert spread(small(TOKENS).logits, wanted) < 1e-5
    checkpoint.save(small, None, tmp_path / "c")
    assert torch.equal(checkpoint.load(tmp_path / "c")[0](TOKENS).logits, small(TOKENS).logits)


@pytest.mark.bits
@pytest.mark.parametrize("form", FORMS)
def test_a_converted_model_can_be_stacked(plain, tmp_path, form):
    stacked = PreRMSNorm(**form)(GStack(2)(plain()))
    grown = GStack(2)(PreRMSNorm(**form)(plain()))
    assert spread(grown(TOKENS).logits, stacked(TOKENS).logits) < 1e-5
    checkpoint.save(grown, None, tmp_path / "c")
    assert torch.equal(checkpoint.load(tmp_path / "c")[0](TOKENS).logits, grown(TOKENS).logits)


def test_a_headless_model_is_converted_but_not_compressed(tiny):
    model = transformers.GPT2Model(tiny("gpt2").config).eval()
    before = model(TOKENS).last_hidden_state
    assert spread(PreRMSNorm()(copy.deepcopy(model))(TOKENS).last_hidden_state, before) < 1e-5
    with pytest.raises(PretrainError, match="crms of GPT2Model: accepted: a model with a language head"):
        PreRMSNorm(crms=True)(model)


def test_what_cannot_be_converted_is_one_clear_line(tiny):
    with pytest.raises(PretrainError, match=r"no longer GPT-2's own \(surgeries: pre_rmsnorm\)"):
        PreRMSNorm()(PreRMSNorm(crms=True)(tiny("gpt2")))
    with pytest.raises(PretrainError, match="add_cross_attention true"):
        PreRMSNorm()(tiny("gpt2", add_cross_attention=True))

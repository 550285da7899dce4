"""The plain loop: `generate`'s tokens, the distribution it says, and clear refusals."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_same_model
from conftest import TINY
from decoding_cases import EOS, WIDE, chance, greedy, learnt, padded, pairs, prompt

from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.generation.forward import Forward, why_not
from pretrain.core.generation.loop import decode
from pretrain.core.generation.options import Options
from pretrain.core.models.families import new_model
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.stages.decode import continue_prompt

FAMILIES = ("llama", "qwen3", "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_those_of_generate(tiny, family):
    for seed in range(3):
        model = tiny(family, seed=seed, **WIDE[family])
        for length in (1, 2, 9, 20):
            ids_1L = prompt(length, seed)
            assert torch.equal(decode(model, ids_1L, max_new_tokens=24), greedy(model, ids_1L, 24))


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_prompts_and_ends_are_those_of_generate(tiny, family):
    ended = 0
    for seed in range(4):
        model = tiny(family, seed=seed, **WIDE[family])
        ids_BL, mask_BL = padded((3, 11, 7, 1), seed)
        for eos in (None, *range(40, 44)):
            ours = decode(model, ids_BL, attention_mask_BL=mask_BL, max_new_tokens=20, eos=eos)
            assert torch.equal(ours, greedy(model, ids_BL, 20, eos=eos, mask_BL=mask_BL))
            ended += eos is not None and bool((ours[:, 11:] == eos).any())
    assert ended  # some rows did stop before the others


def test_a_single_row_stops_at_its_end(tiny):
    model = tiny(**WIDE["llama"])
    whole_1N = decode(model, prompt(5, 0), max_new_tokens=12)
    eos = int(whole_1N[0, 5 + 6])
    stop = whole_1N[0, 5:].tolist().index(eos)
    assert torch.equal(decode(model, prompt(5, 0), max_new_tokens=12, eos=eos), whole_1N[:, : 5 + stop + 1])


def test_eager_attention_and_a_window_that_is_long_enough_change_nothing(tiny):
    model = tiny(**WIDE["llama"])
    ids_BL, mask_BL = padded((4, 9), 1)
    expected = decode(model, ids_BL, attention_mask_BL=mask_BL, max_new_tokens=10)
    model.set_attn_implementation("eager")
    assert torch.equal(decode(model, ids_BL, attention_mask_BL=mask_BL, max_new_tokens=10), expected)
    assert torch.equal(decode(model, ids_BL[1:], max_new_tokens=10), expected[1:])


def test_a_pass_gives_the_logits_of_the_whole_sequence(tiny):
    for family in FAMILIES:
        model, ids_1L = tiny(family, **WIDE[family]), prompt(12, 3)
        with torch.no_grad():
            whole_LV = model(ids_1L).logits[0]
            forward = Forward(model, 12)
            logits_1V = forward.prefill(ids_1L[:, :6])
            for place in range(6, 12):
                assert_same_model(logits_1V[0], whole_LV[place - 1], model)
                logits_1V = forward.step(ids_1L[:, place : place + 1])
            assert_same_model(logits_1V[0], whole_LV[-1], model)


def test_a_changed_model_is_decoded_as_it_is_or_left_to_generate(tiny):
    from pretrain.surgery.architecture.pre_rmsnorm import PreRMSNorm

    model = PreRMSNorm()(tiny("gpt2", **WIDE["gpt2"]), {})
    assert torch.equal(decode(model, prompt(6, 0), max_new_tokens=12), greedy(model, prompt(6, 0), 12))
    handle = model.transformer.register_forward_hook(lambda *_: None)
    assert "has a forward pass of its own; accepted: that of transformers" in why_not(model, 10)
    handle.remove()
    assert why_not(model, 10) is None


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_samples_follow_the_distribution(tiny, top_p):
    model, ids_1L = tiny(vocab_size=7, initializer_range=0.3), prompt(4, 0, 7)
    ours = decode(
        model, ids_1L.expand(6000, -1), max_new_tokens=2, temperature=0.7, top_p=top_p,
        generator=torch.Generator().manual_seed(0),
    )[:, 4:]  # fmt: skip
    counts_VV = torch.bincount(ours[:, 0] * 7 + ours[:, 1], minlength=49).view(7, 7)
    assert chance(counts_VV, pairs(model, ids_1L, 0.7, top_p)) > 1e-3


def test_the_nucleus_is_that_of_transformers():
    from transformers import TopPLogitsWarper

    logits_BV = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 3
    for top_p in (0.1, 0.5, 0.9):
        kept_BV = TopPLogitsWarper(top_p)(None, logits_BV / 0.8) > -torch.inf
        seen_BV = torch.zeros_like(kept_BV)
        for number in torch.linspace(0, 0.99999, 400):
            seen_BV[torch.arange(50), Options(temperature=0.8, top_p=top_p).pick(logits_BV, number.expand(50))] = True
        assert not (seen_BV & ~kept_BV).any()
        assert (seen_BV == kept_BV).float().mean() > 0.98  # the unlikeliest may fall between two of the numbers


def test_a_seed_decides_the_samples(tiny):
    model = tiny()
    one, two, three = (
        decode(model, prompt(5, 0), max_new_tokens=12, temperature=1.0, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    )
    assert torch.equal(one, two) and not torch.equal(one, three)


def test_what_cannot_be_decoded_is_one_clear_error(tiny):
    ids_1L = prompt(5, 0)
    with pytest.raises(
        PretrainError, match="69 positions, prompt and new tokens: GPT2LMHeadModel has 64; accepted: ma"
    ):
        decode(tiny("gpt2"), ids_1L, max_new_tokens=64)
    with pytest.raises(PretrainError, match="model family 'bert'; accepted: llama, gpt2"):
        decode(tiny("bert"), ids_1L)
    with pytest.raises(PretrainError, match="pads after tokens; accepted: prompts padded on the left"):
        decode(tiny(), ids_1L, attention_mask_BL=torch.tensor([[1, 1, 1, 0, 0]]))
    with pytest.raises(PretrainError, match=r"prompts of shape \(1, 0\)"):
        decode(tiny(), ids_1L[:, :0])
    with pytest.raises(PretrainError, match="max_new_tokens 0: accepted: 1 or more"):
        decode(tiny(), ids_1L, max_new_tokens=0)
    with pytest.raises(PretrainError, match="top_p 0.0: accepted: above 0, at most 1"):
        decode(tiny(), ids_1L, temperature=1.0, top_p=0.0)
    dynamic = tiny(rope_scaling={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert "rope_type 'dynamic'" in why_not(dynamic, 10)


@pytest.mark.parametrize(("family", "window", "asked"), [("llama", None, 0), ("mistral", 6, 1), ("mistral", 90, 0)])
def test_the_stage_decodes_with_the_loop_and_leaves_other_models_to_generate(
    prepared, monkeypatch, family, window, asked
):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    fields = TINY["llama"] | ({"sliding_window": window} if window else {})
    model = new_model(family, fields, vocabulary=Vocabulary.of(tokenizer)).eval()
    generate, calls = model.generate, []
    monkeypatch.setattr(model, "generate", lambda *a, **k: calls.append(1) or generate(*a, **k))
    sample = continue_prompt(model, tokenizer, "def run(", temperature=0, max_new_tokens=9)
    assert len(calls) == asked
    ids = [tokenizer.bos_token_id, *tokenizer("def run(", add_special_tokens=False)["input_ids"]]
    expected = greedy(model, torch.tensor([ids]), 9, eos=tokenizer.eos_token_id)[0, len(ids) :]
    assert sample["continuation"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_model_that_has_learnt_ends_where_generate_does(tiny):
    model = learnt(tiny(), 30)
    for seed in range(4):
        assert torch.equal(decode(model, prompt(4, seed), eos=EOS), greedy(model, prompt(4, seed), 64, eos=EOS))

"""The plain loop: `generate`'s tokens, the distribution it says, and clear refusals."""

from __future__ import annotations

import re

import pytest
import torch
from closeness import assert_same_model
from conftest import TINY
from decoding_cases import EOS, WIDE, chance, greedy, learnt, padded, pairs, prompt

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.generation.accepted import check_generation
from pretrain.core.generation.continuations import sample
from pretrain.core.generation.forward import Forward, why_not
from pretrain.core.generation.loop import decode
from pretrain.core.generation.options import Options
from pretrain.core.generation.settings import ends, options_of, sampling
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


@pytest.mark.parametrize("scale", [0.05, 1.0, 6.0])  # a nucleus of nearly all tokens, of many, of few
def test_of_a_large_vocabulary_the_tokens_are_those_of_the_whole_order(scale, monkeypatch):
    generator, none_BN = torch.Generator().manual_seed(0), torch.zeros(40, 0)
    logits_BV, uniform_B = scale * torch.randn(40, 20_000, generator=generator), torch.rand(40, generator=generator)
    pick = Options(temperature=0.8, top_p=0.9).pick
    tokens_B = pick(logits_BV, uniform_B, none_BN)
    monkeypatch.setattr("pretrain.core.generation.options.FIRST", 20_000)
    assert torch.equal(tokens_B, pick(logits_BV, uniform_B, none_BN)) and len(set(tokens_B.tolist())) > 10


def test_the_nucleus_is_that_of_transformers():
    from transformers import TopPLogitsWarper

    logits_BV = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 3
    none_BN = torch.empty(50, 0, dtype=torch.int64)
    for top_p in (0.1, 0.5, 0.9):
        kept_BV = TopPLogitsWarper(top_p)(None, logits_BV / 0.8) > -torch.inf
        seen_BV = torch.zeros_like(kept_BV)
        for number in torch.linspace(0, 0.99999, 400):
            seen_BV[
                torch.arange(50), Options(temperature=0.8, top_p=top_p).pick(logits_BV, number.expand(50), none_BN)
            ] = True
        assert not (seen_BV & ~kept_BV).any()
        assert (seen_BV == kept_BV).float().mean() > 0.98  # the unlikeliest may fall between two of the numbers


@pytest.mark.parametrize("temperature", [1e-31, 1e-320, 5e-324])
def test_a_temperature_below_what_logits_can_be_divided_by_is_greedy(tiny, temperature):
    model = tiny()
    greedy = decode(model, prompt(5, 0), max_new_tokens=12)
    assert torch.equal(greedy, decode(model, prompt(5, 0), max_new_tokens=12, temperature=temperature))
    assert sampling(model, temperature, None)[0] == 0
    cold = Options(temperature=1e-30).pick(
        torch.tensor([[1e4, 1e4 - 1, -1e4]]), torch.tensor([0.999]), torch.empty(1, 0, dtype=torch.int64)
    )
    assert cold.tolist() == [0]


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
    with pytest.raises(PretrainError, match="top_p -0.1: accepted: from 0 to 1"):
        decode(tiny(), ids_1L, temperature=1.0, top_p=-0.1)
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
    sample = continue_prompt(model, tokenizer, "def run(", temperature=0, max_new_tokens=9, token_healing=False)
    assert len(calls) == asked
    ids = [tokenizer.bos_token_id, *tokenizer("def run(", add_special_tokens=False)["input_ids"]]
    expected = greedy(model, torch.tensor([ids]), 9, eos=tokenizer.eos_token_id)[0, len(ids) :]
    assert sample["continuation"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_model_that_has_learnt_ends_where_generate_does(tiny):
    model = learnt(tiny(), 30)
    for seed in range(4):
        assert torch.equal(decode(model, prompt(4, seed), eos=EOS), greedy(model, prompt(4, seed), 64, eos=EOS))


def set_up(model, **fields):
    """The model with these fields in its `generation_config`."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(**fields)
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": list(range(3, 60))},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_shapes_greedy_tokens_is_that_of_generate(tiny, tokenizer, fields):
    from pretrain.decoding.speculative.token_recycling import TokenRecycling

    changed = 0
    for seed in range(3):
        model, ids_1L = set_up(tiny(seed=seed, vocab_size=512, **WIDE["llama"]), **fields), prompt(9, seed)
        options = options_of(model, tokenizer, 9, max_new_tokens=16)
        expected = model.generate(
            ids_1L, attention_mask=torch.ones_like(ids_1L), max_new_tokens=16, do_sample=False,
            eos_token_id=sorted(options["eos"]), pad_token_id=0,
        )  # fmt: skip
        assert torch.equal(decode(model, ids_1L, **options), expected)
        assert torch.equal(TokenRecycling().generate(model, ids_1L, **options), expected)
        changed += not torch.equal(decode(model, ids_1L, max_new_tokens=16)[:, : expected.shape[1]], expected)
    assert changed


def test_what_shapes_samples_is_that_of_transformers(tiny, tokenizer):
    model, ids_1L = set_up(tiny(vocab_size=512, **WIDE["llama"]), top_k=4, min_p=0.1), prompt(6, 0)
    options = options_of(model, tokenizer, 6, max_new_tokens=1, temperature=0.7, top_p=0.9)
    with torch.no_grad():
        logits_1V = model(ids_1L).logits[0, -1:]
    p_V = options["processors"](ids_1L, logits_1V).softmax(-1)[0]
    warmed = (logits_1V[0] / 0.7).softmax(-1)
    assert set(p_V.nonzero()[:, 0].tolist()) <= set(warmed.topk(4).indices.tolist())
    ours = decode(
        model, ids_1L.expand(4000, -1), **options, generator=torch.Generator().manual_seed(0)
    )[:, 6]  # fmt: skip
    share_V = torch.bincount(ours, minlength=512) / len(ours)
    assert (share_V - p_V).abs().max() < 0.03


def test_every_end_token_and_stop_string_ends_its_row(tiny, tokenizer):
    model = tiny(vocab_size=512, **WIDE["llama"])
    ids_BL, mask_BL = padded((4, 9, 6), 1)
    free_BN = decode(model, ids_BL, attention_mask_BL=mask_BL, max_new_tokens=14)[:, 9:].tolist()
    listed = [free_BN[0][3], free_BN[1][6]]
    set_up(model, eos_token_id=listed)
    options = options_of(model, tokenizer, 9, max_new_tokens=14)
    for row, whole in zip(
        decode(model, ids_BL, attention_mask_BL=mask_BL, **options)[:, 9:].tolist(), free_BN, strict=True
    ):
        end = next((i for i, token in enumerate(whole) if token in {*listed, tokenizer.eos_token_id}), 13)
        assert row == (whole[: end + 1] + [tokenizer.pad_token_id] * 14)[: len(row)]
    text = tokenizer.decode(free_BN[1][4:6])
    set_up(model, stop_strings=text)
    stopped = options_of(model, tokenizer, 9, max_new_tokens=14)
    count = next(n for n in range(1, 15) if text in tokenizer.decode(free_BN[1][:n]))
    new = decode(model, ids_BL[1:2], **stopped)[0, 9:].tolist()
    assert new == free_BN[1][:count] and count < 14
    assert sample(model, ids_BL[1].tolist(), 2, **stopped) == [new, new]


def test_a_checkpoint_s_settings_decide_what_is_not_asked_for(tiny, tokenizer, tmp_path):
    model = tiny(vocab_size=512)
    for fields, expected in (
        ({}, (0.8, 0.95)), ({"do_sample": False}, (0.0, 0.95)), ({"do_sample": True}, (1.0, 1.0)),
        ({"temperature": 0.2, "top_p": 0.9}, (0.2, 0.9)), ({"do_sample": True, "top_p": 0.7}, (1.0, 0.7)),
    ):  # fmt: skip
        assert sampling(set_up(model, **fields), None, None) == expected
        assert sampling(model, 0.0, 0.5) == (0.0, 0.5)
    set_up(model, temperature=0.2, eos_token_id=[2, 7])  # and no `do_sample`, as many have it
    checkpoint.save(model, tokenizer, tmp_path / "c")
    again, _ = checkpoint.load(tmp_path / "c")
    assert again.generation_config.temperature == 0.2 and {2, 7} <= ends(again, Vocabulary.of(tokenizer))
    for wrong in ({"temperature": float("nan")}, {"temperature": -1.0}, {"top_p": float("nan")}):
        with pytest.raises(PretrainError, match=f"{next(iter(wrong))} .*: accepted: "):
            continue_prompt(model, tokenizer, "def", **wrong)


def test_a_top_p_of_0_is_the_likeliest_token_wherever_it_is_said(tiny, tokenizer):
    """As in transformers: by the loop, with further processors, of a checkpoint, and with a method that does not sample."""
    model = tiny(vocab_size=512, initializer_range=0.3)
    ids_1L = torch.arange(3, 9)[None]
    greedy = decode(model, ids_1L, max_new_tokens=8)
    assert torch.equal(decode(model, ids_1L, max_new_tokens=8, temperature=5.0, top_p=0.0), greedy)
    from transformers import TopPLogitsWarper

    scores_BV = TopPLogitsWarper(0.0)(None, torch.randn(4, 50, generator=torch.Generator().manual_seed(0)))
    assert ((scores_BV > -torch.inf).sum(-1) == 1).all()
    words = {"max_new_tokens": 8, "token_healing": False}
    likeliest = continue_prompt(model, tokenizer, "def f", temperature=0, **words)
    for fields in ({}, {"repetition_penalty": 1.0 + 1e-9}):
        asked = continue_prompt(set_up(model, **fields), tokenizer, "def f", temperature=5.0, top_p=0, **words)
        assert (asked["continuation"], asked["method"]) == (likeliest["continuation"], "greedy")
    given = set_up(model, do_sample=True, temperature=5.0, top_p=0.0)
    assert continue_prompt(given, tokenizer, "def f", **words)["continuation"] == likeliest["continuation"]


SAID = {  # what 0, or 1, of a field means, and a value that is refused
    "top_k": (-1, "from 0 (0: all tokens)"), "top_p": (1.5, "from 0 to 1 (0: the likeliest token, 1: all)"),
    "min_p": (-0.1, "from 0 to 1 (0: all tokens)"), "temperature": (-1, "from 0 (0: the likeliest token)"),
    "typical_p": (0, "above 0, at most 1 (1: all tokens)"), "repetition_penalty": (0, "above 0 (1: no penalty)"),
    "no_repeat_ngram_size": (-1, "from 0 (0: none)"), "epsilon_cutoff": (1, "from 0 (none) to below 1"),
}  # fmt: skip


@pytest.mark.parametrize("field", SAID)
def test_a_setting_of_a_checkpoint_beyond_its_bounds_is_told_what_its_end_means(tiny, tokenizer, field, tmp_path):
    wrong, words = SAID[field]
    with pytest.raises(PretrainError, match=re.escape(words)):
        check_generation(tmp_path / "generation_config.json", {field: wrong})
    check_generation(tmp_path / "generation_config.json", {field: int(field in ("typical_p", "repetition_penalty"))})


@pytest.mark.parametrize("field", [field for field in SAID if field not in ("temperature", "top_p")])
def test_the_end_that_means_none_changes_no_token(tiny, tokenizer, field):
    end, model = int(field in ("typical_p", "repetition_penalty")), tiny(vocab_size=512, initializer_range=0.3)
    words = {"max_new_tokens": 12, "token_healing": False, "temperature": 2.0, "top_p": 1.0, "seed": 3}
    plain = continue_prompt(set_up(model, do_sample=True), tokenizer, "def f", **words)
    ended = continue_prompt(set_up(model, do_sample=True, **{field: end}), tokenizer, "def f", **words)
    assert ended["continuation"] == plain["continuation"]

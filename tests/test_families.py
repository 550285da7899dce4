"""Families: documents in one row stay apart, and hidden states times the head are the model's logits."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_same_model

from pretrain.core.batch import Vocabulary, document_mask
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import (
    additive,
    at,
    attention_inputs,
    base,
    blocks,
    embeddings,
    encode_decode,
    family,
    head,
    hidden,
    linears,
    new_config,
    new_model,
    norms,
    set_module,
)

FLAT = ("llama", "qwen3", "gpt2", "bert", "modernbert")
FIRST, SECOND = 17, 23
WINDOWED = {  # models with sliding windows shorter than the documents
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def packed():
    tokens_BL = torch.randint(3, 97, (1, FIRST + SECOND), generator=torch.Generator().manual_seed(0))
    document_BL = torch.tensor([[1] * FIRST + [2] * SECOND])
    position_BL = torch.tensor([[*range(FIRST), *range(SECOND)]])
    return tokens_BL, document_BL, position_BL


def logits(model, tokens_BL, document_BL, position_BL):
    mask = document_mask(document_BL, causal=family(model).causal)
    states_BLE = hidden(model, input_ids=tokens_BL, **attention_inputs(model, mask, position_BL))
    weight_VE, bias_V = head(model)
    return states_BLE @ weight_VE.T + (0 if bias_V is None else bias_V)


def check_isolation(model, run, alone):
    """`run(tokens_BL)` gives the logits of packed rows; `alone` are those of the second document by itself."""
    tokens_BL, _, _ = packed()
    other_BL = tokens_BL.clone()
    other_BL[:, :FIRST] = 5
    together, beside_another = run(tokens_BL), run(other_BL)
    assert torch.equal(together[:, FIRST:], beside_another[:, FIRST:])
    assert not torch.equal(together[:, :FIRST], beside_another[:, :FIRST])
    assert torch.allclose(together[:, FIRST:], alone, atol=1e-5)


@pytest.mark.bits
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FLAT)
def test_a_document_is_not_moved_by_its_neighbour_in_the_row(tiny, name, attention):
    model = tiny(name)
    model.set_attn_implementation(attention)
    tokens_BL, document_BL, position_BL = packed()
    with torch.no_grad():
        alone = model(input_ids=tokens_BL[:, FIRST:]).logits
        check_isolation(model, lambda tokens_BL: logits(model, tokens_BL, document_BL, position_BL), alone)


@pytest.mark.bits
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_sliding_window_is_kept_inside_each_document(name, attention):
    model = new_model(name, SHAPE | {"num_key_value_heads": 2, "vocab_size": 97} | WINDOWED[name]).eval()
    model.set_attn_implementation(attention)
    wide = new_model(name, SHAPE | {"num_key_value_heads": 2, "vocab_size": 97}).eval()
    tokens_BL, document_BL, position_BL = packed()
    with torch.no_grad():
        alone = model(input_ids=tokens_BL[:, FIRST:]).logits
        check_isolation(model, lambda tokens_BL: logits(model, tokens_BL, document_BL, position_BL), alone)
        assert not torch.allclose(wide(input_ids=tokens_BL[:, FIRST:]).logits, alone, atol=1e-3)  # the window matters


@pytest.mark.bits
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_t5_documents_are_not_moved_by_their_neighbours(tiny, attention):
    model = tiny("t5")
    model.set_attn_implementation(attention)
    tokens_BL, document_BL, position_BL = packed()
    target_BM = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(1))
    owner_BM = torch.tensor([[1] * 5 + [2] * 7])
    encoder, decoder = document_mask(document_BL, causal=False), document_mask(owner_BM, causal=True)
    cross = (owner_BM[:, :, None] == document_BL[:, None, :])[:, None]
    weight_VE, _ = head(model)

    def run(source_BL):
        inputs = attention_inputs(model, encoder, position_BL, decoder_B1MM=decoder, cross_B1ML=cross)
        states_BME = hidden(model, input_ids=source_BL, decoder_input_ids=target_BM, **inputs)
        assert torch.equal(encode_decode(model, source_BL, target_BM, document_BL, owner_BM), states_BME)
        return states_BME @ weight_VE.T

    with torch.no_grad():
        other_BL = tokens_BL.clone()
        other_BL[:, :FIRST] = 5
        alone = model(input_ids=tokens_BL[:, FIRST:], decoder_input_ids=target_BM[:, 5:]).logits
        assert torch.equal(run(tokens_BL)[:, 5:], run(other_BL)[:, 5:])
        assert not torch.equal(run(tokens_BL)[:, :5], run(other_BL)[:, :5])
        assert torch.allclose(run(tokens_BL)[:, 5:], alone, atol=1e-5)


def test_t5_without_all_three_masks_is_an_error_and_no_leak(tiny):
    model = tiny("t5")
    tokens_BL, document_BL, position_BL = packed()
    mask = document_mask(document_BL, causal=False)
    with pytest.raises(PretrainError, match=r"'t5' needs three masks: decoder_B1MM and cross_B1ML as well"):
        attention_inputs(model, mask, position_BL)
    with pytest.raises(PretrainError, match="need a cross_attention_mask"):
        hidden(model, input_ids=tokens_BL, decoder_input_ids=tokens_BL, attention_mask=additive(mask, torch.float32))


def test_positions_that_may_see_nothing_stay_finite_also_in_bfloat16(tiny):
    mask = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.isfinite(additive(mask, dtype)).all()
    assert torch.isfinite(additive(mask, torch.float32).to(torch.bfloat16)).all()
    assert torch.equal(additive(~mask, torch.float32), torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *((name, {}) for name in FLAT),
        ("llama", {"tie_word_embeddings": True, "num_hidden_layers": 1, "hidden_size": 40, "intermediate_size": 7}),
        ("qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
        ("gpt2", {"tie_word_embeddings": False}),
        ("bert", {"tie_word_embeddings": False}),
        ("modernbert", {"num_hidden_layers": 1, "decoder_bias": False}),
    ],
)
def test_hidden_times_head_is_what_the_model_returns(tiny, name, fields):
    model = tiny(name, **fields)
    tokens_BL, _, _ = packed()
    document_BL, position_BL = torch.ones_like(tokens_BL), torch.arange(tokens_BL.shape[1])[None]
    with torch.no_grad():
        weight_VE, bias_V = head(model)
        plain = hidden(model, input_ids=tokens_BL) @ weight_VE.T + (0 if bias_V is None else bias_V)
        assert torch.allclose(plain, model(tokens_BL).logits, atol=1e-6)
        assert torch.allclose(logits(model, tokens_BL, document_BL, position_BL), model(tokens_BL).logits, atol=1e-5)


@pytest.mark.parametrize("scaled", [True, False])
def test_t5_hidden_times_head_is_what_the_model_returns(tiny, scaled):
    model = tiny("t5", tie_word_embeddings=scaled)  # which in T5 says whether the states are scaled
    tokens_BL, _, _ = packed()
    present_BL = torch.ones_like(tokens_BL)
    present_BL[:, 30:] = 0
    inputs = {"input_ids": tokens_BL, "decoder_input_ids": tokens_BL[:, :9], "attention_mask": present_BL}
    with torch.no_grad():
        assert_same_model(hidden(model, **inputs) @ head(model)[0].T, model(**inputs).logits, model)


@pytest.mark.bits
@pytest.mark.parametrize("name", ["llama", "bert", "modernbert", "t5"])
def test_a_model_without_a_head_has_hidden_states_and_no_head(tiny, name):
    tokens_BL, _, _ = packed()
    model = tiny(name).base_model if name != "t5" else new_model("t5", {"d_model": 32, "num_layers": 1}, task="base")
    inputs = {"input_ids": tokens_BL} | ({"decoder_input_ids": tokens_BL} if name == "t5" else {})
    with torch.no_grad():
        assert torch.equal(hidden(model.eval(), **inputs), model(**inputs).last_hidden_state)
    with pytest.raises(PretrainError, match="has no language-model head"):
        head(model)


@pytest.mark.parametrize("name", [*FLAT, "t5"])
def test_the_table_finds_blocks_linears_and_norms(tiny, name):
    model = tiny(name)
    assert len(blocks(model)) == (4 if name == "modernbert" else 2)
    attention, feed_forward = linears(model, "attention"), linears(model, "feed_forward")
    assert attention and feed_forward and not set(attention) & set(feed_forward)
    assert set(attention) | set(feed_forward) == set(linears(model))
    in_blocks = sum(
        p.numel() for b in {*blocks(model), *blocks(model, "decoder")} for p in b.parameters() if p.ndim == 2
    )
    counted = sum(m.weight.numel() for m in linears(model).values())
    biases_of_position = sum(p.numel() for n, p in model.named_parameters() if "relative_attention_bias" in n)
    assert counted == in_blocks - biases_of_position
    assert norms(model)


@pytest.mark.parametrize("name", [*FLAT, "t5"])
def test_every_path_of_the_table_leads_where_it_says(tiny, name):
    model, entry = tiny(name), family(tiny(name))
    names = {id(module): n for n, module in model.named_modules()}
    sides = ("encoder", "decoder") if entry.decoder_blocks else ("encoder",)
    attention, feed_forward = set(), set()
    for block in (block for side in sides for block in blocks(model, side)):
        within = at(block, entry.attention)
        attention |= {names[id(at(within, path))] for path in (*entry.queries, entry.output)}
        ahead = at(block, entry.feed_forward)
        up = [path for path in entry.up if name != "t5" or hasattr(ahead, path)]
        feed_forward |= {names[id(at(ahead, path))] for path in (*up, entry.down)}
        for path in entry.norms:
            assert "norm" in type(at(block, path)).__name__.lower() or name == "modernbert"  # its first is Identity
    assert feed_forward == set(linears(model, "feed_forward"))
    assert attention == {n for n in linears(model, "attention") if "EncDecAttention" not in n}
    for path, kind in ((entry.final_norm, "norm"), (entry.positions, "embedding")):
        assert path is None or kind in type(at(base(model), path)).__name__.lower()
    assert embeddings(model).weight.shape == (97, 32)


def test_a_side_that_does_not_exist_is_named(tiny):
    assert len(blocks(tiny("t5", num_decoder_layers=3), "decoder")) == 3
    with pytest.raises(PretrainError, match=r"unknown side of the model 'decodr' \(did you mean 'decoder'\?\)"):
        blocks(tiny("t5"), "decodr")


def test_one_layer_and_odd_widths_are_supported(tiny):
    model = tiny(
        "llama",
        num_hidden_layers=1,
        hidden_size=40,
        intermediate_size=7,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    assert len(blocks(model)) == 1
    assert head(model)[0] is model.get_input_embeddings().weight


def test_set_module_replaces_by_name(tiny):
    model = tiny("llama")
    fresh = torch.nn.Identity()
    set_module(model, "model.layers.0.mlp.up_proj", fresh)
    assert model.model.layers[0].mlp.up_proj is fresh


def test_an_unsupported_model_names_those_that_are():
    class Other(torch.nn.Module):
        config = type("C", (), {"model_type": "bertt"})()

    with pytest.raises(
        PretrainError, match=r"unknown model family 'bertt' \(did you mean 'bert'\?\); accepted: .*llama"
    ):
        family(Other())


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("lama", {}, r"unknown model family 'lama' \(did you mean 'llama'\?\); accepted: bert, "),
        ("robertta", {}, r"unknown model family 'robertta' \(did you mean 'roberta'\?\)"),
        (
            "llama", {"hidden_sise": 8},
            r"unknown field 'hidden_sise' of model family 'llama' \(did you mean 'hidden_size'\?\)",
        ),
        ("llama", {"hidden_size": "wide"}, "model family 'llama': .*hidden_size"),
        ("llama", SHAPE | {"num_key_value_heads": 3}, "num_key_value_heads 3: accepted: a divisor of .* 4"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_one_clear_line(model_type, fields, message):
    with pytest.raises(PretrainError, match=message) as caught:
        new_config(model_type, fields)
    assert "\n" not in str(caught.value)


def test_the_names_of_older_configurations_are_accepted():
    assert new_config("llama", {"rope_theta": 5e5}).rope_parameters["rope_theta"] == 5e5
    assert new_config("gpt2", {"hidden_size": 24, "n_head": 3}).n_embd == 24


@pytest.mark.parametrize(
    ("model_type", "fields", "task", "message"),
    [
        ("llama", {"hidden_size": 30, "num_attention_heads": 4}, "causal", "model family 'llama'"),
        (
            "llama",
            SHAPE | {"hidden_act": "sillu"},
            "causal",
            "model family 'llama': hidden_act 'sillu' .did you mean 'silu'..: accepted: gelu",
        ),
        ("t5", {}, "causal", "model family 't5' has no model for task 'causal'; accepted: seq2seq, base"),
        ("t5", {}, "casual", r"unknown task 'casual' \(did you mean 'causal'\?\)"),
    ],
)
def test_a_model_that_cannot_be_built_says_why(model_type, fields, task, message):
    with pytest.raises(PretrainError, match=message):
        new_model(model_type, fields, task=task)


def test_new_models_are_equal_by_seed_have_the_vocabulary_and_leave_the_generator_alone(tiny):
    before = torch.random.get_rng_state()
    first, again, other = tiny("modernbert"), tiny("modernbert"), tiny("modernbert", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(embeddings(first).weight, embeddings(other).weight)
    vocabulary = Vocabulary(97, pad=0, bos=1, eos=2)
    model = new_model("modernbert", SHAPE, task="masked", vocabulary=vocabulary)
    ids = [getattr(model.config, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")]
    assert ids == [0, 1, 2, 1, 2] and embeddings(model).weight.shape == (97, 32)

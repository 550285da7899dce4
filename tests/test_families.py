"""Families: documents in one row stay apart, and hidden states times the head are the model's logits."""

from __future__ import annotations

import pytest
import torch

from pretrain.core.batch import document_mask
from pretrain.core.errors import PretrainError
from pretrain.core.families import (
    attention_inputs,
    blocks,
    encode_decode,
    family,
    head,
    hidden,
    linears,
    new_config,
    new_model,
    norms,
    set_module,
)  # fmt: skip

FLAT = ("llama", "qwen3", "gpt2", "bert", "modernbert")
FIRST, SECOND = 17, 23


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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FLAT)
def test_a_document_is_not_moved_by_its_neighbour_in_the_row(tiny, name, attention):
    model = tiny(name)
    model.set_attn_implementation(attention)
    tokens_BL, document_BL, position_BL = packed()
    with torch.no_grad():
        together = logits(model, tokens_BL, document_BL, position_BL)[:, FIRST:]
        other = tokens_BL.clone()
        other[:, :FIRST] = 5
        beside_another = logits(model, other, document_BL, position_BL)[:, FIRST:]
        alone = model(input_ids=tokens_BL[:, FIRST:]).logits
    assert torch.equal(together, beside_another)
    assert torch.allclose(together, alone, atol=1e-5)


def test_t5_documents_are_not_moved_by_their_neighbours(tiny):
    model = tiny("t5")
    tokens_BL, document_BL, _ = packed()
    with torch.no_grad():

        def run(source):
            masks = (
                document_mask(document_BL, causal=False), document_mask(document_BL, causal=True), document_mask(document_BL, causal=False),
            )  # fmt: skip
            weight_VE, _ = head(model)
            return encode_decode(model, source, tokens_BL, masks)[:, FIRST:] @ weight_VE.T

        other = tokens_BL.clone()
        other[:, :FIRST] = 5
        alone = model(input_ids=tokens_BL[:, FIRST:], decoder_input_ids=tokens_BL[:, FIRST:]).logits
        assert torch.equal(run(tokens_BL), run(other))
        assert torch.allclose(run(tokens_BL), alone, atol=1e-5)


@pytest.mark.parametrize("name", FLAT)
def test_hidden_times_head_is_what_the_model_returns(tiny, name):
    model = tiny(name)
    tokens_BL, _, _ = packed()
    document_BL, position_BL = torch.ones_like(tokens_BL), torch.arange(tokens_BL.shape[1])[None]
    with torch.no_grad():
        assert torch.allclose(logits(model, tokens_BL, document_BL, position_BL), model(tokens_BL).logits, atol=1e-5)


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
        ("lama", {}, r"unknown model family 'lama' \(did you mean 'llama'\?\)"),
        (
            "llama",
            {"hidden_sise": 8},
            r"unknown field 'hidden_sise' of model family 'llama' \(did you mean 'hidden_size'\?\)",
        ),
    ],
)
def test_a_wrong_configuration_is_one_clear_line(model_type, fields, message):
    with pytest.raises(PretrainError, match=message):
        new_config(model_type, fields)


def test_a_model_that_cannot_be_built_says_why():
    with pytest.raises(PretrainError, match="llama"):
        new_model("llama", {"hidden_size": 30, "num_attention_heads": 4})

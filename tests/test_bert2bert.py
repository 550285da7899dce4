"""bert2BERT: when the grown model computes what the small one did, and where its weights are from."""

from __future__ import annotations

import pytest
import torch

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import blocks
from pretrain.surgery import Inputs
from pretrain.surgery.growth.bert2bert import Bert2BERT

TOKENS = torch.arange(3, 43).view(2, 20)
MODELS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"hidden_size": 36, "intermediate_size": 7, "num_key_value_heads": 1, "head_dim": 6}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("gpt2", {}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("bert", {}),
    ("bert", {"tie_word_embeddings": False}),
]


@pytest.fixture
def small(tiny):
    """A model far from its initialisation: no bias is 0, no norm is 1, no mean vanishes."""

    def make(name, **fields):
        model = tiny(name, **fields).double()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                centre = 1 if parameter.ndim == 1 and key.endswith("weight") else 0.05
                parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


def gap(one, other):
    """The largest difference of the logits, relative to their spread."""
    with torch.no_grad():
        mine, theirs = one(TOKENS).logits, other(TOKENS).logits
    return float((mine - theirs).abs().max() / theirs.std())


@pytest.mark.parametrize(("name", "fields"), MODELS)
def test_a_model_whose_neurons_all_have_as_many_copies_computes_the_same(small, name, fields):
    model = small(name, **fields)
    width = model.config.hidden_size
    for times in (2, 3):
        grown = Bert2BERT(hidden_size=times * width, initialisation="FPI", sampling="even")(model)
        assert grown.config.hidden_size == times * width and grown.config.num_hidden_layers == 2
        assert grown.config.num_attention_heads == times * model.config.num_attention_heads
        assert gap(grown, model) < 1e-5


@pytest.mark.parametrize("sampling", ["uniform", "even"])
@pytest.mark.parametrize(("name", "fields"), MODELS[:4])
def test_rmsnorm_is_kept_at_any_width_and_any_number_of_copies(small, name, fields, sampling):
    model = small(name, **fields)
    width, heads = model.config.hidden_size, model.config.num_attention_heads
    for wide in (width + 1, width + width // heads, 2 * width):
        growth = Bert2BERT(
            hidden_size=wide, num_attention_heads=2 * heads, initialisation="FPI", sampling=sampling,
            intermediate_size=101,
        )  # fmt: skip
        assert gap(growth(model, Inputs(seed=3)), model) < 1e-4  # its square is taken in float32


@pytest.mark.parametrize(("name", "fields"), MODELS)
def test_more_neurons_between_two_norms_change_nothing_in_any_family(small, name, fields):
    model = small(name, **fields)
    grown = Bert2BERT(intermediate_size=173, initialisation="FPI")(model, Inputs(seed=5))
    assert grown.num_parameters() > model.num_parameters()
    assert gap(grown, model) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_layernorm_statistics_move_when_neurons_have_unequal_numbers_of_copies(small, name):
    model = small(name)
    even = gap(Bert2BERT(hidden_size=48, initialisation="FPI", sampling="even")(model), model)
    uniform = gap(Bert2BERT(hidden_size=64, initialisation="FPI")(model), model)
    assert 1e-3 < even < 2 and 1e-3 < uniform < 2  # close to the small model, but not it


@pytest.mark.parametrize(
    ("heads", "shared", "grown"), [(4, 2, (6, 2)), (4, 2, (6, 3)), (4, 2, (12, 4)), (4, 1, (15, 3))]
)
def test_grouped_queries_keep_their_keys(small, heads, shared, grown):
    model = small("llama", num_attention_heads=heads, num_key_value_heads=shared, head_dim=8)
    growth = Bert2BERT(num_attention_heads=grown[0], num_key_value_heads=grown[1], initialisation="FPI")
    large = growth(model, Inputs(seed=2))
    assert large.config.num_key_value_heads == grown[1] and large.config.head_dim == 8
    assert gap(large, model) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_new_neurons_of_aki_are_those_of_the_next_block(small, name):
    model = small(name, num_hidden_layers=3)
    wide = {"initialisation": "AKI", "sampling": "even", "hidden_size": 64}
    grown, preserving = Bert2BERT(**wide)(model), Bert2BERT(**wide | {"initialisation": "FPI"})(model)
    path = {"llama": "mlp.up_proj", "gpt2": "mlp.c_fc", "bert": "intermediate.dense"}[name]

    def weight(some, block):  # (out, in)
        found = blocks(some)[block].get_submodule(path).weight.detach()
        return found.T if name == "gpt2" else found

    for block in range(3):
        large, mine, after = (
            weight(some, at) for some, at in ((grown, block), (model, block), (model, min(block + 1, 2)))
        )
        wanted = torch.cat([mine, after])[: len(large)]  # each neuron once of its block, then once of the next
        assert torch.allclose(large, torch.cat([wanted, wanted], 1) / 2)
    assert gap(grown, model) > 1e-3
    assert torch.equal(weight(grown, 2), weight(preserving, 2))  # after the last block there is none


def test_a_whole_head_of_aki_is_of_the_next_block(small):
    model = small("qwen3")
    grown = Bert2BERT(num_attention_heads=8, sampling="even")(model)
    for path in ("q_proj", "k_proj", "v_proj"):
        mine, after = (blocks(model)[b].self_attn.get_submodule(path).weight for b in (0, 1))
        assert torch.allclose(blocks(grown)[0].self_attn.get_submodule(path).weight, torch.cat([mine, after]))


def test_depth_is_whole_stacks_and_then_the_topmost_blocks(small):
    model = small("gpt2", num_hidden_layers=3)
    grown = Bert2BERT(num_hidden_layers=8)(model)
    assert grown.config.num_hidden_layers == len(blocks(grown)) == 8
    for block, source in zip(blocks(grown), [0, 1, 2, 0, 1, 2, 1, 2], strict=True):
        assert torch.equal(block.mlp.c_fc.weight, blocks(model)[source].mlp.c_fc.weight)


def test_each_weight_of_a_windowed_model_finds_its_block(small):
    fields = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    grown = Bert2BERT(num_hidden_layers=4, hidden_size=64)(small("qwen3", **fields))
    assert grown.config.layer_types == ["full_attention", "sliding_attention"] * 2


def test_the_draw_is_the_seeds(small):
    model = small("llama")
    one, same, other = (Bert2BERT(hidden_size=64)(model, Inputs(seed=s)).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


@pytest.mark.bits
def test_a_grown_model_is_tied_as_before_and_trains(small, tmp_path):
    for name, fields in (("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("bert", {})):
        grown = Bert2BERT(hidden_size=64, num_hidden_layers=3)(small(name, **fields).float())
        checkpoint.save(grown, None, tmp_path / name)
        assert torch.equal(checkpoint.load(tmp_path / name)[0](TOKENS).logits, grown(TOKENS).logits)
        assert grown.get_output_embeddings().weight is grown.get_input_embeddings().weight
        grown(TOKENS, labels=TOKENS).loss.backward()
        assert all(p.grad is not None for p in grown.parameters())


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama", {"hidden_size": 16}, "hidden_size 16: accepted: 32 or more"),
        ("llama", {"hidden_size": 33}, "hidden_size 33 with 4 attention heads of 8: accepted: .*or num_attention_heads"),
        ("gpt2", {"hidden_size": 36}, "hidden_size 36 with 4 attention heads of 8: accepted: heads of the old size"),
        ("gpt2", {"num_attention_heads": 8}, "hidden_size 32 with 8 attention heads of 8"),
        ("llama", {"intermediate_size": 40}, "intermediate_size 40: accepted: 48 or more"),
        ("llama", {"num_hidden_layers": 1}, "num_hidden_layers 1: accepted: 2 or more"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3 for 4 attention heads: accepted: a divisor"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads 4 for 4 attention heads: .*2 or more queries"),
        ("llama", {"initialisation": "fpi"}, r"'fpi'.*accepted: FPI, AKI"),
        ("llama", {"sampling": "random"}, r"'random'.*accepted: uniform, even"),
    ],
)  # fmt: skip
def test_what_cannot_be_grown_is_one_clear_line(tiny, name, fields, message):
    with pytest.raises(PretrainError, match=message):
        Bert2BERT(**fields)(tiny(name))


def test_a_model_with_other_modules_is_refused(tiny):
    model = tiny("llama")
    model.pretrain_surgery = [{"method": "lora", "config": {}}]
    with pytest.raises(PretrainError, match="been through lora: accepted: grow first"):
        Bert2BERT(hidden_size=64)(model)

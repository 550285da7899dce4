"""Surgeries: what they promise about weights and logits, and that plain transformers opens what they make."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_same_model

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import blocks
from pretrain.surgery.growth.g_stack import GStack

TOKENS = torch.arange(3, 23)[None]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert"])
def test_stacked_blocks_are_copies_in_the_order_of_the_small_model(tiny, name):
    small = tiny(name)
    grown = GStack(3)(small)
    assert len(blocks(grown)) == 6 and grown.config.num_hidden_layers == 6 and small.config.num_hidden_layers == 2
    for index, block in enumerate(blocks(grown)):
        for (key, mine), theirs in zip(
            block.state_dict().items(), blocks(small)[index % 2].state_dict().values(), strict=True
        ):
            assert torch.equal(mine, theirs), key
    shared = set(dict(grown.named_parameters())) & set(dict(small.named_parameters()))
    assert all(torch.equal(grown.get_parameter(n), small.get_parameter(n)) for n in shared)


@pytest.mark.bits
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_stacking_once_changes_nothing(tiny, name):
    small = tiny(name)
    assert torch.equal(GStack(1)(small)(TOKENS).logits, small(TOKENS).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_stacked_model_runs_its_blocks_over_and_over_and_is_a_plain_checkpoint(tiny, tmp_path, name):
    import transformers

    small = tiny(name, tie_word_embeddings=True)
    grown = GStack(2)(small)
    checkpoint.save(grown, None, tmp_path / "c")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c").eval()
    assert_same_model(plain(TOKENS).logits, grown(TOKENS).logits, grown)
    cached = plain.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    uncached = plain.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(cached, uncached)


def test_wrong_growths_and_families_are_refused(tiny):
    with pytest.raises(PretrainError, match="growth 0: accepted: 1 or more"):
        GStack(0)(tiny())

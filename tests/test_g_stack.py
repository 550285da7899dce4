"""G_stack on models that other surgeries have changed: repeated on the new blocks, or one clear line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.surgery.architecture.pre_rmsnorm import PreRMSNorm
from pretrain.surgery.growth.g_stack import GStack

TOKENS = torch.arange(3, 23)[None]


@pytest.mark.bits
def test_a_changed_model_is_stacked_with_its_change_and_loads_again(tiny, tmp_path):
    grown = GStack(3)(PreRMSNorm()(tiny("gpt2")))
    assert torch.allclose(grown(TOKENS).logits, GStack(3)(tiny("gpt2"))(TOKENS).logits, atol=1e-5)
    checkpoint.save(grown, None, tmp_path / "c")
    assert torch.equal(checkpoint.load(tmp_path / "c")[0](TOKENS).logits, grown(TOKENS).logits)


def test_a_change_that_is_not_the_same_in_each_block_is_one_clear_line(tiny):
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 48))
    with pytest.raises(PretrainError, match=r"no weight model\.layers\.0\.mlp\.up_proj\.weight .*none recorded"):
        GStack(2)(model)


def test_a_surgery_that_cannot_be_repeated_is_named(tiny, monkeypatch):
    model = PreRMSNorm()(tiny("gpt2"))

    def restore(self, model):
        raise KeyError("h.2")

    monkeypatch.setattr(PreRMSNorm, "restore", restore)
    with pytest.raises(PretrainError, match=r"'pre_rmsnorm' .* cannot be repeated .*KeyError.* accepted: grow first"):
        GStack(2)(model)


def test_what_generates_text_keeps_its_settings(tiny):
    model = tiny("llama")
    model.generation_config.max_length = 77
    assert GStack(2)(model).generation_config.max_length == 77

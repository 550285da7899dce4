"""Linear layers of eight bits, and that compressed-tensors reads them to the same logits."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.surgery.compression.w8a8 import W8A8, EightBitLinear, rounded, scales

KINDS = ("fp8", "int8")


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_off_by_half_a_step_at_most_and_the_greatest_by_nothing(kind):
    weight_OI = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    scale_O1 = scales(weight_OI, kind)
    again_OI = rounded(weight_OI, scale_O1, kind).float() * scale_O1
    steps_OI = scale_O1 if kind == "int8" else torch.maximum(weight_OI.abs() / 8, scale_O1 * 2**-9)  # of 3 bits each
    assert ((again_OI - weight_OI).abs() <= steps_OI / 2 * (1 + 1e-4)).all()
    most_O1 = weight_OI.abs().argmax(1, keepdim=True)
    if kind == "fp8":
        assert torch.allclose(again_OI.gather(1, most_O1), weight_OI.gather(1, most_O1), rtol=1e-6)


@pytest.mark.parametrize(("kind", "activations"), [("fp8", "dynamic"), ("fp8", "none"), ("int8", "dynamic")])
def test_compressed_tensors_opens_a_checkpoint_to_the_same_logits(tiny, tmp_path, kind, activations):
    model = W8A8(kind, activations)(tiny("llama", num_hidden_layers=2))
    ids_BL = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(ids_BL).logits
    checkpoint.save(model, None, tmp_path / "c")
    again, _ = checkpoint.load(tmp_path / "c")
    eight = again.model.layers[0].mlp.up_proj
    assert isinstance(eight, EightBitLinear) and eight.weight.itemsize == 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    with torch.no_grad():
        assert torch.equal(again(ids_BL).logits, ours)
        assert torch.allclose(theirs(ids_BL).logits, ours, atol=1e-5)


def test_integers_of_weights_alone_are_refused():
    with pytest.raises(PretrainError, match="w8a8: activations none: accepted: with format fp8"):
        W8A8("int8", "none")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_below_it_is_trained_through_the_rounding(tiny, kind):
    plain = tiny("llama")
    model = W8A8(kind)(copy.deepcopy(plain))
    ids_BL = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(1))
    for each in (plain, model):
        each(ids_BL).logits.square().mean().backward()
    ours, theirs = (each.get_input_embeddings().weight.grad.flatten() for each in (model, plain))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.95

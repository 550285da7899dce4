"""SVFit: the singular values alone are trained."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_rounding, assert_same_model
from examples import IDS, logits, trained
from peft import PeftModel

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.core.models.families import linears
from pretrain.core.models.heads import with_head
from pretrain.surgery import Inputs
from pretrain.surgery.adapters._adapters import adapters

svfit = method_class("svfit")
merge = method_class("merge_adapters")
FAMILIES = ("llama", "gpt2", "bert", "t5")


@pytest.mark.bits
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_changes_at_first_and_the_singular_values_alone_are_trained(tiny, family) -> None:
    before = logits(tiny(family))
    model = svfit(rank=4, where="all")(tiny(family))
    assert torch.equal(logits(model), before)
    assert all(name.endswith(".s") for name, p in model.named_parameters() if p.requires_grad)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == 4 * len(linears(model)) and len(linears(model)) == len(adapters(model))
    extra = {"decoder_input_ids": IDS} if family == "t5" else {}
    model(IDS, **extra).logits.square().sum().backward()
    assert all(module.s.grad.abs().max() > 0 for module in adapters(model).values())


def test_all_singular_values_of_queries_and_values_are_the_papers_sixteenth_of_lora(tiny) -> None:
    model = svfit()(tiny("bert"))
    assert {name.rpartition(".")[2] for name in adapters(model)} == {"query", "value"}
    ours, side = sum(p.numel() for p in model.parameters() if p.requires_grad), 32
    assert ours == 2 * 2 * side and 16 * ours == 2 * 2 * 8 * (side + side)  # LoRA's (O + I) · 8
    fused = svfit()(tiny("gpt2"))
    assert {name.rpartition(".")[2] for name in adapters(fused)} == {"c_attn"}


@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_the_weight_has_the_trained_singular_values_and_its_own_vectors(tiny, family) -> None:
    plain = linears(tiny(family), "all")
    model = trained(svfit(rank=5, where="all")(tiny(family)))
    for name, module in adapters(model).items():
        weight = plain[name].weight.detach()
        weight = weight.T if module.conv1d else weight
        U, s, Vh = torch.linalg.svd(weight, full_matrices=False)
        s[:5] = module.s.detach()
        torch.testing.assert_close(weight + module.change(), (U * s) @ Vh, atol=1e-5, rtol=1e-4)
        x = torch.randn(3, weight.shape[1])
        bias = 0 if plain[name].bias is None else plain[name].bias
        assert_rounding(module(x), x @ ((U * s) @ Vh).T + bias, weight.shape[1], steps=3)


def test_the_metrics_say_what_the_trained_values_hold(tiny) -> None:
    inputs = Inputs()
    svfit(rank=6, targets=("down_proj",))(tiny(), inputs)
    shares = []
    for name, layer in linears(tiny()).items():
        if name.endswith("down_proj"):
            energy = torch.linalg.svdvals(layer.weight.detach()).square()
            shares.append(float(energy[:6].sum() / energy.sum()))
    assert inputs.extra["metrics"] == pytest.approx(
        {"energy_kept": sum(shares) / len(shares), "energy_kept_least": min(shares)}, rel=1e-5
    )


def test_a_classifiers_last_layer_is_trained_and_travels(tiny, tmp_path) -> None:
    def classifier():
        return with_head(tiny("bert"), "sequence", ("a", "b"), Vocabulary(97, pad=0, bos=1, eos=2), seed=5)

    model = trained(svfit()(classifier()))
    assert model.classifier.weight.requires_grad
    checkpoint.save(model, None, tmp_path / "c")
    theirs = PeftModel.from_pretrained(classifier(), tmp_path / "c" / "adapter")
    assert_same_model(logits(theirs), logits(model), model)


def test_what_does_not_fit_is_one_clear_error(tiny) -> None:
    with pytest.raises(PretrainError, match="svfit: rank 0: accepted: 1 or more"):
        svfit(rank=0)
    with pytest.raises(PretrainError, match=r"rank 20: accepted: at most 16, the smaller side of .*v_proj"):
        svfit(rank=20)(tiny())
    with pytest.raises(PretrainError, match="where 'head': accepted: query_value, attention, feed_forward, all"):
        svfit(where="head")(tiny())
    with pytest.raises(PretrainError, match="targets q_prj: accepted: names of layers"):
        svfit(targets=("q_prj",))(tiny())
    with pytest.raises(PretrainError, match="adapted already"):
        svfit()(svfit()(tiny()))

"""SPAFIT: blocks in three groups, frozen, biases, LoRA."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_same_model
from examples import IDS, logits, trained
from peft import LoraConfig, PeftModel, get_peft_model

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.core.models.heads import with_head
from pretrain.surgery import Inputs
from pretrain.surgery.adapters._adapters import adapters

spafit = method_class("spafit")
merge = method_class("merge_adapters")
peft_adapter = method_class("peft_adapter")
LAYERS = {"bert": "num_hidden_layers", "llama": "num_hidden_layers", "gpt2": "n_layer"}
FAMILIES = (("bert", False), ("gpt2", False), ("llama", True))


@pytest.fixture
def four(tiny):
    """Models of four blocks; 1 of them is frozen, 1 trains biases and 2 get LoRA by default."""
    return lambda family="bert": tiny(family, **{LAYERS[family]: 4})


def what_is_trained(model):
    """By block: `none`, `biases`, `lora`, or `lora and biases`."""
    found = {number: set() for number in range(4)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            number = int(name.split("encoder.layer.")[1].split(".")[0])
            found[number].add("lora" if name.endswith((".A", ".B")) else "biases" if name.endswith("bias") else name)
    return [" and ".join(sorted(kinds, reverse=True)) or "none" for kinds in found.values()]


def test_the_default_is_the_papers_4_9_of_24_blocks() -> None:
    assert spafit().groups(24) == (range(4), range(4, 9), range(9, 24))
    assert spafit(n1=4, n2=14).groups(24) == (range(4), range(4, 14), range(14, 24))
    assert [list(group) for group in spafit(n1=1, n2=3, reverse=True).groups(4)] == [[3], [2, 1], [0]]
    assert [len(group) for group in spafit().groups(1)] == [0, 0, 1]


@pytest.mark.parametrize(("fields", "wanted"), [
    ({}, ["none", "biases", "lora and biases", "lora and biases"]),
    ({"last_biases": False}, ["none", "biases", "lora", "lora"]),
    ({"reverse": True}, ["lora and biases", "lora and biases", "biases", "none"]),
    ({"n1": 0, "n2": 3}, ["biases", "biases", "biases", "lora and biases"]),
    ({"n1": 3, "n2": 3}, ["none", "none", "none", "lora and biases"]),
])  # fmt: skip
def test_each_block_trains_what_its_group_does(four, fields, wanted) -> None:
    model = spafit(**fields)(four())
    assert what_is_trained(model) == wanted
    assert torch.allclose(logits(model), logits(four()), atol=1e-6)
    assert {name.rpartition(".")[2] for name in adapters(model)} == {"query", "value"}


def test_the_number_of_trained_parameters_is_biases_and_lora(four) -> None:
    inputs, width, inner, rank = Inputs(), 32, 48, 8
    model = spafit()(four(), inputs)
    biases, lora = 7 * width + inner, 2 * rank * (width + width)  # of a block: q, k, v, o, two norms, two dense
    assert inputs.extra["metrics"] == {"trained_parameters": 3 * biases + 2 * lora, "lora_parameters": 2 * lora}
    logits_ = model.train()(IDS).logits
    logits_.square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_models_without_biases_train_the_scales_if_told_to(four, tiny) -> None:
    for family in ("llama", "modernbert"):
        with pytest.raises(PretrainError, match=f"this {family} has no biases in its blocks: accepted: .*scales: true"):
            spafit()(tiny(family))
    model = spafit(scales=True)(four("llama"))
    names = {n for n, p in model.named_parameters() if p.requires_grad and not n.endswith((".A", ".B"))}
    norms = ("input_layernorm", "post_attention_layernorm")
    assert names == {f"model.layers.{number}.{norm}.weight" for number in (1, 2, 3) for norm in norms}
    assert all(p.requires_grad is False for p in model.model.layers[0].parameters())
    assert spafit(n1=1, n2=1, last_biases=False)(four("llama"))  # LoRA in the last blocks needs no biases


def test_it_is_what_peft_computes_with_biases_and_lora_in_the_last_blocks(four) -> None:
    config = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"], "bias": "all"}
    theirs = get_peft_model(four(), LoraConfig(**config, layers_to_transform=[2, 3], layers_pattern="layer"))
    ours = trained(spafit()(four()))
    named = {}
    for name, tensor in ours.state_dict().items():
        theirs_name = name.replace(".layer.weight", ".base_layer.weight")
        for mine, peft in ((".A", ".lora_A.default.weight"), (".B", ".lora_B.default.weight")):
            theirs_name = theirs_name.removesuffix(mine) + peft if name.endswith(mine) else theirs_name
        named[f"base_model.model.{theirs_name.replace('.layer.bias', '.base_layer.bias')}"] = tensor
    missing, unexpected = theirs.load_state_dict(named, strict=False)
    assert not missing and not unexpected
    assert_same_model(logits(theirs), logits(ours), ours)


@pytest.mark.parametrize("family", ("bert", "gpt2"))  # scales are not in peft's own list of an adapter's weights
def test_lora_and_biases_go_on_as_an_adapter_of_peft(four, tmp_path, family) -> None:
    model = trained(spafit()(four(family), Inputs(seed=3)))
    checkpoint.save(model, None, tmp_path / "c")
    assert_same_model(logits(peft_adapter(folder=str(tmp_path / "c" / "adapter"))(four(family))), logits(model), model)


@pytest.mark.bits
def test_a_classifiers_last_layer_is_trained_and_travels(four, tmp_path) -> None:
    def classifier():
        return with_head(four(), "sequence", ("a", "b"), Vocabulary(97, pad=0, bos=1, eos=2), seed=5)

    model = trained(spafit()(classifier()))
    assert model.classifier.weight.requires_grad and not model.bert.pooler.dense.bias.requires_grad
    checkpoint.save(model, None, tmp_path / "c")
    assert torch.equal(logits(checkpoint.load(tmp_path / "c")[0]), logits(model))
    theirs = PeftModel.from_pretrained(classifier(), tmp_path / "c" / "adapter")
    assert_same_model(logits(theirs), logits(model), model)


def test_what_does_not_fit_is_one_clear_error(four, tiny) -> None:
    with pytest.raises(PretrainError, match="rank 0: accepted: 1 or more"):
        spafit(rank=0)
    with pytest.raises(PretrainError, match=r"n1 1.5: accepted: a number of blocks, or a share"):
        spafit(n1=1.5)
    with pytest.raises(PretrainError, match=r"n1 1, n2 4: accepted: n1 <= n2 < 4"):
        spafit(n1=1, n2=4)(four())
    with pytest.raises(PretrainError, match=r"n1 <= n2 < 4, the number of blocks; these are 3 and 2"):
        spafit(n1=3, n2=2)(four())
    with pytest.raises(PretrainError, match="adapted already"):
        spafit()(spafit()(four()))

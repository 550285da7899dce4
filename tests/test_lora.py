"""Adapters of peft in our checkpoints, in peft's own format, and merged."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from closeness import assert_same_model
from examples import logits, trained
from peft import LoraConfig, PeftModel, get_peft_model

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.core.models.heads import with_head
from pretrain.surgery import Inputs

lora = method_class("lora")
peft_adapter = method_class("peft_adapter")
merge = method_class("merge_adapters")
VOCABULARY = Vocabulary(97, pad=0, bos=1, eos=2)


@pytest.mark.parametrize(("family", "ends"), [
    ("llama", {"q_proj", "v_proj"}), ("gpt2", {"c_attn"}), ("bert", {"query", "value"}), ("modernbert", {"Wqkv"}),
    ("t5", {"q", "v"}),
])  # fmt: skip
@pytest.mark.parametrize("method", ("lora", "dylora", "increlora", "svfit"))
def test_queries_and_values_are_a_place_of_every_adapter(tiny, family, ends, method) -> None:
    adapted = method_class(method)(where="query_value", rank=2)(tiny(family))
    found = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    parts = {name: set(name.split(".")) for name in found}
    assert found and all(ends & its for its in parts.values())
    assert all(any(end in its for its in parts.values()) for end in ends)
    few = method_class(method)(where="query_value", targets=(min(ends),), rank=2)(tiny(family))
    assert {n for n, p in few.named_parameters() if p.requires_grad} == {
        n for n, its in parts.items() if min(ends) in its
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "modernbert", "t5"])
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa", "olora", "orthogonal"])
def test_an_adapter_changes_nothing_at_first_whatever_it_begins_with(tiny, family, init) -> None:
    plain, method = tiny(family).eval(), lora(rank=4, init=init, where="all")
    if family == "gpt2" and init == "olora":  # peft would change the answers at once, or fail
        for adapter in (method, peft_adapter("LORA", {"target_modules": ["c_fc"], "init_lora_weights": init})):
            with pytest.raises(PretrainError, match=r"^init olora: .* is a Conv1D; accepted: another init"):
                adapter(tiny(family))
        return
    adapted = method(tiny(family), Inputs(seed=1)).eval()
    assert torch.allclose(logits(adapted), logits(plain), atol=1e-5)
    assert any("lora_B" in name and parameter.requires_grad for name, parameter in adapted.named_parameters())


@pytest.mark.bits
def test_it_is_pefts_own_adapter(tiny) -> None:
    theirs = get_peft_model(copy.deepcopy(tiny()), LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    ours = trained(lora(rank=4, targets=("q_proj", "v_proj"))(tiny()))
    state = {f"base_model.model.{n}": t for n, t in ours.state_dict().items()}
    assert set(state) == set(theirs.state_dict())
    theirs.load_state_dict(state)
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.bits
@pytest.mark.parametrize("method", [
    lora(rank=4), lora(rank=3, dora=True, where="all"), lora(init="pissa", rslora=True),
    peft_adapter("IA3", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
])  # fmt: skip
def test_a_checkpoint_reopens_with_its_adapter_which_peft_opens_too(tiny, tmp_path, method) -> None:
    model = trained(method(tiny(), Inputs(seed=1)))
    checkpoint.save(model, None, tmp_path / "c")
    again, _ = checkpoint.load(tmp_path / "c")
    assert torch.equal(logits(again), logits(model))
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    if getattr(method, "init", "") != "pissa":  # which changes the frozen weights
        theirs = PeftModel.from_pretrained(tiny(), tmp_path / "c" / "adapter")
        assert_same_model(logits(theirs), logits(model), model)


@pytest.mark.bits
def test_an_adapter_that_peft_saved_is_opened_and_trained_on(tiny, tmp_path) -> None:
    theirs = trained(
        get_peft_model(tiny(), LoraConfig(r=2, target_modules=["o_proj", "up_proj"], rank_pattern={"up_proj": 5}))
    )
    theirs.save_pretrained(tmp_path / "adapter")
    ours = peft_adapter(folder=str(tmp_path / "adapter"))(tiny())
    assert torch.equal(logits(ours), logits(theirs))
    assert any(p.requires_grad for p in ours.parameters())
    checkpoint.save(trained(ours), None, tmp_path / "c")
    assert torch.equal(logits(checkpoint.load(tmp_path / "c")[0]), logits(ours))


@pytest.mark.bits
def test_a_classifiers_last_layer_is_trained_and_travels_with_the_adapter(tiny, tmp_path) -> None:
    def classifier():
        return with_head(tiny("bert"), "sequence", ("a", "b"), VOCABULARY, seed=5)

    model = trained(lora(targets=("query",))(classifier()))
    assert model.classifier.weight.requires_grad and not model.bert.pooler.dense.weight.requires_grad
    checkpoint.save(model, None, tmp_path / "c")
    again, _ = checkpoint.load(tmp_path / "c")
    assert torch.equal(logits(again), logits(model)) and again.classifier.weight.requires_grad
    theirs = PeftModel.from_pretrained(classifier(), tmp_path / "c" / "adapter")
    ours = peft_adapter(folder=str(tmp_path / "c" / "adapter"))(classifier())
    for opened in (theirs, ours):
        assert_same_model(logits(opened), logits(model), model)


@pytest.mark.parametrize(("family", "head"), [
    ("bert", "sequence"), ("bert", "token"), ("modernbert", "sequence"), ("llama", "sequence"),
])  # fmt: skip
@pytest.mark.parametrize("method", [
    lora(rank=2), lora(rank=2, dora=True), peft_adapter("IA3", {"target_modules": ["query", "Wqkv", "v_proj"], "feedforward_modules": []}),
    method_class("dylora")(rank=2), method_class("svfit")(rank=2),
], ids=["lora", "dora", "ia3", "dylora", "svfit"])  # fmt: skip
def test_peft_puts_a_classifiers_new_modules_on_the_base_checkpoint(tiny, tmp_path, family, head, method) -> None:
    checkpoint.save(tiny(family), None, tmp_path / "base")
    model, _ = checkpoint.load(tmp_path / "base")
    model = trained(with_head(method(model, Inputs(seed=1)), head, ("a", "b", "c"), VOCABULARY, seed=5))
    checkpoint.save(model, None, tmp_path / "c")
    again, _ = checkpoint.load(tmp_path / "c")
    checkpoint.save(again, None, tmp_path / "again")
    assert (head == "sequence" and family == "bert") == hasattr(getattr(model.base_model, "pooler", None), "dense")
    for folder in ("c", "again"):
        fresh = type(model).from_pretrained(tmp_path / "base", num_labels=3)
        theirs = PeftModel.from_pretrained(fresh, tmp_path / folder / "adapter")
        assert_same_model(logits(theirs), logits(model), model)
        ours = with_head(tiny(family), head, ("a", "b", "c"), VOCABULARY, seed=6)
        ours = peft_adapter(folder=str(tmp_path / folder / "adapter"))(ours)
        assert_same_model(logits(ours), logits(model), model)


@pytest.mark.bits
@pytest.mark.parametrize("where", (["query", "classifier"], ["dense"]))
def test_an_adapter_within_a_classifiers_new_modules_is_saved_and_in_pefts_format_where_it_can_be(
    tiny, tmp_path, where
) -> None:
    base = with_head(tiny("bert"), "sequence", ("a", "b"), VOCABULARY, seed=5)
    model = trained(peft_adapter("LORA", {"target_modules": where})(copy.deepcopy(base)))
    checkpoint.save(model, None, tmp_path / "c")
    assert torch.equal(logits(checkpoint.load(tmp_path / "c")[0]), logits(model))
    assert (tmp_path / "c" / "adapter").exists() == (where == ["dense"])
    if where == ["dense"]:  # the pooler's among them
        theirs = PeftModel.from_pretrained(base, tmp_path / "c" / "adapter")
        assert_same_model(logits(theirs), logits(model), model)


@pytest.mark.bits
def test_a_head_put_on_after_the_adapter_is_saved_with_it(tiny, tmp_path) -> None:
    model = trained(with_head(lora(rank=2)(tiny()), "sequence", ("a", "b"), VOCABULARY))
    assert model.score.weight.requires_grad
    checkpoint.save(model, None, tmp_path / "c")
    again, _ = checkpoint.load(tmp_path / "c")
    assert torch.equal(logits(again), logits(model))
    assert (tmp_path / "c" / "adapter" / "adapter_model.safetensors").exists()


def test_what_does_not_fit_is_one_clear_error(tiny, tmp_path) -> None:
    with pytest.raises(
        PretrainError, match=r"targets q_prj: accepted: names of layers \(k_proj, o_proj, q_proj, v_proj\)"
    ):
        lora(targets=("q_prj",))(tiny())
    with pytest.raises(PretrainError, match="rank 0: accepted: 1 or more"):
        lora(rank=0)
    with pytest.raises(PretrainError, match="where 'head': accepted: query_value, attention, feed_forward, all"):
        lora(where="head")(tiny())
    with pytest.raises(PretrainError, match="adapter type of peft"):
        peft_adapter("LORAX")(tiny())
    with pytest.raises(PretrainError, match="'rank'"):
        peft_adapter("LORA", {"rank": 3})(tiny())
    with pytest.raises(PretrainError, match=r"with adapter_config.json"):
        peft_adapter(folder=str(tmp_path))(tiny())
    with pytest.raises(PretrainError, match="has no adapter"):
        merge()(tiny())
    adapted = lora(rank=2)(tiny())
    with pytest.raises(PretrainError, match="adapted already"):
        lora(rank=2)(adapted)
    checkpoint.save(adapted, None, tmp_path / "c")
    folder = shutil.copytree(tmp_path / "c" / "adapter", tmp_path / "alone")  # as it comes from elsewhere: no checksums
    (folder / "adapter_config.json").write_text(
        json.dumps(json.loads((folder / "adapter_config.json").read_text()) | {"r": 3})
    )
    with pytest.raises(PretrainError, match="weights do not fit"):
        peft_adapter(folder=str(folder))(tiny())
    shutil.copy(folder / "adapter_config.json", folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(PretrainError, match=r"missing file .*pickled"):
        peft_adapter(folder=str(folder))(tiny())

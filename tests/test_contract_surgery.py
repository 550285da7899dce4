"""What every surgery promises, on each family that it declares, whatever it does; `examples` has one of each.

A new surgery is held to it without being named here.
"""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
import transformers
from closeness import assert_rounding, assert_same_model, products
from conftest import TASK, TINY
from examples import AFTER, declared, example, logits, names, operated, trained
from peft import PeftModel

from pretrain.core import checkpoint
from pretrain.core.checkpoint import surgery_of
from pretrain.core.errors import PretrainError
from pretrain.core.foreign import configs
from pretrain.core.method import method_class
from pretrain.core.quick.table import TASKS
from pretrain.core.registry import methods
from pretrain.recipe import load
from pretrain.stages import dump
from pretrain.surgery import Inputs

CASES = [(name, family) for name in names("surgery") for family in TINY if declared(name, family)]
ADAPTERS = [(name, family) for name, family in CASES if method_class(name).adapts]
WITHOUT_PEFT = {"intrinsic_dimension": "peft has no format for one projection of all matrices"}
TRAINS_WEIGHTS = {"spafit": "the paper trains the biases of some blocks"}
STEPWISE = {  # why bfloat16 is not near float32
    "flexi_depth": "a gate near its threshold opens in the one and not in the other",
    "codebook_features": "a code is the nearest in the one and not in the other",
    "read_me": "the likeliest expert of the one is the second in the other",
    "w8a8": "activations are rounded to eight bits, on this side of a half in the one and on that in the other",
}
OF_OTHERS = {"gptq": "gptq", "awq": "gptq", "w8a8": "compressed-tensors"}  # formats of quantised weights


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, shelf):
    """A surgery's name, a family, the operated model as if trained, its tokenizer, and the logits before: not to be changed."""
    name, family = request.param
    model, tokenizer = operated(name, shelf, family)
    first = logits(model)
    return name, family, trained(model), tokenizer, first


@pytest.fixture(scope="module")
def saved(case, tmp_path_factory):
    """The folder of the case's checkpoint."""
    _, _, model, tokenizer, _ = case
    folder = tmp_path_factory.mktemp("saved")
    checkpoint.save(model, tokenizer, folder / "c")
    return folder / "c"


def trainable(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def kinds(model):
    return {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", names("surgery"))
def test_a_recipe_gives_the_same_surgery_and_unknown_fields_are_refused(name, shelf, tmp_path):
    method, path = example(name, shelf), tmp_path / "r.yaml"
    stage = {"name": "s", "stage": "surgery", "checkpoint": shelf.saved("llama"), "surgeries": [dump(method)]}
    if method.needs_text:
        path.write_text(json.dumps({"stages": [stage]}))
        with pytest.raises(PretrainError, match=rf"s.surgeries.0: {name} needs text .* `corpus`$"):
            load(path)
        stage["corpus"] = str(tmp_path)
    path.write_text(json.dumps({"stages": [stage]}))  # which is YAML too
    assert load(path).stages[0].surgeries == [method]
    path.write_text(json.dumps({"stages": [stage | {"surgeries": [dump(method) | {"no_such": 1}]}]}))
    with pytest.raises(
        PretrainError, match=rf"s.surgeries.0: unknown field 'no_such' of surgery '{name}'.*; accepted: "
    ) as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in names("surgery") if any(declared(name, kind) for kind in TINY)])
def test_what_needs_text_refuses_to_work_without_and_nothing_else_does(name, shelf):
    kind = next(kind for kind in TINY if declared(name, kind))
    method = example(name, shelf, kind)
    model = operated(AFTER[name], shelf, kind)[0] if name in AFTER else shelf.model(kind)
    inputs = Inputs(copy.deepcopy(shelf.tokenizer), [], [shelf.model(kind, 1)], seed=1)
    if method.needs_text:
        with pytest.raises(PretrainError, match=f"{name}: it needs text|{name}: it trains a tokenizer"):
            method(copy.deepcopy(model), inputs)
    else:
        method(copy.deepcopy(model), inputs)


@pytest.mark.parametrize("name", [name for name in names("surgery") if methods()[name].families])
def test_a_family_that_is_not_declared_is_refused_in_one_line_with_those_that_are(name, shelf):
    for kind in TINY:
        if not declared(name, kind):
            with pytest.raises(PretrainError, match=rf"^{name}: .*accepted: ") as error:
                operated(name, shelf, kind)
            accepted = re.findall(r"\w+", str(error.value).partition("accepted: ")[2])
            assert {*methods()[name].families} <= {*accepted} and "\n" not in str(error.value)


def test_a_declared_family_is_operated_on_and_stays_what_it_is(case):
    _, kind, model, tokenizer, _ = case
    assert model.config.model_type == kind
    found = logits(model)
    assert found.shape[-1] == model.config.vocab_size >= len(tokenizer) and bool(torch.isfinite(found).all())
    assert not any(module.training for module in model.modules())


@pytest.mark.bits
def test_a_checkpoint_reopens_as_what_was_saved_to_the_bit(case, saved, tmp_path, monkeypatch):
    _, _, model, tokenizer, _ = case
    monkeypatch.setattr(configs, "SLACK", 0)  # as if it were large: what a small model may lack of its weights is much
    again, processor = checkpoint.load(saved)
    assert torch.equal(logits(again), logits(model))
    assert trainable(again) == trainable(model) and surgery_of(again) == surgery_of(model)
    assert kinds(again) == kinds(model) and processor.get_vocab() == tokenizer.get_vocab()
    checkpoint.save(again, processor, tmp_path / "c")
    files = [path.relative_to(saved) for path in saved.rglob("*.safetensors")]
    assert files and all((saved / file).read_bytes() == (tmp_path / "c" / file).read_bytes() for file in files)
    assert (saved / "config.json").read_text() == (tmp_path / "c" / "config.json").read_text()


def test_plain_transformers_opens_it_or_says_that_it_cannot(case, saved):
    name, kind, model, *_ = case
    config = json.loads((saved / "config.json").read_text())
    if "quantization_config" in config:  # opened where a package is that we do not ask for
        assert config["quantization_config"]["quant_method"] == OF_OTHERS[name]
    elif surgery_of(model):
        with pytest.raises(ValueError, match=r"open it with pretrain.load"):
            transformers.AutoConfig.from_pretrained(saved)
    else:
        assert_same_model(logits(getattr(transformers, TASKS[TASK[kind]]).from_pretrained(saved)), logits(model), model)


@pytest.mark.parametrize("case", ADAPTERS, ids="-".join, indirect=True)
def test_an_adapter_changes_nothing_at_first_and_peft_opens_it(case, saved, shelf):
    name, kind, model, _, first = case
    plain = shelf.model(kind)
    assert_same_model(first, logits(plain), plain)
    assert not torch.allclose(logits(model), first, atol=1e-3)
    assert trainable(model) and (name in TRAINS_WEIGHTS or not {*trainable(model)} & {*plain.state_dict()})
    assert (saved / "adapter").exists() == (name not in WITHOUT_PEFT)
    if name not in WITHOUT_PEFT:
        assert_same_model(logits(PeftModel.from_pretrained(plain, saved / "adapter")), logits(model), model)


@pytest.mark.parametrize("case", ADAPTERS, ids="-".join, indirect=True)
def test_an_adapter_merges_to_a_plain_model_of_the_same_function(case, shelf, tmp_path):
    _, kind, model, tokenizer, _ = case
    plain, merged = shelf.model(kind), method_class("merge_adapters")()(copy.deepcopy(model))
    assert_same_model(logits(merged), logits(model), model)
    assert type(merged) is type(plain) and merged.state_dict().keys() == plain.state_dict().keys()
    assert trainable(merged) == trainable(plain) and not surgery_of(merged)
    checkpoint.save(merged, tokenizer, tmp_path / "c")
    theirs = getattr(transformers, TASKS[TASK[kind]]).from_pretrained(tmp_path / "c")
    assert_same_model(logits(theirs), logits(merged), merged)


def test_under_bfloat16_autocast_logits_are_near_and_gradients_finite(case):
    name, _, model, *_ = case
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model, grad=True)
    found.float().square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert bool(torch.isfinite(found).all()) and all(bool(torch.isfinite(g).all()) for g in gradients)
    assert bool(gradients) == bool(trainable(model))
    if name not in STEPWISE:
        # Sums are held in float32; what goes in and comes out is rounded: one term a step, and of one side alone.
        wanted, steps = logits(model), products(model)[1]
        assert_rounding(found.float(), wanted, 1, steps=steps, size=float(wanted.abs().max()) / 2, dtype=torch.bfloat16)

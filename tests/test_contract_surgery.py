"""What every surgery promises, on each family that it declares, whatever it does; `examples` has one of each.

A new surgery is held to it without being named here.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from closeness import UNIT, assert_rounding, assert_same_model, products
from conftest import TASK, TINY
from examples import declared, example, logits, names, operated, trained
from peft import PeftModel

from pretrain.core import checkpoint
from pretrain.core.checkpoint import recorded, surgery_of
from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.core.models.families import TASKS, family
from pretrain.core.registry import methods
from pretrain.recipe import load

CASES = [(name, family) for name in names("surgery") for family in TINY if declared(name, family)]
STEPWISE = {  # why bfloat16 is not near float32
    "flexi_depth": "a gate near its threshold opens in the one and not in the other",
}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, shelf):
    """The name of a surgery and a family, the operated model as if trained, and its tokenizer; not to be changed."""
    name, family = request.param
    model, tokenizer = operated(name, shelf, family)
    return name, family, trained(model), tokenizer


@pytest.fixture(scope="module")
def saved(case, tmp_path_factory):
    """The folder of the case's checkpoint."""
    _, _, model, tokenizer = case
    folder = tmp_path_factory.mktemp("saved")
    checkpoint.save(model, tokenizer, folder / "c")
    return folder / "c"


def trainable(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def adapted(model):
    return any(recorded(entry).adapts for entry in surgery_of(model))


@pytest.mark.parametrize("name", names("surgery"))
def test_a_recipe_gives_the_same_surgery_and_unknown_fields_are_refused(name, shelf, tmp_path):
    method = example(name, shelf)
    given = {"method": name} | {field: getattr(method, field) for field in method.__dataclass_fields__}
    stage = {"name": "s", "stage": "surgery", "checkpoint": shelf.saved("llama"), "surgeries": [given]}
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({"stages": [stage]}))  # which is YAML too
    assert load(path).stages[0].surgeries == [method]
    stage["surgeries"] = [given | {"no_such": 1}]
    path.write_text(json.dumps({"stages": [stage]}))
    with pytest.raises(PretrainError, match=rf"s.surgeries.0: unknown field 'no_such' of surgery '{name}'.*; accepted: ") as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in names("surgery") if methods()[name].families])
def test_a_family_that_is_not_declared_is_refused_in_one_line_with_those_that_are(name, shelf):
    for kind in TINY:
        if not declared(name, kind):
            with pytest.raises(PretrainError, match=rf"^{name}: .*accepted: .*{', '.join(methods()[name].families)}") as error:
                operated(name, shelf, kind)
            assert "\n" not in str(error.value)


def test_a_declared_family_is_operated_on_and_stays_what_it_is(case):
    _, kind, model, tokenizer = case
    assert family(model).name == family(model).name and model.config.model_type == kind
    found = logits(model)
    assert found.shape[-1] == model.config.vocab_size >= len(tokenizer) and bool(torch.isfinite(found).all())
    assert not any(module.training for module in model.modules())


@pytest.mark.bits
def test_a_checkpoint_reopens_as_what_was_saved_to_the_bit(case, saved, tmp_path):
    _, _, model, tokenizer = case
    again, processor = checkpoint.load(saved)
    assert torch.equal(logits(again), logits(model))
    assert trainable(again) == trainable(model) and processor.get_vocab() == tokenizer.get_vocab()
    checkpoint.save(again, processor, tmp_path / "c")
    files = [path.relative_to(saved) for path in saved.rglob("*.safetensors")]
    assert files and all((saved / file).read_bytes() == (tmp_path / "c" / file).read_bytes() for file in files)
    assert (saved / "config.json").read_text() == (tmp_path / "c" / "config.json").read_text()


def test_plain_transformers_and_peft_open_what_they_can(case, saved, shelf):
    _, kind, model, _ = case
    if not surgery_of(model):
        plain = getattr(transformers, TASKS[TASK[kind]]).from_pretrained(saved)
        assert_same_model(logits(plain), logits(model), model)
    if (saved / "adapter").exists():
        theirs = PeftModel.from_pretrained(shelf.model(kind), saved / "adapter")
        assert_same_model(logits(theirs), logits(model), model)


def test_under_bfloat16_autocast_logits_are_near_and_gradients_finite(case):
    name, _, model, _ = case
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model, grad=True)
    found.float().square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert bool(torch.isfinite(found).all()) and all(bool(torch.isfinite(g).all()) for g in gradients)
    assert bool(gradients) == bool(trainable(model))
    if name not in STEPWISE:
        assert_rounding(found.float(), logits(model), 1, steps=products(model)[1], dtype=torch.bfloat16)

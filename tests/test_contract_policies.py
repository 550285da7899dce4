"""What every policy owes: from a recipe, remembered in a training's state, resumed as if nothing had happened."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import zoo
from conftest import TASK
from examples_training import Material, declared, example, names, reread, undeclared
from policy_run import run

from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.core.models.families import new_model
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.objectives.language.masked_lm import MaskedLM
from pretrain.objectives.language.span_corruption import SpanCorruption
from pretrain.optim.optimizers.adamw import AdamW
from pretrain.policies import Policy
from pretrain.surgery import Inputs
from pretrain.training.budget import Budget
from pretrain.training.state import split_tensors

POLICIES = names("policy")
FAMILIES = [(name, family) for name in POLICIES if method_class(name).families for family in declared(name)]
OBJECTIVES = {"causal": CausalLM, "masked": MaskedLM, "seq2seq": SpanCorruption}
# What a policy needs of the model; without an entry any model will do.
SURGERIES = {"increlora_allocation": ("increlora", {"max_rank": 4})}
RATES = {"restart": 0.3}  # at which a policy that acts where training diverges has something to do


@pytest.fixture(scope="module")
def material(prepared, stories, tmp_path_factory):
    return Material(prepared, tmp_path_factory.mktemp("material"), stories)


def model_for(name, material, family="llama"):
    if name == "router_balance":
        fields = zoo.fields("mixtral") | {"vocab_size": 512}
        return new_model("mixtral", fields, task="causal", vocabulary=Vocabulary.of(material.tokenizer), seed=1)
    model = material.model(family, TASK[family], seed=1)
    if name not in SURGERIES:
        return model
    surgery, fields = SURGERIES[name]
    return method_class(surgery)(**fields)(model, Inputs(seed=3))


@pytest.mark.parametrize("name", POLICIES)
def test_a_recipe_gives_it_back(material, tmp_path, name):
    policy = example(name, material)
    assert reread(policy, tmp_path) == policy


class Idle(Policy):
    """Does nothing."""

    name = "idle"


@pytest.mark.bits
@pytest.mark.parametrize("name", POLICIES)
def test_a_training_that_was_cut_ends_as_the_one_that_was_not(material, tmp_path, name):
    """It is cut after its fourth step of eight, and rows are read ahead by a worker the second time."""
    policy, budget, evaluated = example(name, material), Budget(steps=8), {"evaluate": size, "evaluate_every": 2}
    evaluated |= {"optimizer": AdamW(lr=RATES[name])} if name in RATES else {}
    models = [model_for(name, material) for _ in range(3)]
    whole = run(material.prepared, models[0], tmp_path / "a", policy, budget=budget, save_every=4, keep=9, **evaluated)
    (tmp_path / "b" / "state").mkdir(parents=True)
    shutil.copytree(tmp_path / "a" / "state" / "step-000000004", tmp_path / "b" / "state" / "step-000000004")
    again = run(material.prepared, models[1], tmp_path / "b", policy, budget=budget, workers=1, **evaluated)
    plain = run(material.prepared, models[2], tmp_path / "c", Idle(), budget=budget, **evaluated)
    assert [row["step"] for row in rows(tmp_path / "b")] == [5, 6, 7, 8]
    assert remembered(again, name) == remembered(whole, name)
    assert again.spent | {"seconds": 0} == whole.spent | {"seconds": 0}
    ends = [training.model.state_dict() for training in (whole, again, plain)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])
    acted = ends[0].keys() != ends[2].keys() or not all(torch.equal(ends[0][n], ends[2][n]) for n in ends[0])
    assert acted  # else nothing is shown


@pytest.mark.parametrize("name", POLICIES)
def test_plans_know_how_much_it_remembers(material, tmp_path, name):
    policy, model = example(name, material), model_for(name, material)
    training = run(material.prepared, model, tmp_path, policy, budget=Budget(steps=6), evaluate=size, evaluate_every=2)
    tensors: dict[str, torch.Tensor] = {}
    split_tensors(training.state[name], "", tensors)
    trained = sum(p.numel() for p in training.model.parameters() if p.requires_grad)
    held = sum(t.numel() * t.element_size() for t in tensors.values()) / (4 * trained)
    assert held == pytest.approx(policy.remembered, rel=0.35, abs=0.3)


def size(trainee):
    """A metric that grows while these models are trained, so that the best weights are not the last."""
    return {"loss": sum(float(p.detach().double().abs().sum()) for p in trainee.parameters())}


def rows(folder):
    return [r for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if r["event"] == "step"]


def remembered(training, name):
    """A policy's state as text: JSON values and tensors, and nothing else."""
    return json.dumps(training.state[name], sort_keys=True, default=lambda tensor: {"tensor": tensor.tolist()})


@pytest.mark.parametrize(("name", "family"), FAMILIES)
def test_it_trains_each_family_that_it_declares(material, tmp_path, name, family):
    objective = OBJECTIVES[TASK[family]]()
    trained = run(
        material.prepared, model_for(name, material, family), tmp_path, example(name, material), objective=objective, budget=Budget(steps=2),
    )  # fmt: skip
    assert trained.step == 2 and trained.guard.skipped == 0
    assert all(p.isfinite().all() for p in trained.model.parameters())


@pytest.mark.parametrize("name", [name for name in POLICIES if undeclared(name)])
def test_a_family_that_it_does_not_declare_is_refused_before_training(material, tmp_path, name):
    accepted = ", ".join(method_class(name).families)
    for family in undeclared(name):
        objective = OBJECTIVES[TASK[family]]()
        with pytest.raises(PretrainError, match=rf"{name}: model family '{family}': accepted: {accepted}$"):
            run(
                material.prepared,
                model_for(name, material, family),
                tmp_path,
                example(name, material),
                objective=objective,
            )
    assert not (tmp_path / "log.jsonl").exists()

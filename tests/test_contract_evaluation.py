"""What every evaluation owes: from a recipe, seeded, the same in any batches and order, JSON, a model left as it was."""

from __future__ import annotations

import copy
import inspect
import json
import math
import random
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from closeness import products, rounding
from conftest import TASK
from examples_training import OPERATED, Material, declared, example, names, reread, undeclared

from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.core.quick.table import listed
from pretrain.stages.evaluate import evaluate

EVALUATIONS = names("evaluation")
# What learns from the documents one after the other, or draws something else for each place: another order, another draw.
ORDERED = ("ast_probe", "generation_verification_gap", "intrinsic_dimension_d90", "scbench")
EXACT = ("harness",)  # intervals of means by their formula, which draws nothing
HEADED = ("task", "error_correction")  # a model that was tuned with the objective
FUNCTION = "def f{0}(a, b):\n    x = a * {0} - b\n    return [x, b]\n\n\n"
LENGTH = 160  # tokens of the longest document


@pytest.fixture(scope="module")
def material(prepared, stories, tmp_path_factory):
    return Material(prepared, tmp_path_factory.mktemp("material"), stories)


@pytest.fixture(scope="module")
def documents(stories):
    """Of two domains and two classes, with the columns that evaluations read by default."""
    chosen = [
        *[s for s in stories if s["domain"] == "python"][:16],
        *[s for s in stories if s["domain"] != "python"][:16],
    ]
    return [
        {
            "text": FUNCTION.format(n) + "\n# ".join(["", *s["text"][: 600 if n < 16 else 200].splitlines()]), "domain": s["domain"], "id": str(n), "label": "ab"[n % 2],
            "source": s["text"][:60], "target": s["text"][60:100], "prompt": s["text"][:30], "answer": s["text"][30:36],
            "group": str(n % 16),
        }
        for n, s in enumerate(chosen)
    ]  # fmt: skip


def prepared_for(name, material, family):
    """A model that the evaluation measures, and the evaluation."""
    evaluation = example(name, material)
    positions = {"n_positions": 512} if family == "gpt2" else {}
    spread = {} if family == "t5" else {"initializer_range": 0.3}  # so that documents differ by more than rounding
    model = material.model(family, TASK[family], seed=3, **positions, **spread)
    if name in HEADED:
        model.config.architectures = [type(model).__name__]
        model = evaluation.method.ready(model, ("a", "b"), Vocabulary.of(material.tokenizer), 0).eval()
    return OPERATED.get(name, lambda plain: plain)(model), evaluation


def measured(evaluation, model, material, documents):
    return evaluate(model, material.tokenizer, documents, [evaluation], compressors=False)


def assert_same(found, expected, model):
    """Metrics and those of the domains differ by rounding alone."""
    terms, steps = products(model)
    terms = max(terms, LENGTH)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        limit = rounding(terms, math.sqrt(terms) * max(1.0, abs(value)), steps=steps)
        assert found[name] == pytest.approx(value, rel=0, abs=limit), name


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_recipe_gives_it_back(material, tmp_path, name):
    evaluation = example(name, material)
    assert reread(evaluation, tmp_path) == evaluation


@pytest.mark.parametrize("name", EVALUATIONS)
def test_it_measures_the_same_again_in_any_batches_and_leaves_the_model_alone(material, documents, monkeypatch, name):
    model, evaluation = prepared_for(name, material, declared(name)[0])
    before, drawn = copy.deepcopy(model.state_dict()), copy.deepcopy(documents)
    model.train()
    modes = [module.training for module in model.modules()]
    first = measured(evaluation, model, material, documents)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(99)
    assert measured(evaluation, model, material, documents) == first
    assert [module.training for module in model.modules()] == modes and documents == drawn
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    smaller(monkeypatch)
    again = measured(evaluation, model, material, documents)
    assert_same(again["metrics"], first["metrics"], model)
    for domain, some in first["domains"].items():
        assert_same(again["domains"][domain], some, model)


def smaller(monkeypatch):
    """Batches of one text, or of a few short ones."""
    for module in [
        m for n, m in sys.modules.items() if n.startswith(("pretrain.evaluation.", "pretrain.core.models."))
    ]:
        for name, value in list(vars(module).items()):
            if name == "BATCH_TOKENS":
                monkeypatch.setattr(module, name, 40)
            if inspect.isfunction(value) and "batch_tokens" in (value.__kwdefaults__ or {}):
                monkeypatch.setitem(value.__kwdefaults__, "batch_tokens", 40)


@pytest.mark.parametrize("name", [name for name in EVALUATIONS if name not in ORDERED])
def test_the_order_of_the_documents_does_not_matter(material, documents, name):
    model, evaluation = prepared_for(name, material, declared(name)[0])
    first = measured(evaluation, model, material, documents)
    turned = measured(evaluation, model, material, documents[::-1])
    assert_same(turned["metrics"], first["metrics"], model)


@pytest.mark.parametrize("name", [n for n in EVALUATIONS if "resamples" in {f.name for f in fields(method_class(n))}])
def test_what_is_resampled_has_intervals_and_the_seed_is_theirs(material, documents, name):
    cls = method_class(name)
    given = {f.name: getattr(example(name, material), f.name) for f in fields(cls)} | {"resamples": 60}
    model, _ = prepared_for(name, material, declared(name)[0])
    first, *others = (measured(cls(**given | {"seed": seed}), model, material, documents) for seed in range(3))
    assert first["intervals"] and set(first["intervals"]) <= set(first["metrics"])
    for low, high in first["intervals"].values():
        assert math.isfinite(low) and low <= high
    wide = {n for n, (low, high) in first["intervals"].items() if low < high}
    assert wide and (name in EXACT) != any(
        first["intervals"][n] != other["intervals"][n] for other in others for n in wide
    )


@pytest.mark.parametrize(("name", "family"), [(n, f) for n in EVALUATIONS for f in declared(n)[1:]])
def test_it_measures_each_family_that_it_declares(material, documents, name, family):
    model, evaluation = prepared_for(name, material, family)
    found = measured(evaluation, model, material, documents)
    assert found["metrics"] and all(math.isfinite(value) for value in found["metrics"].values())


@pytest.mark.parametrize("name", [name for name in EVALUATIONS if undeclared(name)])
def test_a_family_that_it_does_not_declare_is_refused(material, documents, name):
    accepted = ", ".join(method_class(name).families)
    for family in undeclared(name):
        model = material.model(family, TASK[family])
        with pytest.raises(
            PretrainError, match=rf"{name}: model family '{listed(family).name}': accepted: {accepted}$"
        ):
            measured(example(name, material), model, material, documents)

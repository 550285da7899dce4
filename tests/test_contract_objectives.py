"""What every objective owes: from a recipe, seeded, in float32 and in bfloat16, on the families that it declares.

That micro-batches and processes add up to the whole batch's gradient is held by `test_gradients.py`.
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from closeness import autocast_rounding, products
from examples_training import FITTED, declared, names, reread, trainable, undeclared
from gradient_cases import build
from test_training import small

from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.objectives.language.electra import Electra
from pretrain.stages.train import Train
from pretrain.training.distributed import World

ALONE = World(0, 1, torch.device("cpu"))
OBJECTIVES = names("objective")
ON = [(name, family) for name in OBJECTIVES for family in declared(name)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture(scope="module")
def usual(prepared, folder):
    """Each objective on the first of its families, made once."""
    return functools.cache(lambda name: build(name, {}, "", prepared, folder))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_recipe_gives_the_objective_back(usual, tmp_path, name):
    objective = usual(name).objective
    assert reread(objective, tmp_path, trainable(name)) == objective


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_follows_from_the_rows_and_the_seed_alone(usual, name):
    made = usual(name)
    given = copy.deepcopy(made.rows)

    def batch(seed, elsewhere):
        np.random.seed(elsewhere)
        torch.manual_seed(elsewhere)
        return made.objective.prepare(made.rows, replace(made.context, rng=np.random.default_rng(seed)))

    first, again = batch(3, 0), batch(3, 1)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert int(first["weight"]) > 0
    assert all(repr(one) == repr(other) for one, other in zip(made.rows, given, strict=True))  # rows are as they were


@pytest.mark.parametrize(("name", "family"), ON)
def test_it_trains_each_family_that_it_declares_in_bfloat16_as_in_float32(prepared, folder, name, family):
    made = build(name, FITTED.get(name, lambda _: {})(family), family, prepared, folder)
    batch = [[made.batch()]]
    (exact, loss), (coarse, rounded) = (made.gradients(batch, ALONE, precision=p) for p in ("float32", "bfloat16"))
    for gradients in (exact, coarse):
        assert gradients and all(g.isfinite().all() for g in gradients.values())
        assert any(g.abs().sum() > 0 for g in gradients.values())
    assert math.isfinite(loss) and math.isfinite(rounded)
    assert abs(rounded - loss) <= autocast_rounding(abs(loss), steps=products(made.trainee)[1])


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if undeclared(name)])
def test_a_family_that_it_does_not_declare_is_refused_as_the_recipe_is_read(usual, tmp_path, name):
    objective = usual(name).objective
    accepted = ", ".join(method_class(name).families)
    for family in undeclared(name):
        with pytest.raises(PretrainError, match=rf"{name}: model family '\w+': accepted: {accepted}$"):
            reread(objective, tmp_path, family)


def test_a_checkpoint_of_another_family_is_refused_before_training(tiny, prepared, tmp_path):
    with pytest.raises(PretrainError, match="electra: model family 'llama': accepted: bert"):
        small(prepared, tiny, tmp_path, objective=Electra())
    with pytest.raises(PretrainError, match="causal_lm: model family 't5': accepted: causal"):
        Train(corpus="c", tokenizer="t", budget={"steps": 1}, model={"family": "t5"}, objective={"method": "deft", "objective": "causal_lm"})  # fmt: skip

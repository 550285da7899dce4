"""On how much held-out text the sides of a comparison are measured: on the same, and no more than fits their budget."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from pretrain.core.files import JSONObject
from pretrain.forecast import forecast
from pretrain.identity import plan
from pretrain.recipe import Recipe
from pretrain.stages.train import Train
from pretrain.training.budget import MOST_HELD_OUT, held_out_tokens

COMPARED = 8_000  # held-out tokens at least by which two recipes are told apart


def training_of(recipe: Recipe, trained: str) -> Train:
    """The stage that is compared."""
    stage = next(stage for stage in recipe.stages if stage.name == trained)
    assert isinstance(stage, Train)
    return stage


def same_tokens(sides: Mapping[str, tuple[Recipe, str]], flops: float) -> dict[str, int]:
    """Held-out tokens of a measurement of the sides that learn text and do not say how many: as many fit the budget.

    All of them are measured on the same, the fewest that fit one of them, since else their losses would not compare.
    """
    fits = {}
    for name, (recipe, trained) in sides.items():
        stage = training_of(recipe, trained)
        with TemporaryDirectory() as folder:  # in which nothing is finished, so that a comparison goes on as it began
            made = forecast(plan(replace(recipe, output=Path(folder))))
        expected = next(each.estimate.plan for each in made if each.item.stage.name == trained)
        given = _entry(recipe, trained).get("evaluate_tokens", "auto") != "auto"
        if given or expected is None or stage.weighted()[0].method.reads != "rows":
            continue
        steps = flops * expected.steps / expected.flops
        fits[name] = held_out_tokens("auto", stage.evaluate_every, steps, stage.batch_rows * stage.length, COMPARED)
    return dict.fromkeys(fits, min(fits.values(), default=MOST_HELD_OUT))


def _entry(recipe: Recipe, trained: str) -> JSONObject:
    """What a recipe says of the stage that is compared."""
    number = next(number for number, stage in enumerate(recipe.stages) if stage.name == trained)
    entry: JSONObject = recipe.raw["stages"][number]
    return entry


def measured_on(recipe: Recipe, trained: str, tokens: int | None) -> Recipe:
    """The recipe with so many held-out tokens of each measurement of a training; as it is where none are said."""
    if tokens is None or tokens == training_of(recipe, trained).evaluate_tokens:
        return recipe
    stages = [
        stage.model_copy(update={"evaluate_tokens": tokens}) if stage.name == trained else stage
        for stage in recipe.stages
    ]
    changed = replace(recipe, stages=stages, raw=copy.deepcopy(recipe.raw))
    _entry(changed, trained)["evaluate_tokens"] = tokens
    return changed

"""The bases of claims at cpu scale: sizes, budgets and initialisations that fit, before anything is trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.core.batch import Vocabulary
from pretrain.core.models.families import new_model
from pretrain.experiments.claims import TRAINED, Claim, claims
from pretrain.experiments.protocol import SIDES
from pretrain.recipe import read

FOLDER = Path(__file__).parent.parent / "claims"
BASES = sorted(path.stem.removesuffix("-cpu") for path in (FOLDER / "bases").glob("*-cpu.yaml"))
CLAIMS = {sized.label: sized for claim in claims(FOLDER).values() for sized in claim.sized("cpu")}
LEAST = 4  # tokens a weight
MOST = 5e12  # FLOPs
TASKS = {"llama": "causal", "gpt2": "causal", "mixtral": "causal", "bert": "masked", "t5": "seq2seq"}

Stage = dict[str, Any]


def by_name(raw: dict[str, Any]) -> dict[str, Stage]:
    """A recipe's stages."""
    return {stage.get("name", stage["stage"]): stage for stage in raw["stages"]}


def is_new(stage: Stage) -> bool:
    """Whether it trains a model from nothing."""
    return stage["stage"] == "train" and bool(stage.get("model")) and not stage.get("init")


def origin(name: str, stages: dict[str, Stage]) -> list[str]:
    """The stages that a checkpoint comes from, back to the one that began from nothing, and itself."""
    stage = stages[name]
    before = stage.get("init") or stage.get("checkpoint")
    return [name] if is_new(stage) else [*origin(before, stages), name]


def weights_and_flops(name: str, stages: dict[str, Stage]) -> tuple[int, float]:
    """The weights of a model made anew, and about the FLOPs that it takes to train on a token.

    Six for each weight, and for each block 12 · length · width for its attention; the meter counts fewer, since the
    head of a masked model is asked at few places.
    """
    stage = stages[name]
    fields = dict(stage["model"])
    family = fields.pop("family")
    tokenizer = stages[stage["tokenizer"]]
    vocabulary = Vocabulary(tokenizer["vocab_size"] + tokenizer.get("sentinels", 0), pad=0, bos=1, eos=2, mask=3)
    with torch.device("meta"):
        model = new_model(family, fields, task=TASKS[family], vocabulary=vocabulary)
    weights = sum(weight.numel() for weight in model.parameters())
    attention = 12 * stage["length"] * model.config.hidden_size * model.config.num_hidden_layers
    return weights, 6 * weights + attention


def spent(claim: Claim, stages: dict[str, Stage]) -> dict[str, tuple[float, float]]:
    """About the tokens that each training reads at cpu scale, and its FLOPs."""
    found: dict[str, tuple[float, float]] = {}
    for name, stage in stages.items():
        if stage["stage"] != "train":
            continue
        _, flops = weights_and_flops(origin(name, stages)[0], stages)
        ((unit, amount),) = stage["budget"].items()
        if name == TRAINED and claim.equal != "none":
            unit, amount = claim.equal, claim.scales["cpu"].budget
            amount -= sum(work for _, work in found.values()) if unit == "flops" else 0
        rows = stage["batch_rows"] * stage["length"]
        tokens = float(amount) * {"tokens": 1, "steps": rows, "flops": 1 / flops}[unit]
        found[name] = tokens, tokens * flops
    return found


def check_initialised(stages: dict[str, Stage]) -> int:
    """That the models made anew start with 0.7 / √width, or their family's own where it goes by width; how many."""
    new = [stage["model"] for stage in stages.values() if is_new(stage)]
    for fields in new:
        if fields["family"] == "t5":
            assert fields["initializer_factor"] == 1.0
        else:
            width = fields.get("hidden_size") or fields["n_embd"]
            assert fields["initializer_range"] == pytest.approx(0.7 / math.sqrt(width), rel=0.01)
    return len(new)


@pytest.mark.parametrize("name", BASES)
def test_a_base_initialises_its_model_for_its_width_and_lets_the_rate_fall_to_nothing(name):
    stages = by_name(read(FOLDER / "bases" / f"{name}-cpu.yaml")[0])
    assert check_initialised(stages) == 1
    schedules = [stage["schedule"] for stage in stages.values() if stage["stage"] == "train"]
    assert all(schedule["method"] == "linear" and not schedule.get("final") for schedule in schedules)


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_a_claim_initialises_every_model_for_its_width(name):
    assert all(check_initialised(by_name(CLAIMS[name].recipe(side, "cpu"))) for side in SIDES)


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_the_model_that_is_judged_and_its_teachers_see_four_tokens_a_weight(name):
    claim = CLAIMS[name]
    for side in SIDES:
        stages = by_name(claim.recipe(side, "cpu"))
        trained = spent(claim, stages)
        helpers = [[stage] for stage in stages if is_new(stages[stage]) and stage not in origin(TRAINED, stages)]
        for path in [origin(TRAINED, stages), *helpers]:
            weights, _ = weights_and_flops(path[0], stages)
            tokens = sum(trained[stage][0] for stage in path if stage in trained)
            assert tokens >= LEAST * weights, f"{side}: {path}: {tokens / weights:.2f} tokens a weight"


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_a_run_s_own_training_is_of_seconds(name):
    claim = CLAIMS[name]
    for side in SIDES:
        stages = by_name(claim.recipe(side, "cpu"))
        trained = spent(claim, stages)
        own = [stage for stage in trained if stages[stage].get("seed") is None]  # others are run once for all seeds
        assert sum(trained[stage][1] for stage in own) <= MOST, side
        assert claim.equal != "flops" or claim.scales["cpu"].budget <= MOST

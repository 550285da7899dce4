"""`evaluate_every` as a share of the budget: as many held-out points whatever the speed, the same after a resume."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.quick.plan import Plan
from pretrain.corpus.shards import Shards
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.dial.configs import shape_from
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.optim.optimizers.adamw import AdamW
from pretrain.optim.schedules.constant import Constant
from pretrain.policies import Policy
from pretrain.stages._training_data import held_out_of
from pretrain.stages.train import Train
from pretrain.training.budget import MEASURING, Budget
from pretrain.training.loader import Loader
from pretrain.training.loop import Settings, train

STAGE = {"corpus": "c", "tokenizer": "t", "model": {"family": "llama"}, "budget": {"steps": 9}}


@dataclass(frozen=True)
class Breaking(Policy):
    """Ends the process's training once, after the step `at`."""

    name = "breaking"
    at: int = 0

    def before_step(self, training, state, batches):
        if training.step == self.at > 0:
            raise InterruptedError


def points(prepared, tiny, folder, budget, every, policy=None):
    """The steps after which held-out text was measured."""
    loader = Loader(
        Shards(prepared / "tokens" / "train"), [CausalLM()], Vocabulary.of(load_tokenizer(prepared / "tokenizer")),
        length=32, batch_rows=2,
    )  # fmt: skip
    settings = Settings(budget=budget, evaluate_every=every, save_every=4, bar=False)
    train(
        tiny("llama", vocab_size=512), loader, [CausalLM()], AdamW(), Constant(), settings, folder,
        policies=[policy or Breaking()], evaluate=lambda trainee: {"loss": 1.0},
    )  # fmt: skip
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if row["event"] == "evaluation"]


@pytest.mark.parametrize(
    ("budget", "share", "steps"),
    [
        (Budget(steps=100), 0.04, list(range(4, 101, 4))),
        (Budget(steps=30), 0.1, list(range(3, 31, 3))),
        (Budget(flops=1), 0.2, [1]),  # one step spends it all
        (Budget(steps=7), 0.04, list(range(1, 8))),  # no more than there are steps
        (Budget(steps=10), 0.3, [3, 6, 9, 10]),  # the end is always one
    ],
)
def test_a_share_of_the_budget_spreads_the_points_evenly(prepared, tiny, tmp_path, budget, share, steps):
    assert points(prepared, tiny, tmp_path, budget, share) == steps


def test_whole_numbers_are_steps_as_ever(prepared, tiny, tmp_path):
    assert points(prepared, tiny, tmp_path, Budget(steps=10), 4) == [4, 8, 10]


def test_a_resumed_training_measures_at_the_same_points(prepared, tiny, tmp_path):
    with pytest.raises(InterruptedError):
        points(prepared, tiny, tmp_path, Budget(steps=50), 0.1, Breaking(at=22))
    assert points(prepared, tiny, tmp_path, Budget(steps=50), 0.1) == [*range(5, 51, 5)]


def test_what_a_stage_accepts_and_keeps_of_it():
    for value in (0, 100, 0.04):
        kept = Train(**STAGE, evaluate_every=value).model_dump(mode="json")["evaluate_every"]
        assert json.dumps(kept) == json.dumps(value)  # a whole number stays one: addresses of before hold
    for value in (-1, 1.5, -0.1):
        with pytest.raises(PretrainError, match="evaluate_every"):
            Train(**STAGE, evaluate_every=value)


BUDGETS = [Budget(steps=4000), Budget(tokens=2_000_000), Budget(flops=2e12), Budget(epochs=3), Budget(seconds=60)]


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.unit)
@pytest.mark.parametrize("every", [0.05, 0.2, 50])
def test_auto_measures_on_what_fits_a_quarter_of_the_training_whatever_the_budget_is_of(tiny, budget, every):
    stage = Train(**STAGE | {"budget": budget}, evaluate_tokens="auto", evaluate_every=every, length=64, batch_rows=8)
    model = tiny("llama", vocab_size=512)
    plan = Plan(steps=5000, flops=1e12, seconds=60.0, measurement=1.0)
    tokens = held_out_of(stage, budget.resolved(8000, 8), model, plan)
    forward = shape_from(model.config.to_dict()).forward(64)
    per_step = 8 * 64 * shape_from(model.config.to_dict()).flops(64)
    steps = {"steps": 4000, "tokens": 2e6 / 512, "flops": 2e12 / per_step, "epochs": 3000, "seconds": 5000}[budget.unit]
    count = 1 / every if every < 1 else steps / every
    taken = count * tokens * forward / (steps * per_step)
    assert taken <= MEASURING and (taken > MEASURING / 3 or tokens in (2000, 100_000))


def test_what_is_said_stands_and_where_only_the_end_is_measured_nothing_is_saved(tiny):
    model, budget = tiny("llama", vocab_size=512), Budget(steps=5)
    said = {tokens: Train(**STAGE, evaluate_tokens=tokens, evaluate_every=0.05) for tokens in (100_000, 300)}
    assert [held_out_of(stage, budget, model, None) for stage in said.values()] == list(said)
    assert held_out_of(Train(**STAGE, evaluate_tokens="auto"), budget, model, None) == 100_000
    with pytest.raises(PretrainError, match=r"evaluate_tokens.*auto"):
        Train(**STAGE, evaluate_tokens="all")


def test_auto_keeps_all_the_points_and_says_what_they_are_of(tmp_path, stories):
    from small_recipe import small_recipe

    from pretrain.engine import run

    text = small_recipe(tmp_path, stories[:60], budget={"steps": 40}, evaluate_every=0.05, evaluate_tokens="auto")
    (tmp_path / "r.yaml").write_text(text)
    lines = []
    run(tmp_path / "r.yaml", output=tmp_path / "run", say=lines.append, report=False)
    assert "[model] measured on 2,000 validation tokens at most each time" in lines
    rows = map(json.loads, (tmp_path / "run" / "model" / "log.jsonl").read_text().splitlines())
    assert sum(row["event"] == "evaluation" for row in rows) == 20

"""`evaluate_every` as a share of the budget: as many held-out points whatever the speed, the same after a resume."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.corpus.shards import Shards
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.optim.optimizers.adamw import AdamW
from pretrain.optim.schedules.constant import Constant
from pretrain.policies import Policy
from pretrain.stages.train import Train
from pretrain.training.budget import Budget
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

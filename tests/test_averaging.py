"""Averages of the weights and the best of them: their formulas, and what evaluations, checkpoints and states hold."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from policy_run import run, steps
from small_recipe import small_recipe

import pretrain
from pretrain import engine
from pretrain.core.errors import PretrainError
from pretrain.optim.optimizers.schedule_free import ScheduleFree
from pretrain.policies import Policy
from pretrain.policies.averaging.ema import EMA
from pretrain.policies.averaging.keep_best import KeepBest
from pretrain.policies.averaging.lawa import LAWA
from pretrain.recipe import load
from pretrain.training.budget import Budget

AVERAGING = pytest.mark.parametrize("policy", [EMA(), LAWA(k=3, every=2)], ids=lambda policy: policy.name)


@dataclass(frozen=True)
class Watch(Policy):
    """Keeps the weights after each step, and those of each evaluation."""

    after: list[Any] = field(default_factory=list)
    evaluated: list[Any] = field(default_factory=list)
    name = "watch"

    def after_step(self, training: Any, state: Any, batches: Any, losses: Any) -> None:
        self.after.append(weights(training.model))

    def on_evaluation(self, training: Any, state: Any, metrics: Any) -> None:
        self.evaluated.append(weights(training.model))


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def close(one, other):
    return all(torch.allclose(a.double(), b, rtol=1e-5, atol=1e-7) for a, b in zip(one, other, strict=True))


def losses(*values):
    """An evaluation that gives these numbers, one after the other."""
    left = list(values)
    return lambda trainee: {"loss": left.pop(0)}


def test_ema_is_the_papers_average_of_the_weights_after_each_step(prepared, tiny, tmp_path):
    watch = Watch()
    trained = run(
        prepared, tiny(vocab_size=512), tmp_path, EMA(decay=0.2), watch, evaluate=losses(1.0), budget=Budget(steps=8)
    )
    average = [w.double() for w in watch.after[0]]
    for n, after in enumerate(watch.after[1:], 1):
        decay = min(0.2, (1 + n) / (10 + n))
        average = [decay * a + (1 - decay) * w.double() for a, w in zip(average, after, strict=True)]
    assert close(weights(trained.model), average) and same(watch.evaluated[-1], weights(trained.model))
    assert not close(weights(trained.model), [w.double() for w in watch.after[-1]])


def test_ema_moves_at_every_so_many_steps(prepared, tiny, tmp_path):
    watch = Watch()
    trained = run(prepared, tiny(vocab_size=512), tmp_path, EMA(every=3), watch, budget=Budget(steps=8))
    average = [w.double() for w in watch.after[0]]
    for n, step in enumerate((3, 6), 1):
        decay = (1 + n) / (10 + n)
        average = [decay * a + (1 - decay) * w.double() for a, w in zip(average, watch.after[step - 1], strict=True)]
    assert close(weights(trained.model), average)


@pytest.mark.parametrize("every, copied", [(2, (4, 6, 8)), (0.25, (4, 6, 8)), (3, (3, 6)), (9, ())])
def test_lawa_is_the_mean_of_the_latest_copies(prepared, tiny, tmp_path, every, copied):
    watch = Watch()
    trained = run(prepared, tiny(vocab_size=512), tmp_path, LAWA(k=3, every=every), watch, budget=Budget(steps=8))
    kept = [watch.after[step - 1] for step in copied or (8,)]
    assert close(weights(trained.model), [torch.stack(each).double().mean(0) for each in zip(*kept, strict=True)])


def test_lawa_of_equal_weights_is_those_weights(prepared, tiny, tmp_path):
    from pretrain.policies._weights import mean

    equal = [{"w": torch.randn(50, generator=torch.Generator().manual_seed(0))}] * 3
    assert torch.equal(mean(equal)["w"], equal[0]["w"])


@pytest.mark.bits
@AVERAGING
def test_training_goes_on_from_the_weights_themselves(prepared, tiny, tmp_path, policy):
    """Whether, and how often, averages are looked at."""
    watches, given = [Watch(), Watch(), Watch()], {"budget": Budget(steps=6)}
    run(
        prepared,
        tiny(vocab_size=512),
        tmp_path / "a",
        policy,
        watches[0],
        evaluate=losses(*range(9)),
        evaluate_every=1,
        **given,
    )
    run(prepared, tiny(vocab_size=512), tmp_path / "b", policy, watches[1], evaluate=losses(1.0), **given)
    run(prepared, tiny(vocab_size=512), tmp_path / "c", watches[2], **given)
    for watch in watches[:2]:
        assert all(map(same, watch.after, watches[2].after)) and len(watch.after) == 6
    assert same(watches[0].evaluated[-1], watches[1].evaluated[-1])
    assert not same(watches[0].evaluated[-1], watches[0].after[-1])


@AVERAGING
def test_a_checkpoint_has_the_average_and_is_what_the_metrics_are_of(stories, tmp_path, policy):
    fields = {"budget": {"steps": 8}, "policies": [{"method": policy.name, "every": 2}], "save_every": 4}
    evaluation = {
        "stage": "evaluate", "checkpoint": "model", "corpus": "corpus", "split": "validation", "compressors": False,
        "evaluations": [{"method": "held_out", "length": 64, "stride": 64}],
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(small_recipe(tmp_path, stories[:30], evaluation, held_out=0.3, **fields))
    done = engine.run(load(tmp_path / "r.yaml", [], tmp_path / "out"), say=engine.silent)
    model, _ = pretrain.load(done.folder / "model" / "checkpoint")
    raw = engine.run(load(tmp_path / "r.yaml", ["model.policies=[]"], tmp_path / "raw"), say=engine.silent)
    other, _ = pretrain.load(raw.folder / "model" / "checkpoint")
    assert not same(weights(model), weights(other))
    train, after = (done.stages[name]["metrics"]["loss"] for name in ("model", "evaluate"))
    assert train != raw.stages["model"]["metrics"]["loss"] and train == pytest.approx(after, rel=0.05)


def test_only_one_may_average(stories, tmp_path, prepared, tiny):
    with pytest.raises(PretrainError, match="ema and lawa average the weights: accepted: one of them"):
        run(prepared, tiny(vocab_size=512), tmp_path, EMA(), LAWA())
    with pytest.raises(PretrainError, match="schedule_free and ema average"):
        run(prepared, tiny(vocab_size=512), tmp_path, EMA(), optimizer=ScheduleFree())
    (tmp_path / "r.yaml").write_text(
        small_recipe(tmp_path, stories[:30], budget={"steps": 1}, policies=["ema", "lawa"])
    )
    with pytest.raises(PretrainError, match=r"r.yaml:\d+: .*ema and lawa average the weights"):
        load(tmp_path / "r.yaml")


@pytest.mark.parametrize("better, values, best", [
    ("lower", (5, 3, 4, 3, 6), 2), ("higher", (1, 2, 7, 3, 7), 3), ("lower", (5, 4, 3, 2, 1), 5),
    ("lower", (float("nan"), 3, 4, 5, 6), 2), ("higher", (float("nan"), float("nan"), 2, 1, 0), 3),
])  # fmt: skip
def test_the_weights_of_the_best_evaluation_are_what_is_left(prepared, tiny, tmp_path, better, values, best):
    watch, policy = Watch(), KeepBest(better=better)
    trained = run(
        prepared, tiny(vocab_size=512), tmp_path, watch, policy, evaluate=losses(*values), evaluate_every=1, budget=Budget(steps=5),
    )  # fmt: skip
    assert same(weights(trained.model), watch.after[best - 1])
    assert trained.metrics == {"loss": values[best - 1], "best_step": best} and trained.step == 5


@pytest.mark.parametrize("patience, ends", [(0, 8), (1, 4), (2, 5), (3, 8)])
def test_training_ends_when_it_gets_no_better(prepared, tiny, tmp_path, patience, ends):
    watch, policy = Watch(), KeepBest(patience=patience)
    trained = run(
        prepared, tiny(vocab_size=512), tmp_path, watch, policy, evaluate=losses(5, 4, 3, 3, 4, 2, 2, 2), evaluate_every=1,
        save_every=100, budget=Budget(steps=8),
    )  # fmt: skip
    assert trained.step == len(watch.after) == ends
    assert same(weights(trained.model), watch.after[2 if ends < 6 else 5])
    assert [path.name for path in (tmp_path / "state").iterdir()] == [f"step-{ends:09d}"]
    # Asked to go on, it has nothing to do: the best weights are there again.
    again = run(
        prepared, tiny(vocab_size=512), tmp_path, policy, evaluate=losses(), evaluate_every=1, budget=Budget(steps=8)
    )
    assert again.step == ends and same(weights(again.model), weights(trained.model))
    assert again.metrics == trained.metrics


def test_the_best_average_is_kept_where_weights_are_averaged(prepared, tiny, tmp_path):
    watch = Watch()
    trained = run(
        prepared,
        tiny(vocab_size=512),
        tmp_path,
        watch,
        EMA(),
        KeepBest(),
        evaluate=losses(3, 2, 1, 4, 5, 6),
        evaluate_every=1,
    )
    assert same(weights(trained.model), watch.evaluated[2]) and not same(watch.evaluated[2], watch.after[2])


def test_a_metric_that_is_not_there_is_named(prepared, tiny, tmp_path):
    with pytest.raises(PretrainError, match="keep_best: metric 'accuracy': accepted: loss"):
        run(prepared, tiny(vocab_size=512), tmp_path, KeepBest(metric="accuracy"), evaluate=losses(1.0))


def test_averages_of_narrow_weights_are_kept_wide(prepared, tiny, tmp_path):
    """In bfloat16 an average of 0.999 would not move."""
    model = tiny(vocab_size=512).bfloat16()
    trained = run(prepared, model, tmp_path, EMA(), budget=Budget(steps=3))
    assert {a.dtype for a in trained.state["ema"]["average"].values()} == {torch.float32}
    assert {p.dtype for p in trained.model.parameters()} == {torch.bfloat16}


def test_nothing_frozen_is_averaged(prepared, tiny, tmp_path):
    model = tiny(vocab_size=512)
    model.get_input_embeddings().weight.requires_grad = False
    trained = run(prepared, model, tmp_path, EMA(), budget=Budget(steps=2))
    names = {name for name, p in trained.model.named_parameters() if p.requires_grad}
    assert trained.state["ema"]["average"].keys() == names < dict(trained.model.named_parameters()).keys()


class Sharded(torch.nn.Parameter):
    """Looks as a sharded parameter does."""

    full_tensor = None


@pytest.mark.parametrize("policy", [EMA(), LAWA(), KeepBest()], ids=lambda policy: policy.name)
def test_sharded_weights_are_refused(prepared, tiny, tmp_path, policy):
    model = tiny(vocab_size=512)
    model.model.norm.weight = Sharded(model.model.norm.weight.data)
    with pytest.raises(PretrainError, match=f"{policy.name}: sharded weights .* accepted: strategy: ddp"):
        run(prepared, model, tmp_path, policy)
    assert not steps(tmp_path) if (tmp_path / "log.jsonl").exists() else True


def test_what_the_log_tells_of_an_early_end(prepared, tiny, tmp_path):
    run(
        prepared,
        tiny(vocab_size=512),
        tmp_path,
        KeepBest(patience=1),
        evaluate=losses(1, 2),
        evaluate_every=2,
        budget=Budget(steps=9),
    )
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["event"], row["step"]) for row in rows][-2:] == [("step", 4), ("evaluation", 4)]

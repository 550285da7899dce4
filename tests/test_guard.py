"""Steps that are not finite: nothing changes, they are counted and logged, too many in a row end the training."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small_recipe import small_recipe
from test_training import log, small

from pretrain import engine
from pretrain.core.errors import Diverged, PretrainError, PretrainWarning
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.optim.optimizers.adamw import AdamW
from pretrain.policies import Policy
from pretrain.recipe import load
from pretrain.stages import _training_data as data
from pretrain.training import state
from pretrain.training.budget import Budget
from pretrain.training.guard import Guard, seed
from pretrain.training.loop import Settings


@dataclass(frozen=True)
class Poison(CausalLM):
    """Its loss is multiplied and added to, from the `first` step to the `last` (from 1)."""

    how: str = "nan"
    first: int = 5
    last: int = 5
    name = "poison"

    def loss(self, model: Any, batch: Any, modules: Any = None) -> Any:
        loss = super().loss(model, batch, modules)
        if self.first <= model.steps + 1 <= self.last:
            by, plus = {"nan": (math.nan, 0.0), "inf": (math.inf, 0.0), "plus inf": (1.0, math.inf)}[self.how]
            return loss._replace(value=loss.value * by + plus)
        return loss


@dataclass(frozen=True)
class Count(Policy):
    """Tells the model which step it is in, and notes which steps it is told of."""

    name = "count"

    def before_step(self, training: Any, state: Any, batches: Any) -> None:
        training.model.steps = training.step

    def after_step(self, training: Any, state: Any, batches: Any, losses: Any) -> None:
        state.setdefault("told", []).append(training.step)


def trained(tiny, prepared, folder, objective, steps, **given):
    settings = Settings(budget=Budget(steps=steps), bar=False, **({"save_every": 0} | given))
    return small(prepared, tiny, folder, settings=settings, objective=objective, policies=[Count()])


def bits(training):
    moments = training.optimizer.state.values()
    return [*training.model.parameters(), *(v for m in moments for v in m.values() if torch.is_tensor(v))]


@pytest.mark.bits
@pytest.mark.parametrize("how", ["nan", "inf", "plus inf"])
def test_a_step_that_is_not_finite_leaves_weights_and_optimiser_as_they_are(tiny, prepared, tmp_path, how):
    """The last case has a gradient that is finite: the loss alone is not."""
    before = trained(tiny, prepared, tmp_path / "a", CausalLM(), 4)
    after = trained(tiny, prepared, tmp_path / "b", Poison(how), 5)
    assert all(torch.equal(a, b) for a, b in zip(bits(before), bits(after), strict=True))
    assert after.step == 5 and after.guard.skipped == 1 and after.state["count"]["told"] == [1, 2, 3, 4]
    assert after.tokens > before.tokens and after.flops > before.flops
    assert [(row["step"], row["skipped_steps"]) for row in log(tmp_path / "b", "skipped")] == [(5, 1)]
    assert [row["step"] for row in log(tmp_path / "b")] == [1, 2, 3, 4]


def test_training_goes_on_after_it(tiny, prepared, tmp_path):
    training = trained(tiny, prepared, tmp_path, Poison(first=2, last=3), 6, max_skips=3)
    assert [row["step"] for row in log(tmp_path)] == [1, 4, 5, 6] and training.guard.skipped == 2
    assert log(tmp_path)[-1]["loss"] < log(tmp_path)[0]["loss"]
    assert training.guard.in_row == 0


def test_too_many_in_a_row_end_the_training_with_the_last_good_state_kept(tiny, prepared, tmp_path):
    with pytest.raises(PretrainError, match=r"loss nan, .* at step 7: .*3 steps in a row.* state is step-000000004"):
        trained(tiny, prepared, tmp_path, Poison(last=99), 20, save_every=2, keep=1, max_skips=3)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-000000004"]
    assert [row["step"] for row in log(tmp_path, "skipped")] == [5, 6, 7]


def test_a_training_of_which_no_step_was_made_is_an_error_however_few_there_were(tiny, prepared, tmp_path):
    wrong = r"step 3: .*3 of 3 steps were skipped; the newest good state is the start; accepted: (?!.*max_skips)"
    with pytest.raises(Diverged, match=wrong):
        trained(tiny, prepared, tmp_path, Poison(first=1, last=99), 3, save_every=1)
    assert not list((tmp_path / "state").glob("step-*"))


@pytest.mark.bits
def test_a_training_that_ends_among_skipped_steps_gives_the_last_good_weights_and_says_so(tiny, prepared, tmp_path):
    before = trained(tiny, prepared, tmp_path / "a", CausalLM(), 4)
    after = trained(tiny, prepared, tmp_path / "b", Poison(last=99), 6)
    assert all(torch.equal(a, b) for a, b in zip(bits(before), bits(after), strict=True))
    assert after.guard.summary(after.step) == (
        "2 of 6 steps were not finite and skipped, the last 2 among them: the weights are those of step 4"
    )
    assert before.guard.summary(before.step) == ""
    middle = trained(tiny, prepared, tmp_path / "c", Poison(), 6)
    assert middle.guard.summary(middle.step) == "1 of 6 steps were not finite and skipped"


@pytest.fixture
def poisoned(stories, tmp_path, monkeypatch):
    """`poisoned(step)`: the small recipe's result and lines where the gradient of that one of its steps is no number."""
    admits = Guard.admits

    def run(poison: int, *overrides: str):
        spoil = lambda self, norm, step: admits(self, norm * math.nan if step == poison else norm, step)  # noqa: E731
        monkeypatch.setattr(Guard, "admits", spoil)
        (tmp_path / "r.yaml").write_text(small_recipe(tmp_path, stories[:30], held_out=0.3, budget={"steps": 3}))
        lines: list[str] = []
        recipe = load(tmp_path / "r.yaml", overrides, tmp_path / "out")
        return engine.run(recipe, say=lines.append, report=False).stages["model"]["metrics"], lines

    return run


def test_a_stage_says_what_was_skipped(poisoned):
    metrics, lines = poisoned(3)
    skipped = "1 of 3 steps were not finite and skipped, the last 1 among them: the weights are those of step 2"
    assert f"[model] warning: {skipped}" in lines and metrics["skipped_steps"] == metrics["skipped_at_end"] == 1


def test_weights_that_spoil_most_of_the_steps_are_an_error(poisoned, tmp_path):
    """So high a rate does it in the first; held-out text, of which the loss is that of chance, does not tell."""
    wrong = r"stage 'model': loss .* at step 3: training has diverged, 2 of 3 steps were skipped"
    with pytest.raises(Diverged, match=wrong):
        poisoned(0, "model.optimizer={method: adamw, lr: 1e30}", "model.schedule=constant")
    assert not (tmp_path / "out" / "model").exists()


def test_weights_that_measure_as_no_number_are_an_error_where_the_last_step_was_skipped(poisoned, monkeypatch):
    monkeypatch.setattr(data, "evaluation", lambda *_: lambda trainee: {"loss": math.nan})
    with pytest.raises(Diverged, match="the last steps were skipped and its metrics are not finite; the newest good"):
        poisoned(3)


def test_the_count_of_skipped_steps_outlives_a_resume(tiny, prepared, tmp_path):
    trained(tiny, prepared, tmp_path, Poison(first=2, last=2), 3, save_every=1)
    assert trained(tiny, prepared, tmp_path, CausalLM(), 5, save_every=1).guard.skipped == 1


def test_the_backward_pass_of_a_loss_that_is_no_number_begins_with_none():
    assert seed(torch.tensor(3.0)) == 1 and seed(torch.tensor(-0.0)) == 1
    assert all(seed(torch.tensor(value)).isnan() for value in (math.nan, math.inf, -math.inf))


def test_an_optimiser_that_can_leaves_the_update_out_by_itself_and_the_host_learns_of_it_later():
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 4)
    optimizer = AdamW(lr=0.1).build(net.named_parameters())
    guard, kept = Guard(optimizer, late=True), []
    for step, norm in enumerate([1.0, math.nan, math.inf, 1.0], start=1):
        net.weight.grad = torch.full_like(net.weight, norm)
        net.bias.grad = torch.full_like(net.bias, norm)
        assert guard.admits(torch.tensor(norm), step)
        optimizer.step()
        kept.append([t.clone() for t in (net.weight, *optimizer.state[net.weight].values())])
        guard.read(unread=1)
        assert guard.skipped == max(0, step - 2), "known a step late"
    assert all(torch.equal(a, b) for a, b in zip(kept[0], kept[2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(kept[2], kept[3], strict=True))
    assert guard.unlogged == [2, 3] and guard.in_row == 2
    guard.read()
    assert guard.in_row == 0 and guard.skipped == 2


@pytest.mark.promise("Faults", "A training state that is not finite is not written, and takes no good one's place.")
def test_no_state_is_written_that_is_not_finite(tiny, prepared, tmp_path):
    @dataclass(frozen=True)
    class Spoil(Policy):
        name = "spoil"

        def after_step(self, training: Any, state: Any, batches: Any, losses: Any) -> None:
            if training.step == 4:
                next(training.model.parameters()).data[0, 0] = math.inf

    settings = Settings(budget=Budget(steps=9), save_every=2, keep=1, bar=False)
    wrong = r"the state after step 4 is not written: model\.model\..* is not finite"
    with pytest.raises(PretrainError, match=wrong):
        small(prepared, tiny, tmp_path, settings=settings, policies=[Spoil()])
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-000000002"]
    assert state.newest(tmp_path / "state") is not None


@pytest.mark.promise(
    "Faults", "No state that is whole makes room for one that is damaged; steps of which no state is left are named."
)
def test_a_damaged_state_of_later_takes_no_good_ones_place_and_lost_states_are_named(tiny, prepared, tmp_path):
    def go_on(steps):
        settings = Settings(budget=Budget(steps=steps), save_every=99, keep=1, bar=False)
        return small(prepared, tiny, tmp_path, settings=settings)

    go_on(2)
    later = tmp_path / "state" / "step-000000005"
    shutil.copytree(tmp_path / "state" / "step-000000002", later)
    (later / "training.json").write_text("{}")
    with pytest.warns(PretrainWarning, match="step-000000005 is damaged and passed over"):
        assert go_on(3).step == 3
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-000000003"]
    shutil.rmtree(tmp_path / "state")
    with pytest.warns(
        PretrainWarning, match=r"log.jsonl tells of step 3, and no state is there: training begins again"
    ):
        go_on(1)

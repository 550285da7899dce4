"""The policy `restart`: earlier weights come back where the loss diverges, and the rate is lower from then on."""

from __future__ import annotations

import json
import math

import pytest
import torch
from policy_run import run, steps

from pretrain.core.errors import PretrainError, PretrainWarning
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.optim.optimizers.muon import Muon
from pretrain.policies import Policy
from pretrain.policies.pacing.restart import Restart
from pretrain.training.budget import Budget


class Shaken(Policy):
    """Spoils the weights after some steps; before each step it notes them, and the optimiser's memory."""

    name = "shaken"

    def __init__(self, *after):
        self.after, self.seen = after, {}

    def before_step(self, training, state, batches):
        weights = [p.detach().clone() for p in training.model.parameters()]
        memory = [
            {k: v.clone() for k, v in training.optimizer.state[p].items() if isinstance(v, torch.Tensor)}
            for group in training.optimizer.param_groups
            for p in group["params"]
        ]
        self.seen[training.step] = weights, memory

    def after_step(self, training, state, batches, losses):
        if training.step in self.after:
            for p in training.model.parameters():
                p.data += torch.randn_like(p)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": Muon()}], ids=["adamw", "muon"])
def test_after_a_divergence_the_weights_and_the_memory_from_before_it_go_on_at_a_lower_rate(
    prepared, tiny, tmp_path, optimizer
):
    watch, policy = Shaken(9), Restart(every=4, window=2, rise=0.5, factor=0.5)
    with pytest.warns(
        PretrainWarning, match=r"restart: after step 10 the loss has risen from .* to .*: back to the weights of step 8"
    ):
        training = run(prepared, tiny(vocab_size=512), tmp_path, watch, policy, budget=Budget(steps=14), **optimizer)  # fmt: skip
    assert not same(watch.seen[9][0], watch.seen[8][0]) and same(watch.seen[10][0], watch.seen[8][0])
    for now, then in zip(watch.seen[10][1], watch.seen[8][1], strict=True):
        assert now.keys() == then.keys() and all(torch.equal(now[k], then[k]) for k in now)
    rates = [row["lr"] for row in steps(tmp_path)]
    assert rates[:10] == [rates[0]] * 10 and rates[10:] == [rates[0] / 2] * 4
    assert training.step == 14 and training.state["restart"]["restarts"] == 1


def test_a_copy_of_the_window_in_which_the_loss_rose_is_not_gone_back_to(prepared, tiny, tmp_path):
    watch = Shaken(7)
    with pytest.warns(PretrainWarning, match="after step 9 .*: back to the weights of step 4"):
        run(
            prepared,
            tiny(vocab_size=512),
            tmp_path,
            watch,
            Restart(every=4, window=4, rise=6.0),
            budget=Budget(steps=11),
        )
    assert same(watch.seen[9][0], watch.seen[4][0])  # and not 8, which is after the weights were spoilt


def test_a_training_that_does_not_diverge_is_left_as_it_is(prepared, tiny, tmp_path):
    models = [tiny(vocab_size=512) for _ in range(2)]
    run(prepared, models[0], tmp_path / "a", Restart(every=3, window=2), budget=Budget(steps=8))
    run(prepared, models[1], tmp_path / "b", budget=Budget(steps=8))
    assert same(models[0].parameters(), models[1].parameters())


def test_steps_that_are_not_finite_bring_weights_back_before_training_gives_up(prepared, tiny, tmp_path):
    class Broken(CausalLM):
        """Whose loss is no number while the weights of after step 5 are there."""

        def loss(self, model, batch, modules=None):
            loss = super().loss(model, batch, modules)
            worse = next(model.parameters()).detach().abs().max() > 3
            return type(loss)(loss.value * math.nan if worse else loss.value, loss.parts, loss.nll_BL)

    watch = Shaken(5)
    with pytest.warns(
        PretrainWarning, match="after step 8 3 steps in a row were not finite: back to the weights of step 4"
    ):
        training = run(prepared, tiny(vocab_size=512), tmp_path, watch, Restart(every=4, window=4), objective=Broken(), budget=Budget(steps=12), evaluate=lambda _: {"loss": 1.0})  # fmt: skip
    assert training.guard.skipped == 3
    assert training.metrics["restarts"] == 1 and math.isfinite(steps(tmp_path)[-1]["loss"])


def test_at_most_so_many_times(prepared, tiny, tmp_path):
    watch = Shaken(*range(4, 20, 4))
    with pytest.warns(PretrainWarning) as told:
        training = run(prepared, tiny(vocab_size=512), tmp_path, watch, Restart(every=2, window=2, rise=0.5, most=2), budget=Budget(steps=20))  # fmt: skip
    assert training.state["restart"]["restarts"] == 2 == len([w for w in told if "restart:" in str(w.message)])
    assert json.dumps([row["lr"] for row in steps(tmp_path)][-1:]) == json.dumps([0.01 * 0.67 * 0.67])


def test_copies_that_lie_nearer_than_the_window_are_refused():
    with pytest.raises(PretrainError, match="restart: every 10: accepted: 20, the window, or more"):
        Restart(every=10)

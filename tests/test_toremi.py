"""ToReMi: weights by the rule of each stage, and a gradient that is that of the weighted loss."""

from __future__ import annotations

import pytest
import torch
from policy_run import run, steps

from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.policies import Policy
from pretrain.policies.mixing.toremi import ToReMi
from pretrain.training.budget import Budget


def test_hard_topics_gain_in_the_first_stage_and_lose_in_the_second():
    policy = ToReMi()
    losses, ones = {"easy": 2.0, "middle": 3.0, "hard": 4.0}, dict.fromkeys(("easy", "middle", "hard"), 1.0)
    early = policy.adjusted(ones, losses, late=False)
    assert early == pytest.approx({"easy": 1, "middle": 1, "hard": 1 + 1 / 3})
    assert policy.adjusted(early, losses, late=False)["hard"] == pytest.approx((4 / 3) ** 2)
    late = policy.adjusted(early, losses, late=True)
    assert late == pytest.approx({"easy": 4 / 3, "middle": 1, "hard": 4 / 3 * 2 / 3})


def test_weights_stay_between_their_bounds_and_unseen_topics_as_they_are():
    policy = ToReMi()
    assert policy.adjusted({"a": 4.9, "b": 1.0, "c": 2.0}, {"a": 9.0, "b": 1.0}, late=False) == {"a": 5, "b": 1, "c": 2}
    late = policy.adjusted({"a": 0.11, "b": 4.9, "c": 2.0}, {"a": 9.0, "b": 1.0}, late=True)
    assert late == {"a": 0.1, "b": 5, "c": 2}


def test_a_step_takes_the_gradient_of_the_weighted_loss(tiny, prepared, tmp_path):
    class Seen(Policy):
        name = "seen"

        def before_step(self, training, state, batches):
            self.batch, self.model = dict(batches[0]), {k: v.clone() for k, v in training.model.state_dict().items()}

    seen = Seen()

    class Start(ToReMi):
        name = "toremi"

        def start(self, training, state):
            super().start(training, state)
            state["weights"] |= {"python": 3.0, "docstrings": 0.5}

    training = run(prepared, tiny(vocab_size=512), tmp_path, Start(), seen, budget=Budget(steps=1), clip=0.0)
    model = tiny(vocab_size=512)
    model.load_state_dict(seen.model)
    weights = seen.batch.pop("token_weight_BL")
    names = training.loader.shards.domain_names
    by_domain = torch.tensor([{"python": 3.0, "docstrings": 0.5}[n] for n in names])
    assert torch.equal(weights, by_domain[seen.batch["domain_B"]][:, None].expand_as(weights))
    nll_BL = CausalLM().loss(model, seen.batch).nll_BL
    expected = float((weights * nll_BL).sum() / seen.batch["weight"])
    assert steps(tmp_path)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_interval_gathers_the_unweighted_losses_of_its_steps(tiny, prepared, tmp_path):
    class Losses(Policy):
        name = "losses"

        def __init__(self):
            self.seen = {}

        def after_step(self, training, state, batches, losses):
            for batch, loss in zip(batches, losses, strict=True):
                for domain, row in zip(batch["domain_B"].tolist(), loss.nll_BL, strict=True):
                    name = training.loader.shards.domain_names[domain]
                    total, count = self.seen.get(name, (0.0, 0))
                    self.seen[name] = total + float(row.sum()), count + int((row != 0).sum())

    losses, policy = Losses(), ToReMi(interval=3)
    training = run(prepared, tiny(vocab_size=512), tmp_path, policy, losses, budget=Budget(steps=3), micro_rows=2)
    means = {name: total / count for name, (total, count) in losses.seen.items()}
    expected = policy.adjusted(dict.fromkeys(means, 1.0), means, late=True)  # 3 of 3 steps: after the switch
    assert training.state["toremi"]["weights"] == pytest.approx(expected)
    assert training.state["toremi"]["sums"] == {}


@pytest.mark.bits
def test_with_one_weight_it_is_plain_training(tiny, prepared, tmp_path):
    plain = run(prepared, tiny(vocab_size=512), tmp_path / "a")
    same = run(prepared, tiny(vocab_size=512), tmp_path / "b", ToReMi(interval=100))
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), same.model.parameters(), strict=True))

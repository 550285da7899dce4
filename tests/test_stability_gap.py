"""The stability gap's remedies: a mixture with replay, a part of the domain gone through several times."""

from __future__ import annotations

from collections import Counter

import pytest
from policy_run import run

from pretrain.core.errors import PretrainError
from pretrain.policies import Policy
from pretrain.policies.mixing.stability_gap import StabilityGap
from pretrain.training.budget import Budget


class Rows(Policy):
    """Notes the rows of each step."""

    name = "rows"

    def __init__(self):
        self.drawn = []

    def before_step(self, training, state, batches):
        self.drawn += [
            (int(d), int(r)) for b in batches for d, r in zip(b["domain_B"].tolist(), b["row_B"].tolist(), strict=True)
        ]


def test_a_part_of_the_domain_is_seen_as_often_as_asked_for(tiny, prepared, tmp_path):
    rows = Rows()
    policy = StabilityGap("python", epochs=4, replay_share=0.25)
    training = run(prepared, tiny(vocab_size=512), tmp_path, policy, rows, budget=Budget(steps=24))
    python = training.loader.shards.domain_names.index("python")
    seen = Counter(row for domain, row in rows.drawn if domain == python)
    assert training.state["stability_gap"]["rows"] == 24 * 8 * 0.75 / 4 == 36
    assert 36 <= len(seen) <= 36 and sum(seen.values()) / len(seen) == pytest.approx(4, rel=0.15)
    assert len(training.loader.plan.rows_of_domain(python)) > 36
    assert sum(d != python for d, _ in rows.drawn) / len(rows.drawn) == pytest.approx(0.25, abs=0.08)


def test_replay_is_weighted_as_asked_or_as_in_the_corpus(tiny, prepared, tmp_path):
    policy = StabilityGap("docstrings", replay_share=0.4)
    training = run(prepared, tiny(vocab_size=512), tmp_path / "a", policy, budget=Budget(steps=1))
    assert training.loader.mixture == pytest.approx({"docstrings": 0.6, "python": 0.4})
    alone = StabilityGap("docstrings", replay_share=0.0)
    training = run(prepared, tiny(vocab_size=512), tmp_path / "b", alone, budget=Budget(steps=1))
    assert training.loader.mixture == pytest.approx({"docstrings": 1.0, "python": 0.0})


@pytest.mark.parametrize("unit", ["tokens", "flops", "steps"])
def test_every_budget_gives_the_same_part(tiny, prepared, tmp_path, unit):
    spent = run(prepared, tiny(vocab_size=512), tmp_path / "x", budget=Budget(steps=8)).spent
    budget = Budget(**{unit: spent[unit]})
    training = run(prepared, tiny(vocab_size=512), tmp_path / unit, StabilityGap("python", 2), budget=budget)
    assert training.state["stability_gap"]["rows"] == pytest.approx(8 * 8 * 0.82 / 2, abs=3)


def test_wrong_fields_are_refused(tiny, prepared, tmp_path):
    for policy, told in (
        (StabilityGap("pyton"), "domain 'pyton' has no rows; accepted: docstrings, python"),
        (StabilityGap("python", replay={"python": 1.0}), "accepted: weights of other domains"),
        (StabilityGap("python", replay={"docs": 1.0}), "unknown domain in the mixture 'docs'"),
    ):
        with pytest.raises(PretrainError, match=told):
            run(prepared, tiny(vocab_size=512), tmp_path, policy, budget=Budget(steps=1))

"""Policies: mixtures that follow their rule and survive a resume, masks that hold."""

from __future__ import annotations

import math

import policy_run
import pytest
import torch

from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import linears
from pretrain.corpus.shards import Shards
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.optim.optimizers.adamw import AdamW
from pretrain.optim.schedules.constant import Constant
from pretrain.policies import Policy
from pretrain.policies.mixing.domain_upsampling import DomainUpsampling
from pretrain.policies.mixing.odm import ODM, probabilities
from pretrain.policies.pruning.spdf import SPDF
from pretrain.training.budget import Budget
from pretrain.training.loader import Loader
from pretrain.training.loop import Settings, train


def run(prepared, tiny, folder, policy, steps=10, mixture=None, save_every=0, workers=0):
    vocabulary = Vocabulary.of(load_tokenizer(prepared / "tokenizer"))
    loader = Loader(
        Shards(prepared / "tokens" / "train"),
        [CausalLM()],
        vocabulary,
        length=64,
        batch_rows=8,
        mixture=mixture,
        workers=workers,
    )
    settings = Settings(budget=Budget(steps=steps), save_every=save_every, bar=False)
    return train(
        tiny(vocab_size=512), loader, [CausalLM()], AdamW(lr=1e-2), Constant(), settings, folder, policies=[policy]
    )


def test_exp3_gives_the_papers_probabilities():
    rewards = {"a": 3.0, "b": 1.0, "c": 0.0}
    mixture, rate = probabilities(rewards, 50, 0.2)
    assert rate == pytest.approx(math.sqrt(math.log(3) / 150))
    powers = [math.exp(0.2 * r) for r in rewards.values()]
    assert list(mixture.values()) == pytest.approx([(1 - 3 * rate) * p / sum(powers) + rate for p in powers])
    assert sum(mixture.values()) == pytest.approx(1) and min(mixture.values()) >= rate
    assert list(probabilities(rewards, 1, 1 / 3)[0].values()) == pytest.approx([1 / 3] * 3)
    assert sum(probabilities({"a": 1e6, "b": 0.0}, 9, 0.5)[0].values()) == pytest.approx(1)


def test_odm_smooths_importance_weighted_losses_and_sets_the_mixture(tiny, prepared, tmp_path):
    training = run(prepared, tiny, tmp_path, ODM(warmup=0.0), steps=1)
    state = training.state["odm"]
    natural = {
        n: len(training.loader.plan.rows_of_domain(d)) / len(training.loader.plan)
        for d, n in enumerate(training.loader.shards.domain_names)
    }
    for name, reward in state["reward"].items():
        assert (
            reward == 0 or 4 < reward * natural[name] / 0.1 < 9
        )  # the loss of an untrained model of 512 entries is near 6.2
    assert training.loader.mixture == pytest.approx(state["mixture"]) and state["updates"] == 1


class Mixtures(Policy):
    """Notes what each step's successor draws from."""

    name = "mixtures"

    def __init__(self):
        self.seen = []

    def after_step(self, training, state, batches, losses):
        self.seen.append(dict(training.loader.mixture))


def test_odm_explores_after_its_warm_up_as_if_it_had_begun_with_it(tiny, prepared, tmp_path):
    watch = Mixtures()
    training = policy_run.run(prepared, tiny(vocab_size=512), tmp_path, ODM(warmup=0.75), watch, budget=Budget(steps=8))
    assert all(mixture == watch.seen[0] for mixture in watch.seen[:5]) and watch.seen[5] != watch.seen[0]
    state = training.state["odm"]
    count = len(state["reward"])
    before, rate = (min(1 / count, math.sqrt(math.log(count) / (count * t))) for t in (7, 8))
    assert state["updates"] == 8 and state["rate"] == pytest.approx(rate) and rate < 1 / count
    powers = {name: math.exp(before * reward) for name, reward in state["reward"].items()}
    expected = {name: (1 - count * rate) * p / sum(powers.values()) + rate for name, p in powers.items()}
    assert state["mixture"] == pytest.approx(expected) and watch.seen[-1] == pytest.approx(state["mixture"])


def test_odm_needs_two_domains(tiny, prepared, tmp_path):
    with pytest.raises(PretrainError, match="odm: the corpus has the one domain python"):
        run(prepared, tiny, tmp_path, ODM(), mixture={"python": 1.0})


def test_upsampling_begins_when_its_share_is_left(tiny, prepared, tmp_path):
    training = run(prepared, tiny, tmp_path, DomainUpsampling({"docstrings": 1.0}, share=0.3), steps=10)
    assert training.state["domain_upsampling"] == {"begun": 7}
    taken = training.loader.state()["taken"]
    assert taken["docstrings"] == 24 and taken["*"] == 56


def test_a_wrong_upsampling_is_refused_before_training(tiny, prepared, tmp_path):
    with pytest.raises(PretrainError, match="unknown domain in the mixture 'docs'"):
        run(prepared, tiny, tmp_path, DomainUpsampling({"docs": 1.0}))
    with pytest.raises(PretrainError, match="share 2: accepted"):
        run(prepared, tiny, tmp_path, DomainUpsampling({"python": 1.0}, share=2))
    assert not (tmp_path / "log.jsonl").exists() or not (tmp_path / "log.jsonl").read_text()


def test_spdf_holds_exactly_its_share_at_zero_in_the_blocks_only(tiny, prepared, tmp_path):
    training = run(prepared, tiny, tmp_path, SPDF(sparsity=0.75), steps=4)
    matrices = linears(training.model)
    for module in matrices.values():
        assert int((module.weight == 0).sum()) == round(0.75 * module.weight.numel())
    masked = {f"{name}.weight" for name in matrices}
    assert all((p != 0).float().mean() > 0.9 for n, p in training.model.named_parameters() if n not in masked)
    again = run(prepared, tiny, tmp_path / "b", SPDF(sparsity=0.75), steps=1)
    for a, b in zip(matrices.values(), linears(again.model).values(), strict=True):
        assert torch.equal(a.weight == 0, b.weight == 0)


@pytest.mark.bits
def test_spdf_without_sparsity_is_plain_training_and_dense_training_after_it_fills_the_zeros(tiny, prepared, tmp_path):
    dense = run(prepared, tiny, tmp_path / "a", SPDF(sparsity=0.0), steps=3)
    plain = run(prepared, tiny, tmp_path / "b", DomainUpsampling({"python": 1.0}, share=1e-9), steps=3)
    assert all(torch.equal(a, b) for a, b in zip(dense.model.parameters(), plain.model.parameters(), strict=True))
    sparse = run(prepared, tiny, tmp_path / "c", SPDF(sparsity=0.75), steps=2).model
    vocabulary = Vocabulary.of(load_tokenizer(prepared / "tokenizer"))
    loader = Loader(Shards(prepared / "tokens" / "train"), [CausalLM()], vocabulary, length=64, batch_rows=8)
    train(
        sparse, loader, [CausalLM()], AdamW(), Constant(), Settings(budget=Budget(steps=2), bar=False), tmp_path / "d"
    )
    assert all((m.weight == 0).float().mean() < 0.05 for m in linears(sparse).values())


def test_a_policy_that_a_recipe_names_twice_is_refused():
    from pretrain.stages.train import Train

    given = {"name": "model", "stage": "train", "corpus": "c", "tokenizer": "t", "model": {"family": "llama"}}
    with pytest.raises(PretrainError, match="policies: ema stands there 2 times; accepted: each once"):
        Train(**given, budget={"steps": 1}, policies=["ema", {"method": "ema", "decay": 0.9}])

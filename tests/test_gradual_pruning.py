"""Gradual pruning: the cubic schedule between its two shares, masks that only grow, the average parameter count."""

from __future__ import annotations

import pytest
import torch
from policy_run import run, steps

from pretrain.core.errors import PretrainError
from pretrain.core.models.families import linears
from pretrain.policies import Policy
from pretrain.policies.pruning.gradual_pruning import GradualPruning
from pretrain.policies.pruning.spdf import SPDF
from pretrain.training.budget import Budget


class Watch(Policy):
    """Notes the sparsity after each step and which weights are zero."""

    name = "watch"

    def __init__(self):
        self.sparsity, self.zeros_seen, self.parameters = [], [], []

    def after_step(self, training, state, batches, losses):
        zeros = {n: m.weight == 0 for n, m in linears(training.model).items()}
        self.zeros_seen.append(zeros)
        self.sparsity.append(sum(int(z.sum()) for z in zeros.values()) / sum(z.numel() for z in zeros.values()))
        self.parameters.append(training.state["gradual_pruning"]["parameters"])


def test_the_schedule_is_cubic_between_its_two_shares():
    policy = GradualPruning(sparsity=0.8)
    assert policy.wanted(0) == policy.wanted(0.25) == 0
    assert policy.wanted(0.5) == pytest.approx(0.8 * (1 - 0.5**3))
    assert policy.wanted(0.35) == pytest.approx(0.8 * (1 - 0.8**3))
    assert policy.wanted(0.75) == policy.wanted(1) == 0.8
    assert GradualPruning(start_share=0.5, end_share=0.5).wanted(0.5) == 0.8


def test_it_prunes_on_time_and_what_is_pruned_stays_so(tiny, prepared, tmp_path):
    policy, watch = GradualPruning(sparsity=0.8, every=2), Watch()
    training = run(prepared, tiny(vocab_size=512), tmp_path, policy, watch, budget=Budget(steps=16))
    assert watch.sparsity[:5] == [0] * 5  # a quarter is dense, and at a quarter the wanted sparsity is still 0
    expected = [policy.wanted((n + 1) // 2 * 2 / 16) for n in range(5, 16)]
    assert watch.sparsity[5:] == pytest.approx(expected, abs=1e-3)
    for module in linears(training.model).values():
        assert int((module.weight == 0).sum()) == round(0.8 * module.weight.numel())
    for before, after in zip(watch.zeros_seen[5:-1], watch.zeros_seen[6:], strict=True):
        assert all(bool((after[n] | ~before[n]).all()) for n in before)


def test_the_smallest_of_each_layer_go_first(tiny, prepared, tmp_path):
    class Before(Policy):
        name = "before"

        def after_step(self, training, state, batches, losses):
            self.weights = {n: m.weight.detach().clone() for n, m in linears(training.model).items()}

    before, policy = Before(), GradualPruning(sparsity=0.5, start_share=1.0, end_share=1.0)
    training = run(prepared, tiny(vocab_size=512), tmp_path, before, policy, budget=Budget(steps=3))
    for name, module in linears(training.model).items():
        size, kept = before.weights[name].abs(), module.weight != 0
        assert size[kept].min() >= size[~kept].max()
        assert torch.equal(module.weight[kept], before.weights[name][kept])


def test_the_target_is_reached_though_the_interval_is_long(tiny, prepared, tmp_path):
    training = run(prepared, tiny(vocab_size=512), tmp_path, GradualPruning(sparsity=0.5), budget=Budget(steps=8))
    assert training.state["gradual_pruning"]["sparsity"] == 0.5


def test_an_interval_may_be_a_share_of_training(tiny, prepared, tmp_path):
    watch = Watch()
    policy = GradualPruning(sparsity=0.8, every=0.25, start_share=0.0, end_share=1.0)
    run(prepared, tiny(vocab_size=512), tmp_path, policy, watch, budget=Budget(steps=8))
    expected = [policy.wanted(n // 2 * 0.25) for n in range(1, 9)]
    assert watch.sparsity == pytest.approx(expected, abs=1e-3)


def test_average_parameters_are_those_of_the_steps(tiny, prepared, tmp_path):
    watch, metrics = Watch(), {}
    training = run(
        prepared, tiny(vocab_size=512), tmp_path, GradualPruning(every=2), watch, budget=Budget(steps=16),
        evaluate=lambda trainee: dict(metrics),
    )  # fmt: skip
    total = sum(p.numel() for p in training.model.parameters())
    used = [total, *watch.parameters[:-1]]  # a step computes with what the one before it left
    assert training.metrics["average_parameters"] == pytest.approx(sum(used) / 16)
    zeros = sum(int((m.weight == 0).sum()) for m in linears(training.model).values())
    assert training.metrics["parameters"] == total - zeros


def test_only_zeros_are_credited(tiny, prepared, tmp_path):
    training = run(prepared, tiny(vocab_size=512), tmp_path, GradualPruning(every=2), budget=Budget(steps=16))
    rows = steps(tmp_path)
    assert all(r["flops"] == r["dense_flops"] for r in rows[:6]) and rows[-1]["flops"] < rows[-1]["dense_flops"]
    layers = sum(m.weight.numel() for m in linears(training.model).values())
    saved = (rows[-1]["dense_flops"] - rows[-2]["dense_flops"]) - (rows[-1]["flops"] - rows[-2]["flops"])
    assert saved == pytest.approx(0.8 * 3 * 2 * 8 * 64 * layers, rel=1e-3)
    plain = run(
        prepared, tiny(vocab_size=512), tmp_path / "b", GradualPruning(every=2, credit=False), budget=Budget(steps=16)
    )
    assert plain.flops == plain.dense_flops == training.dense_flops


@pytest.mark.bits
def test_a_budget_of_flops_which_pruning_saves_resumes_as_if_nothing_had_happened(tiny, prepared, tmp_path):
    policy, limit = (
        GradualPruning(every=2),
        run(prepared, tiny(vocab_size=512), tmp_path / "x", budget=Budget(steps=10)).flops,
    )

    class Stop(Policy):
        name = "stop"

        def after_step(self, training, state, batches, losses):
            if training.step == 10 and training.folder.name == "b" and not state.get("stopped"):
                raise KeyboardInterrupt

    whole = run(prepared, tiny(vocab_size=512), tmp_path / "a", policy, Stop(), budget=Budget(flops=limit))
    with pytest.raises(KeyboardInterrupt):
        run(prepared, tiny(vocab_size=512), tmp_path / "b", policy, Stop(), budget=Budget(flops=limit), save_every=3)
    again = run(prepared, tiny(vocab_size=512), tmp_path / "b", policy, budget=Budget(flops=limit), save_every=3)
    for key in ("parameter_steps", "steps", "sparsity"):
        assert again.state["gradual_pruning"][key] == whole.state["gradual_pruning"][key]
    assert again.flops == whole.flops and again.state["gradual_pruning"]["sparsity"] > 0
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_biases_shared_heads_and_tied_embeddings_stay_dense(tiny, prepared, tmp_path, family):
    model = tiny(family, vocab_size=512, tie_word_embeddings=True)
    training = run(prepared, model, tmp_path, GradualPruning(every=1), budget=Budget(steps=4))
    pruned = {f"{name}.weight" for name in linears(training.model)}
    for name, parameter in training.model.named_parameters():
        assert name in pruned or parameter.dim() == 1 or (parameter == 0).float().mean() < 0.05, name


def test_an_end_before_the_start_is_refused():
    with pytest.raises(PretrainError, match="start_share 0.8, end_share 0.75: accepted"):
        GradualPruning(start_share=0.8)


@pytest.mark.parametrize("sparse", [SPDF(sparsity=0.75), GradualPruning(sparsity=0.75, start_share=0.0, end_share=0.0)])
def test_the_gradient_is_clipped_by_the_norm_of_what_may_move(tiny, prepared, tmp_path, sparse):
    class Watch(Policy):
        """Measures the whole gradient before the zeros' part is taken away."""

        name = "watch"

        def before_update(self, training, state):
            self.whole = [p.grad.clone() for p in training.model.parameters()]
            self.movable = {id(m.weight): m.weight != 0 for m in linears(training.model).values()}

        def after_step(self, training, state, batches, losses):
            parameters = list(training.model.parameters())
            masks = [self.movable.get(id(p), torch.ones_like(p, dtype=torch.bool)) for p in parameters]
            of_all = torch.stack([g.norm() for g in self.whole]).norm()
            of_rest = torch.stack([(g * m).norm() for g, m in zip(self.whole, masks, strict=True)]).norm()
            clipped = torch.stack([p.grad.norm() for p in parameters]).norm()
            self.norms = float(of_all), float(of_rest), float(clipped)

    watch = Watch()
    run(prepared, tiny(vocab_size=512), tmp_path, watch, sparse, budget=Budget(steps=2), clip=0.05)
    of_all, of_rest, clipped = watch.norms
    assert steps(tmp_path)[-1]["grad_norm"] == pytest.approx(of_rest, rel=1e-4)
    assert of_rest < 0.97 * of_all
    assert clipped == pytest.approx(0.05, rel=1e-3)

"""DP-SGD: the step's formula, what the accountant proves against published numbers, and what is recorded."""

from __future__ import annotations

import math

import pytest
import torch
from policy_run import run

from pretrain.core.errors import PretrainError
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.policies import Policy
from pretrain.policies.privacy._accountant import divergence, epsilon, noise_for
from pretrain.policies.privacy.dp_sgd import DPSGD
from pretrain.training.budget import Budget


class Seen(Policy):
    """Keeps the batches and the model of the step, and its gradient."""

    name = "seen"

    def before_step(self, training, state, batches):
        self.batches = [dict(batch) for batch in batches]
        self.weights = {k: v.clone() for k, v in training.model.state_dict().items()}

    def before_update(self, training, state):
        self.gradient = flat([p.grad for p in training.model.parameters()])


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def a_step(prepared, tiny, folder, **fields):
    """The gradient of one step, and those of its examples one by one."""
    seen, model = Seen(), tiny(vocab_size=512)
    run(prepared, model, folder, DPSGD(**fields), seen, budget=Budget(steps=1), clip=0.0, micro_rows=1)
    model.load_state_dict(seen.weights)
    examples = []
    for batch in seen.batches:
        value = CausalLM().loss(model, batch).value
        examples.append(flat(torch.autograd.grad(value, list(model.parameters()))))
    return seen.gradient, torch.stack(examples)


def test_without_noise_and_bound_it_is_the_mean_of_the_examples_gradients(prepared, tiny, tmp_path):
    gradient, examples = a_step(prepared, tiny, tmp_path, clip_norm=1e9, noise_multiplier=0.0)
    torch.testing.assert_close(gradient, examples.mean(0), rtol=1e-4, atol=1e-7)


@pytest.mark.promise("Privacy", "No row's gradient counts by more than `clip_norm` in a step.")
def test_each_example_counts_by_no_more_than_the_bound(prepared, tiny, tmp_path):
    gradient, examples = a_step(prepared, tiny, tmp_path, clip_norm=0.5, noise_multiplier=0.0)
    norms = examples.norm(dim=1, keepdim=True)
    assert norms.max() > 0.5
    clipped = examples * (0.5 / norms).clamp(max=1)
    torch.testing.assert_close(gradient, clipped.mean(0), rtol=1e-4, atol=1e-7)
    assert gradient.norm() <= 0.5 + 1e-6


def test_the_noise_has_the_deviation_of_the_bound_times_the_multiplier_over_the_batch(prepared, tiny, tmp_path):
    gradient, examples = a_step(prepared, tiny, tmp_path, clip_norm=0.5, noise_multiplier=40.0)
    clipped = examples * (0.5 / examples.norm(dim=1, keepdim=True)).clamp(max=1)
    noise = gradient - clipped.mean(0)
    assert float(noise.std()) == pytest.approx(40.0 * 0.5 / len(examples), rel=0.02)


@pytest.mark.promise("Privacy", "Under Poisson sampling Rényi's epsilon is no less than the exact one.")
def test_the_accountant_bounds_the_exact_gaussian_mechanism():
    def phi(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    for sigma, spent in ((1.0, 3.0), (4.0, 0.5)):
        delta = phi(1 / (2 * sigma) - spent * sigma) - math.exp(spent) * phi(-1 / (2 * sigma) - spent * sigma)
        assert spent <= epsilon(sigma, 1.0, 1, delta) <= 1.25 * spent
        # Many steps are one with less noise.
        assert spent <= epsilon(sigma * 10, 1.0, 100, delta) == pytest.approx(epsilon(sigma, 1.0, 1, delta))


@pytest.mark.promise("Privacy", "Under Poisson sampling Rényi's epsilon is no less than the exact one.")
def test_the_accountant_bounds_the_exact_sampled_mechanism_of_one_step():
    q, sigma, spent = 0.1, 1.0, 1.0
    x = torch.linspace(-20, 30, 400001, dtype=torch.float64)
    without = torch.exp(-(x**2) / (2 * sigma**2)) / math.sqrt(2 * math.pi * sigma**2)
    with_it = without * (1 - q + q * torch.exp((2 * x - 1) / (2 * sigma**2)))
    sides = [(with_it, without), (without, with_it)]
    delta = max(float(torch.trapezoid((a - math.exp(spent) * b).clamp(min=0), x)) for a, b in sides)
    assert spent <= epsilon(sigma, q, 1, delta) <= 2.5 * spent


def test_the_moments_accountant_s_published_number():
    """(1.26, 1e-5) after 10,000 steps at q = 0.01 and sigma = 4: the paper's, by its own weaker conversion."""
    moments = min(10_000 * divergence(a, 4.0, 0.01) + math.log(1e5) / (a - 1) for a in range(2, 65))
    assert moments == pytest.approx(1.26, abs=0.01)
    assert 0.8 < epsilon(4.0, 0.01, 10_000, 1e-5) < moments


def test_the_divergence_is_the_integral_of_its_definition():
    q, sigma, order = 0.1, 1.3, 5
    x = torch.linspace(-40, 60, 400001, dtype=torch.float64)
    density = torch.exp(-(x**2) / (2 * sigma**2)) / math.sqrt(2 * math.pi * sigma**2)
    ratio = 1 - q + q * torch.exp((2 * x - 1) / (2 * sigma**2))
    integral = torch.trapezoid(density * ratio**order, x)
    assert divergence(order, sigma, q) == pytest.approx(math.log(integral) / (order - 1), rel=1e-9)


def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise():
    assert epsilon(1.0, 0.01, 100, 1e-5) < epsilon(1.0, 0.01, 1000, 1e-5) < epsilon(0.8, 0.01, 1000, 1e-5)
    assert epsilon(1.0, 0.01, 1000, 1e-5) < epsilon(1.0, 0.02, 1000, 1e-5) < epsilon(1.0, 0.02, 1000, 1e-7)
    assert epsilon(1.0, 0.01, 0, 1e-5) == 0 and epsilon(0.0, 0.01, 1, 1e-5) == math.inf


def test_the_noise_that_a_target_asks_for_just_keeps_to_it():
    sigma = noise_for(2.0, 0.02, 500, 1e-5)
    assert epsilon(sigma, 0.02, 500, 1e-5) <= 2.0 < epsilon(0.99 * sigma, 0.02, 500, 1e-5)


@pytest.mark.promise("Privacy", "Epsilon, delta, the noise and the sampling rate stand in the lineage.")
def test_what_is_spent_stands_beside_the_metrics(prepared, tiny, tmp_path):
    policy = DPSGD(target_epsilon=4.0)
    training = run(
        prepared, tiny(vocab_size=512), tmp_path, policy, budget=Budget(steps=3), micro_rows=1,
        evaluate=lambda trainee: {"loss": 1.0},
    )  # fmt: skip
    rate = 8 / len(training.loader.plan)
    assert training.metrics["sampling_rate"] == pytest.approx(rate) and training.metrics["delta"] == 1e-5
    assert training.metrics["epsilon"] == epsilon(training.metrics["noise_multiplier"], rate, 3, 1e-5)
    assert 3.9 < training.metrics["epsilon"] <= 4.0
    unseen = run(prepared, tiny(vocab_size=512), tmp_path / "b", policy, budget=Budget(steps=3), micro_rows=1)
    assert unseen.metrics == {name: value for name, value in training.metrics.items() if name != "loss"}


def test_micro_batches_and_budgets_that_cannot_be_accounted_for_are_one_line(prepared, tiny, tmp_path):
    with pytest.raises(PretrainError, match="dp_sgd: micro-batches of 8 examples: accepted: micro_rows: 1"):
        run(prepared, tiny(vocab_size=512), tmp_path / "a", DPSGD(), micro_rows=8)
    with pytest.raises(PretrainError, match="dp_sgd: a budget of tokens: accepted: one of steps"):
        run(prepared, tiny(vocab_size=512), tmp_path / "b", DPSGD(), budget=Budget(tokens=999))

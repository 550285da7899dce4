"""The Edgeworth accountant against an exact composition, and the noise that it saves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from policy_run import run

from pretrain.policies.privacy._accountant import epsilon, noise_for
from pretrain.policies.privacy._edgeworth import beyond, cumulants, delta_of, estimated_epsilon
from pretrain.policies.privacy.dp_sgd import DPSGD
from pretrain.policies.privacy.ew_tune import EWTune
from pretrain.training.budget import Budget

SST2 = (2000 / 67349, 673, 1e-5)  # the rate, steps and delta of 20 epochs of SST-2 in batches of 2000


def exact(spent, sigma, rate, steps, width=1e-3, side=64.0):
    """Delta by the distribution of the privacy loss on a grid, the steps composed by its Fourier transform."""
    count = round(2 * side / width)
    x = np.linspace(-14, 14 + 1 / sigma, 200_001)
    ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + x / sigma - 1 / (2 * sigma**2))
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * np.exp(ratio) * (x[1] - x[0])
    place, part = np.divmod(ratio / width, 1.0)
    place = place.astype(int) + count // 2
    mass = np.bincount(place, density * (1 - part), minlength=count) + np.bincount(
        place + 1, density * part, minlength=count
    )
    whole = np.fft.fftshift(np.fft.irfft(np.fft.rfft(np.fft.ifftshift(mass)) ** steps, count))
    loss = (np.arange(count) - count // 2) * width
    return float(((1 - np.exp(spent - loss)) * whole)[loss > spent].sum())


def test_the_cumulants_of_the_gaussian_mechanism_are_those_of_a_normal_ratio():
    for side, sign in zip(cumulants(2.0, 1.0), (-1, 1), strict=True):
        assert side == pytest.approx((sign / 8, 1 / 4, 0, 0, 0), abs=1e-9)


def test_without_sampling_it_is_exact():
    def phi(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    sigma, spent, steps = 20.0, 1.7, 100
    mean = math.sqrt(steps) / sigma
    delta = phi(mean / 2 - spent / mean) - math.exp(spent) * phi(-mean / 2 - spent / mean)
    assert delta_of(spent, sigma, 1.0, steps) == pytest.approx(delta, rel=1e-6)
    assert estimated_epsilon(sigma, 1.0, steps, delta) == pytest.approx(spent, rel=1e-5)


def test_the_expansion_is_that_of_a_sum_of_exponentials():
    """Whose cumulants are (k - 1)!, and whose sum's distribution is known."""
    steps, x = 40, 55.0
    wanted = sum(math.exp(-x + k * math.log(x) - math.lgamma(k + 1)) for k in range(steps))
    assert beyond(x, (1.0, 1.0, 2.0, 6.0, 24.0), steps) == pytest.approx(wanted, rel=2e-2)
    assert beyond(x, (1.0, 1.0, 0.0, 0.0, 0.0), steps) < 0.75 * wanted


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "delta"), [(0.7, 0.005, 2000, 1e-5), (2.0, 0.1, 200, 1e-5), (0.62, *SST2)]
)
def test_it_lies_within_five_hundredths_of_the_exact_composition_and_below_renyi_s(sigma, rate, steps, delta):
    estimate = estimated_epsilon(sigma, rate, steps, delta)
    assert exact(1.05 * estimate, sigma, rate, steps) < delta < exact(0.95 * estimate, sigma, rate, steps)
    assert estimate < 0.95 * epsilon(sigma, rate, steps, delta)
    assert exact(epsilon(sigma, rate, steps, delta), sigma, rate, steps) < delta  # what Rényi's proves holds


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "delta"), [(0.6, 2000 / 392702, 1960, 1e-6), (0.5, 0.1, 3, 1e-5), (0.01, 0.1, 3, 1e-5)]
)
def test_where_the_sum_is_too_skewed_the_proved_bound_is_taken(sigma, rate, steps, delta):
    assert estimated_epsilon(sigma, rate, steps, delta) == epsilon(sigma, rate, steps, delta)


def test_at_the_paper_s_setting_it_asks_for_less_noise():
    less, more = (noise_for(8.0, *SST2, accountant) for accountant in (estimated_epsilon, epsilon))
    assert 0.9 * more < less < 0.98 * more
    assert estimated_epsilon(less, *SST2) <= 8.0 < estimated_epsilon(0.99 * less, *SST2)


def test_its_claim_is_where_the_two_accountants_differ():
    claim = yaml.safe_load((Path(__file__).parents[1] / "claims" / "ew_tune.yaml").read_text())
    fields = claim["method"]["set"]
    (policy,), rows = fields["model.policies"], 3161  # of what the base trains on
    known = (policy["target_epsilon"], fields["model.batch_rows"] / rows, claim["scales"]["cpu"], 1e-5)
    assert noise_for(*known, estimated_epsilon) < 0.98 * noise_for(*known, epsilon)


def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise():
    assert estimated_epsilon(1.0, 0.1, 100, 1e-5) < estimated_epsilon(1.0, 0.1, 200, 1e-5)
    assert estimated_epsilon(1.2, 0.1, 100, 1e-5) < estimated_epsilon(1.0, 0.1, 100, 1e-5)
    assert estimated_epsilon(1.0, 0.1, 100, 1e-5) < estimated_epsilon(1.0, 0.2, 100, 1e-5)
    assert estimated_epsilon(1.0, 0.1, 0, 1e-5) == 0 and estimated_epsilon(0.0, 0.1, 1, 1e-5) == math.inf


def test_the_estimate_and_the_proof_stand_beside_the_metrics(prepared, tiny, tmp_path):
    assert EWTune() != DPSGD(accountant="edgeworth") and EWTune().accountant == "edgeworth"
    policy = EWTune(target_epsilon=4.0)
    training = run(
        prepared, tiny(vocab_size=512), tmp_path, policy, budget=Budget(steps=3), micro_rows=1,
        evaluate=lambda trainee: {"loss": 1.0},
    )  # fmt: skip
    found = training.metrics
    assert found["epsilon"] <= 4.0 and found["noise_multiplier"] > 0
    spent = (found["noise_multiplier"], found["sampling_rate"], 3, 1e-5)
    assert (found["epsilon"], found["epsilon_renyi"]) == (estimated_epsilon(*spent), epsilon(*spent))

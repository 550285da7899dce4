"""The rule that adds seeds: how often it is wrong of a method that does nothing, and how often it finds one that works."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pretrain.experiments.sequential import EQUAL, LOOKS, Noise, standing
from pretrain.experiments.verdict import BETTER, UNDECIDED, WORSE

CLAIMS = 1500
NOTHING, SOMETHING = {UNDECIDED, EQUAL}, {BETTER, WORSE}


def simulate(effect, *, deviation=1.0, documents=0.0, freedom=20, better="lower", seed=0):
    """The words of claims whose paired differences are `effect` + noise; their pooled noise is of a deviation of 1."""
    rng = np.random.default_rng(seed)
    words, seeds = [], []
    for _ in range(CLAIMS):
        pool = Noise.of_runs([rng.normal(0, math.sqrt(0.5), freedom + 1).tolist()])
        share_D = rng.normal(0, documents * math.sqrt(50), 50) if documents else np.zeros(50)
        drawn = effect + share_D.mean() + deviation * rng.standard_normal(LOOKS[-1])
        more = LOOKS[0]
        count = 0
        while more:
            count += more
            differences = drawn[:count]
            each_SD = differences[:, None] + share_D - share_D.mean() if documents else None
            found = standing(differences.tolist(), better, pool, each_SD)
            more = found.more
        words.append(found.word)
        seeds.append(found.seeds)
    return words, seeds


@pytest.mark.parametrize(
    ("case", "least"),
    [({}, 0.95), ({"deviation": 0.5}, 0.99), ({"documents": 1.0}, 0.95), ({"better": "higher"}, 0.95),
     ({"deviation": 2.0}, 0.84)],
    ids=str,
)  # fmt: skip
def test_a_method_that_does_nothing_is_undecided_or_equal(case, least):
    words, seeds = simulate(0.0, **case)
    assert sum(word in NOTHING for word in words) / CLAIMS >= least
    assert max(seeds) <= 8


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_an_effect_of_one_and_a_quarter_deviations_is_found_with_eight_seeds_at_most(better):
    words, seeds = simulate(-1.25, better=better)
    right = BETTER if better == "lower" else WORSE
    assert sum(word == right for word in words) / CLAIMS >= 0.8
    assert np.mean(seeds) < 6.5 and max(seeds) <= 8  # most are found before the last look


def test_a_large_effect_is_found_at_the_first_look_and_one_of_nothing_is_called_equal():
    words, seeds = simulate(4.0)
    assert words.count(WORSE) >= 0.99 * CLAIMS and np.mean(seeds) < 3.2
    words, _ = simulate(0.0)
    assert words.count(EQUAL) > 0.6 * CLAIMS


def test_documents_widen_the_interval_as_much_as_their_differences_vary():
    differences = [0.1, 0.12, 0.11]
    alike = np.repeat(np.array(differences)[:, None], 40, axis=1)
    spread = alike + np.where(np.arange(40) % 2, 1.0, -1.0)
    narrow, wide = (standing(differences, documents_SD=each) for each in (alike, spread))
    assert narrow.word == WORSE and wide.word == UNDECIDED
    assert narrow.documents < 1e-12 and wide.documents == pytest.approx(1 / math.sqrt(39))


def test_noise_is_pooled_about_each_groups_own_mean():
    noise = Noise.pooled([[1.0, 3.0], [11.0, 13.0], [5.0]])
    assert noise == Noise(math.sqrt(2.0), 2) and Noise.pooled([[1.0]]) is None
    assert Noise.of_runs([[0.0, 2.0]]).deviation == pytest.approx(2.0)
    joined = Noise(1.0, 18).joined([0.0, 2.0])
    assert joined.freedom == 19 and joined.deviation == pytest.approx(math.sqrt((18 + 2) / 19))
    assert Noise(1.0, 20).joined([0.0, 50.0, 100.0]) == Noise(50.0, 2)  # what is much noisier stands alone


def test_without_earlier_runs_the_pairs_own_noise_decides_and_one_pair_cannot():
    assert standing([-1.0, -1.1, -0.9]).word == BETTER and standing([-1.0, 1.1, 0.9]).more == 1
    with pytest.raises(ValueError, match="two or more"):
        standing([1.0])
    assert standing([-9.0], noise=Noise(1.0, 20)).word == BETTER

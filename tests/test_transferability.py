"""Transferability: each score against its definition, written out; what they tell apart; intervals; errors."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import TINY

from pretrain.core.errors import PretrainError
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.evaluation.probes.transferability import MEASURES, Transferability, evidence


def sample(count=90, width=6, classes=3, apart=1.0, seed=0):
    """Features of classes of unequal size and spread, some of them correlated."""
    rng = np.random.default_rng(seed)
    label = np.minimum(rng.integers(0, classes + 1, count), classes - 1)
    label[: 2 * classes] = np.repeat(np.arange(classes), 2)
    centres = apart * rng.normal(size=(classes, width))
    f = centres[label] + (1 + 0.3 * label[:, None]) * rng.normal(size=(count, width)) @ rng.normal(size=(width, width))
    return f + 2.0, label


def score(name, f, label, **fields):
    return MEASURES[name](Transferability(**fields), np.asarray(f, float), label)


def means(f, label):
    return np.stack([f[label == c].mean(0) for c in label])


def test_the_h_score_is_the_trace_of_the_paper():
    f, label = sample()
    expected = np.trace(np.linalg.inv(np.cov(f.T)) @ np.cov(means(f, label).T))
    assert score("h_score", f, label) == pytest.approx(expected, rel=1e-9)
    # It does not change with an invertible map of the features, and is at most the number of classes less one.
    turned = f @ np.random.default_rng(1).normal(size=(6, 6)) * 1e3 - 7
    assert score("h_score", turned, label) == pytest.approx(expected, rel=1e-6)
    assert 0 < expected < 2 and score("h_score", np.eye(3)[label], label) == pytest.approx(2)
    twice = np.concatenate([f, f[:, :2]], axis=1)  # a singular covariance
    assert score("h_score", twice, label) == pytest.approx(expected, rel=1e-6)


def test_the_shrunk_h_score_is_that_of_ledoit_and_wolf():
    from sklearn.covariance import LedoitWolf

    for width in (6, 200):
        f, label = sample(width=width)
        fitted = LedoitWolf().fit(f)
        inverse = np.linalg.inv(fitted.covariance_)
        expected = (1 - fitted.shrinkage_) * np.trace(inverse @ np.cov(means(f, label).T))
        assert score("h_score_shrunk", f, label) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("width", [5, 120])
def test_logme_is_the_log_density_of_the_labels_and_near_its_maximum(width):
    from scipy.optimize import minimize
    from scipy.stats import multivariate_normal

    f, label = sample(count=60, width=width)
    f[:, width // 2 :] *= 0.01
    u, s, _ = np.linalg.svd(f, full_matrices=False)
    found = []
    for c in range(3):
        y = (label == c).astype(float)

        def density(logs, y=y):
            alpha, beta = np.exp(logs)
            covariance = np.eye(60) / beta + f @ f.T / alpha
            return multivariate_normal(np.zeros(60), covariance).logpdf(y) / 60

        value, alpha, beta = evidence(u, s**2, width, label == c)
        assert value == pytest.approx(density(np.log([alpha, beta])), rel=1e-7)
        if width < 60:  # with more features than documents the evidence has no clear maximum
            best = minimize(lambda logs, density=density: -density(logs), np.log([alpha, beta]), method="Nelder-Mead")
            assert value == pytest.approx(-best.fun, abs=2e-3)
        found.append(value)
    assert score("logme", f, label) == pytest.approx(np.mean(found))


def test_transrate_is_the_difference_of_log_determinants():
    f, label = sample(width=12)
    z = f - f.mean(0)

    def rate(x, epsilon):
        return np.linalg.slogdet(np.eye(12) + x.T @ x / (len(x) * epsilon))[1] / 2

    for epsilon in (1e-4, 0.5):
        expected = rate(z, epsilon) - np.mean([rate(z[label == c], epsilon) for c in range(3)])
        assert score("transrate", f, label, epsilon=epsilon) == pytest.approx(expected)


def test_gbc_is_the_overlap_of_gaussians():
    f, label = sample(width=4, apart=0.5)
    expected = 0.0
    for a in range(3):
        for b in range(3):
            if a != b:
                (m1, v1), (m2, v2) = ((f[label == c].mean(0), f[label == c].var(0).mean()) for c in (a, b))
                s1, s2, s = v1 * np.eye(4), v2 * np.eye(4), (v1 + v2) / 2 * np.eye(4)
                gap = m1 - m2
                distance = gap @ np.linalg.inv(s) @ gap / 8
                distance += np.log(np.linalg.det(s) / np.sqrt(np.linalg.det(s1) * np.linalg.det(s2))) / 2
                expected -= np.exp(-distance)
    assert score("gbc", f, label) == pytest.approx(expected)
    assert score("gbc", np.zeros((6, 2)), np.array([0, 0, 0, 1, 1, 1])) == pytest.approx(-2)
    # The integral of the root of the product of two densities, which the coefficient is.
    x = np.linspace(-30, 30, 20001)
    one, label = np.concatenate([[-1.0, 1.0], [2.0, 8.0]])[:, None], np.array([0, 0, 1, 1])
    p, q = (np.exp(-((x - m) ** 2) / 2 / v) / np.sqrt(2 * np.pi * v) for m, v in ((0, 1), (5, 9)))
    assert score("gbc", one, label) == pytest.approx(-2 * np.trapezoid(np.sqrt(p * q), x), rel=1e-6)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_knn_is_scikit_learn_s_with_the_document_left_out(neighbours):
    from sklearn.model_selection import LeaveOneOut, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    f, label = sample()
    expected = cross_val_score(KNeighborsClassifier(neighbours), f, label, cv=LeaveOneOut()).mean()
    assert score("knn", f, label, neighbours=neighbours) == pytest.approx(expected)


def test_msc_and_parc_are_their_definitions():
    from scipy.stats import spearmanr

    f, label = sample(count=40)
    unit = f / np.linalg.norm(f, axis=1, keepdims=True)
    distance, silhouettes = 1 - unit @ unit.T, []
    for i in range(40):
        own = [j for j in range(40) if label[j] == label[i] and j != i]
        near, far = distance[i, own].mean(), min(distance[i, label == c].mean() for c in range(3) if c != label[i])
        silhouettes.append((far - near) / max(near, far))
    assert score("msc", f, label) == pytest.approx(np.mean(silhouettes))
    f[:, 1] = 3.0  # a feature that says nothing
    z = (f - f.mean(0)) / np.where(f.std(0) > 0, f.std(0), 1)
    one_hot, below = np.eye(3)[label], np.tril_indices(40, -1)
    expected = spearmanr((1 - np.corrcoef(z))[below], np.round(1 - np.corrcoef(one_hot), 9)[below]).statistic
    assert score("parc", f, label) == pytest.approx(expected)


@pytest.mark.parametrize("name", MEASURES)
def test_classes_that_lie_apart_score_higher(name):
    near, far = (sample(apart=a)[0] for a in (0.2, 20.0))
    label = sample()[1]
    assert score(name, far, label) > score(name, near, label) + 1e-3


def test_intervals_are_the_jackknife_s_and_cover_what_the_mean_s_do():
    f, label = sample(count=200)
    method = Transferability(groups=5, seed=3)
    found = method.measure(f, label)
    assert tuple(found.metrics) == method.measures and set(found.intervals) == set(method.measures)
    for name, (low, high) in found.intervals.items():
        assert low < found.metrics[name] < high and low + high == pytest.approx(2 * found.metrics[name])
    accuracy = found.metrics["knn"]
    width = np.sqrt(accuracy * (1 - accuracy) / 200)
    low, high = Transferability(groups=100, measures=("knn",)).measure(f, label).intervals["knn"]
    assert 0.5 * width < (high - low) / 3.92 < 2.5 * width


def test_components_are_the_principal_ones():
    f, label = sample(width=8)
    _, _, vt = np.linalg.svd(f - f.mean(0), full_matrices=False)
    cut = (f - f.mean(0)) @ vt[:3].T
    found = Transferability(components=3, measures=("h_score", "logme")).measure(f, label).metrics
    assert found["h_score"] == pytest.approx(score("h_score", cut, label))
    assert found["logme"] == pytest.approx(score("logme", cut, label))
    assert Transferability(components=50, measures=("h_score",)).measure(f, label).metrics["h_score"] == (
        pytest.approx(score("h_score", f, label))
    )


@pytest.mark.parametrize("family", TINY)
def test_every_family_is_measured_on_real_documents(tiny, prepared, family):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    documents = list(Corpus(prepared / "corpus").documents("train"))[:50]
    odd = [{"text": "", "domain": "python"}, {"text": "a", "domain": None}, {"text": "b", "domain": "rare"}]
    method = Transferability(length=16, smallest=5, groups=2)
    model = tiny(family, vocab_size=512)
    model.train()
    found = method(model, tokenizer, [*documents, *odd])
    assert model.training
    assert found.metrics["transferability_documents"] == 50 and found.metrics["transferability_skipped"] == 3
    assert found.metrics["transferability_classes"] == 2 and np.isfinite(list(found.metrics.values())).all()
    assert 0 <= found.metrics["h_score"] <= 1 + 1e-9 and method.columns == ("domain",)


def test_what_cannot_be_measured_is_refused(tiny, prepared):
    tokenizer, model = load_tokenizer(prepared / "tokenizer"), tiny(vocab_size=512)
    for fields, said in (
        ({"length": 0}, "length 0: accepted: 1 or more"),
        ({"groups": 1}, "groups 1: accepted: 2 or more"),
        ({"smallest": 1}, "smallest 1: accepted: 2 or more"),
        ({"neighbours": 10}, r"neighbours 10: accepted: fewer than smallest \(10\)"),
        ({"epsilon": 0.0}, "epsilon 0.0: accepted: above 0"),
        ({"measures": ("h_scores",)}, "h_score"),
    ):
        with pytest.raises(PretrainError, match=said):
            Transferability(**fields)
    documents = [{"text": f"text {i}", "domain": "ab"[i == 0]} for i in range(30)]
    with pytest.raises(PretrainError, match="label 'domain' has 1 values in 10 documents or more; accepted: a column"):
        Transferability()(model, tokenizer, documents)
    with pytest.raises(PretrainError, match="label 'shape' has 0 values"):
        Transferability(label="shape")(model, tokenizer, documents)

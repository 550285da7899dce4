"""NMTune: its three terms and its spectrum by their formulas, what it trains, and the noise that it is against."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from pretrain.core.errors import PretrainError
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.data.rewriting.label_noise import LabelNoise
from pretrain.evaluation.probes.nmtune import NMTune, penalties, spectral


def test_the_terms_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    f, z = rng.normal(size=(9, 4)), rng.normal(size=(9, 4))
    centred = z - z.mean(0)
    covariance = centred.T @ centred / 8
    apart = sum(covariance[i, j] ** 2 for i in range(4) for j in range(4) if i != j) / 4
    singular = np.sqrt(np.linalg.eigvalsh(z.T @ z))[::-1]
    lengths = [np.sqrt((x**2).sum(1, keepdims=True)) for x in (f, z)]  # each document's
    wanted = {
        "consistency": np.mean((f / lengths[0] - z / lengths[1]) ** 2),
        "covariance": apart,
        "dominance": -singular[0] / singular.sum(),
    }
    found = penalties(torch.from_numpy(f), torch.from_numpy(z))
    assert {name: float(value) for name, value in found.items()} == pytest.approx(wanted)


def test_consistency_sees_no_scale_and_a_flat_spectrum_has_the_largest_entropy():
    f = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert penalties(f, 5 * f)["consistency"] < 1e-24
    assert spectral(torch.eye(4, dtype=torch.float64)) == pytest.approx({"sve": math.log(4), "lsvr": math.log(4)})
    assert spectral(torch.ones(5, 3, dtype=torch.float64)) == pytest.approx({"sve": 0.0, "lsvr": 0.0}, abs=1e-6)


@pytest.fixture
def data():
    """Three classes that features tell apart."""
    source = torch.Generator().manual_seed(1)
    label = torch.randint(0, 3, (90,), generator=source)
    f = torch.randn(90, 6, generator=source, dtype=torch.float64)
    f[torch.arange(90), label] += 3
    return f, label


def test_without_weight_it_is_the_network_s_cross_entropy_alone(data):
    """By another loop: the same start, the gradient of the cross-entropy, AdamW."""
    f, label = data
    start = NMTune(steps=1, lr=1e-30, weight=0).fit(f, label, 3)
    net = torch.nn.Sequential(*start[0], start[1]).requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(f), label).backward()
        optimizer.step()
    torch.testing.assert_close(NMTune(steps=5, lr=1e-2, weight=0).fit(f, label, 3)(f), net(f).detach())


def test_the_terms_make_the_largest_singular_value_dominate_and_keep_z_near_f(data):
    f, label = data
    plain, regularised = (NMTune(steps=150, lr=1e-2, weight=w).fit(f, label, 3) for w in (0.0, 0.3))
    a, b = (penalties(f, head[0](f)) for head in (plain, regularised))
    assert sum(b.values()) < sum(a.values()) - 0.2
    assert (regularised(f).argmax(-1) == label).double().mean() > 0.8


def test_it_tells_domains_of_real_documents_and_gives_the_model_back(tiny, prepared):
    from pretrain.corpus.store import Corpus

    documents = [d for split in ("train", "validation") for d in Corpus(prepared / "corpus").documents(split)][:80]
    model, tokenizer = tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        first, measured = (NMTune(steps=n, resamples=50)(model, tokenizer, documents) for n in (1, 100))
    assert measured.metrics["nmtune_loss"] < first.metrics["nmtune_loss"] - 0.02
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    low, high = measured.intervals["nmtune_loss"]
    assert low < measured.metrics["nmtune_loss"] < high


def test_documents_that_leave_nothing_to_tell_apart_are_one_line(tiny, prepared):
    with pytest.raises(PretrainError, match="nmtune: label 'domain' has . values in .* accepted: two values"):
        NMTune()(tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer"), [{"text": "x = 1", "domain": "a"}] * 3)


def corpus(count=400):
    return Dataset.from_list([{"text": f"document {i}", "label": "abc"[i % 3], "number": i} for i in range(count)])


def test_label_noise_changes_a_share_of_labels_to_any_other_and_nothing_else():
    before, after = corpus(3000), LabelNoise(rate=0.3)(corpus(3000))
    pairs = list(zip(before["label"][:], after["label"][:], strict=True))
    changed = [pair for pair in pairs if pair[0] != pair[1]]
    assert len(changed) / len(pairs) == pytest.approx(0.3, abs=0.03)
    assert {changed.count(kind) > len(changed) / 9 for kind in set(changed)} == {True} and len(set(changed)) == 6
    assert before["text"][:] == after["text"][:]


def test_more_noise_flips_what_less_does_and_none_flips_nothing():
    flips = [
        {i for i, (a, b) in enumerate(zip(corpus()["label"][:], LabelNoise(rate=r)(corpus())["label"][:], strict=True)) if a != b}
        for r in (0.0, 0.1, 0.3, 1.0)
    ]  # fmt: skip
    assert not flips[0] and flips[1] < flips[2] < flips[3] == set(range(400))

"""Calibration: the paper's errors from plain logits and by scikit-learn, positions, intervals, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.evaluation._predictions import Predictions
from pretrain.evaluation.likelihood.calibration import Calibration
from pretrain.evaluation.likelihood.held_out import HeldOut


@pytest.fixture
def tokenizer(prepared):
    return load_tokenizer(prepared / "tokenizer")


@pytest.fixture
def documents(prepared):
    return [d | {"text": d["text"][:300]} for d in Corpus(prepared / "corpus").documents("test")]


@pytest.fixture
def sharp(tiny):
    """A model whose random predictions are sure of themselves, each by another amount."""

    def make(family="llama", **fields):
        model = tiny(family, vocab_size=512, **fields)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(40)
        return model

    return make


def plain(model, tokenizer, text):
    ids = [tokenizer.bos_token_id, *encode(tokenizer, [text])[0].tolist(), tokenizer.eos_token_id]
    with torch.no_grad():
        p = model(torch.tensor([ids])).logits[0, :-1].double().softmax(-1)
    sure, said = p.max(-1)
    nll = -p[torch.arange(len(ids) - 1), ids[1:]].log()
    return sure.numpy(), (said == torch.tensor(ids[1:])).numpy(), nll.numpy()


def test_the_errors_are_the_paper_s_from_plain_logits(sharp, tokenizer, documents):
    model = sharp(max_position_embeddings=512)
    method = Calibration(length=400, positions=(1, 7, 20, 5000), resamples=200)
    model.train()
    found = method(model, tokenizer, documents)
    assert model.training
    model.eval()
    each = [plain(model, tokenizer, d["text"]) for d in documents]
    sure, right, nll = (np.concatenate(part) for part in zip(*each, strict=True))
    place = np.concatenate([np.arange(len(part[0])) for part in each])
    gaps, ece = [], 0.0
    for m in range(1, 16):
        inside = (sure > (m - 1) / 15) & (sure <= m / 15)
        name = f"bin_{m:02d}"
        if not inside.any():
            assert f"{name}_share" not in found.metrics
            continue
        gaps.append(abs(right[inside].mean() - sure[inside].mean()))
        ece += inside.mean() * gaps[-1]
        for part, value in (("accuracy", right), ("confidence", sure)):
            assert found.metrics[f"{name}_{part}"] == pytest.approx(value[inside].mean(), abs=1e-5)
        assert found.metrics[f"{name}_share"] == pytest.approx(inside.mean())
    assert len(gaps) > 8
    assert found.metrics["ece"] == pytest.approx(ece, abs=1e-5)
    assert found.metrics["mce"] == pytest.approx(max(gaps), abs=1e-5)
    assert found.metrics["token_accuracy"] == pytest.approx(right.mean())
    assert found.metrics["token_confidence"] == pytest.approx(sure.mean(), abs=1e-5)
    for low, high in ((1, 7), (7, 20), (20, 5000)):
        inside = (place >= low) & (place < high)
        assert found.metrics[f"perplexity@{low}"] == pytest.approx(math.exp(nll[inside].mean()), rel=1e-4)
    assert "perplexity@5000" not in found.metrics and "perplexity@0" not in found.metrics
    for name, (low, high) in found.intervals.items():
        # The largest gap and the summed gaps of fewer different documents are larger.
        assert low - 1e-9 <= found.metrics[name] <= high + 1e-9 or name in ("mce", "ece")
    assert {"ece", "mce", "token_accuracy", "token_confidence", "perplexity@7"} <= set(found.intervals)


def given(sure, right):
    """What `_measures` makes of given predictions."""
    method = Calibration(positions=())
    said = Predictions(np.zeros(len(sure)), np.asarray(sure, float), np.asarray(right, bool))
    return {n: v[0] for n, v in method._measures(method._sums(said, 0)[None]).items() if np.isfinite(v[0])}


def test_bins_are_scikit_learn_s():
    from sklearn.calibration import calibration_curve

    rng = np.random.default_rng(0)
    sure = np.concatenate([rng.random(500), np.arange(1, 16) / 15])
    right = rng.random(515) < sure**2
    accuracy, confidence = calibration_curve(right, sure, n_bins=15, strategy="uniform")
    found = given(sure, right)
    assert [found[f"bin_{m:02d}_accuracy"] for m in range(1, 16)] == pytest.approx(accuracy)
    assert [found[f"bin_{m:02d}_confidence"] for m in range(1, 16)] == pytest.approx(confidence)


def test_the_calibrated_have_no_error_and_the_overconfident_all():
    assert given([1.0] * 4, [True] * 4)["ece"] == 0 and given([1.0] * 4, [False] * 4)["ece"] == 1
    assert given([0.75] * 4, [True, True, True, False])["ece"] == pytest.approx(0)
    mixed = given([0.75] * 4 + [0.5] * 2, [True] * 4 + [False] * 2)
    assert mixed["ece"] == pytest.approx((4 * 0.25 + 2 * 0.5) / 6) and mixed["mce"] == pytest.approx(0.5)


def test_one_bucket_has_the_perplexity_of_the_held_out_evaluation(tiny, tokenizer, documents):
    for family, length in (("llama", 64), ("gpt2", 0)):
        model = tiny(family, vocab_size=512)
        found = Calibration(length=length, positions=(0,))(model, tokenizer, documents)
        expected = HeldOut(length=length)(model, tokenizer, documents)
        assert found.metrics["perplexity@0"] == pytest.approx(expected.metrics["perplexity"], rel=1e-4)
        for name in found.domains:
            assert set(found.domains[name]) == {"ece", "token_accuracy"}
        assert set(found.domains) == set(expected.domains)


def test_what_cannot_be_measured_is_refused(tiny, tokenizer, documents):
    with pytest.raises(PretrainError, match="bins 0: accepted: 1 or more"):
        Calibration(bins=0)
    for positions, words in {
        (4, 4): "numbers that rise",
        (5, 1): "numbers that rise",
        (-1, 3): "each 0 or more",
    }.items():
        with pytest.raises(PretrainError, match=rf"positions .*: accepted: .*{words}"):
            Calibration(positions=positions)
    with pytest.raises(PretrainError, match="predicts no next token; accepted: a causal language model"):
        Calibration()(tiny("bert", vocab_size=512), tokenizer, documents)
    with pytest.raises(PretrainError, match="stride 9, length 8: accepted"):
        Calibration(length=8, stride=9)(tiny(vocab_size=512), tokenizer, documents)

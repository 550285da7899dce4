"""PreSelect: predictive strength by hand and by Kendall's tau, labels, measured ability, and what the classifier keeps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.corpus.store import write_corpus
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.data._classifier import Classifier
from pretrain.data._work import desk, working
from pretrain.data.selection import _scores, preselect
from pretrain.data.selection.preselect import Preselect, labels, strengths


@given(st.integers(2, 7), st.integers(0, 2**32 - 1))
def test_strength_is_the_share_of_pairs_in_order(models, seed):
    rng = np.random.default_rng(seed)
    loss_MN, ability = rng.normal(size=(models, 5)), tuple(rng.permutation(models).astype(float))
    found = strengths(loss_MN, ability)
    for n in range(5):
        right = sum(
            (ability[i] > ability[j]) == (loss_MN[i, n] < loss_MN[j, n]) for i in range(models) for j in range(i)
        )
        assert found[n] == pytest.approx(right / math.comb(models, 2))
        assert 2 * found[n] - 1 == pytest.approx(kendalltau(ability, -loss_MN[:, n]).statistic)


def test_strength_is_blind_to_the_normaliser_and_counts_ties_as_wrong():
    loss_MN = np.array([[3.0, 1.0, 2.0], [2.0, 2.0, 2.0], [1.0, 3.0, 1.0]])
    assert strengths(loss_MN, (1, 2, 3)).tolist() == pytest.approx([1, 0, 2 / 3])
    assert strengths(loss_MN, (3, 2, 1)).tolist() == pytest.approx([0, 1, 0])
    assert strengths(loss_MN / [7, 11, 13], (1, 2, 3)).tolist() == pytest.approx([1, 0, 2 / 3])


def test_the_highest_strength_is_positive_and_as_many_of_the_lowest_are_negative():
    positive, negative = labels(np.array([1, 0.5, 0, 1, 0.9, 0.2]))
    assert positive.tolist() == [0, 3]
    assert negative.tolist() == [2, 5]
    positive, negative = labels(np.array([1, 1, 1, 0.5]))
    assert (positive.tolist(), negative.tolist()) == ([0, 1, 2], [3])
    positive, negative = labels(np.array([0.5, 0.8, 0.1]))
    assert (positive.tolist(), negative.tolist()) == ([1], [2])


def test_the_classifier_tells_texts_apart_by_words_and_pairs_of_words():
    good = [f"the cat sat on mat {i}" for i in range(40)]
    bad = [f"sat the mat cat on {i}" for i in range(40)]
    corpus = Dataset.from_dict({"text": ["the cat sat on mat x", "sat the mat cat on x"]})
    pairs, words = Classifier(epochs=3, ngrams=2, seed=0), Classifier(epochs=3, ngrams=1, seed=0)
    pairs.fit(good, bad)
    words.fit(good, bad)
    score_N, size_N = pairs.scores(corpus)
    assert score_N[0] > 0 > score_N[1]
    assert size_N.tolist() == [20, 20]
    assert words.scores(corpus)[0][0] == pytest.approx(words.scores(corpus)[0][1], abs=1e-6)


@pytest.fixture(scope="module")
def corpus(stories):
    return Dataset.from_list([s | {"text": s["text"][:200], "number": i} for i, s in enumerate(stories)])


@pytest.fixture(scope="module")
def models(tiny, prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = load_tokenizer(prepared / "tokenizer")
    for seed in range(3):
        checkpoint.save(tiny(vocab_size=512, seed=seed), tokenizer, folder / str(seed))
    return tuple(str(folder / str(seed)) for seed in range(3))


def plain_nats(folder, text):
    model, tokenizer = checkpoint.load(folder)
    tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])  # fmt: skip
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss) * (tokens.shape[1] - 1)


def test_ability_is_measured_as_bits_per_byte_on_held_out_documents(models, stories, tmp_path):
    short = [s | {"text": s["text"][:150]} for s in stories]
    write_corpus(short, tmp_path / "target", validation=0.1, test=0.1, near_duplicates=None)
    from pretrain.corpus.store import Corpus

    held_out = [d for d in Corpus(tmp_path / "target").documents("validation") if d["domain"] == "python"]
    with desk() as here:
        found = Preselect(models, str(tmp_path / "target"), domains=("python",)).abilities(here)
    size = sum(len(d["text"].encode()) for d in held_out)
    wanted = [-sum(plain_nats(m, d["text"]) for d in held_out) / math.log(2) / size for m in models]
    assert found == pytest.approx(wanted, rel=1e-4)
    with desk() as here, pytest.raises(PretrainError, match=r"domains \['nowhere'\]: no held-out documents"):
        Preselect(models, str(tmp_path / "target"), domains=("nowhere",)).abilities(here)


def test_the_highest_share_of_characters_is_kept_in_order(corpus, models, tmp_path):
    method = Preselect(models, ability=(1.0, 2.0, 3.0), ratio=0.3)
    with working(tmp_path) as here:
        kept = method(corpus)
    chosen = kept["number"][:]
    size_N = np.array([len(t) for t in corpus["text"]])
    assert chosen == sorted(set(chosen))
    assert kept.column_names == corpus.column_names
    assert 0.3 * size_N.sum() <= size_N[chosen].sum() < 0.3 * size_N.sum() + 200
    assert method(corpus)["number"][:] == chosen
    (told,) = here.reports
    assert sum(told["strength_counts"].values()) == len(corpus)
    assert told["labelled"] == told["strength_counts"].get("1", 0) > 0


def test_documents_on_which_better_models_do_better_are_kept(models, monkeypatch):
    """The losses are given: on `clean` words they fall with ability, on `noisy` ones they rise."""
    rng = np.random.default_rng(0)
    clean, noisy = ["lorem", "ipsum", "dolor"], ["spam", "eggs", "ham"]
    texts = [" ".join(rng.choice(noisy if i % 3 else clean, 12)) for i in range(150)]
    corpus = Dataset.from_dict({"text": texts})

    def likelihoods(folder, sample, here, **_):
        sign = np.array([-1 if t.split()[0] in clean else 1 for t in sample["text"]])
        return _scores.Likelihoods(100 + sign * models.index(folder), np.ones(len(sample), dtype=int))

    monkeypatch.setattr(preselect, "likelihoods", likelihoods)
    kept = Preselect(models, ability=(1.0, 2.0, 3.0), ratio=0.3, documents=60)(corpus)
    assert all(t.split()[0] in clean for t in kept["text"])
    turned = Preselect(models, ability=(3.0, 2.0, 1.0), ratio=0.3, documents=60)(corpus)
    assert all(t.split()[0] in noisy for t in turned["text"])


def test_bad_fields_are_refused(corpus, models):
    with pytest.raises(PretrainError, match=r"preselect: models \['a'\]: accepted: two or more"):
        Preselect(("a",), ability=(1.0,))
    with pytest.raises(PretrainError, match="either ability, a number for each model, or target"):
        Preselect(("a", "b"))
    with pytest.raises(PretrainError, match="either ability, a number for each model, or target"):
        Preselect(("a", "b"), "c", ability=(1.0, 2.0))
    with pytest.raises(PretrainError, match=r"ability \[1.0\]: accepted: 2 numbers"):
        Preselect(("a", "b"), ability=(1.0,))
    with pytest.raises(PretrainError, match="accepted: a different number for each model"):
        Preselect(models, ability=(1.0, 1.0, 2.0))(corpus)
    with pytest.raises(PretrainError, match="all of 120 documents rank the models alike"):
        Preselect((models[0], models[0]), ability=(1.0, 2.0))(corpus)

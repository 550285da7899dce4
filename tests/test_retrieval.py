"""Retrieval by halves: ranks, the measures against scikit-learn, ties, skipped documents, every family."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import TINY

from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.evaluation.probes.retrieval import Retrieval, ranks, scores


def test_ranks_and_measures_are_those_of_scikit_learn():
    from sklearn.metrics import ndcg_score, top_k_accuracy_score
    from sklearn.metrics.pairwise import cosine_similarity

    rng = np.random.default_rng(0)
    passage = rng.normal(size=(60, 4))
    query = passage + 0.8 * rng.normal(size=(60, 4))
    cosine = cosine_similarity(query, passage)
    rank = ranks(query, passage)
    assert rank.tolist() == [int((row > row[i]).sum()) + 1 for i, row in enumerate(cosine)]
    names, values = scores(rank)
    mean = dict(zip(names, values.mean(0), strict=True))
    assert mean["ndcg@10"] == pytest.approx(ndcg_score(np.eye(60), cosine, k=10))
    for k in (1, 10):
        expected = top_k_accuracy_score(np.arange(60), cosine, k=k, labels=np.arange(60))
        assert mean[f"recall@{k}"] == pytest.approx(expected)
    assert mean["mrr@10"] == pytest.approx(np.mean([1 / r if r <= 10 else 0 for r in rank]))


def test_embeddings_that_are_all_the_same_find_nothing():
    same = np.ones((30, 4)) + 1e-9 * np.random.default_rng(0).normal(size=(30, 4))
    assert ranks(same, same).tolist() == [30] * 30
    assert ranks(np.zeros((3, 2)), np.zeros((3, 2))).tolist() == [3, 3, 3]


@pytest.mark.parametrize("family", TINY)
def test_every_family_finds_repeated_text_and_counts_what_it_skips(tiny, prepared, family):
    tokenizer, model = load_tokenizer(prepared / "tokenizer"), tiny(family, vocab_size=512)
    documents = []
    for document in Corpus(prepared / "corpus").documents("test"):
        ids = encode(tokenizer, [document["text"]])[0][:20].tolist()
        again = tokenizer.decode(ids)
        if encode(tokenizer, [again + again])[0].tolist() == ids + ids:
            documents.append({"text": again + again})
    found = Retrieval(resamples=100)(model, tokenizer, [*documents, {"text": ""}, {"text": "short"}])
    assert found.metrics["recall@1"] == found.metrics["mrr@10"] == found.metrics["ndcg@10"] == 1.0
    assert found.metrics["retrieval_documents"] == len(documents) > 3 and found.metrics["retrieval_skipped"] == 2
    assert set(found.intervals) == {"mrr@10", "recall@1", "recall@10", "ndcg@10"}


def test_halves_are_cut_to_the_length(tiny, prepared, monkeypatch):
    taken = []

    def features(model, pieces, framing, **more):
        taken.extend(pieces)
        return np.eye(len(pieces))

    monkeypatch.setattr("pretrain.evaluation.probes.retrieval.text_features", features)
    tokenizer = load_tokenizer(prepared / "tokenizer")
    text = "one two three four five six seven eight nine ten eleven twelve"
    ids = encode(tokenizer, [text])[0].tolist()
    Retrieval(length=5, shortest=2)(tiny(vocab_size=512), tokenizer, [{"text": text}] * 2)
    half = len(ids) // 2
    assert taken[0].tolist() == ids[:5] and taken[2].tolist() == ids[half : half + 5]


def test_what_cannot_be_measured_is_refused(tiny, prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    with pytest.raises(PretrainError, match="0 of 2 documents have 16 tokens; accepted"):
        Retrieval()(tiny(vocab_size=512), tokenizer, [{"text": "a"}, {"text": ""}])
    with pytest.raises(PretrainError, match="pooling 'cls': a causal model's"):
        Retrieval(pooling="cls", shortest=1)(tiny(vocab_size=512), tokenizer, [{"text": "a b c"}, {"text": "d e f"}])
    with pytest.raises(PretrainError, match="shortest 0: accepted: 1 or more"):
        Retrieval(shortest=0)

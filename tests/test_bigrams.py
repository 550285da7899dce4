"""Bigram counts: probabilities that add up, no pair across documents, and the numbers of the held-out evaluation."""

from __future__ import annotations

import math
import time
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.core.errors import PretrainError
from pretrain.corpus import bigrams
from pretrain.corpus.bigrams import Bigrams
from pretrain.corpus.shards import Shards
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.evaluation.likelihood._bigrams import bigram_line
from pretrain.evaluation.likelihood.held_out import HeldOut


def split(documents, vocabulary):
    flat = np.array([token for document in documents for token in document], np.uint16)
    offsets = np.cumsum([0, *map(len, documents)])
    return SimpleNamespace(flat=flat, offsets_N1=offsets, tokens=len(flat), info={"vocabulary": vocabulary})


def counted(documents, vocabulary):
    return Bigrams.of(split(documents, vocabulary))


def test_the_probabilities_are_those_worked_out_by_hand():
    # Pairs: 01 twice, 12 and 11 once: D = 2 / (2 + 2 · 1). 1 follows two different tokens, 2 one.
    made = counted([[0, 1, 2], [0, 1, 1]], 4)
    assert made.discount == 0.5
    assert made.continuation_V() == pytest.approx([1 / 12, 1.5 / 3 + 1 / 12, 0.5 / 3 + 1 / 12, 1 / 12])
    expected = {(0, 1): 1.5 / 2 + 0.25 * 7 / 12, (1, 2): 0.5 / 2 + 0.5 * 1 / 4, (1, 3): 0.5 / 12, (3, 1): 7 / 12}
    for (before, token), probability in expected.items():
        assert made.probability(np.array([before]), np.array([token])) == pytest.approx(probability)
    nll = made.nll([np.array([0, 1, 2]), np.array([1]), np.array([], np.int64), np.array([3, 1])])
    assert nll == pytest.approx([-math.log(expected[0, 1]) - math.log(expected[1, 2]), 0, 0, -math.log(7 / 12)])


DOCUMENTS = st.lists(st.lists(st.integers(0, 8), max_size=12), max_size=8)


@settings(max_examples=150)
@given(DOCUMENTS)
def test_probabilities_sum_to_one_after_every_token_and_are_above_zero(documents):
    made = counted(documents, 10)
    before_TT, token_TT = np.meshgrid(np.arange(10), np.arange(10), indexing="ij")
    probability_TT = made.probability(before_TT.ravel(), token_TT.ravel()).reshape(10, 10)
    assert probability_TT.sum(1) == pytest.approx(np.ones(10)) and probability_TT.min() > 0


@settings(max_examples=150)
@given(DOCUMENTS, st.integers(1, 9))
def test_pairs_lie_inside_documents_wherever_the_counting_is_cut(documents, chunk):
    expected = np.zeros((9, 9), int)
    for document in documents:
        for pair in pairwise(document):
            expected[pair] += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bigrams, "CHUNK_TOKENS", chunk)
        assert (counted(documents, 9).counts_VV.toarray() == expected).all()


def test_as_many_tokens_are_counted_as_a_training_has_seen():
    documents = [[number] * 10 for number in range(100)]  # nine pairs each, all of one token
    some, more, every = (Bigrams.of(split(documents, 100), tokens).counts_VV for tokens in (205, 405, 10**6))
    assert some.sum() == 20 * 9 and more.sum() == 40 * 9 and every.sum() == 100 * 9
    kept = some.diagonal() > 0
    assert kept.sum() == 20 and not kept[:20].all() and (more.diagonal()[kept] == 9).all()
    assert Bigrams.of(split(documents, 100), 1).counts_VV.sum() == 9


def test_a_token_beyond_the_vocabulary_is_refused():
    with pytest.raises(PretrainError, match="token 4: accepted: 0 to 3, the vocabulary of the counts"):
        counted([[0, 1]], 4).nll([np.array([0, 4, 1])])


def test_millions_of_tokens_are_counted_in_seconds():
    rng = np.random.default_rng(0)
    documents = np.minimum(rng.zipf(1.3, (3000, 1000)) - 1, 4095)
    started = time.perf_counter()
    assert np.isfinite(counted(documents.tolist(), 4096).nll(list(documents))).all()
    assert time.perf_counter() - started < 6


def test_the_line_is_of_the_targets_and_bytes_of_the_held_out_evaluation(tiny, prepared):
    tokenizer, train = load_tokenizer(prepared / "tokenizer"), Shards(prepared / "tokens" / "train")
    documents = list(Corpus(prepared / "corpus").documents("test"))
    line, model = (
        bigram_line(train, tokenizer, documents),
        HeldOut(length=64)(tiny(vocab_size=512), tokenizer, documents),
    )
    same = ("digest", "domain", "targets", "bytes")
    assert [[row[k] for k in same] for row in line.documents] == [[row[k] for k in same] for row in model.documents]
    shards = Shards(prepared / "tokens" / "test")
    nll = Bigrams.of(train).nll([shards.document(i) for i in range(len(shards))])
    assert line.metrics["loss"] == pytest.approx(nll.sum() / (shards.tokens - len(shards)))
    assert 2 < line.metrics["loss"] < 4 < math.log(512) < model.metrics["loss"] + 0.5  # random weights

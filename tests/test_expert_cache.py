"""Hit rates of a cache of experts: LRU and Belady's policy against a search over all policies, and what is measured."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_read_me import mixed

from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.models.features import framed
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.evaluation.probes.expert_cache import ExpertCache, hits
from pretrain.surgery.experts.read_me import experts_of

TRACES = st.lists(st.integers(0, 4), max_size=14)
CAPACITIES = st.integers(1, 5)


def most_hits(trace, capacity):
    """The most that any policy has: each choice of what to drop is tried."""
    states = {frozenset(): 0}
    for expert in trace:
        after = {}
        for cached, count in states.items():
            if expert in cached:
                following = [(cached, count + 1)]
            elif len(cached) < capacity:
                following = [(cached | {expert}, count)]
            else:
                following = [(cached - {dropped} | {expert}, count) for dropped in cached]
            for state, number in following:
                after[state] = max(number, after.get(state, 0))
        states = after
    return max(states.values())


def lru_hits(trace, capacity):
    cached, count = [], 0
    for expert in trace:
        count += expert in cached
        cached = [expert, *(other for other in cached if other != expert)][:capacity]
    return count


@given(TRACES, CAPACITIES)
def test_the_whole_trace_known_has_the_most_hits_there_can_be(trace, capacity):
    assert hits(trace, capacity, None) == most_hits(trace, capacity) == hits(trace, capacity, len(trace))


@given(TRACES, CAPACITIES)
def test_nothing_known_is_lru(trace, capacity):
    assert hits(trace, capacity) == hits(trace, capacity, 0) == lru_hits(trace, capacity)


@given(TRACES, CAPACITIES, st.integers(0, 15))
def test_some_known_is_between_nothing_and_the_most(trace, capacity, lookahead):
    count = hits(trace, capacity, lookahead)
    assert 0 <= count <= most_hits(trace, capacity)
    assert count <= len(trace) - len(set(trace))  # the first of each is never there
    if capacity >= len(set(trace)):
        assert count == len(trace) - len(set(trace))


def expert_there(trace, place, capacity, lookahead):
    """Whether the expert at a place is in the cache when it is asked for, by the policy written out."""
    cached = {}
    for now in range(place):
        expert = trace[now]
        if expert not in cached and len(cached) == capacity:
            window = trace[now + 1 : now + 1 + lookahead]
            unseen = [other for other in cached if other not in window]
            dropped = min(unseen, key=cached.get) if unseen else max(cached, key=window.index)
            del cached[dropped]
        cached[expert] = now
    return trace[place] in cached


@given(TRACES, CAPACITIES, st.integers(0, 15))
def test_hits_are_those_of_the_policy_written_out(trace, capacity, lookahead):
    assert hits(trace, capacity, lookahead) == sum(
        expert_there(trace, place, capacity, lookahead) for place in range(len(trace))
    )


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a b c d e f g", "b a d c"] * 5, vocab_size=290)


def test_the_rates_are_those_of_the_routers_choices(tiny, tokenizer):
    size = len(Vocabulary.of(tokenizer).tokens)
    model = mixed(tiny, vocab_size=size)
    documents = [{"text": "a b c d e f g " * 4, "domain": "x"}, {"text": "g f d c a " * 3, "domain": "y"}]
    measured = ExpertCache(capacity=1, lookahead=4)(model, tokenizer, documents)
    rows = [ids for ids, _ in framed("test", model, tokenizer, documents, 512)]
    traces = [experts_of(model, torch.tensor([ids]))[0].tolist() for ids in rows]
    tokens = sum(map(len, traces))
    wanted = {
        name: sum(hits(trace, 1, lookahead) for trace in traces) / tokens
        for name, lookahead in (("lru", 0), ("lookahead", 4), ("belady", None))
    }
    assert {name: measured.metrics[f"hit_rate_{name}"] for name in wanted} == wanted
    stays = sum(a == b for trace in traces for a, b in pairwise(trace)) / (tokens - 2)
    assert measured.metrics["stays"] == pytest.approx(stays)
    assert measured.metrics["experts_used"] == len({expert for trace in traces for expert in trace})
    assert measured.metrics["hit_rate_lru"] == pytest.approx(stays * (tokens - 2) / tokens)  # of a cache of one
    assert set(measured.domains) == {"x", "y"}
    whole = ExpertCache(capacity=3)(model, tokenizer, documents).metrics
    assert whole["hit_rate_lru"] == whole["hit_rate_belady"] > measured.metrics["hit_rate_lru"]


def test_a_model_without_a_router_is_refused(tiny, tokenizer):
    with pytest.raises(
        PretrainError, match="expert_cache: the model has no router: accepted: one that the surgery read_me"
    ):
        ExpertCache()(tiny(vocab_size=len(Vocabulary.of(tokenizer).tokens)), tokenizer, [{"text": "a b"}])

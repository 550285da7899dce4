"""Iterated random computation: what networks write, what they read, and documents that follow from the seed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import engine
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.corpus.sources import RandomComputation, read
from pretrain.corpus.sources.made.random_computation import continued, random_network
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.recipe import load

SMALL = {"length": 24, "buffer": 30, "replaced": 8, "drawn": 6, "reset": (4, 4), "width": 8, "layers": 2}


def texts(count=20, **fields):
    return [document["text"] for document in read(RandomComputation(count, **SMALL | fields))]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.sampled_from([2, 50, 256]), st.floats(1, 3), st.integers(0, 1000))
def test_each_symbol_is_the_likeliest_after_those_before_it_and_beside_them(start, symbols, scale, seed):
    torch.manual_seed(seed)
    embedding, lstm, head = random_network(symbols, 8, 2, scale, 1.0)
    begun_NS, beside_NL = torch.randint(symbols, (5, start)), torch.randint(symbols, (5, 20))
    with torch.no_grad():
        row_NL = continued(embedding, lstm, head, begun_NS, beside_NL, 0.0)
        states, _ = lstm(torch.cat([embedding(row_NL), embedding(beside_NL)], -1))  # the whole row at once
        logits_NLV = head(states)
    assert torch.equal(row_NL[:, :start], begun_NS)
    best_NL, taken_NL = logits_NLV[:, start - 1 : -1].amax(-1), row_NL[:, start:]
    there_NL = logits_NLV[:, start - 1 : -1].gather(-1, taken_NL[..., None])[..., 0]
    torch.testing.assert_close(there_NL, best_NL, rtol=1e-3, atol=1e-4)


def test_weights_and_biases_are_scaled_once_for_each_layer_and_the_embedding_apart():
    made = []
    for scale, small in ((1.0, 1.0), (1.5, 1e-8)):
        torch.manual_seed(0)
        made.append(random_network(10, 8, 3, scale, small))
    (plain, lstm, head), (small, scaled, same) = made
    for before, after in zip(lstm.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(after, before * 1.5**3)
    torch.testing.assert_close(small.weight, plain.weight * 1e-8)
    assert torch.equal(head.weight, same.weight)


def test_documents_follow_from_the_seed_and_leave_other_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = texts()
    assert torch.equal(torch.rand(2), expected)
    assert texts() == first and texts(9) == first[:9]
    assert texts(seed=1) != first
    assert len(first) == 20 and {len(text) for text in first} == {24}


def test_shuffled_documents_have_the_same_symbols_in_another_order():
    plain, shuffled = texts(), texts(shuffled=True)
    assert [sorted(text) for text in plain] == [sorted(text) for text in shuffled] and plain != shuffled


def test_rounds_accumulate_structure_only_where_networks_read_what_others_wrote(monkeypatch):
    seen = []
    write = RandomComputation._written

    def watched(self, seed_NS, beside_NL, number, scale):
        seen.append((seed_NS.copy(), beside_NL.copy()))
        return write(self, seed_NS, beside_NL, number, scale)

    monkeypatch.setattr(RandomComputation, "_written", watched)

    def structured(iterated):
        """Rows that a network reads beside its own and that are neither of one symbol nor of as many as there can be."""
        seen.clear()
        texts(60, symbols=128, iterated=iterated)
        counts = [len(np.unique(row)) for _, beside_NL in seen for row in beside_NL]
        return sum(1 < count < 12 for count in counts)

    assert structured(iterated=True) > 10
    assert structured(iterated=False) == 0
    for seed_NS, _ in seen:
        assert (seed_NS[:4] == seed_NS[:4, :1]).all() and not (seed_NS[4:] == seed_NS[4:, :1]).all()


def test_a_tokenizer_of_bytes_has_a_token_for_each_symbol():
    tokenizer = train_tokenizer([], algorithm="bytes")
    for text, tokens_L in zip(texts(), encode(tokenizer, texts()), strict=True):
        assert len(tokens_L) == 24 and tokenizer.decode(tokens_L) == text
    assert max(map(ord, itertools.chain(*texts(symbols=256)))) > 127
    size = RandomComputation(20, **SMALL | {"symbols": 256, "iterated": False}).size()
    assert size.documents == 20 and 20 * 24 < size.bytes <= 2 * 20 * 24


def test_a_corpus_of_them_is_made_and_its_products_are_the_stages_and_planned(tmp_path):
    fields = ", ".join(f"{k}: {list(v) if isinstance(v, tuple) else v}" for k, v in SMALL.items())
    (tmp_path / "r.yaml").write_text(
        f"name: noise\noutput: {tmp_path / 'runs'}\nstages:\n"
        f"  - {{name: corpus, stage: data, sources: [{{random_computation: 40, {fields}}}], near_duplicates: null}}\n"
    )
    recipe = load(tmp_path / "r.yaml")
    (stage,) = engine.run(recipe, say=lambda text: None).stages.values()
    assert stage["flops"] == RandomComputation(40, **SMALL).flops() > 0
    planned = recipe.stages[0].estimate({})
    assert planned.flops == stage["flops"] and planned.seconds > stage["flops"] / 1e12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": (2.0, 1.0)}, r"scale \[2.0, 1.0\]: accepted: \[lowest, highest\]"),
        ({"reset": (3,)}, r"reset \[3\]: accepted: \[rows of one symbol, rows of random ones\]"),
        ({"seed_length": 24}, "seed_length 24: accepted: less than the length of 24"),
        ({"drawn": 31}, "drawn: 31 rows: accepted: at most the 30 of the buffer"),
        ({"iterated": False, "replaced": 9}, "replaced 9: accepted: without iteration the 8 of reset"),
        ({"symbols": 257}, "symbols 257: accepted: from 2 to 256"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(PretrainError, match=message):
        RandomComputation(1, **SMALL | fields)

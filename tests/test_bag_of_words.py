"""Bag-of-words prediction: the loss is the paper's, on the encoder's own head, and the [CLS] learns to name the words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_objectives import VOCABULARY, context, rows

from pretrain.core.batch import Row, Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.objectives.language.masked_lm import MaskedLM
from pretrain.objectives.retrieval.bag_of_words import BagOfWords


def pieces_of(batch):
    for b in range(len(batch["tokens_BL"])):
        for document in range(1, int(batch["document_BL"][b].max()) + 1):
            yield b, batch["document_BL"][b] == document


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_packed_documents_have_the_papers_loss_of_each_alone(tiny, family):
    model, given = tiny(family), rows([20, 31], [45])
    batch = BagOfWords().prepare(given, context(60))
    found = BagOfWords().loss(model, batch)
    masked, bags = 0.0, []
    for b, mine in pieces_of(batch):
        with torch.no_grad():
            logits = model(batch["tokens_BL"][b][mine][None]).logits[0]
        masked += F.cross_entropy(logits, batch["target_BL"][b][mine], reduction="sum")
        words = set(batch["original_BL"][b][mine].tolist()) - VOCABULARY.special
        wanted = torch.zeros(97)
        wanted[list(words)] = 1 / len(words)
        bags.append(F.cross_entropy(logits[0], wanted))
    assert float(found.parts["masked_lm"]) == pytest.approx(float(masked / batch["weight"]), rel=1e-4)
    assert float(found.parts["bag_of_words"]) == pytest.approx(float(sum(bags) / 3), rel=1e-4)
    assert found.value.item() == pytest.approx(float(sum(found.parts.values())), rel=1e-6)


def test_the_bag_holds_the_words_before_any_was_hidden():
    given = rows([40])
    batch = BagOfWords(rate=0.9).prepare(given, context(50))
    assert torch.equal(batch["original_BL"][0, :40], torch.from_numpy(given[0].tokens_L.astype(np.int64)))
    assert batch["word_BL"][0].tolist() == [False] + [True] * 38 + [False] * 11
    assert (batch["tokens_BL"] == 3).sum() > 10


def test_hiding_is_that_of_masked_lm():
    ours = BagOfWords(rate=0.3).prepare(rows([20, 31]), context(60))
    theirs = MaskedLM(rate=0.3, whole_words=True).prepare(rows([20, 31]), context(60))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_piece_that_goes_on_a_document_gets_a_cls_for_its_first_token():
    tokens = np.random.default_rng(0).integers(27, 97, 30).astype(np.int32)
    row = Row(tokens.copy(), np.array([0, 18], np.int32), np.array([5, 6]), 0, 0)
    batch = BagOfWords().prepare([row], context(32))
    original = batch["original_BL"][0, :30]
    assert original[0] == original[18] == 1
    others = np.delete(np.arange(30), [0, 18])
    assert np.array_equal(original.numpy()[others], tokens[others]) and np.array_equal(row.tokens_L, tokens)
    assert not batch["word_BL"][0, [0, 18]].any() and (batch["tokens_BL"][0, [0, 18]] == 1).all()


def test_a_piece_of_a_single_token_has_no_words_and_no_loss(tiny):
    row = Row(np.array([30, 40], np.int32), np.array([0, 1], np.int32), np.array([0, 1]), 0, 0)
    found = BagOfWords().loss(tiny("bert"), BagOfWords().prepare([row], context(8)))
    assert float(found.parts["bag_of_words"]) == 0 and torch.isfinite(found.value)


def test_the_weight_falls_along_a_half_cosine(tiny):
    weights = [float(BagOfWords().prepare(rows([20]), context(30, progress))["bag_weight"]) for progress in (0, 0.5, 1)]
    assert weights == pytest.approx([1.0, 0.55, 0.1])
    batch = BagOfWords(final_weight=0.0).prepare(rows([20]), context(30, 1.0))
    found = BagOfWords().loss(tiny("bert"), batch)
    assert torch.equal(found.value.detach(), found.parts["masked_lm"])


def test_there_are_no_parameters_besides_the_encoders(tiny):
    model = tiny("bert")
    assert BagOfWords().modules(model) is None
    BagOfWords().loss(model, BagOfWords().prepare(rows([40]), context(50))).value.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_cls_state_learns_to_name_the_words_of_its_document(tiny):
    model, objective = tiny("bert").train(), BagOfWords(weight=1.0, final_weight=1.0)
    batch = objective.prepare(rows([20, 20], [40]), context(64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        torch.manual_seed(step)
        objective.loss(model, batch).value.backward()
        optimizer.step()
        optimizer.zero_grad()
    for b, mine in pieces_of(batch):
        with torch.no_grad():
            scores = model.eval()(batch["tokens_BL"][b][mine][None]).logits[0, 0]
        words = set(batch["original_BL"][b][mine].tolist()) - VOCABULARY.special
        assert len(words & set(scores.topk(len(words)).indices.tolist())) > 0.9 * len(words)


@pytest.mark.parametrize("fields", [{"rate": 0.0}, {"rate": 1.0}, {"weight": -1.0}, {"final_weight": float("nan")}])
def test_a_wrong_field_is_named(fields):
    with pytest.raises(PretrainError, match=f"bag_of_words: {next(iter(fields))} .*accepted"):
        BagOfWords(**fields)


def test_a_tokenizer_that_lacks_what_is_needed_is_named():
    for vocabulary, what in ((Vocabulary(97, pad=0, bos=1), "mask"), (Vocabulary(97, pad=0, mask=3), "cls")):
        with pytest.raises(PretrainError, match=f"accepted: a tokenizer made with {what}"):
            BagOfWords().prepare(rows([20]), context(vocabulary=vocabulary))

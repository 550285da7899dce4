"""Classes by the likelihood of words: the formula, calibration, label expansion, examples shown before."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.core.batch import Vocabulary
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.evaluation.tasks.label_words import LabelWords

TEXT = ["a graph has nodes and edges", "an array has rows and a shape", "data are samples of a thing"] * 3
WORDS = {"g": (" graph", " nodes and"), "a": (" array",), "d": (" data", " samples", " thing")}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT * 20, vocab_size=300)


@pytest.fixture(scope="module")
def model(tiny, tokenizer):
    return tiny("llama", vocab_size=len(tokenizer), initializer_range=0.5)


@pytest.fixture
def documents():
    return [{"text": text, "label": "gad"[n % 3], "domain": "text"} for n, text in enumerate(TEXT)]


def likelihood(model, tokenizer, prompt, word):
    """p(word | prompt), token by token."""
    (before,), (after,) = encode(tokenizer, [prompt]), encode(tokenizer, [word])
    begin = Vocabulary.of(tokenizer).begin
    ids = [*([] if begin is None else [begin]), *before.tolist(), *after.tolist()]
    with torch.no_grad():
        log_LV = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(np.exp(sum(log_LV[i - 1, ids[i]] for i in range(len(ids) - len(after), len(ids)))))


def test_scores_are_the_papers_formula(model, tokenizer, documents):
    free, template = ("N/A", ""), "{text} is of"
    method = LabelWords(words=WORDS, template=template, content_free=free, resamples=0)
    every = [word for words in WORDS.values() for word in words]
    right, losses = [], []
    for document in documents:
        p_W = np.array([likelihood(model, tokenizer, f"{document['text']} is of", word) for word in every])
        q_FW = np.array([[likelihood(model, tokenizer, f"{text} is of", word) for word in every] for text in free])
        free_W = (q_FW / q_FW.sum(1, keepdims=True)).mean(0)
        fair_W = p_W / p_W.sum() / (free_W / free_W.sum())
        score_C = np.array([fair_W[:2].mean(), fair_W[2], fair_W[3:].mean()])
        right.append("gad"[score_C.argmax()] == document["label"])
        losses.append(-np.log(score_C["gad".index(document["label"])] / score_C.sum()))
    found = method(model, tokenizer, documents)
    assert found.metrics["accuracy"] == np.mean(right)
    assert found.metrics["label_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert found.metrics["majority"] == pytest.approx(1 / 3) and sum(map(len, found.confusion.values())) >= 3


def test_calibration_makes_labels_of_a_text_without_content_alike(model, tokenizer):
    nothing = [{"text": "N/A", "label": label} for label in "gad"]
    plain = LabelWords(words=WORDS, content_free=("N/A",), calibrate=False)(model, tokenizer, nothing)
    fair = LabelWords(words=WORDS, content_free=("N/A",))(model, tokenizer, nothing)
    assert fair.metrics["label_loss"] == pytest.approx(np.log(3), abs=1e-6)
    assert plain.metrics["label_loss"] > np.log(3) + 0.01


def test_more_words_of_a_label_do_not_make_it_likelier_by_their_number(model, tokenizer, documents):
    method = LabelWords(words=WORDS, calibrate=False)
    share_NW = np.full((1, 6), 1 / 6)
    assert method.scores(share_NW).tolist() == [[1 / 6] * 3]
    assert method.shares(model, tokenizer, ["x"]).sum() == pytest.approx(1)


def test_of_a_prompt_that_is_too_long_the_beginning_is_left_out(tiny, tokenizer):
    short = tiny("gpt2", vocab_size=len(tokenizer), n_positions=16, initializer_range=0.5)
    method = LabelWords(words=WORDS)
    long, end = "an array has rows " * 20, " and the end of it is a longer one than all positions hold"
    assert np.array_equal(method.shares(short, tokenizer, [long + end]), method.shares(short, tokenizer, [end]))


def test_examples_of_each_label_are_shown_before_with_their_first_word(
    model, tokenizer, documents, stories, tmp_path, monkeypatch
):
    class Few:
        """A corpus of some labelled documents."""

        def __init__(self, folder):
            self.folder = folder

        def documents(self, name, columns):
            assert name == "train"
            yield from ({"text": f"text {n}", "label": "gadx"[n % 4], "id": str(n)} for n in range(8))

    monkeypatch.setattr("pretrain.evaluation.tasks.label_words.Corpus", Few)
    monkeypatch.setattr("pretrain.evaluation.tasks.label_words.corpus_of", lambda folder: folder)
    seen = []
    monkeypatch.setattr(LabelWords, "shares", lambda self, m, t, prompts: (seen.extend(prompts), np.ones((len(prompts), 6)))[1])  # fmt: skip
    method = LabelWords(words=WORDS, template="{text} is", shots=2, pool="p", separator="; ", content_free=("N/A",))
    method(model, tokenizer, documents[:3])
    first = seen[0].split("; ")
    assert [piece.split(" is")[1] for piece in first] == [" graph", " array", " data"] * 2 + [""]
    assert len({*first}) == 7 and seen[-1].endswith("; N/A is") and seen[-1].split("; ")[:-1] == first[:-1]
    with pytest.raises(
        PretrainError, match="p has 2 training documents of label 'g'; accepted: 3 or more, as many as shots"
    ):
        LabelWords(words=WORDS, shots=3, pool="p")(model, tokenizer, documents)


@pytest.mark.parametrize("fields, said", [
    ({"words": {"a": ("x",)}}, "accepted: 2 or more labels"),
    ({"words": {"a": ("x",), "b": ("x",)}}, "accepted: 2 or more labels, each with words of its own"),
    ({"template": "nothing"}, "accepted: text with at least one {column}"),
    ({"template": "{text"}, "template '{text'"),
    ({"shots": 2}, "shots 2, pool '': accepted: both, or neither"),
    ({"content_free": ()}, "content_free .*: accepted: at least one text"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused_in_a_line(fields, said):
    with pytest.raises(PretrainError, match=f"^label_words: .*{said}"):
        LabelWords(**{"words": WORDS} | fields)
    assert LabelWords(words=WORDS, calibrate=False, content_free=())


def test_documents_without_a_label_that_has_words_are_passed_over(model, tokenizer, documents):
    method = LabelWords(words=WORDS)
    some = [*documents, {"text": "x", "label": "other"}, {"text": "y", "label": None}]
    assert method(model, tokenizer, some).metrics == method(model, tokenizer, documents).metrics
    with pytest.raises(PretrainError, match="label_words: no document has text and in 'label' one of"):
        method(model, tokenizer, some[-2:])

"""Difference sampling: scores are differences of plain likelihoods, the top share is kept, scoring goes on after a kill."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.meter import count_flops
from pretrain.corpus.tokenizers import load_tokenizer, train_tokenizer
from pretrain.data._work import working
from pretrain.data.selection import _scores
from pretrain.data.selection._select import top, top_share, weighted
from pretrain.data.selection.miniplm import Miniplm


@pytest.fixture(scope="module")
def corpus(stories):
    rows = [s | {"text": s["text"][:300], "number": i} for i, s in enumerate(stories[:23])]
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def models(tiny, prepared, stories, tmp_path_factory):
    """Checkpoints `big` and `small` with one tokenizer, `other` with another."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = load_tokenizer(prepared / "tokenizer")
    other = train_tokenizer((s["text"] for s in stories), vocab_size=400)
    checkpoint.save(tiny(vocab_size=512, num_hidden_layers=3, seed=1), tokenizer, folder / "big")
    checkpoint.save(tiny(vocab_size=512, seed=2), tokenizer, folder / "small")
    checkpoint.save(tiny(vocab_size=400, seed=3), other, folder / "other")
    checkpoint.save(tiny("bert", vocab_size=512), tokenizer, folder / "encoder")
    checkpoint.save(tiny(vocab_size=512), None, folder / "mute")
    return {path.name: str(path) for path in folder.iterdir()}


def ids(folder, text):
    tokenizer = checkpoint.load(folder)[1]
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def loss(folder, tokens):
    """Transformers' own: the mean over the tokens after the first."""
    model, _ = checkpoint.load(folder)
    with torch.no_grad():
        batch = torch.tensor([tokens])
        return float(model(input_ids=batch, labels=batch).loss)


def test_the_same_model_twice_tells_nothing_apart(corpus, models):
    method = Miniplm(models["small"], models["small"])
    assert not method.scores(corpus).any()
    assert method(corpus)["number"][:] == list(range(11))  # of equals the earlier


def test_scores_are_differences_of_transformers_own_loss(corpus, models):
    found = Miniplm(models["big"], models["small"]).scores(corpus)
    wanted = [loss(models["small"], ids(models["small"], t)) - loss(models["big"], ids(models["big"], t)) for t in corpus["text"]]  # fmt: skip
    assert found == pytest.approx(wanted, abs=2e-5)
    assert np.abs(found).max() > 0.01


def test_a_document_longer_than_the_window_is_scored_in_pieces(corpus, models):
    length = 30
    found = Miniplm(models["big"], models["small"], length=length).scores(corpus)
    tokens = ids(models["big"], corpus["text"][0])
    pieces = [tokens[i : i + length + 1] for i in range(0, len(tokens) - 1, length)]
    assert len(pieces) > 2
    total = {m: sum(loss(models[m], p) * (len(p) - 1) for p in pieces) for m in ("big", "small")}
    assert found[0] == pytest.approx((total["small"] - total["big"]) / (len(tokens) - 1), abs=2e-5)


def test_other_tokenizers_are_compared_by_the_byte(corpus, models):
    found = Miniplm(models["big"], models["other"]).scores(corpus)
    text = corpus["text"][1]
    nats = {m: loss(models[m], ids(models[m], text)) * (len(ids(models[m], text)) - 1) for m in ("big", "other")}
    assert found[1] == pytest.approx((nats["other"] - nats["big"]) / len(text.encode()), rel=1e-4)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_the_highest_scores_are_kept_in_order_with_all_columns(corpus, models, ratio):
    method = Miniplm(models["big"], models["small"], ratio)
    kept, score_N = method(corpus), method.scores(corpus)
    chosen = kept["number"][:]
    assert len(chosen) == int(ratio * 23)
    assert chosen == sorted(chosen)
    assert kept.column_names == corpus.column_names
    rest = [i for i in range(23) if i not in chosen]
    assert not rest or score_N[chosen].min() >= score_N[rest].max()


@pytest.mark.bits
def test_an_interrupted_scoring_goes_on_and_its_cost_is_known(corpus, models, tmp_path, monkeypatch):
    monkeypatch.setattr(_scores, "SHARD", 4)
    method = Miniplm(models["big"], models["small"])
    with working(tmp_path / "whole"):
        whole, flops = count_flops(lambda: method.scores(corpus))
    score, scored = _scores._Scorer.__call__, []

    def dies(self, texts):
        if len(scored) == 8:
            raise KeyboardInterrupt
        scored.append(texts)
        return score(self, texts)

    monkeypatch.setattr(_scores._Scorer, "__call__", dies)
    with working(tmp_path / "killed"), pytest.raises(KeyboardInterrupt):
        method.scores(corpus)
    monkeypatch.setattr(_scores._Scorer, "__call__", lambda self, texts: scored.append(texts) or score(self, texts))
    with working(tmp_path / "killed") as desk:
        again, rest = count_flops(lambda: method.scores(corpus))
    assert len(scored) == 12  # six shards, twice
    assert (again == whole).all()
    assert desk.flops + rest == flops > desk.flops > 0


def test_scores_of_another_checkpoint_or_text_are_not_taken(corpus, models, tmp_path):
    with working(tmp_path):
        first = Miniplm(models["big"], models["small"]).scores(corpus)
        turned = Miniplm(models["small"], models["big"]).scores(corpus)
        back = Miniplm(models["big"], models["small"]).scores(corpus.select(range(22, -1, -1)))
    assert first == pytest.approx(-turned)
    assert first == pytest.approx(back[::-1], abs=1e-5)


def test_the_selection_reports_what_it_kept(corpus, models, tmp_path):
    with working(tmp_path) as desk:
        kept = Miniplm(models["big"], models["small"])(corpus)
    (told,) = desk.reports
    assert told["method"] == "miniplm"
    for domain, counts in told["documents"].items():
        assert counts["before"] == corpus["domain"][:].count(domain)
        assert counts["after"] == kept["domain"][:].count(domain)
    assert told["score_percentiles"]["kept"]["0"] >= told["score_percentiles"]["all"]["50"]


def test_checkpoints_that_score_no_text_are_refused(corpus, models):
    with pytest.raises(PretrainError, match="accepted: a causal language model"):
        Miniplm(models["big"], models["encoder"])(corpus)
    with pytest.raises(PretrainError, match="has no tokenizer"):
        Miniplm(models["mute"], models["small"])(corpus)


NUMBERS = st.lists(st.floats(-5, 5, width=16, allow_subnormal=False), min_size=1, max_size=30).map(np.array)


@given(NUMBERS, st.data())
def test_selectors_keep_a_subset_in_order_of_the_right_size(score_N, data):
    count = data.draw(st.integers(1, len(score_N)))
    kept = top(score_N, count)
    drawn = weighted(np.exp(score_N), count, seed=3)
    for one in (kept, drawn):
        assert len(one) == count
        assert (np.diff(one) > 0).all()
        assert set(one) <= set(range(len(score_N)))
    assert score_N[kept].sum() >= score_N[drawn].sum() - 1e-9
    assert (weighted(np.exp(score_N), count, seed=3) == drawn).all()
    assert set(weighted(np.exp(score_N), count - 1, seed=3)) <= set(drawn)


@given(NUMBERS, st.floats(0.01, 1, allow_subnormal=False), st.data())
def test_a_share_of_the_size_is_reached_and_not_passed_by_a_whole_document(score_N, share, data):
    size_N = np.array(data.draw(st.lists(st.integers(1, 9), min_size=len(score_N), max_size=len(score_N))))
    kept = top_share(score_N, size_N, share)
    assert size_N[kept].sum() >= share * size_N.sum() - 1e-9
    last = kept[np.argmin(score_N[kept][::-1])] if len(kept) == 1 else sorted(kept, key=lambda i: (score_N[i], -i))[0]
    assert size_N[kept].sum() - size_N[last] < share * size_N.sum()
    assert (np.diff(kept) > 0).all()


def test_documents_are_drawn_as_often_as_their_weights_say():
    weight_N = np.array([1.0, 1, 2, 2] * 2500)
    kept = weighted(weight_N, 3000, seed=0)
    assert (weight_N[kept] == 2).mean() == pytest.approx(2 / 3, abs=0.03)

"""Min-K% Prob: the score from plain logits, detection against scikit-learn, members by corpus and by column, errors."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.core.models.likelihood import judged
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.evaluation._predictions import framed, predictions
from pretrain.evaluation.likelihood.held_out import HeldOut
from pretrain.evaluation.likelihood.min_k import MinK, auroc, least_likely, true_positives


@pytest.fixture
def tokenizer(prepared):
    return load_tokenizer(prepared / "tokenizer")


def plain(model, tokens):
    """Log-probabilities of plain `transformers`, of the tokens after the first."""
    with torch.no_grad():
        logp = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return logp[:-1], logp[torch.arange(len(tokens) - 1), tokens[1:]].numpy()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_predictions_are_those_of_plain_transformers(tiny, name):
    model, rng = tiny(name), np.random.default_rng(0)
    documents = [rng.integers(3, 97, n) for n in (1, 0, 2, 30, 7, 45)]
    model.train()
    found = predictions(model, documents, length=60, batch_tokens=64)
    assert model.training
    model.eval()
    for tokens, said in zip(documents, found, strict=True):
        if len(tokens) < 2:
            assert len(said.nll_T) == len(said.right_T) == 0
            continue
        logp_TV, logp_T = plain(model, tokens.tolist())
        assert said.nll_T == pytest.approx(-logp_T, rel=1e-4)
        assert said.confidence_T == pytest.approx(logp_TV.amax(-1).exp().numpy(), rel=1e-4)
        assert said.right_T.tolist() == (logp_TV.argmax(-1).numpy() == tokens[1:]).tolist()


def test_windows_and_chunks_put_each_prediction_in_its_place(tiny, monkeypatch):
    model, tokens = tiny(), np.random.default_rng(0).integers(3, 97, 50)
    found = predictions(model, [tokens[:3], tokens], length=20, stride=15)[1]
    assert found.nll_T[:20] == pytest.approx(-plain(model, tokens[:21].tolist())[1], rel=1e-4)
    assert found.nll_T[20:35] == pytest.approx(-plain(model, tokens[15:36].tolist())[1][5:], rel=1e-4)
    monkeypatch.setattr("pretrain.core.models.likelihood.CHUNK_BYTES", 4 * 97 * 7)
    again = predictions(model, [tokens], length=20, stride=15)[0]
    assert again.nll_T == pytest.approx(found.nll_T) and (again.right_T == found.right_T).all()
    assert len(judged(model, torch.zeros(1, 32), torch.tensor([3]))) == 3


def test_the_score_is_the_mean_of_the_least_likely_share(tiny, tokenizer, prepared):
    model = tiny(vocab_size=512)
    documents = [d for d in Corpus(prepared / "corpus").documents("test")]
    found = MinK(length=40, k=0.1)(model, tokenizer, documents)
    scores, losses = [], []
    for document in documents:
        ids = encode(tokenizer, [document["text"]])[0].tolist()
        if len(ids) >= 40:
            logp = plain(model, [tokenizer.bos_token_id, *ids[:40]])[1]
            scores.append(np.sort(logp)[:4].mean())
            losses.append(-logp.mean())
    assert found.metrics["min_k"] == pytest.approx(np.mean(scores), rel=1e-5)
    assert found.metrics["min_k_documents"] == len(scores)
    assert found.metrics["min_k_skipped"] == len(documents) - len(scores)
    low, high = found.intervals["min_k"]
    assert low < found.metrics["min_k"] < high and set(found.metrics) == {"min_k", "min_k_documents", "min_k_skipped"}
    whole = MinK(length=40, k=1.0)(model, tokenizer, documents)
    assert whole.metrics["min_k"] == pytest.approx(-np.mean(losses), rel=1e-5)
    assert set(found.domains) <= {"python", "docstrings"} and all("min_k" in d for d in found.domains.values())


def test_framed_documents_have_the_loss_of_the_held_out_evaluation(tiny, tokenizer, prepared):
    from pretrain.core.batch import Vocabulary

    model = tiny(vocab_size=512)
    documents = list(Corpus(prepared / "corpus").documents("test"))[:5]
    tokens = framed(tokenizer, Vocabulary.of(tokenizer), [d["text"] for d in documents], end=True)
    nll = np.concatenate([p.nll_T for p in predictions(model, tokens, length=64, stride=32)])
    assert nll.mean() == pytest.approx(HeldOut(length=64)(model, tokenizer, documents).metrics["loss"], rel=1e-5)


def test_a_share_of_tokens_is_one_at_least():
    nll = np.array([3.0, 1.0, 2.0, 5.0, 4.0])
    assert least_likely(nll, 0.4) == -4.5 and least_likely(nll, 0.01) == -5.0 and least_likely(nll, 1.0) == -3.0
    assert least_likely(nll, 0.59) == -4.5


@pytest.mark.parametrize("levels", [4, 1000])
def test_detection_is_that_of_scikit_learn(levels):
    from sklearn.metrics import roc_auc_score, roc_curve

    rng = np.random.default_rng(levels)
    for count in (3, 40, 61):
        seen, other = rng.integers(0, levels, count) + levels * 0.2, rng.integers(0, levels, 2 * count) * 1.0
        label, score = np.repeat([1, 0], [count, 2 * count]), np.concatenate([seen, other])
        assert auroc(seen, other) == pytest.approx(roc_auc_score(label, score))
        fpr, tpr, _ = roc_curve(label, score, drop_intermediate=False)
        for share in (0.01, 0.05, 0.2, 0.5):
            assert true_positives(seen, other, share) == pytest.approx(tpr[fpr < share].max())


def trained_on(texts, tiny, tokenizer):
    """A model that has learnt a few texts by heart."""
    model = tiny(vocab_size=512)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        ids = [[tokenizer.bos_token_id, *encode(tokenizer, [t])[0][:24].tolist()] for t in texts]
        batch = torch.tensor(ids)
        for _ in range(25):
            model(batch, labels=batch).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    return model.eval()


def test_texts_learnt_by_heart_are_found_by_corpus_and_by_column(tiny, tokenizer, prepared):
    corpus = Corpus(prepared / "corpus")
    long = lambda d: len(encode(tokenizer, [d["text"]])[0]) >= 24  # noqa: E731
    others = [d for split in ("test", "validation") for d in corpus.documents(split) if long(d)]
    seen = [d for d in corpus.sample("train", len(others)) if long(d)]
    model = trained_on([d["text"] for d in seen], tiny, tokenizer)
    found = MinK(length=24, members=str(prepared), resamples=200)(model, tokenizer, others)
    assert found.metrics["min_k_auroc"] > 0.9 and found.metrics["min_k_members"] == len(seen)
    assert found.metrics["min_k_documents"] == len(seen) + len(others)
    for name in ("min_k", "min_k_loss", "min_k_zlib"):
        for part in ("auroc", "tpr"):
            low, high = found.intervals[f"{name}_{part}"]
            assert 0 <= low <= found.metrics[f"{name}_{part}"] <= high <= 1
    labelled = [d | {"seen": d in seen} for d in (*others, *seen)]
    method = MinK(length=24, member="seen", resamples=200)
    again = method(model, tokenizer, [*labelled, {"text": "x" * 900, "seen": None}])
    assert method.columns == ("seen",)
    for name in ("min_k_auroc", "min_k_loss_tpr", "min_k_zlib_auroc", "min_k_members"):
        assert again.metrics[name] == pytest.approx(found.metrics[name])
    assert found.metrics["min_k"] == pytest.approx(MinK(length=24)(model, tokenizer, others).metrics["min_k"])


def test_the_baselines_are_the_loss_and_the_loss_over_what_zlib_makes_of_the_text(tiny, tokenizer, prepared):
    from sklearn.metrics import roc_auc_score

    model = tiny(vocab_size=512)
    documents = [d for d in Corpus(prepared / "corpus").documents("train")][:20]
    documents = [d | {"seen": i % 3 == 0} for i, d in enumerate(documents)]
    found = MinK(length=20, member="seen", resamples=10)(model, tokenizer, documents).metrics
    label, loss, packed = [], [], []
    for document in documents:
        ids = encode(tokenizer, [document["text"]])[0][:20].tolist()
        if len(ids) == 20:
            label.append(document["seen"])
            loss.append(plain(model, [tokenizer.bos_token_id, *ids])[1].mean())
            packed.append(loss[-1] / len(zlib.compress(tokenizer.decode(ids).encode())))
    assert found["min_k_loss_auroc"] == pytest.approx(roc_auc_score(label, loss))
    assert found["min_k_zlib_auroc"] == pytest.approx(roc_auc_score(label, packed))


def test_what_cannot_be_measured_is_refused(tiny, tokenizer, prepared, tmp_path):
    model, documents = (
        tiny(vocab_size=512),
        [{"text": "one two three " * 9, "seen": True}, {"text": "a", "seen": False}],
    )
    for fields, said in (
        ({"k": 0.0}, "k 0.0: accepted: above 0"),
        ({"k": 1.5}, "k 1.5: accepted"),
        ({"false_positives": 1.0}, "false_positives 1.0: accepted"),
        ({"length": 0}, "length 0: accepted: 1 or more"),
        ({"members": "x", "member": "y"}, "members 'x' and member 'y': accepted: one of them"),
    ):
        with pytest.raises(PretrainError, match=said):
            MinK(**fields)
    with pytest.raises(PretrainError, match="none of 2 documents has 4000 tokens; accepted: a smaller length"):
        MinK(length=4000)(tiny(vocab_size=512, max_position_embeddings=8000), tokenizer, documents)
    with pytest.raises(PretrainError, match="length 65: accepted: at most the model's 64 positions"):
        MinK(length=65)(tiny("gpt2", vocab_size=512), tokenizer, documents)
    with pytest.raises(PretrainError, match="1 of 1 documents of 5 tokens are members; accepted: some that are and"):
        MinK(length=5, member="seen")(model, tokenizer, documents)
    with pytest.raises(PretrainError, match="column 'seen' has 'yes'; accepted: true, false"):
        MinK(length=5, member="seen")(model, tokenizer, [documents[0] | {"seen": "yes"}])
    with pytest.raises(PretrainError, match="is not a corpus"):
        MinK(length=5, members=str(tmp_path))(model, tokenizer, documents)
    with pytest.raises(PretrainError, match="predicts no next token; accepted: a causal language model"):
        MinK(length=5)(tiny("bert", vocab_size=512), tokenizer, documents)

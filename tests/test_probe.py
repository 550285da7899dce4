"""The probe: features that batching does not change, the classifiers' exact answers, honest halves, clear errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import TINY

from pretrain.core.batch import Vocabulary
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.core.models.features import Framing, evaluating, middle
from pretrain.core.models.features import text_features as features
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.evaluation.probes import probe as module
from pretrain.evaluation.probes.probe import Probe, to_fit

WORDS = Vocabulary(97, pad=0, bos=1, eos=2)
INTERVALS = {"probe_accuracy", "probe_macro_f1", "probe_loss"}


def pieces(*lengths, seed=0):
    return [np.random.default_rng(seed).integers(3, 97, n) for n in lengths]


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(("pooling", "layer"), [("mean", -1), ("last", 1), ("cls", 0), ("mean", 2)])
def test_a_batch_gives_what_each_piece_gives_alone(tiny, family, pooling, layer):
    model = tiny(family)
    framing = Framing(model, WORDS, 30)
    if pooling == "cls" and family in ("llama", "qwen3", "gpt2"):
        with pytest.raises(PretrainError, match="pooling 'cls': .* accepted: mean, last"):
            features(model, pieces(3, 4), framing, pooling=pooling, layer=layer)
        return
    given = pieces(5, 30, 1, 17, 29, 8)
    together = features(model, given, framing, pooling=pooling, layer=layer)
    alone = np.concatenate([features(model, [piece], framing, pooling=pooling, layer=layer) for piece in given])
    assert together.shape == (6, 32) and np.allclose(together, alone, atol=1e-5)
    assert pooling == "cls" or np.abs(together[0] - together[1]).max() > 1e-3


@pytest.mark.parametrize("family", TINY)
def test_the_last_layer_is_the_model_s_own_last_state(tiny, family):
    model, piece = tiny(family), pieces(9)[0]
    framing = Framing(model, WORDS, 30)
    ids = torch.tensor([framing.frame(piece)])
    inner = model.get_encoder() if family == "t5" else model.base_model
    with torch.no_grad():
        found = inner(input_ids=ids, output_hidden_states=True)
    text = slice(1, 10)
    own = {-1: found.last_hidden_state, 0: found.hidden_states[0], 1: found.hidden_states[1]}
    for layer, states in own.items():
        assert features(model, [piece], framing, layer=layer)[0] == pytest.approx(states[0, text].mean(0), abs=1e-5)
    assert features(model, [piece], framing, pooling="last")[0] == pytest.approx(
        found.last_hidden_state[0, -1], abs=1e-5
    )
    assert ids[0, 0] == 1 and (ids[0, -1] == 2) == (family not in ("llama", "qwen3", "gpt2"))


def test_pieces_fit_the_model_s_positions_and_come_from_the_middle(tiny):
    assert Framing(tiny("gpt2"), WORDS, 128).length == 63 and Framing(tiny("t5"), WORDS, 128).length == 128
    assert middle(np.arange(10), 4).tolist() == [3, 4, 5, 6] and middle(np.arange(3), 4).tolist() == [0, 1, 2]


@pytest.mark.bits
def test_a_model_in_training_is_measured_without_dropout_and_given_back(tiny):
    model = tiny("bert")
    model.train()
    model.bert.embeddings.eval()
    modes = [m.training for m in model.modules()]
    framing = Framing(model, WORDS, 30)
    first, again = (features(model, pieces(20, 9), framing) for _ in range(2))
    assert (first == again).all() and [m.training for m in model.modules()] == modes
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert [m.training for m in model.modules()] == modes


@pytest.fixture
def labelled(monkeypatch):
    """Documents whose features are given, so that the classifiers' answers are known."""

    def make(features_NE, labels):
        documents = [{"text": f"document {i}", "kind": label} for i, label in enumerate(labels)]
        monkeypatch.setattr(
            "pretrain.core.models.features.text_features", lambda *a, **k: np.asarray(features_NE, np.float32)
        )
        return documents

    return make


def test_the_nearest_mean_and_linear_classifiers_are_scikit_learn_s(tiny, prepared, labelled):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.neighbors import NearestCentroid
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 200)
    features_NE = rng.normal(size=(200, 5)) + label[:, None] * 0.6 * np.array([1, 0, 0, 1, 0])
    documents = labelled(features_NE, [f"c{i}" for i in label])
    fit = np.array([to_fit(d) for d in documents])
    tokenizer, model = load_tokenizer(prepared / "tokenizer"), tiny(vocab_size=512)
    scaler = StandardScaler().fit(features_NE[fit].astype(np.float32))
    answers = {
        "nearest_mean": NearestCentroid().fit(features_NE[fit], label[fit]).predict(features_NE[~fit]),
        "linear": LogisticRegression(max_iter=2000)
        .fit(scaler.transform(features_NE[fit]), label[fit])
        .predict(scaler.transform(features_NE[~fit])),
    }
    for name, said in answers.items():
        found = Probe(classifier=name, label="kind", resamples=200)(model, tokenizer, documents)
        assert found.metrics["probe_accuracy"] == pytest.approx(accuracy_score(label[~fit], said))
        assert found.metrics["probe_macro_f1"] == pytest.approx(f1_score(label[~fit], said, average="macro"))
        common = np.bincount(label[fit]).argmax()
        assert found.metrics["probe_majority"] == pytest.approx((label[~fit] == common).mean())
        for metric, (low, high) in found.intervals.items():
            assert low < found.metrics[metric] < high


def test_halves_depend_on_the_text_alone_and_on_no_hash_of_the_corpus():
    from pretrain.corpus.store import side

    texts = [f"text {i}" for i in range(2000)]
    assert 900 < sum(to_fit({"text": text}) for text in texts) < 1100
    held_out = [t for t in texts if side(t, 0.0, 0.1) == "test"]
    assert 0.35 < np.mean([to_fit({"text": t}) for t in held_out]) < 0.65
    assert to_fit({"text": "\ud800"}) in (True, False)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_domains_of_real_documents_are_told_from_untrained_states(tiny, prepared, family):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    documents = [d for split in ("validation", "test") for d in Corpus(prepared / "corpus").documents(split)]
    found = Probe(length=32)(tiny(family, vocab_size=512), tokenizer, [*documents, {"text": "", "domain": "python"}])
    assert 0 <= found.metrics["probe_accuracy"] <= 1 and set(found.intervals) == INTERVALS


def test_a_label_that_cannot_be_probed_is_refused(tiny, prepared):
    tokenizer, model = load_tokenizer(prepared / "tokenizer"), tiny(vocab_size=512)
    documents = [{"text": f"a {i}", "domain": "x", "odd": "ab"[i == 0]} for i in range(9)]
    with pytest.raises(PretrainError, match="label 'domain' has 1 values in 9 documents; accepted"):
        Probe()(model, tokenizer, documents)
    with pytest.raises(PretrainError, match="label 'shape' has 0 values"):
        Probe(label="shape")(model, tokenizer, documents)
    alike = [{"text": "a", "domain": d} for d in "xy"]
    with pytest.raises(PretrainError, match="2 documents leave none to (test|fit); accepted: more"):
        Probe()(model, tokenizer, alike)
    with pytest.raises(PretrainError, match="layer 3: accepted: -3 to 2, for 2 blocks"):
        Probe(label="odd", layer=3)(model, tokenizer, documents)
    with pytest.raises(PretrainError, match="length -1: accepted: 0 or more"):
        Probe(length=-1)


def test_special_tokens_in_a_text_are_text(prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    ids = encode(tokenizer, ["a<|endoftext|>b"])[0]
    assert tokenizer.eos_token_id not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"
    assert module.Probe(label="domain").columns == ("domain",)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_loss_is_that_of_scikit_learn_s_probabilities_and_the_mean_of_its_documents(
    tiny, prepared, labelled, classes
):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(1)
    label = rng.integers(0, classes, 200)
    features_NE = (rng.normal(size=(200, 5)) + label[:, None] * 0.6).astype(np.float32)
    documents = labelled(features_NE, [f"c{i}" for i in label])
    fit = np.array([to_fit(d) for d in documents])
    scaler = StandardScaler().fit(features_NE[fit].astype(np.float64))
    made = LogisticRegression(max_iter=2000).fit(scaler.transform(features_NE[fit]), label[fit])
    expected = log_loss(label[~fit], made.predict_proba(scaler.transform(features_NE[~fit])))
    probe = Probe(label="kind", resamples=200)
    found = probe(tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer"), documents)
    assert found.metrics["probe_loss"] == pytest.approx(expected)
    assert np.mean([row["nll"] for row in found.documents]) == pytest.approx(expected)
    assert len(found.documents) == found.metrics["probe_documents"] and {r["targets"] for r in found.documents} == {1.0}
    low, high = found.intervals["probe_loss"]
    assert low < expected < high


def test_a_label_that_none_of_the_documents_to_fit_has_leaves_the_loss_finite(tiny, prepared, labelled):
    documents = labelled(np.random.default_rng(2).normal(size=(60, 4)), ["a"] * 60)
    fit = np.array([to_fit(d) for d in documents])
    for number, document in enumerate(documents):
        document["kind"] = "ab"[number % 2] if fit[number] else "abc"[number % 3]
    found = Probe(label="kind", resamples=10)(tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer"), documents)
    nll_N = np.array([row["nll"] for row in found.documents])
    unseen_N = np.array([d["kind"] for d, fitted in zip(documents, fit, strict=True) if not fitted]) == "c"
    assert nll_N[unseen_N] == pytest.approx(np.log(fit.sum() + 1)) and np.isfinite(nll_N).all()
    for number, document in enumerate(documents):  # one label alone to fit: it has what the other has not
        document["kind"] = "a" if fit[number] else "ab"[number % 2]
    found = Probe(label="kind", resamples=10)(tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer"), documents)
    count = fit.sum()
    assert {round(row["nll"], 9) for row in found.documents} == {
        round(float(np.log((count + 1) / share)), 9) for share in (count, 1)
    }

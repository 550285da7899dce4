"""BARTScore: transformers' own loss, pair by pair; directions, judgements, cut texts, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.core.batch import Vocabulary
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.evaluation import _pairs as module
from pretrain.evaluation.generation.bartscore import BARTScore

WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "source",
    "and",
    "writes",
    "what",
    "follows",
    "in",
    "other",
    "words",
    "or",
    "fewer",
]


@pytest.fixture
def tokenizer(prepared):
    return load_tokenizer(prepared / "tokenizer")


@pytest.fixture
def documents():
    rng = np.random.default_rng(0)
    some = []
    for i in range(14):
        source, target = (" ".join(rng.choice(WORDS, rng.integers(1, 13))) for _ in range(2))
        some.append({"source": source, "target": target, "domain": "ab"[i % 2], "grade": int(rng.integers(0, 4))})
    return some


def ids_of(tokenizer, text):
    return encode(tokenizer, [text])[0].tolist()


def own_loss(model, tokenizer, source, target, separator="\n"):
    """The loss that `transformers` computes from labels, of one pair alone."""
    x, y = ids_of(tokenizer, source), [*ids_of(tokenizer, target), tokenizer.eos_token_id]
    with torch.no_grad():
        if model.config.model_type == "t5":
            read = [tokenizer.bos_token_id, *x, tokenizer.eos_token_id]
            return float(model(input_ids=torch.tensor([read]), labels=torch.tensor([y])).loss)
        read = [tokenizer.bos_token_id, *x, *ids_of(tokenizer, separator)]
        return float(model(torch.tensor([read + y]), labels=torch.tensor([[-100] * len(read) + y])).loss)


@pytest.mark.parametrize("family", ["t5", "llama", "gpt2"])
def test_the_score_is_minus_the_model_s_own_loss(tiny, tokenizer, documents, family, monkeypatch):
    model = tiny(family, vocab_size=512, **({"n_positions": 256} if family == "gpt2" else {}))
    expected = [-own_loss(model, tokenizer, d["source"], d["target"]) for d in documents]
    vocabulary, sides = Vocabulary.of(tokenizer), ([d["source"] for d in documents], [d["target"] for d in documents])
    for tokens in (1, 150, 4096):
        monkeypatch.setattr(module, "BATCH_TOKENS", tokens)
        found = BARTScore().scores(model, tokenizer, vocabulary, *sides)
        assert found == pytest.approx(expected, rel=1e-4)
    model.train()
    measured = BARTScore(resamples=200)(
        model, tokenizer, [*documents, {"source": "a", "target": None}, {"target": "b"}]
    )
    assert model.training
    assert measured.metrics["bartscore"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert (measured.metrics["bartscore_documents"], measured.metrics["bartscore_skipped"]) == (14, 2)
    assert measured.domains["a"]["bartscore"] == pytest.approx(np.mean(expected[::2]), rel=1e-4)
    low, high = measured.intervals["bartscore"]
    assert low < measured.metrics["bartscore"] < high
    assert set(measured.metrics) == {"bartscore", "bartscore_documents", "bartscore_skipped"}


def test_both_directions_and_their_mean(tiny, tokenizer, documents):
    model = tiny("t5", vocab_size=512)
    turned = BARTScore(source="target", target="source")(model, tokenizer, documents).metrics["bartscore"]
    found = BARTScore(both=True)(model, tokenizer, documents)
    forward = BARTScore()(model, tokenizer, documents).metrics["bartscore"]
    assert found.metrics["bartscore"] == pytest.approx(forward)
    assert found.metrics["bartscore_reverse"] == pytest.approx(turned) != forward
    assert found.metrics["bartscore_f"] == pytest.approx((forward + turned) / 2)
    assert set(found.intervals) == {"bartscore", "bartscore_reverse", "bartscore_f"}


def test_judgements_are_compared_by_rank(tiny, tokenizer, documents):
    from scipy.stats import spearmanr

    model = tiny("t5", vocab_size=512)
    given = [*documents, {"source": "a", "target": "b", "grade": None}]
    for both in (False, True):
        method = BARTScore(judgement="grade", both=both, resamples=300)
        forward, turned = (
            [-own_loss(model, tokenizer, d[x], d[y]) for d in documents]
            for x, y in (("source", "target"), ("target", "source"))
        )
        scores = np.add(forward, turned) if both else forward
        found = method(model, tokenizer, given)
        expected = spearmanr(scores, [d["grade"] for d in documents]).statistic
        assert found.metrics["bartscore_spearman"] == pytest.approx(expected, abs=1e-6)
        low, high = found.intervals["bartscore_spearman"]
        assert low < expected < high and method.columns == ("source", "target", "grade")


def test_long_texts_are_cut_to_the_length_and_to_the_model_s_positions(tiny, tokenizer):
    source, target = " ".join(WORDS * 4), " ".join(WORDS[::-1] * 3)
    x, y = ids_of(tokenizer, source), ids_of(tokenizer, target)
    vocabulary, end, apart = Vocabulary.of(tokenizer), tokenizer.eos_token_id, ids_of(tokenizer, "\n")
    model = tiny("gpt2", vocab_size=512)

    def loss(read, said):
        with torch.no_grad():
            logp = model(torch.tensor([[*read, *said][:-1]])).logits[0].log_softmax(-1)
        return float(-logp[torch.arange(len(read) - 1, len(read) + len(said) - 1), said].mean())

    assert len(x) > 64 and len(y) > 64
    found = BARTScore(length=20).scores(model, tokenizer, vocabulary, [source], [target])[0]
    assert found == pytest.approx(-loss([end, *x[:20], *apart], [*y[:20], end]), rel=1e-4)
    found = BARTScore(length=50).scores(model, tokenizer, vocabulary, [source], [target])[0]
    kept = 65 - 1 - len(apart) - 1 - 50
    assert found == pytest.approx(-loss([end, *x[:kept], *apart], [*y[:50], end]), rel=1e-4)
    found = BARTScore().scores(model, tokenizer, vocabulary, [source], [target])[0]
    assert found == pytest.approx(-loss([end, *apart], [*y[: 65 - 2 - len(apart)], end]), rel=1e-4)
    t5 = tiny("t5", vocab_size=512)
    found = BARTScore(length=20).scores(t5, tokenizer, vocabulary, [source], [target])[0]
    with torch.no_grad():
        own = t5(input_ids=torch.tensor([[end, *x[:20], end]]), labels=torch.tensor([[*y[:20], end]])).loss
    assert found == pytest.approx(-float(own), rel=1e-4)


def test_what_cannot_be_measured_is_refused(tiny, tokenizer, documents):
    with pytest.raises(PretrainError, match="length 0: accepted: 1 or more"):
        BARTScore(length=0)
    with pytest.raises(PretrainError, match="source and target 'text': accepted: two columns"):
        BARTScore(source="text", target="text")
    with pytest.raises(PretrainError, match="none of 2 documents has 'source' and 'target'; accepted: columns"):
        BARTScore()(tiny("t5", vocab_size=512), tokenizer, [{"text": "a"}, {"source": "a", "target": ""}])
    with pytest.raises(PretrainError, match="BertForMaskedLM generates no text; accepted: a causal model"):
        BARTScore()(tiny("bert", vocab_size=512), tokenizer, documents)
    with pytest.raises(PretrainError, match="judgement 'domain' has 0 values in 14 documents; accepted: a column"):
        BARTScore(judgement="domain")(tiny("t5", vocab_size=512), tokenizer, documents)

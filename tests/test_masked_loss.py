"""The held-out loss of masked language models, by domain."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from examples import Shelf

from pretrain.core.errors import PretrainError
from pretrain.evaluation.likelihood.masked_loss import MaskedLoss

TEXTS = ["the quick brown fox", "jumps over the lazy dog, then the dog sleeps", "a fox", "the dog " * 30]
DOCUMENTS = [{"text": text, "domain": "ab"[n % 2], "id": str(n)} for n, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_it_is_the_models_loss_on_the_hidden_tokens_and_each_domain_has_its_own(shelf, family):
    model = shelf.model(family, initializer_range=0.3)
    evaluation = MaskedLoss(length=24, rate=0.3)
    found = evaluation(model, shelf.tokenizer, DOCUMENTS)
    nll, targets = np.array([(row["nll"], row["targets"]) for row in found.documents]).T
    assert found.metrics["masked_loss"] == pytest.approx(nll.sum() / targets.sum())
    for number, domain in enumerate("ab"):
        assert found.domains[domain]["masked_loss"] == pytest.approx(nll[number::2].sum() / targets[number::2].sum())
    low, high = found.intervals["masked_loss"]
    assert low < found.metrics["masked_loss"] < high
    alone = evaluation(model, shelf.tokenizer, DOCUMENTS[1:2]).documents[0]
    assert alone["nll"] == pytest.approx(nll[1], rel=1e-5) and alone["targets"] == targets[1]


def test_a_short_document_has_the_loss_that_transformers_gives_it(shelf, monkeypatch):
    from pretrain.objectives.language import masked_lm

    made = []
    prepare = masked_lm.MaskedLM.prepare
    monkeypatch.setattr(masked_lm.MaskedLM, "prepare", lambda *a: made.append(prepare(*a)) or made[-1])
    model = shelf.model("bert", initializer_range=0.3)
    found = MaskedLoss(length=40, rate=0.4)(model, shelf.tokenizer, DOCUMENTS[:1])
    (batch,) = made
    count = int((batch["document_BL"] > 0).sum())
    with torch.no_grad():
        theirs = model(batch["tokens_BL"][:, :count], labels=batch["target_BL"][:, :count]).loss
    assert int((batch["target_BL"] >= 0).sum()) == found.documents[0]["targets"] > 0
    assert found.metrics["masked_loss"] == pytest.approx(float(theirs), rel=1e-5)


def test_documents_without_a_token_to_hide_are_refused(shelf):
    with pytest.raises(PretrainError, match="masked_loss: no token to hide in 1 document; accepted: longer ones"):
        MaskedLoss()(shelf.model("bert"), shelf.tokenizer, [{"text": "", "domain": "a"}])

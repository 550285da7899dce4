"""DrBERT: the decoder is beside the model, attends as told, and without it the loss is masked LM's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_same_model
from transformers import AutoModelForMaskedLM

from pretrain.core.batch import Context, Row, Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.models.cross_entropy import IGNORE
from pretrain.objectives.language.drbert import DrBERT
from pretrain.objectives.language.masked_lm import MaskedLM

VOCABULARY = Vocabulary(97, pad=0, bos=1, eos=2, mask=3, special=frozenset(range(4)))


def rows(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    result = []
    for index, pieces in enumerate(lengths):
        tokens = np.concatenate([[1, *rng.integers(4, 97, n - 2), 2] for n in pieces]).astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(pieces)[:-1]]).astype(np.int32)
        result.append(Row(tokens, starts, np.arange(len(pieces)), 0, index))
    return result


def context(length=60, seed=0, vocabulary=VOCABULARY):
    return Context(vocabulary, length, np.random.default_rng(seed))


def made(tiny, **fields):
    torch.manual_seed(0)
    model, objective = tiny("bert"), DrBERT(rate=0.3, **fields)
    return model, objective, objective.modules(model)


def spread(modules):
    """Larger weights, so that what the decoder does is seen."""
    with torch.no_grad():
        for p in modules.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return modules.eval()


@pytest.mark.bits
def test_without_layers_it_is_masked_lm(tiny):
    model, objective, modules = made(tiny, layers=0)
    assert modules is None
    mine, theirs = objective.prepare(rows([30, 20], [48]), context()), MaskedLM(rate=0.3)
    plain = theirs.prepare(rows([30, 20], [48]), context())
    assert all(torch.equal(mine[k], plain[k]) for k in plain)
    assert torch.equal(objective.loss(model, mine).value, theirs.loss(model, plain).value)


def test_the_trained_checkpoint_is_a_plain_bert_that_knows_no_decoder(tiny, tmp_path):
    model, objective, modules = made(tiny)
    names = set(model.state_dict())
    batch = objective.prepare(rows([30, 20], [48]), context())
    optimizer = torch.optim.AdamW([*model.parameters(), *modules.parameters()], lr=1e-2)
    losses = []
    for _ in range(15):
        value = objective.loss(model, batch, modules).value
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    plain, tokens = AutoModelForMaskedLM.from_pretrained(tmp_path).eval(), batch["tokens_BL"]
    with torch.no_grad():
        before = plain(tokens).logits
        assert_same_model(before, model(tokens).logits, model)
        for p in modules.parameters():
            p.zero_()
        assert_same_model(before, model(tokens).logits, model)


def test_the_loss_is_that_of_the_blocks_called_one_by_one(tiny):
    model, objective, modules = made(tiny, attention="full", encoder_share=0.0)
    spread(modules)
    batch = objective.prepare(rows([40]), context(40))
    with torch.no_grad():
        states = model.bert(batch["tokens_BL"]).last_hidden_state
        for block in modules:
            states = block(states)
        expected = F.cross_entropy(model.cls(states)[0], batch["target_BL"][0])
    assert float(objective.loss(model, batch, modules).value) == pytest.approx(float(expected), rel=1e-5)


def reach(tiny, attention, layers, revealed=None):
    """Which chosen positions' encoder states each position's decoded state depends on."""
    model, objective, modules = made(tiny, attention=attention, layers=layers)
    spread(modules)
    batch = objective.prepare(rows([24]), context(24))
    if revealed is not None:
        batch["revealed_BL"] = torch.full_like(batch["revealed_BL"], revealed)
    from pretrain.core.batch import document_mask
    from pretrain.core.models.families import attention_inputs
    from pretrain.objectives.language._encoder_blocks import run

    states = torch.randn(1, 24, 32, requires_grad=True)
    decoded = states
    for number, block in enumerate(modules):
        mask = document_mask(batch["document_BL"], causal=False) & objective._visible(batch, number)
        decoded = run(model, [block], decoded, attention_inputs(model, mask, batch["position_BL"]))
    chosen = (batch["target_BL"][0] != -100).nonzero()[:, 0].tolist()
    seen = torch.stack([torch.autograd.grad(decoded[0, i].sum(), states, retain_graph=True)[0][0] for i in range(24)])
    return chosen, (seen.abs().sum(-1) > 0)


def test_the_decoder_attends_to_the_positions_it_is_told(tiny):
    chosen, seen = reach(tiny, "full", 1)
    assert seen.all()
    chosen, seen = reach(tiny, "unmasked", 2)
    for j in range(24):
        assert seen[:, j].nonzero()[:, 0].tolist() == ([j] if j in chosen else list(range(24)))
    chosen, seen = reach(tiny, "gradual", 1, revealed=False)
    assert not any(seen[i, j] for j in chosen for i in range(24) if i != j)
    assert reach(tiny, "gradual", 1, revealed=True)[1].all()
    assert reach(tiny, "gradual", 2, revealed=False)[1].all()


def test_a_document_that_is_chosen_whole_sees_itself_alone(tiny):
    model, objective, modules = made(tiny, attention="unmasked")
    spread(modules)
    batch = objective.prepare(rows([20, 4]), context(24))
    batch["target_BL"][0, 20:] = 5
    batch["weight"] = (batch["target_BL"] != IGNORE).sum()
    batch["from_encoder_BL"] = torch.zeros_like(batch["from_encoder_BL"])
    nll_BL = objective.loss(model, batch, modules).nll_BL
    alone = {k: v[:, 20:] for k, v in batch.items() if k.endswith("BL")}
    alone["weight"] = (alone["target_BL"] != IGNORE).sum()
    assert torch.allclose(objective.loss(model, alone, modules).nll_BL[0], nll_BL[0, 20:], atol=1e-5)


def test_the_head_gets_the_share_from_the_encoder(tiny):
    model, objective, modules = made(tiny, encoder_share=0.5)
    spread(modules)
    batch = objective.prepare(rows([60], [60]), context(60))
    each = objective.loss(model, batch, modules).nll_BL
    mixed = batch["from_encoder_BL"]
    for value in (True, False):
        alone = objective.loss(model, batch | {"from_encoder_BL": torch.full_like(mixed, value)}, modules).nll_BL
        assert torch.allclose(each[mixed == value], alone[mixed == value], atol=1e-5)
    drawn = DrBERT(encoder_share=0.2, revealed=0.7).prepare(rows(*[[500]] * 4), context(500))
    assert abs(drawn["from_encoder_BL"].float().mean() - 0.2) < 0.03
    assert abs(drawn["revealed_BL"].float().mean() - 0.7) < 0.03


@pytest.mark.parametrize("attention", ["full", "unmasked", "gradual"])
def test_packed_documents_have_the_loss_of_each_alone(tiny, attention):
    model, objective, modules = made(tiny, attention=attention)
    spread(modules)
    batch = objective.prepare(rows([30, 20, 3]), context(60))
    nll_BL = objective.loss(model, batch, modules).nll_BL
    for document in (1, 2, 3):
        mine = (batch["document_BL"][0] == document).nonzero()[:, 0]
        alone = {k: v[:, mine] for k, v in batch.items() if k.endswith("BL")}
        alone["weight"] = (alone["target_BL"] != IGNORE).sum()
        assert torch.allclose(objective.loss(model, alone, modules).nll_BL[0], nll_BL[0, mine], atol=1e-5)


@pytest.mark.parametrize(
    "fields", [{"layers": -1}, {"attention": "all"}, {"revealed": 1.5}, {"encoder_share": 1.0}, {"encoder_share": -1.0}]
)
def test_fields_that_cannot_be_are_named(fields):
    with pytest.raises(PretrainError, match=rf"drbert: {next(iter(fields))} .* accepted: "):
        DrBERT(**fields)


def test_a_tokenizer_without_a_mask_is_named():
    with pytest.raises(PretrainError, match="drbert: no mask token; accepted: a tokenizer made with mask: true"):
        DrBERT().prepare(rows([20]), context(vocabulary=Vocabulary(97, pad=0)))

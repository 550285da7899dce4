"""Prefix LM: what each position sees, and that it is causal LM when the prefix is a single token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.core.batch import Context, Row, Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.objectives.language.prefix_lm import PrefixLM

FAMILIES = ["llama", "gpt2", "qwen3"]


def rows(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    result = []
    for index, pieces in enumerate(lengths):
        starts = np.concatenate([[0], np.cumsum(pieces)[:-1]]).astype(np.int32)
        tokens = rng.integers(3, 97, sum(pieces)).astype(np.int32)
        result.append(Row(tokens, starts, np.arange(len(pieces)), 0, index))
    return result


def context(length, seed=0):
    return Context(Vocabulary(97, pad=0, bos=1, eos=2), length, np.random.default_rng(seed))


def each_nll(model, batch):
    with torch.no_grad():
        return PrefixLM().loss(model, batch).nll_BL


@pytest.mark.bits
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_of_one_token_is_causal_lm(tiny, family):
    model, given = tiny(family), rows([20, 11], [25, 1])
    prefix, causal = PrefixLM(longest=0.0), CausalLM()
    mine, theirs = prefix.prepare(given, context(32)), causal.prepare(given, context(32))
    assert torch.equal(mine["target_BL"], theirs["target_BL"]) and mine["weight"] == theirs["weight"]
    assert torch.equal(prefix.loss(model, mine).value, causal.loss(model, theirs).value)


@pytest.mark.bits
@pytest.mark.parametrize("family", FAMILIES)
def test_the_suffix_is_read_from_left_to_right_and_the_prefix_from_both_sides(tiny, family):
    model, given = tiny(family), rows([30])
    batch = PrefixLM(shortest=0.5, longest=0.5).prepare(given, context(30))
    prefix = int(batch["prefix_BL"].sum())
    assert prefix == 14 and (batch["target_BL"][0] != -100).nonzero()[:, 0].tolist() == list(range(13, 29))
    before = each_nll(model, batch)
    changed = {k: v.clone() for k, v in batch.items()}
    changed["tokens_BL"][0, 20] = (changed["tokens_BL"][0, 20] + 1) % 97  # of the suffix: the past cannot know
    after = each_nll(model, changed)
    assert torch.equal(before[0, :20], after[0, :20]) and not torch.allclose(before[0, 20:29], after[0, 20:29])
    assert PrefixLM().loss(model, batch).value.item() == pytest.approx(float(before.sum()) / 16, rel=1e-5)
    # The first state knows of the prefix's last token, which a causal model's would not.
    changed = {k: v.clone() for k, v in batch.items()}
    changed["tokens_BL"][0, 13] = (changed["tokens_BL"][0, 13] + 1) % 97
    for one in (batch, changed):
        one["target_BL"][0, 0] = 5
    assert each_nll(model, batch)[0, 0] != each_nll(model, changed)[0, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_have_the_loss_of_each_alone(tiny, family):
    model = tiny(family)
    batch = PrefixLM().prepare(rows([17, 14], [22, 2, 1], seed=3), context(32, seed=3))
    nll_BL = each_nll(model, batch)
    for b in range(2):
        for document in range(1, int(batch["document_BL"][b].max()) + 1):
            mine = (batch["document_BL"][b] == document).nonzero()[:, 0]
            alone = {k: batch[k][b][mine][None] for k in ("tokens_BL", "prefix_BL", "target_BL", "position_BL")}
            alone["document_BL"] = torch.ones_like(alone["tokens_BL"])
            assert torch.allclose(each_nll(model, alone)[0], nll_BL[b][mine], atol=1e-5)


def test_the_loss_is_that_of_the_model_with_the_mask_written_out(tiny):
    model = tiny("llama")
    batch = PrefixLM(shortest=0.4, longest=0.6).prepare(rows([24]), context(24))
    prefix = int(batch["prefix_BL"].sum())
    seen = torch.tensor([[j <= i or j < prefix for j in range(24)] for i in range(24)])
    mask = torch.zeros(1, 1, 24, 24).masked_fill_(~seen, -1e9)
    with torch.no_grad():
        logits = model(batch["tokens_BL"], attention_mask=mask, use_cache=False).logits[0]
    expected = F.cross_entropy(logits[prefix - 1 : -1], batch["tokens_BL"][0, prefix:])
    assert PrefixLM().loss(model, batch).value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_prefixes_are_drawn_uniformly_from_one_to_all_but_one():
    counts = np.zeros(10, int)
    shared = context(10)
    for _ in range(1800):
        batch = PrefixLM().prepare(rows([10]), shared)
        prefix = int(batch["prefix_BL"].sum())
        assert int(batch["weight"]) == 10 - prefix
        counts[prefix] += 1
    assert counts[0] == 0 and counts[1:].min() > 140 and counts[1:].max() < 260


@pytest.mark.parametrize("fields", [{"shortest": 0.6, "longest": 0.4}, {"longest": 1.5}, {"shortest": -0.1}])
def test_shares_that_cannot_be_are_named(fields):
    with pytest.raises(PretrainError, match=rf"prefix_lm: {next(iter(fields))} .*: accepted: "):
        PrefixLM(**fields)

"""RTS, C-RTS and SLM: what is replaced, by what, and what is asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax

from pretrain.core import checkpoint
from pretrain.core.batch import Context, Row, Vocabulary, rows_to_tensors
from pretrain.core.errors import PretrainError
from pretrain.objectives.language.masked_lm import MaskedLM
from pretrain.objectives.language.random_token_substitution import Generator, RandomTokenSubstitution

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


def made(tiny, kind, family="bert", **fields):
    torch.manual_seed(0)
    model, objective = tiny(family), RandomTokenSubstitution(objective=kind, **fields)
    model = model.base_model if objective.task == "base" else model
    return model, objective, objective.modules(model)


def test_rts_replaces_the_rate_by_any_ordinary_token():
    batch = RandomTokenSubstitution().prepare(rows([20_000]), context(20_000))
    changed = batch["tokens_BL"] != batch["original_BL"]
    assert int(changed.sum()) / 19_998 == pytest.approx(0.15 * 92 / 93, abs=0.001)
    drawn = np.bincount(batch["tokens_BL"][changed].numpy(), minlength=97)
    assert drawn[:4].sum() == 0 and drawn[4:].min() > 10 and drawn[4:].max() < 60
    assert int(batch["weight"]) == 20_000 and not (batch["tokens_BL"] == 3).any()


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_rts_tells_each_token_of_each_document(tiny, family):
    model, objective, modules = made(tiny, "rts", family)
    with torch.no_grad():
        modules["head"][-1].weight.mul_(50)
    batch = objective.prepare(rows([30, 20], [48]), context())
    total = 0.0
    for b, sizes in enumerate([[30, 20], [48]]):
        for start, size in zip(np.cumsum([0, *sizes]), sizes):
            part = slice(start, start + size)
            states = model(batch["tokens_BL"][b : b + 1, part]).last_hidden_state
            changed = (batch["tokens_BL"] != batch["original_BL"])[b, part].float()
            scores = modules["head"](states)[0, :, 0]
            total += F.binary_cross_entropy_with_logits(scores, changed, reduction="sum").item()
    found = objective.loss(model, batch, modules)
    assert found.value.item() == pytest.approx(total / int(batch["weight"]), rel=1e-5)
    assert int(batch["weight"]) == 98


@pytest.mark.bits
def test_slm_is_masked_lm_that_swaps_all_it_chooses(tiny):
    model, objective, modules = made(tiny, "slm")
    assert modules is None and objective.task == "masked"
    mine = objective.prepare(rows([30, 20], [48]), context())
    plain = MaskedLM(masked=0.0, random=1.0)
    theirs = plain.prepare(rows([30, 20], [48]), context())
    assert int(mine["weight"]) == int(theirs["weight"]) and not (mine["tokens_BL"] == 3).any()
    kept, here = mine["target_BL"] == -100, context()
    plain_BL = rows_to_tensors(rows([30, 20], [48]), here.length, here.vocabulary.pad)["tokens_BL"]
    assert torch.equal(mine["tokens_BL"][kept], plain_BL[kept])
    assert torch.equal(objective.loss(model, mine).value, plain.loss(model, mine).value)


def test_the_generator_draws_clusters_by_its_counts_and_tokens_evenly():
    cluster_V = torch.tensor([0, 1, 2, 2, 0, 1, 1, 1, 2, 2, 3])
    generator, special_V = Generator(cluster_V, beta=2.0), torch.zeros(11, dtype=torch.bool)
    special_V[[2, 10]] = True  # the last is all of its cluster
    counts = np.array([[5, 1, 9, 2], [1, 1, 1, 1], [-4, 0, 6, 1], [0, 1, 2, 3]])
    generator.count_CC.copy_(torch.from_numpy(counts))
    spread = np.maximum(counts.max(1, keepdims=True) - counts.min(1, keepdims=True), 1)
    expected = softmax(2.0 * (counts - counts.min(1, keepdims=True)) / spread, axis=1)
    assert np.allclose(generator.probability_CC().numpy(), expected, atol=1e-6)
    torch.manual_seed(0)
    for token, cluster in ((4, 0), (6, 1), (3, 2)):
        drawn = np.bincount(generator.draw(torch.full((40_000,), token), special_V).numpy(), minlength=11) / 40_000
        odds = np.where(np.arange(4) < 3, expected[cluster], 0)
        odds /= odds.sum()
        sizes = np.array([2, 4, 3, 1])
        wanted = np.where(special_V.numpy(), 0, (odds / sizes)[cluster_V.numpy()])
        assert np.allclose(drawn, wanted, atol=0.01)
    assert generator.draw(torch.zeros(0, dtype=torch.long), special_V).shape == (0,)


def test_the_generator_counts_what_was_told_and_what_was_not():
    generator = Generator(torch.tensor([0, 0, 1, 1, 2]), 2.0)
    original, token = torch.tensor([0, 1, 0, 4, 2]), torch.tensor([2, 3, 3, 0, 3])
    generator.learn(original, token, torch.tensor([True, False, False, True, True]))
    assert generator.count_CC.tolist() == [[1] * 3] * 3  # for this step
    generator.settle()
    assert generator.count_CC.tolist() == [[1, 2, 1], [1, 0, 1], [0, 1, 1]]


def test_c_rts_learns_only_while_training_and_from_its_own_replacements(tiny):
    model, objective, modules = made(tiny, "c_rts", clusters=5)
    batch = objective.prepare(rows([60], [60]), context())
    assert torch.equal(batch["tokens_BL"], batch["original_BL"]) and 15 < batch["chosen_BL"].sum() < 20
    with torch.no_grad():
        modules["head"][-1].weight.zero_()
        modules["head"][-1].bias.fill_(9.0)  # all are said to be replaced
    before = modules["generator"].count_CC.clone()
    modules.eval()
    torch.manual_seed(1)
    found = objective.loss(model, batch, modules)
    assert torch.equal(modules["generator"].count_CC, before) and float(found.parts["detected"]) == 1
    modules.train()
    torch.manual_seed(1)
    found = objective.loss(model, batch, modules)
    assert torch.equal(modules["generator"].count_CC, before)  # until the step is over
    taken = int((before - modules.state_dict()["generator.count_CC"]).sum())
    assert taken == round(float(found.parts["replaced"]) * 120) and 0 < taken <= int(batch["chosen_BL"].sum())
    with torch.no_grad():
        modules["head"][-1].bias.fill_(-9.0)
    torch.manual_seed(1)
    objective.loss(model, batch, modules)
    assert torch.equal(modules.state_dict()["generator.count_CC"].sum(), before.sum())


def test_clusters_are_those_of_the_checkpoint_named(tiny, tmp_path):
    other = tiny("bert", seed=5)
    with torch.no_grad():
        other.get_input_embeddings().weight.copy_((torch.arange(97) % 3)[:, None] * 10 + torch.rand(97, 32))
    checkpoint.save(other, None, tmp_path / "checkpoint")
    _, _, modules = made(tiny, "c_rts", clusters=3, embeddings=str(tmp_path))
    cluster_V = modules["generator"].cluster_V
    for a in range(3):
        assert len(set(cluster_V[a::3].tolist())) == 1
    assert len(set(cluster_V[:3].tolist())) == 3
    with pytest.raises(PretrainError, match="embeddings .*: 97 tokens; accepted: .* vocabulary of 50"):
        RandomTokenSubstitution("c_rts", embeddings=str(tmp_path)).modules(tiny("bert", vocab_size=50).base_model)


@pytest.mark.parametrize("kind", ["rts", "c_rts", "slm"])
def test_a_model_learns_by_it(tiny, kind):
    model, objective, modules = made(tiny, kind, clusters=5)
    model.train()
    given = objective.prepare(rows([40, 20], [60]), context(64))
    parameters = [p for m in (model, modules) if m is not None for p in m.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    for _ in range(30):
        torch.manual_seed(1)
        value = objective.loss(model, given, modules).value
        value.backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert min(losses[-5:]) < 0.8 * losses[0]


@pytest.mark.parametrize(
    "fields", [{"objective": "mlm"}, {"rate": 0.0}, {"rate": 1.0}, {"clusters": 1}, {"beta": -1.0}]
)
def test_fields_that_cannot_be_are_named(fields):
    with pytest.raises(PretrainError, match=rf"random_token_substitution: {next(iter(fields))} .* accepted: "):
        RandomTokenSubstitution(**fields)

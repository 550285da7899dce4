"""SALT: both phases against their formulas, when they change, what they cost; and which sequences can be learnt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_objectives import context, rows
from test_training import log, small

from pretrain.core import checkpoint
from pretrain.core.checkpoint import save
from pretrain.core.errors import PretrainError
from pretrain.core.meter import count_flops
from pretrain.core.models.likelihood import document_nll, token_ranks
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.data._work import working
from pretrain.data.selection import _scores
from pretrain.data.selection._scores import likelihoods
from pretrain.data.selection.salt_ds import SALTDS
from pretrain.objectives import _distil
from pretrain.objectives.distillation.distillation import Distillation
from pretrain.objectives.distillation.salt import SALT
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.training.budget import Budget
from pretrain.training.loop import Settings


@pytest.fixture
def setting(tiny, tmp_path):
    """`setting(progress, **fields)`: objective, student, what it trains beside, batch."""

    def make(progress=0.0, **fields):
        save(tiny(seed=7, num_hidden_layers=1), None, tmp_path / "teacher" / "checkpoint")
        objective, model = SALT(str(tmp_path / "teacher"), **fields), tiny(hidden_size=64)
        at = context(60, progress=progress)
        return objective, model, objective.modules(model), objective.prepare(rows([20, 31], [45]), at)

    return make


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)


@pytest.mark.bits
@pytest.mark.parametrize("progress", [0.2, 0.7, 1.0])
def test_after_its_share_of_the_budget_it_is_the_plain_objective_without_a_teacher(setting, progress):
    objective, model, beside, batch = setting(progress, share=0.2)
    plain = CausalLM().prepare(rows([20, 31], [45]), context(60))
    assert batch.keys() == plain.keys() and all(torch.equal(batch[name], plain[name]) for name in plain)
    beside.model.register_forward_pre_hook(lambda *_: pytest.fail("the teacher is run"))
    found, wanted = objective.loss(model, batch, beside), CausalLM().loss(model, plain)
    assert torch.equal(found.value, wanted.value) and found.measured is None
    for a, b in zip(gradients(found.value, model), gradients(wanted.value, model), strict=True):
        assert torch.equal(a, b)


def test_the_gradient_at_the_logits_is_that_of_one_mixed_label(setting):
    torch.manual_seed(0)
    x, y = torch.randn(5, 97, requires_grad=True), torch.randn(5, 97)
    target, weight = torch.tensor([3, 0, 96, 41, 3]), torch.eye(97)
    for temperature in (1.0, 0.25, 4.0):
        hard, soft = SALT("x", temperature=temperature)._losses((x, weight, None), (y, weight, None), target)
        (found,) = torch.autograd.grad((0.3 * hard + 0.7 * soft).sum(), x)
        label = 0.3 * torch.nn.functional.one_hot(target, 97) + 0.7 * (y / temperature).softmax(-1)
        assert torch.allclose(found, x.softmax(-1) - label, atol=1e-6)


def test_the_first_phase_adds_to_the_plain_loss_what_distillation_adds_but_for_the_teachers_entropy(setting):
    objective, model, beside, batch = setting(0.19, omega=0.4)
    loss, plain = objective.loss(model, batch, beside), CausalLM().loss(model, batch)
    distilled = Distillation(objective.teacher, hard=0.6, soft=0.4, temperature=1.0).loss(model, batch, beside)
    assert loss.parts["hard"].item() == pytest.approx(plain.value.item(), rel=1e-5)
    assert loss.measured[""].item() == loss.parts["hard"].item()
    assert torch.allclose(loss.nll_BL, plain.nll_BL, rtol=1e-4, atol=1e-5)
    entropy = (loss.parts["soft"] - distilled.parts["soft"]).item()
    assert 0 < entropy < np.log(97)
    assert loss.value.item() == pytest.approx(distilled.value.item() + 0.4 * entropy, rel=1e-5)
    for a, b in zip(gradients(loss.value, model), gradients(distilled.value, model), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_weights_of_tokens_reach_both_terms_and_chunks_change_nothing(setting, monkeypatch):
    objective, model, beside, batch = setting()
    once = objective.loss(model, batch, beside)
    twice = objective.loss(model, batch | {"token_weight_BL": torch.full((2, 60), 2.0)}, beside)
    assert torch.allclose(twice.value, 2 * once.value)
    monkeypatch.setattr(_distil, "LEAST_ROWS", 16)
    monkeypatch.setattr(_distil, "CHUNK_BYTES", {"cpu": 1})
    pieces = objective.loss(model, batch, beside)
    for a, b in zip(gradients(pieces.value, model), gradients(once.value, model), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def trained(prepared, tiny, folder, teacher, share, steps=10):
    objective = CausalLM() if share is None else SALT(str(teacher), share=share)
    settings = Settings(budget=Budget(steps=steps), save_every=5, bar=False)
    return small(prepared, tiny, folder, settings=settings, objective=objective, micro_rows=4, num_hidden_layers=1)


@pytest.fixture
def teacher(tiny, tmp_path):
    save(tiny(vocab_size=512, seed=7), None, tmp_path / "teacher" / "checkpoint")
    return tmp_path / "teacher"


def test_the_meter_counts_the_teacher_in_the_first_phase_alone(prepared, tiny, tmp_path, teacher):
    spent = {}
    for name, share in (("plain", None), ("salt", 0.4), ("throughout", 1.0)):
        trained(prepared, tiny, tmp_path / name, teacher, share)
        spent[name] = np.diff([0, *(row["flops"] for row in log(tmp_path / name))])
    steps = log(tmp_path / "salt")
    taught = ["soft" in row["parts"] for row in steps]
    # The loader knows of the progress of one step before.
    assert taught == [True] * 5 + [False] * 5
    assert (spent["salt"][:5] == spent["throughout"][:5]).all() and (spent["salt"][5:] == spent["plain"][5:]).all()
    model, _ = checkpoint.load(teacher / "checkpoint")
    forward = count_flops(lambda: model.model(torch.zeros(8, 64, dtype=torch.long)))[1]
    assert (spent["salt"][:5] > spent["plain"][:5] + 0.9 * forward).all()


@pytest.mark.bits
def test_a_training_that_was_stopped_in_the_second_phase_goes_on_without_the_teacher(prepared, tiny, tmp_path, teacher):
    whole = trained(prepared, tiny, tmp_path / "a", teacher, 0.3)
    trained(prepared, tiny, tmp_path / "b", teacher, 0.6, steps=5)
    resumed = trained(prepared, tiny, tmp_path / "b", teacher, 0.3)
    assert len(log(tmp_path / "b")) == 10 and whole.step == resumed.step
    ours, theirs = whole.trainee.state_dict(), resumed.trainee.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def corpus(stories):
    rows = [s | {"text": s["text"][:300], "number": i} for i, s in enumerate(stories[:23])]
    return Dataset.from_list([*rows, rows[0] | {"text": "", "number": 23}])


@pytest.fixture(scope="module")
def model(tiny, prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoint.save(tiny(vocab_size=512, initializer_range=0.3), load_tokenizer(prepared / "tokenizer"), folder)
    return str(folder)


def losses(folder, text, top_k):
    """The losses in transformers' own logits of the tokens that are among the `top_k` likeliest."""
    net, tokenizer = checkpoint.load(folder)
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        log_LV = net(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    others = [each_V.topk(top_k + 1).values[-1].item() if top_k < 512 else -np.inf for each_V in log_LV]
    own = log_LV[range(len(ids) - 1), ids[1:]].tolist()
    return [-log for log, below in zip(own, others, strict=True) if log > below]


@pytest.mark.parametrize("top_k", [1, 40, 200, 512])
def test_the_score_is_the_median_loss_of_the_tokens_among_the_likeliest(corpus, model, top_k):
    found = SALTDS(model, top_k).scores(corpus)
    chosen = [losses(model, text, top_k) for text in corpus["text"]]
    assert found == pytest.approx([np.median(each) if each else 0.0 for each in chosen], abs=2e-5)
    assert (len(chosen[0]) < len(losses(model, corpus["text"][0], 512))) == (top_k < 512)


def test_noise_among_learnable_tokens_does_not_move_the_score(corpus, model):
    length = 20
    pieces = SALTDS(model, 100, length=length).scores(corpus.select([0]))[0]
    net, tokenizer = checkpoint.load(model)
    ids = np.array([tokenizer.bos_token_id, *tokenizer(corpus["text"][0], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])  # fmt: skip
    ((nll_L, rank_L),) = token_ranks(net, [ids], length=length)
    assert len(nll_L) == len(ids) - 1 and (rank_L >= 100).any()
    total = document_nll(net, [ids], length=length)[0]
    assert nll_L.sum() == pytest.approx(total, rel=1e-6)
    assert pieces == pytest.approx(np.median(nll_L[rank_L < 100]), rel=1e-6)


def test_the_highest_are_kept_or_named_and_all_stay(corpus, model, tmp_path):
    method = SALTDS(model, 100, share=0.4)
    with working(tmp_path) as desk:
        kept = method(corpus)
    score_N, numbers = method.scores(corpus), kept["number"][:]
    rest = [i for i in range(24) if i not in numbers]
    assert 0 < len(numbers) < 24 and score_N[numbers].min() >= score_N[rest].max() and numbers == sorted(numbers)
    named = SALTDS(model, 100, share=0.4, domain="hard")(corpus)
    assert named.column_names == corpus.column_names == kept.column_names
    assert [i for i, domain in enumerate(named["domain"]) if domain == "hard"] == numbers
    assert [d for d in named.select(rest)["domain"]] == [d for d in corpus.select(rest)["domain"]]
    assert named["text"][:] == corpus["text"][:]
    (told,) = desk.reports
    assert told["method"] == "salt_ds" and SALTDS(model, domain="hard").brings == ("hard",)
    assert "domain" in SALTDS(model, domain="hard")(corpus.remove_columns("domain")).column_names


@pytest.mark.bits
def test_scoring_that_was_stopped_goes_on_and_likelihoods_are_not_taken_for_it(corpus, model, tmp_path, monkeypatch):
    monkeypatch.setattr(_scores, "SHARD", 4)
    scored = []
    score = _scores._Scorer.learnable
    monkeypatch.setattr(_scores._Scorer, "learnable", lambda self, *a: scored.append(a) or score(self, *a))
    with working(tmp_path) as desk:
        first = SALTDS(model, 100).scores(corpus)
        likelihoods(model, corpus, desk, length=1024)
        assert (SALTDS(model, 100).scores(corpus) == first).all() and len(scored) == 6
        assert (SALTDS(model, 10).scores(corpus) != first).any() and len(scored) == 12
        assert desk.flops > 0


def test_what_cannot_be_is_refused(tiny, tmp_path):
    with pytest.raises(PretrainError, match="salt: omega 0.0: accepted"):
        SALT("x", omega=0.0)
    save(tiny("bert"), None, tmp_path / "bert")
    with pytest.raises(PretrainError, match="is a bidirectional model: accepted: a causal one"):
        SALT(str(tmp_path / "bert")).modules(tiny())

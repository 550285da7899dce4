"""Distillation from a frozen teacher: the divergences, their gradients, features, and that the teacher stays outside."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_objectives import context, rows
from test_train_stage import recipe  # noqa: F401
from test_training import log, small

import pretrain
from pretrain import engine
from pretrain.core.checkpoint import save
from pretrain.core.errors import PretrainError
from pretrain.core.meter import count_flops
from pretrain.objectives import _distil
from pretrain.objectives.distillation.distillation import Distillation, divergence, grouped
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.objectives.language.masked_lm import MaskedLM
from pretrain.recipe import load
from pretrain.training.budget import Budget
from pretrain.training.loop import Settings

WIDER = {"hidden_size": 64, "num_hidden_layers": 3}


@pytest.fixture
def setting(tiny, tmp_path):
    """`setting(family, teacher=fields, **fields)`: objective, student, what it trains beside, batch."""

    def make(family="llama", teacher=WIDER, **fields):
        save(tiny(family, seed=7, **teacher), None, tmp_path / "teacher" / "checkpoint")
        task = "masked_lm" if family in ("bert", "modernbert") else "causal_lm"
        objective = Distillation(str(tmp_path / "teacher"), objective=task, **fields)
        model = tiny(family)
        torch.manual_seed(0)
        batch = objective.prepare(rows([20, 31], [45]), context(60))
        return objective, model, objective.modules(model), batch

    return make


def gradients(loss, *models):
    return torch.autograd.grad(loss, [p for m in models for p in m.parameters()], retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bert", "modernbert"])
def test_without_soft_targets_it_is_the_students_own_objective(setting, family):
    teacher = {} if family == "modernbert" else WIDER
    objective, model, beside, batch = setting(family, teacher, hard=1.0, soft=0.0)
    found = objective.loss(model, batch, beside)
    alone = (MaskedLM() if family in ("bert", "modernbert") else CausalLM()).loss(model, batch)
    assert torch.allclose(found.value, alone.value, rtol=1e-5)
    assert torch.allclose(found.nll_BL, alone.nll_BL, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients(found.value, model), gradients(alone.value, model), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("fields", [{}, {"divergence": "reverse"}, {"divergence": "jensen_shannon"}, {"top_k": 5}])
def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it(setting, tiny, family, fields):
    objective, _, beside, batch = setting(family, {}, hard=0.0, features=1.0, **fields)
    copy = tiny(family, seed=7)
    loss = objective.loss(copy, batch, beside)
    assert abs(loss.value.item()) < 1e-6 and loss.parts["hard"] > 1
    assert all(g is None or g.abs().max() < 1e-6 for g in gradients(loss.value, copy, beside))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergences_are_torchs(setting, temperature):
    found = {}
    for kind in ("forward", "reverse", "jensen_shannon"):
        objective, model, beside, batch = setting(temperature=temperature, divergence=kind)
        loss = objective.loss(model, batch, beside)
        found[kind] = loss.parts["soft"].item()
        total = 0.5 * loss.parts["hard"] + temperature**2 * loss.parts["soft"]
        assert loss.value.item() == pytest.approx(total.item(), rel=1e-5)
    one = Distillation("x").prepare(rows([20], [31], [45]), context(60))  # one document a row needs no mask of its own
    known = one["target_BL"] != -100
    with torch.no_grad():
        p, q = (m(one["tokens_BL"]).logits[known].div(temperature).log_softmax(-1) for m in (model, beside.model))
    m = ((p.exp() + q.exp()) / 2).log()

    def torchs(a, b):
        return F.kl_div(b, a, log_target=True, reduction="batchmean").item()

    wanted = {
        "forward": torchs(q, p),
        "reverse": torchs(p, q),
        "jensen_shannon": (torchs(p, m) + torchs(q, m)) / 2,
    }
    for kind, value in wanted.items():
        objective, *_ = setting(temperature=temperature, divergence=kind)
        assert objective.loss(model, one, beside).parts["soft"].item() == pytest.approx(value, rel=1e-4)
        assert found[kind] > 0
    assert wanted["jensen_shannon"] < math.log(2)


def test_the_gradient_at_the_logits_is_the_papers_and_keeps_its_size_as_the_temperature_grows():
    weight, target = torch.eye(97, dtype=torch.float64), torch.zeros(5, dtype=torch.long)
    torch.manual_seed(0)
    x, y = torch.randn(5, 97, dtype=torch.float64, requires_grad=True), torch.randn(5, 97, dtype=torch.float64)
    for t in (2.0, 1000.0):
        soft = Distillation("x", temperature=t)._losses((x, weight, None), (y, weight, None), target)[1]
        found = torch.autograd.grad(t**2 * soft.sum(), x)[0]
        wanted = t * ((x / t).softmax(-1) - (y / t).softmax(-1))  # equations 2 and 3, times T²
        assert torch.allclose(found.double(), wanted, atol=1e-4)
    matching = ((x - x.mean(-1, keepdim=True)) - (y - y.mean(-1, keepdim=True))) / 97  # equation 4: logits compared
    assert torch.allclose(found.double(), matching, atol=1e-3) and matching.abs().max() > 1e-2


def test_a_truncated_teacher_sees_less_and_less_of_the_difference():
    torch.manual_seed(0)
    p, q = (torch.randn(6, 40, dtype=torch.float64).mul(2).log_softmax(-1) for _ in range(2))
    for kind in ("forward", "reverse", "jensen_shannon"):
        whole = divergence(p, q, kind)
        before = torch.zeros(6)
        for k in (1, 5, 20, 39):
            likely = q.topk(k).indices
            parts = [grouped(z, likely) for z in (p, q)]
            assert all(torch.allclose(part.exp().sum(-1), torch.ones(6).double()) for part in parts)
            now = divergence(*parts, kind)
            assert (now >= before - 1e-9).all() and (now <= whole + 1e-9).all()  # of coarser and coarser classes
            before = now
        assert torch.allclose(now, whole)  # the one other token is a class of its own
    likely = q.topk(5).indices
    rest = 1 - q.exp().gather(-1, likely).sum(-1)
    assert torch.allclose(grouped(q, likely)[:, -1].exp(), rest)


@pytest.mark.bits
def test_the_truncation_is_in_the_loss_and_more_than_the_vocabulary_is_all_of_it(setting):
    losses = {}
    for k in (0, 3, 97, 500):
        objective, model, beside, batch = setting(top_k=k)
        losses[k] = objective.loss(model, batch, beside).parts["soft"].item()
    assert losses[3] < losses[0] == losses[97] == losses[500]


def test_chunks_change_nothing(setting, monkeypatch):
    objective, model, beside, batch = setting(top_k=4, features=0.5)
    whole = objective.loss(model, batch, beside)
    before = gradients(whole.value, model, beside)
    monkeypatch.setattr(_distil, "LEAST_ROWS", 16)
    monkeypatch.setattr(_distil, "CHUNK_BYTES", {"cpu": 1})
    found = objective.loss(model, batch, beside)
    assert torch.allclose(found.value, whole.value, rtol=1e-6)
    found.value.backward()
    for parameter, b in zip([*model.parameters(), *beside.parameters()], before, strict=True):
        assert torch.allclose(parameter.grad, b, rtol=1e-4, atol=1e-7)


def test_the_weights_of_a_policy_reach_both_losses(setting):
    objective, model, beside, batch = setting()
    once = objective.loss(model, batch, beside).value
    twice = objective.loss(model, batch | {"token_weight_BL": torch.full((2, 60), 2.0)}, beside).value
    assert torch.allclose(twice, 2 * once)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_features_are_the_mean_squared_difference_of_projected_states(setting, family):
    objective, model, beside, batch = setting(family, features=0.7, layers={0: 2, 1: 0})
    loss = objective.loss(model, batch, beside)
    assert [tuple(w.weight.shape) for w in beside.learnt] == [(64, 32)] * 2
    with _distil.block_states(model, [0, 1]) as ours, _distil.block_states(beside.model, [0, 2]) as theirs:
        for m in (model, beside.model):
            _distil.states(m, batch, causal=family == "llama")
    inside = batch["document_BL"] > 0
    assert 0 < inside.sum() < inside.numel()
    pairs = [(beside.learnt[0](ours[0]), theirs[2]), (beside.learnt[1](ours[1]), theirs[0])]
    wanted = sum(((a - b)[inside] ** 2).mean() for a, b in pairs) / 2
    assert loss.parts["features"].item() == pytest.approx(wanted.item(), rel=1e-5)
    total = 0.5 * loss.parts["hard"] + 4 * loss.parts["soft"] + 0.7 * wanted
    assert loss.value.item() == pytest.approx(total.item(), rel=1e-5)
    assert all(g.any() for g in gradients(loss.value, beside))


@pytest.mark.parametrize(
    ("ours", "theirs", "pairs"), [(2, 4, [1, 3]), (3, 3, [0, 1, 2]), (2, 3, [1, 2]), (3, 2, [0, 1, 1])]
)
def test_by_default_blocks_are_paired_evenly_and_the_last_with_the_last(tiny, ours, theirs, pairs):
    student, teacher = (tiny("gpt2", n_layer=n) for n in (ours, theirs))
    assert Distillation("x", features=1.0)._pairs(student, teacher) == list(enumerate(pairs))


def test_features_are_the_same_when_activations_are_recomputed(setting):
    objective, model, beside, batch = setting(features=1.0)
    model.train()
    before = gradients(objective.loss(model, batch, beside).value, model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective.loss(model, batch, beside).value.backward()
    for parameter, b in zip(model.parameters(), before, strict=True):
        assert torch.allclose(parameter.grad, b, rtol=1e-4, atol=1e-7)


def test_features_are_those_of_each_batch_when_blocks_are_compiled(setting):
    objective, model, beside, _ = setting(features=1.0)
    batches = [objective.prepare(rows([30, 30], seed=seed), context(60)) for seed in range(3)]
    before = [objective.loss(model, batch, beside).parts["features"].item() for batch in batches]
    for block in model.model.layers:
        block.compile(backend="eager")
    after = [objective.loss(model, batch, beside).parts["features"].item() for batch in batches]
    assert after == pytest.approx(before, rel=1e-5) and len(set(before)) == 3


def test_the_teacher_moves_with_the_module_and_is_no_part_of_it(setting):
    _, _, beside, _ = setting(features=1.0)
    assert not any(name.startswith("model") for name in beside.state_dict())
    assert {id(p) for p in beside.parameters()} == {id(w.weight) for w in beside.learnt}
    assert not any(p.requires_grad for p in beside.model.parameters())
    assert not beside.train().model.training
    assert {p.device.type for p in torch.nn.ModuleList([beside]).to("meta")[0].model.parameters()} == {"meta"}


def taught(prepared, tiny, folder, steps, tmp_path, **fields):
    teacher = tiny(vocab_size=512, seed=7)
    save(teacher, None, tmp_path / "teacher" / "checkpoint")
    objective = Distillation(str(tmp_path / "teacher"), **fields)
    settings = Settings(budget=Budget(steps=steps), save_every=2, bar=False)
    done = small(prepared, tiny, folder, settings=settings, objective=objective, micro_rows=4, num_hidden_layers=1)
    return done, teacher


def test_the_teacher_is_neither_trained_nor_saved_and_its_flops_count(prepared, tiny, tmp_path):
    done, teacher = taught(prepared, tiny, tmp_path / "a", 2, tmp_path, features=1.0)
    inside = done.trainee.beside[0].model
    for name, value in teacher.state_dict().items():
        assert torch.equal(inside.state_dict()[name], value)
    optimised = {id(p) for group in done.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in [*done.trainee.model.parameters(), *done.trainee.beside[0].learnt.parameters()]}
    (state,) = (tmp_path / "a" / "state" / "step-000000002").glob("rank-*.safetensors")
    assert {name for name in load_file(state) if "beside" in name} == {"model.beside.0.learnt.0.weight"}
    plain = small(
        prepared, tiny, tmp_path / "b", settings=Settings(budget=Budget(steps=2), bar=False), num_hidden_layers=1
    )
    forward = count_flops(lambda: teacher(torch.zeros(8, 64, dtype=torch.long)))[1]
    assert done.flops > plain.flops + 2 * forward


@pytest.mark.bits
def test_a_training_resumes_bit_for_bit(prepared, tiny, tmp_path):
    whole, _ = taught(prepared, tiny, tmp_path / "a", 4, tmp_path, features=1.0)
    taught(prepared, tiny, tmp_path / "b", 2, tmp_path, features=1.0)
    resumed, _ = taught(prepared, tiny, tmp_path / "b", 4, tmp_path, features=1.0)
    ours, theirs = whole.trainee.state_dict(), resumed.trainee.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_student_comes_closer_to_the_teacher(prepared, tiny, tmp_path):
    done, _ = taught(prepared, tiny, tmp_path / "a", 25, tmp_path, hard=0.0)
    soft = [row["parts"]["soft"] for row in log(tmp_path / "a")]
    assert soft[-1] < 0.8 * soft[0] and done.step == 25


def test_a_stage_learns_from_an_earlier_stage(recipe, tmp_path):  # noqa: F811
    text = recipe.read_text()
    stage = text[text.index("  - stage: train") :]
    second = stage.replace("name: model", "name: student")
    recipe.write_text(text + second + "    objective: {method: distillation, teacher: model, features: 0.1}\n")
    done = engine.run(load(recipe, [], tmp_path / "out"), say=engine.silent)
    student, _ = pretrain.load(done.folder / "student" / "checkpoint")
    teacher, _ = pretrain.load(done.folder / "model" / "checkpoint")
    assert set(student.state_dict()) == set(teacher.state_dict())
    assert done.stages["student"]["flops"] > 4 / 3 * done.stages["model"]["flops"]  # one more forward pass


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "span_corruption"}, "objective 'span_corruption': accepted: causal_lm, masked_lm"),
        ({"temperature": 0.0}, "temperature 0.0: accepted: above 0"),
        ({"soft": -1.0}, "soft -1.0: accepted: 0 or more"),
        ({"top_k": -1}, "top_k -1: accepted: 0 or more"),
        ({"divergence": "total"}, "divergence 'total': accepted: forward, reverse, jensen_shannon"),
        ({"layers": {0: 0}}, "accepted: with features above 0"),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(PretrainError, match=f"distillation: .*{message}"):
        Distillation("x", **fields)


def test_a_teacher_that_cannot_be_is_an_error(setting, tiny, tmp_path):
    with pytest.raises(PretrainError, match="distillation: the teacher's vocabulary has 50 entries: accepted: 97"):
        setting(teacher={"vocab_size": 50})
    with pytest.raises(PretrainError, match="layers 0: 3: accepted: 0 to 1, the student's blocks, to 0 to 2"):
        setting(features=1.0, layers={0: 3})
    with pytest.raises(PretrainError, match="no checkpoint at"):
        Distillation(str(tmp_path / "nowhere")).modules(tiny())
    save(tiny("bert"), None, tmp_path / "bert")
    with pytest.raises(PretrainError, match="is a bidirectional model: accepted: a causal one"):
        Distillation(str(tmp_path / "bert")).modules(tiny())

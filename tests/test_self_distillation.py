"""Self-distillation: the distance to the teacher's states, of the unmasked text, and that only the student moves."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from test_objectives import context, rows
from test_train_stage import recipe  # noqa: F401
from test_training import small

import pretrain
from pretrain import engine
from pretrain.core.checkpoint import save
from pretrain.core.errors import PretrainError
from pretrain.core.meter import count_flops
from pretrain.core.models.families import base
from pretrain.objectives.distillation.self_distillation import SelfDistillation
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.objectives.language.masked_lm import MaskedLM
from pretrain.recipe import load
from pretrain.training.budget import Budget
from pretrain.training.loop import Settings

FAMILIES = ["llama", "gpt2", "bert", "modernbert"]


@pytest.fixture
def setting(tiny, tmp_path):
    """`setting(family, **fields)`: objective, student, teacher, batch, the text of the batch row by row."""

    def make(family="bert", **fields):
        save(tiny(family, seed=7), None, tmp_path / "teacher" / "checkpoint")
        task = "masked_lm" if family in ("bert", "modernbert") else "causal_lm"
        objective, model, text = (
            SelfDistillation(str(tmp_path / "teacher"), task, **fields),
            tiny(family),
            rows([20, 31], [45]),
        )
        return objective, model, objective.modules(model), objective.prepare(text, context(60)), text

    return make


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)


def documents(text):
    return [torch.from_numpy(piece).long()[None] for row in text for piece in row.pieces()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("states", ["auto", "all"])
def test_the_distance_is_that_of_the_unmasked_documents_one_by_one(setting, family, states):
    objective, model, beside, batch, text = setting(family, states=states, distance=0.3)
    loss = objective.loss(model, batch, beside)
    found = []
    for tokens in documents(text):
        with torch.no_grad():
            ours, theirs = (base(m)(tokens).last_hidden_state[0] for m in (model, beside.model))
        apart = (ours - theirs).square().sum(-1)
        found.append(apart[:1] if states == "auto" and "bert" in family else apart)
    wanted = torch.cat(found)
    assert len(wanted) == (3 if states == "auto" and "bert" in family else 96)
    assert loss.parts["distance"].item() == pytest.approx(wanted.mean().item(), rel=1e-4)
    alone = (MaskedLM() if "bert" in family else CausalLM()).loss(model, batch)
    assert loss.parts["objective"].item() == pytest.approx(alone.value.item(), rel=1e-5)
    assert loss.value.item() == pytest.approx(alone.value.item() + 0.3 * wanted.mean().item(), rel=1e-4)
    assert torch.allclose(loss.nll_BL, alone.nll_BL)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_of_the_teacher_is_at_no_distance_and_the_gradient_is_the_objectives(setting, tiny, family):
    objective, _, beside, batch, _ = setting(family)
    copy = tiny(family, seed=7)
    loss = objective.loss(copy, batch, beside)
    assert loss.parts["distance"] < 1e-9
    alone = (MaskedLM() if "bert" in family else CausalLM()).loss(copy, batch).value
    for a, b in zip(gradients(loss.value, copy), gradients(alone, copy), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_of_both_terms_and_the_teacher_gets_none(setting):
    objective, model, beside, batch, _ = setting(states="all")
    off, *_ = setting(states="all", distance=0.0)
    both, one = (gradients(o.loss(model, batch, beside).value, model) for o in (objective, off))
    apart = base(model)(batch["tokens_BL"].where(batch["target_BL"] == -100, batch["target_BL"])[1:, :45])
    with torch.no_grad():
        other = base(beside.model)(batch["tokens_BL"].where(batch["target_BL"] == -100, batch["target_BL"])[1:, :45])
    single = {name: value[1:, :45] for name, value in batch.items() if value.ndim == 2}
    distance = (apart.last_hidden_state - other.last_hidden_state).square().sum(-1).mean()
    found = objective.loss(model, single, beside)
    assert found.parts["distance"].item() == pytest.approx(distance.item(), rel=1e-4)
    wanted = gradients(distance, model)
    alone = gradients(MaskedLM().loss(model, single).value, model)
    for a, b, c in zip(gradients(found.value, model), wanted, alone, strict=True):
        assert torch.allclose(a, c if b is None else b + c, rtol=1e-3, atol=1e-5)
    assert any(not torch.allclose(a, b) for a, b in zip(both, one, strict=True))
    assert all(p.grad is None and not p.requires_grad for p in beside.model.parameters())


def test_the_state_of_the_first_token_is_refused_for_causal_models():
    with pytest.raises(PretrainError, match="states 'first': accepted with causal_lm: auto, all"):
        SelfDistillation("x", "causal_lm", states="first")
    assert SelfDistillation("x", states="first").task == "masked"


def test_a_causal_student_reads_each_batch_once(setting):
    objective, model, beside, batch, _ = setting("llama")
    for m in (model, beside.model):
        _, cost = count_flops(lambda m=m: CausalLM().loss(m, batch).value.detach())
    with torch.no_grad():
        forward = count_flops(lambda: base(beside.model)(batch["tokens_BL"]))[1]
        both = count_flops(lambda: objective.loss(model, batch, beside))[1]
        one = count_flops(lambda: CausalLM().loss(model, batch))[1]
    assert both == one + forward and cost >= one


def test_the_teacher_is_neither_trained_nor_saved(prepared, tiny, tmp_path):
    teacher = tiny("bert", vocab_size=512, seed=7)
    save(teacher, None, tmp_path / "teacher")
    objective = SelfDistillation(str(tmp_path / "teacher"))
    settings = Settings(budget=Budget(steps=2), save_every=2, bar=False)
    done = small(prepared, tiny, tmp_path / "a", settings=settings, objective=objective, family="bert")
    for name, value in done.trainee.beside[0].model.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name])
    optimised = {id(p) for group in done.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in done.trainee.model.parameters()}
    (state,) = (tmp_path / "a" / "state" / "step-000000002").glob("rank-*.safetensors")
    saved = load_file(state)
    assert saved and not any("beside" in name for name in saved)


@pytest.mark.processes
def test_the_papers_recipe_runs_from_one_start_to_the_teacher_and_to_the_student(recipe, tmp_path):  # noqa: F811
    text = (
        recipe.read_text()
        .replace("vocab_size: 400", "vocab_size: 400\n    mask: true")
        .replace("validation: 0.1", "validation: 0.3")
    )
    text = text.replace("family: llama", "family: bert") + "    objective: masked_lm\n"
    further = """\
  - {stage: train, name: %s, corpus: corpus, init: model, length: 32, batch_rows: 2, budget: {steps: 3}, objective: %s}
"""
    text += further % ("teacher", "masked_lm")
    text += further % ("student", "{method: self_distillation, teacher: teacher}")
    recipe.write_text(text)
    done = engine.run(load(recipe, [], tmp_path / "out"), say=engine.silent)
    start, student = (pretrain.load(done.folder / name / "checkpoint")[0] for name in ("model", "student"))
    assert set(start.state_dict()) == set(student.state_dict())
    assert done.stages["student"]["metrics"]["distance"] > 0
    assert done.stages["student"]["flops"] > 5 / 3 * done.stages["teacher"]["flops"]  # two more forward passes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "electra"}, "objective 'electra': accepted: masked_lm, causal_lm"),
        ({"distance": -1.0}, "distance -1.0: accepted: 0 or more"),
        ({"states": "last"}, "states 'last': accepted: auto, first, all"),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(PretrainError, match=f"self_distillation: {message}"):
        SelfDistillation("x", **fields)


def test_a_teacher_of_another_width_is_an_error(tiny, tmp_path):
    save(tiny("bert", hidden_size=64), None, tmp_path / "t")
    with pytest.raises(PretrainError, match="the teacher's hidden_size is 64: accepted: 32, the student's"):
        SelfDistillation(str(tmp_path / "t")).modules(tiny("bert"))

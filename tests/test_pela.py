"""PELA: the factorisation is the best one of its size, goes into a checkpoint and back, and is trained near the original."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_same_model
from safetensors.torch import load_file
from test_objectives import context, rows
from test_train_stage import recipe  # noqa: F401
from test_training import log, small
from transformers.pytorch_utils import Conv1D

import pretrain
from pretrain import engine
from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import linears
from pretrain.objectives._distil import block_states, states
from pretrain.objectives.distillation.pela_pretraining import PELAPretraining, largest_change, low_rank
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.objectives.language.masked_lm import MaskedLM
from pretrain.optim.optimizers.adamw import AdamW
from pretrain.recipe import load
from pretrain.surgery import Inputs
from pretrain.surgery.compression.pela import PELA, LowRank
from pretrain.training.budget import Budget
from pretrain.training.loop import Settings

TOKENS = torch.arange(3, 23)[None]
FAMILIES = ["llama", "qwen3", "gpt2", "bert", "modernbert"]


def with_biases(model):
    """The model with biases that are not zero, and its matrices not nearly so."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in linears(model).values():
            layer.weight.normal_(0, 0.15, generator=generator)
            if layer.bias is not None:
                layer.bias.normal_(0, 0.1, generator=generator)
    return model


def matrix(layer):
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_rank_the_logits_are_the_same(tiny, family):
    plain, model = with_biases(tiny(family)), PELA(0.5)(with_biases(tiny(family)))
    layers = linears(model)
    assert set(layers) == set(linears(plain)) and all(isinstance(layer, LowRank) for layer in layers.values())
    assert_same_model(model(TOKENS).logits, plain(TOKENS).logits, plain)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_matrix_is_the_best_of_its_rank_and_both_factors_are_of_one_size(tiny, family):
    plain, model = linears(with_biases(tiny(family))), linears(PELA(2.0)(with_biases(tiny(family))))
    for name, layer in model.items():
        weight, rank = matrix(plain[name]), layer.A.shape[0]
        s = torch.linalg.svd(weight.double()).S
        lost = (layer.dense().double() - weight.double()).square().sum()
        assert 1 < rank < min(weight.shape) and torch.allclose(lost, s[rank:].square().sum(), rtol=1e-4)
        assert torch.linalg.matrix_norm(layer.dense() - weight, 2).item() == pytest.approx(s[rank].item(), rel=1e-4)
        for gram in (layer.A @ layer.A.T, layer.B.T @ layer.B):  # √S in each
            torch.testing.assert_close(gram, torch.diag(s[:rank].float()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("compression", [1.5, 2.0, 3.0, 100.0])
def test_parameters_are_as_many_as_the_paper_counts(tiny, compression):
    plain, inputs = tiny(), Inputs()
    model = PELA(compression)(tiny(), inputs)
    shapes = [layer.weight.shape for layer in linears(plain).values()]
    counted = sum((o + i) * max(1, o * i // (compression * (o + i))) for o, i in shapes)
    before, metrics = sum(o * i for o, i in shapes), inputs.extra["metrics"]
    assert metrics["linear_parameters"] == counted and metrics["linear_parameters_before"] == before
    others = sum(p.numel() for p in plain.parameters()) - before
    assert sum(p.numel() for p in model.parameters()) == others + counted
    if compression < 100:
        assert 0.75 / compression < counted / before <= 1 / compression


def test_the_energy_kept_is_that_of_the_kept_singular_values(tiny):
    plain, inputs = with_biases(tiny()), Inputs()
    model = PELA(2.0)(with_biases(tiny()), inputs)
    kept, energy = [], []
    for name, layer in linears(model).items():
        squares = torch.linalg.svdvals(matrix(linears(plain)[name]).detach().double()).square()
        kept.append(squares[: layer.A.shape[0]].sum())
        energy.append(squares.sum())
    metrics = inputs.extra["metrics"]
    assert metrics["energy_kept"] == pytest.approx(float(sum(kept) / sum(energy)), rel=1e-5)
    assert metrics["energy_kept_least"] == pytest.approx(min(float(k / e) for k, e in zip(kept, energy, strict=True)))
    assert PELA(0.5)(tiny(), inputs) is not None and inputs.extra["metrics"]["energy_kept"] == pytest.approx(1.0)


@pytest.mark.bits
@pytest.mark.parametrize("family", ["gpt2"])
def test_saved_and_loaded_it_is_the_same_model_and_merged_a_plain_one(tiny, tmp_path, family):
    import transformers

    model = PELA(2.0)(with_biases(tiny(family)))
    before = model(TOKENS).logits
    checkpoint.save(model, None, tmp_path / "a")
    loaded, _ = checkpoint.load(tmp_path / "a")
    assert torch.equal(loaded(TOKENS).logits, before)
    assert checkpoint.surgery_of(loaded) == checkpoint.surgery_of(model)
    merged = PELA(merge=True)(loaded)
    assert not checkpoint.surgery_of(merged)
    checkpoint.save(merged, None, tmp_path / "b")
    auto = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    after = auto.from_pretrained(tmp_path / "b").eval()
    assert_same_model(after(TOKENS).logits, before, model)
    assert {n: p.shape for n, p in after.named_parameters()} == {n: p.shape for n, p in tiny(family).named_parameters()}


def test_wrong_fields_and_models_are_refused(tiny):
    with pytest.raises(PretrainError, match=r"pela: compression 0.4: accepted: 0.5 or more"):
        PELA(0.4)
    with pytest.raises(PretrainError, match="this one has none of its layers"):
        PELA(merge=True)(tiny())
    with pytest.raises(PretrainError, match="q_proj is a LowRank: accepted: plain linear layers"):
        PELA()(PELA()(tiny()))


@pytest.fixture
def setting(tiny, tmp_path):
    """`setting(family, compression, **fields)`: objective, factorised student, teacher, batch."""

    def make(family="llama", compression=2.0, **fields):
        checkpoint.save(with_biases(tiny(family)), None, tmp_path / "teacher" / "checkpoint")
        task = "masked_lm" if "bert" in family else "causal_lm"
        objective = PELAPretraining(str(tmp_path / "teacher"), task, **fields)
        model = PELA(compression)(with_biases(tiny(family)))
        return objective, model, objective.modules(model), objective.prepare(rows([20, 31], [45]), context(60))

    return make


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)


@pytest.mark.bits
@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_rank_there_is_nothing_to_learn_but_the_objective(setting, family):
    objective, model, beside, batch = setting(family, 0.5, epsilon=0.0)
    loss = objective.loss(model, batch, beside)
    alone = (MaskedLM() if "bert" in family else CausalLM()).loss(model, batch)
    assert loss.parts["features"] < 1e-8 and loss.parts["perturbation"] < 1e-10
    assert loss.value.item() == pytest.approx(alone.value.item(), rel=1e-5) and torch.equal(loss.nll_BL, alone.nll_BL)
    for a, b in zip(gradients(loss.value, model), gradients(alone.value, model), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_loss_is_the_papers_formula(setting, family):
    objective, model, beside, batch = setting(
        family, objective_weight=0.5, features=0.1, perturbation=2.0, epsilon=0.01
    )
    with block_states(model, [0, 1]) as ours, block_states(beside.model, [0, 1]) as theirs:
        states(beside.model, batch, causal=family != "bert")
        own = (MaskedLM() if family == "bert" else CausalLM()).loss(model, batch)
    inside = batch["document_BL"] > 0
    features = sum(F.mse_loss(ours[n][inside], theirs[n][inside]) for n in (0, 1)) / 2
    apart = []
    for name, layer in linears(model).items():
        change = torch.norm(layer.B @ layer.A - matrix(linears(beside.model)[name]), float("inf"))
        apart.append(F.mse_loss(change, torch.tensor(0.01)))  # as the official code has it
    wanted = 0.5 * own.value + 0.1 * features + 2.0 * sum(apart) / len(apart)
    found = objective.loss(model, batch, beside)
    assert features > 1e-3 and sum(apart) > 1e-3
    assert found.value.item() == pytest.approx(wanted.item(), rel=1e-5)
    for a, b in zip(gradients(found.value, model), gradients(wanted, model), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_the_largest_change_and_its_gradient_are_those_of_the_whole_product():
    torch.manual_seed(0)
    B, A, weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 2), (2, 9), (6, 9)))
    B.requires_grad_(), A.requires_grad_()
    mine, theirs = largest_change(B, A, weight), (B @ A - weight).abs().amax()
    torch.testing.assert_close(mine, theirs)
    for a, b in zip(torch.autograd.grad(mine, (B, A)), torch.autograd.grad(theirs, (B, A)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(largest_change(B.float(), A.float(), weight.float()), theirs.float())


@pytest.mark.bits
def test_a_term_of_weight_zero_costs_nothing(setting):
    objective, model, beside, batch = setting(features=0.0, perturbation=0.0)
    found = objective.loss(model, batch, beside)
    assert set(found.parts) == {"objective"} and torch.equal(found.value, CausalLM().loss(model, batch).value)


def test_distillation_alone_brings_the_features_nearer_and_leaves_the_teacher_alone(prepared, tiny, tmp_path):
    teacher = with_biases(tiny(vocab_size=512))
    checkpoint.save(teacher, None, tmp_path / "teacher")
    objective = PELAPretraining(str(tmp_path / "teacher"), objective_weight=0.0)
    settings = Settings(budget=Budget(steps=20), save_every=20, bar=False)

    def factorised(family, **fields):
        return PELA(2.0)(with_biases(tiny(family, **fields)))

    done = small(prepared, factorised, tmp_path / "a", settings=settings, objective=objective, optimizer=AdamW(lr=1e-3))
    (state,) = (tmp_path / "a" / "state" / "step-000000020").glob("rank-*.safetensors")
    saved = load_file(state)
    assert saved and not any("beside" in name for name in saved)
    assert all(torch.equal(v, teacher.state_dict()[n]) for n, v in done.trainee.beside[0].model.state_dict().items())
    assert {id(p) for g in done.optimizer.param_groups for p in g["params"]} == {id(p) for p in done.model.parameters()}
    parts = [row["parts"] for row in log(tmp_path / "a")]
    assert parts[-1]["features"] < 0.8 * parts[0]["features"]
    assert parts[-1]["perturbation"] < parts[0]["perturbation"]


def test_the_papers_recipe_runs(recipe, tmp_path):  # noqa: F811
    text = (
        recipe.read_text()
        + """\
  - stage: train
    name: small
    corpus: corpus
    init: model
    surgeries: [{method: pela, compression: 2}]
    objective: {method: pela_pretraining, teacher: model}
    optimizer: {method: adamw, lr: 0.01}
    length: 32
    batch_rows: 2
    budget: {steps: 8}
  - {stage: surgery, name: plain, checkpoint: small, surgeries: [{method: pela, merge: true}]}
"""
    )
    recipe.write_text(text)
    done = engine.run(load(recipe, [], tmp_path / "out"), say=engine.silent)
    model, _ = pretrain.load(done.folder / "small" / "checkpoint")
    plain, _ = pretrain.load(done.folder / "plain" / "checkpoint")
    assert len(low_rank(model)) == 7 and not low_rank(plain)
    ids = torch.arange(10, 30)[None]
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert {"pela", "pela_pretraining"} <= set(done.stages["small"]["methods"])
    assert done.stages["plain"]["metrics"]["parameters"] > done.stages["plain"]["metrics"]["parameters_before"]


def test_a_student_and_a_teacher_that_do_not_fit_are_errors(setting, tiny, tmp_path):
    objective, model, _, _ = setting()
    with pytest.raises(PretrainError, match="perturbation 1.0: accepted: 0, or a model that the surgery pela made"):
        objective.modules(tiny())
    assert PELAPretraining(objective.teacher, perturbation=0.0).modules(tiny()) is not None
    with pytest.raises(PretrainError, match="the teacher has 2 blocks: accepted: 1, as the student"):
        objective.modules(PELA()(tiny(num_hidden_layers=1)))
    checkpoint.save(model, None, tmp_path / "low")
    with pytest.raises(PretrainError, match="q_proj is factorised: accepted: the original model"):
        PELAPretraining(str(tmp_path / "low")).modules(model)
    with pytest.raises(PretrainError, match="epsilon -1.0: accepted: 0 or more"):
        PELAPretraining("x", epsilon=-1.0)
    with pytest.raises(PretrainError, match="objective 'ul2': accepted: causal_lm, masked_lm"):
        PELAPretraining("x", "ul2")

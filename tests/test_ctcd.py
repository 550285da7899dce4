"""Co-training and co-distillation: gradients of each of the four losses, the companion, and that both come out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_objectives import context, rows
from test_training import small

from pretrain.core.checkpoint import save
from pretrain.core.errors import PretrainError
from pretrain.objectives import _distil
from pretrain.objectives.distillation.ctcd import CTCD
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.objectives.language.masked_lm import MaskedLM
from pretrain.training.budget import Budget
from pretrain.training.loop import Settings

WIDER = {"hidden_size": 64, "num_hidden_layers": 3}


def setting(tiny, family="llama", companion=WIDER, seed=0, **fields):
    masked = family in ("bert", "modernbert")
    objective = CTCD(companion=companion, objective="masked_lm" if masked else "causal_lm", **fields)
    model = tiny(family)
    torch.manual_seed(seed)
    other = objective.modules(model).eval()
    return objective, model, other, objective.prepare(rows([20, 31], [45]), context(60))


def gradients(loss, *models):
    parameters = [p for model in models for p in model.parameters()]
    return torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bert", "modernbert"])
def test_without_distillation_it_is_two_separate_trainings(tiny, family):
    objective, model, other, batch = setting(tiny, family, from_companion=0.0, to_companion=0.0)
    found = objective.loss(model, batch, other)
    alone = MaskedLM() if family in ("bert", "modernbert") else CausalLM()
    mine, theirs = alone.loss(model, batch), alone.loss(other, batch)
    assert torch.allclose(found.value, mine.value + theirs.value, rtol=1e-5)
    assert torch.allclose(found.nll_BL, mine.nll_BL, rtol=1e-4, atol=1e-5)
    expected = [*gradients(mine.value, model), *gradients(theirs.value, other)]
    for a, b in zip(gradients(found.value, model, other), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergences_are_torchs(tiny, temperature):
    _, model, other, _ = setting(tiny)
    objective = CTCD(temperature=temperature)
    batch = objective.prepare(rows([20]), context(20))
    found = objective.loss(model, batch, other)
    with torch.no_grad():
        p, q = (m(batch["tokens_BL"]).logits[0, :-1].div(temperature).log_softmax(-1) for m in (model, other))
    wanted = {
        "from_companion": F.kl_div(p, q, log_target=True, reduction="batchmean"),
        "to_companion": F.kl_div(q, p, log_target=True, reduction="batchmean"),
    }
    for name, value in wanted.items():
        assert float(found.parts[name]) == pytest.approx(float(value), rel=1e-4)
    kls = found.parts["from_companion"] + found.parts["to_companion"]
    total = found.parts["model"] + found.parts["companion"] + temperature**2 * kls
    assert found.value.item() == pytest.approx(float(total), rel=1e-5)


@pytest.mark.parametrize(("name", "learner"), [("from_companion", 0), ("to_companion", 1)])
def test_distillation_moves_the_learner_only(tiny, name, learner):
    none = dict.fromkeys(("hard", "companion_hard", "from_companion", "to_companion"), 0.0)
    objective, *models, batch = setting(tiny, **(none | {name: 1.0}))
    loss = objective.loss(models[0], batch, models[1]).value
    assert any(g.abs().sum() > 0 for g in gradients(loss, models[learner]))
    assert all(g is None or not g.any() for g in gradients(loss, models[1 - learner]))


def test_the_distillation_gradient_at_the_logits_is_the_difference_of_the_predictions(tiny):
    # ∂ T² KL(q ‖ p) / ∂x = T (p - q)
    objective = CTCD(temperature=2.0)
    weight = torch.eye(97)
    x, y = torch.randn(5, 97, requires_grad=True), torch.randn(5, 97)
    kl = objective._losses((x, weight, None), (y, weight, None), torch.zeros(5, dtype=torch.long))[2]
    grad = torch.autograd.grad(4.0 * kl.sum(), x)[0]
    assert torch.allclose(grad, 2.0 * ((x / 2).softmax(-1) - (y / 2).softmax(-1)), atol=1e-5)


def test_chunks_change_nothing(tiny, monkeypatch):
    objective, model, other, batch = setting(tiny)
    whole = objective.loss(model, batch, other)
    before = gradients(whole.value, model, other)
    monkeypatch.setattr(_distil, "LEAST_ROWS", 16)
    monkeypatch.setattr(_distil, "CHUNK_BYTES", {"cpu": 1})
    found = objective.loss(model, batch, other)
    assert torch.allclose(found.value, whole.value, rtol=1e-6)
    found.value.backward()
    for parameter, b in zip([*model.parameters(), *other.parameters()], before, strict=True):
        assert torch.allclose(parameter.grad, b, rtol=1e-4, atol=1e-7)


def test_the_weights_of_a_policy_reach_all_four_losses(tiny):
    objective, model, other, batch = setting(tiny)
    once = objective.loss(model, batch, other).value
    twice = objective.loss(model, batch | {"token_weight_BL": torch.full_like(once, 2.0).expand(2, 60)}, other).value
    assert torch.allclose(twice, 2 * once)


@pytest.mark.parametrize(
    ("family", "changed", "expected"),
    [
        ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1}, {"head_dim": 16, "num_key_value_heads": 1}),
        ("llama", WIDER, {"hidden_size": 64, "head_dim": 16, "num_key_value_heads": 2, "num_hidden_layers": 3}),
        ("qwen3", {"num_hidden_layers": 3}, {"head_dim": 8, "num_hidden_layers": 3}),
        ("gpt2", WIDER, {"n_embd": 64, "n_layer": 3, "n_positions": 64}),
        ("bert", {"num_attention_heads": 2}, {"num_attention_heads": 2, "hidden_size": 32}),
        ("modernbert", {"num_hidden_layers": 5}, {"local_attention": 6, "num_hidden_layers": 5}),
        ("llama", {}, {"hidden_size": 32}),
    ],
)
def test_the_companion_is_the_model_with_some_fields_changed(tiny, family, changed, expected):
    objective, model, other, batch = setting(tiny, family, companion=changed)
    config = other.config
    assert {name: getattr(config, name) for name in expected} == expected
    assert type(other) is type(model) and config.vocab_size == 97
    assert not torch.equal(other.get_input_embeddings().weight[:, :32], model.get_input_embeddings().weight)
    assert torch.isfinite(objective.loss(model, batch, other).value)
    if family == "modernbert":
        assert len(config.layer_types) == 5


def test_a_companion_is_made_of_a_model_whose_file_holds_what_its_type_does_not_know(tiny):
    model = tiny("llama")
    model.config.unk_token_id = 0  # as a checkpoint converted from GGUF has it
    companion = CTCD(companion=WIDER).modules(model)
    assert companion.config.hidden_size == 64 and not hasattr(companion.config, "unk_token_id")


def test_a_companion_may_go_on_from_a_checkpoint(tiny, tmp_path):
    teacher = tiny("llama", hidden_size=64, seed=7)
    save(teacher, None, tmp_path / "checkpoint")
    objective = CTCD(companion_init=str(tmp_path))
    assert objective.references() == {"companion_init": str(tmp_path)}
    other = objective.modules(tiny())
    assert all(
        torch.equal(a, b) for a, b in zip(other.state_dict().values(), teacher.state_dict().values(), strict=True)
    )
    with pytest.raises(PretrainError, match="companion's vocabulary has 97 entries: accepted: 120"):
        objective.modules(tiny(vocab_size=120))


@pytest.mark.bits
@pytest.mark.parametrize("tied", [False, True])
def test_a_training_resumes_bit_for_bit_with_its_companion(prepared, tiny, tmp_path, tied):
    def run(folder, steps):
        settings = Settings(budget=Budget(steps=steps), save_every=2, bar=False)
        torch.manual_seed(0)
        objective = CTCD(companion=WIDER)
        return small(
            prepared, tiny, folder, settings=settings, objective=objective, micro_rows=4, tie_word_embeddings=tied
        )

    whole = run(tmp_path / "a", 4)
    run(tmp_path / "b", 2)
    torch.manual_seed(5)  # the companion's weights are the saved ones, however it was made
    resumed = run(tmp_path / "b", 4)
    ours, theirs = whole.trainee.state_dict(), resumed.trainee.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(name.startswith("beside.0.model.layers.2") for name in ours)


def test_both_learn_and_come_closer_than_without_distillation(prepared, tiny, tmp_path):
    def run(folder, weight):
        settings = Settings(budget=Budget(steps=25), save_every=0, bar=False)
        torch.manual_seed(0)
        objective = CTCD(companion=WIDER, from_companion=weight, to_companion=weight)
        batch = objective.prepare(rows([40, 20]), context(64))
        done = small(prepared, tiny, folder, settings=settings, objective=objective)
        with torch.no_grad():
            return objective.loss(done.trainee.model.eval(), batch, done.trainee.beside[0].eval()).parts, done

    apart, done = run(tmp_path / "a", 0.0)
    together, _ = run(tmp_path / "b", 1.0)
    assert done.flops > 0
    assert float(together["from_companion"]) < float(apart["from_companion"])


def test_the_companion_comes_out_by_name(tiny):
    objective, _, other, _ = setting(tiny)
    assert objective.export(other) == {"companion": other}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "span_corruption"}, "objective 'span_corruption': accepted: causal_lm, masked_lm"),
        ({"temperature": 0.0}, "temperature 0.0: accepted: above 0"),
        ({"hard": -1.0}, "hard -1.0: accepted: 0 or more"),
        ({"companion": WIDER, "companion_init": "x"}, "accepted: one of them"),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(PretrainError, match=message):
        CTCD(**fields)


def test_a_companion_that_cannot_be_is_an_error(tiny):
    with pytest.raises(PretrainError, match="unknown field 'hiden_size'.*did you mean 'hidden_size'"):
        CTCD(companion={"hiden_size": 64}).modules(tiny())
    with pytest.raises(PretrainError, match="num_attention_heads 0: accepted: a whole number from 1"):
        CTCD(companion={"num_attention_heads": 0}).modules(tiny())
    with pytest.raises(PretrainError, match="companion's vocabulary has 50 entries"):
        CTCD(companion={"vocab_size": 50}).modules(tiny())

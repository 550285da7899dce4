"""IncreLoRA: components that are added while training, where they are needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from closeness import assert_same_model
from peft import PeftModel
from policy_run import run, steps
from transformers import AutoModelForCausalLM

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.core.models.families import new_model
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.optim.schedules.cosine import Cosine
from pretrain.policies import Policy
from pretrain.policies.pruning.increlora_allocation import _restart_schedules, orthogonality
from pretrain.surgery import Inputs
from pretrain.surgery.adapters.increlora import RESERVED, growing
from pretrain.training.budget import Budget

increlora = method_class("increlora")
allocation = method_class("increlora_allocation")
lora = method_class("lora")
merge = method_class("merge_adapters")
IDS = torch.tensor([[1, 5, 9, 11, 40, 2]])


def logits(model, **given):
    with torch.no_grad():
        return model.eval()(IDS, **given).logits


def grown(model, seed=0):
    """As if components had been added and trained: layers of 1, 2, 3, 1, … active ones, each with one in reserve."""
    source = torch.Generator().manual_seed(seed)
    for number, layer in enumerate(growing(model).values()):
        layer.initialise(0, 4, 0.0, source)
        layer.resize(1 + number % 3, 1)
        with torch.no_grad():
            for name in ("A", "B", "E"):
                for index in range(layer.counts[0]):
                    parameter = getattr(layer, name)[index]
                    parameter += 0.5 * torch.randn(parameter.shape, generator=source)
    return model


def small(prepared, **given):
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = Vocabulary.of(load_tokenizer(prepared / "tokenizer"))
    model = new_model("llama", fields | {"attention_dropout": 0.1}, vocabulary=vocabulary, seed=1)
    return increlora(**({"max_rank": 6} | given))(model, Inputs(seed=3))


@pytest.mark.bits
@pytest.mark.parametrize("family", ("gpt2",))
def test_a_new_adapter_changes_nothing_and_alone_is_trained(tiny, family) -> None:
    extra = {"decoder_input_ids": IDS} if family == "t5" else {}
    before = logits(tiny(family), **extra)
    model = increlora(max_rank=3)(tiny(family))
    assert torch.equal(logits(model, **extra), before)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"A", "E", "B"}
    for layer in growing(model).values():
        assert layer.counts == (1, 0) and layer.A[0].std() > 0.01 and not layer.A[1].any()


@pytest.mark.bits
@pytest.mark.parametrize("training", (False, True))
def test_a_layer_is_its_formula_and_what_is_inactive_is_out_of_it(tiny, training) -> None:
    model = grown(increlora(alpha=5.0, max_rank=6)(tiny())).train(training)
    layer = list(growing(model).values())[2]
    assert layer.counts == (3, 1)
    with torch.no_grad():
        layer.E[3].fill_(RESERVED)
    x = torch.randn(7, layer.in_features)
    change = sum(layer.E[i] * layer.B[i] @ layer.A[i] for i in range(3 + training)) * 5.0 / 3
    expected = x @ (layer.layer.weight + change).T
    assert torch.allclose(layer(x), expected, atol=1e-5)
    before = layer(x)
    with torch.no_grad():
        for index in range(3 + training, 6):
            for parameter in (layer.A[index], layer.B[index], layer.E[index]):
                parameter += 100.0
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("scoring", (False, True))
def test_only_active_components_get_gradients_and_reserved_ones_but_for_their_scale(tiny, scoring) -> None:
    model = grown(increlora(max_rank=6)(tiny())).train()
    for layer in growing(model).values():
        layer.scoring = scoring
        layer.E[layer.counts[0]].data.fill_(RESERVED)
    model(IDS, labels=IDS).loss.backward()
    for layer in growing(model).values():
        active, _ = layer.counts
        for parameters, number in ((layer.A, active + 1), (layer.B, active + 1), (layer.E, active)):
            assert all(p.grad is not None and p.grad.any() for p in parameters[:number])
            assert all(p.grad is None for p in parameters[number:])


@pytest.mark.parametrize("checkpointing", (False, True))
def test_a_layers_score_is_the_sensitivity_of_its_change(tiny, checkpointing) -> None:
    model = grown(increlora(max_rank=6)(tiny())).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plain = merge()(grown(increlora(max_rank=6)(tiny()))).train()
    for layer in growing(model).values():
        layer.scoring = True
    plain(IDS, labels=IDS).loss.backward()
    for _ in range(2):  # two micro-batches add up
        model(IDS, labels=IDS).loss.backward()
    for name, layer in growing(model).items():
        product = layer.change() * plain.get_submodule(name).weight.grad
        assert torch.allclose(layer.score, 2 * product.abs().sum() / product.numel() ** 0.5, rtol=1e-3)
        assert layer.score > 0


def test_the_layer_that_matters_gets_the_components(prepared, tmp_path) -> None:
    model = small(prepared, targets=("q_proj", "v_proj"))
    with torch.no_grad():
        for layer in growing(model).values():
            layer.E[0].fill_(0.5)
        first, last = model.model.layers
        first.self_attn.o_proj.weight.zero_()  # nothing of the first attention is seen
        last.self_attn.k_proj.weight.zero_()  # and all queries of the last are as good
    policy = allocation(target_rank=1.5, init_warmup=1, incre_interval=2, top_h=1)
    run(prepared, model, tmp_path, policy, budget=Budget(steps=6))
    ranks = {name: layer.counts[0] for name, layer in growing(model).items()}
    assert ranks.pop("model.layers.1.self_attn.v_proj") == 3 and set(ranks.values()) == {1}


def test_smoothing_is_that_of_sensitivity_and_uncertainty() -> None:
    policy = allocation(beta1=0.5, beta2=0.75)
    sensitivity, uncertainty = policy.smoothed(policy.smoothed([0.0, 0.0], 4.0), 1.0)
    assert sensitivity == 0.5 * 2.0 + 0.5 * 1.0
    assert uncertainty == 0.75 * (0.25 * 2.0) + 0.25 * 0.5


class Watch(Policy):
    """Notes the sum of the ranks before each step."""

    name = "watch"

    def __init__(self):
        self.seen = []

    def before_step(self, training, state, batches):
        sizes = [layer.counts for layer in growing(training.model).values()]
        assert all(sum(size) <= 6 for size in sizes)
        self.seen.append(sum(size[0] for size in sizes))


@pytest.mark.parametrize(("given", "room", "expected"), [
    ({"target_rank": 2.0, "top_h": 1, "incre_rank_num": 2}, 6, [4, 4, 4, 4, 6, 6, 8, 8]),
    ({"target_rank": 1.75, "top_h": 4, "incre_rank_num": 2}, 6, [4, 4, 4, 4, 7, 7, 7, 7]),
    ({"target_rank": 3.0, "top_h": 4}, 3, [4, 4, 4, 4, 8, 8, 12, 12]),  # all the room there is
])  # fmt: skip
def test_ranks_grow_after_the_warm_up_to_the_budget_and_never_above(prepared, tmp_path, given, room, expected) -> None:
    model, watch = small(prepared, max_rank=room, targets=("q_proj", "down_proj")), Watch()
    run(prepared, model, tmp_path, allocation(init_warmup=3, incre_interval=2, **given), watch, budget=Budget(steps=8))
    assert watch.seen == expected
    for layer in growing(model).values():
        active, reserved = layer.counts
        assert not reserved and not any(p.any() for p in [*layer.A[active:], *layer.B[active:], *layer.E[active:]])


def test_what_is_reported_is_the_active_components(prepared, tmp_path) -> None:
    model = small(prepared, targets=("q_proj", "down_proj"))
    policy = allocation(init_warmup=0, incre_interval=1, target_rank=2.0, top_h=2)
    training = run(prepared, model, tmp_path, policy, budget=Budget(steps=4), evaluate=lambda trainee: {})
    _, tensors = increlora().adapter(model)
    scales = sum(layer.counts[0] for layer in growing(model).values())
    assert training.metrics["adapter_rank"] == scales == 8
    assert training.metrics["adapter_parameters"] == sum(t.numel() for t in tensors.values()) + scales
    flops = [0] + [row["flops"] for row in steps(tmp_path)]
    assert flops[1] > flops[4] - flops[3]  # the last step has all its components and scores no layer any more


def test_a_new_component_has_an_optimiser_state_of_its_own_age(prepared, tmp_path) -> None:
    model = small(prepared, targets=("v_proj",))
    policy = allocation(init_warmup=0, incre_interval=2, target_rank=2.0, top_h=1)
    training = run(prepared, model, tmp_path, policy, budget=Budget(steps=7))
    for name, layer in growing(model).items():
        parts, scales = training.state[policy.name]["born"][name]
        for parameters, births in ((layer.A, parts), (layer.B, parts), (layer.E, scales)):
            assert len(births) == layer.counts[0] == 2
            for parameter, born in zip(parameters, births, strict=False):
                assert training.optimizer.state[parameter]["step"] == 7 - born
            assert all(not training.optimizer.state.get(p) for p in parameters[3:])
    assert sorted(s[1][1] for s in training.state[policy.name]["born"].values()) == [2, 4]


def test_what_is_new_begins_the_schedule_anew(tiny) -> None:
    model = increlora(targets=("q_proj",), max_rank=3)(tiny())
    layers = growing(model)
    name, layer = next(iter(layers.items()))
    layer.resize(2, 0)
    parameters = [p for one in layers.values() for p in one.parameters() if p.requires_grad]
    optimizer, schedule, total = torch.optim.SGD(parameters, lr=1.0), Cosine(warmup=3), 20
    training = SimpleNamespace(
        optimizer=optimizer, schedule=schedule, spent={"steps": 11}, step=11,
        settings=SimpleNamespace(budget=Budget(steps=total)),
    )  # fmt: skip
    born = {other: [[0], [0]] for other in layers} | {name: [[0, 6], [0, 9]]}
    _restart_schedules(training, {"born": born}, layers)
    optimizer.param_groups[0]["lr"] = schedule.factor(10, total)
    before = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {id(p): float((b - p.detach()).mean()) for p, b in zip(parameters, before, strict=True)}
    assert moved[id(layer.A[0])] == pytest.approx(schedule.factor(10, total), rel=1e-5)
    assert moved[id(layer.A[1])] == moved[id(layer.B[1])] == pytest.approx(schedule.factor(4, 14), rel=1e-5)
    assert moved[id(layer.E[1])] == pytest.approx(schedule.factor(1, 11), rel=1e-5) == pytest.approx(2 / 3, rel=1e-5)


def test_the_regulariser_pulls_towards_orthogonal_components(tiny, prepared, tmp_path) -> None:
    layers = list(growing(grown(increlora(max_rank=6)(tiny()))).values())
    parts = []
    for layer in layers:
        number = sum(layer.counts)
        A, B = torch.cat([*layer.A[:number]]), torch.cat([*layer.B[:number]], 1)
        parts += [((A @ A.T - torch.eye(number)) ** 2).sum().sqrt(), ((B.T @ B - torch.eye(number)) ** 2).sum().sqrt()]
    assert torch.allclose(orthogonality(layers), sum(parts) / len(parts))
    norms = {}
    for weight in (0.0, 100.0):
        model = small(prepared, targets=("v_proj",))
        policy = allocation(init_warmup=0, incre_interval=1, reg_orth_coef=weight)
        run(prepared, model, tmp_path / str(weight), policy, budget=Budget(steps=8), clip=0.0)
        with torch.no_grad():
            norms[weight] = float(orthogonality(list(growing(model).values())))
    assert norms[100.0] < 0.8 * norms[0.0]


@pytest.mark.bits
def test_an_interrupted_training_ends_with_the_same_weights(prepared, tmp_path) -> None:
    policy = allocation(init_warmup=1, incre_interval=2, target_rank=2.0, top_h=1)
    given, layers = {"save_every": 5, "micro_rows": 4}, {"targets": ("q_proj", "down_proj")}
    whole = small(prepared, **layers)
    expected = run(prepared, whole, tmp_path / "whole", policy, budget=Budget(steps=10), **given)
    run(prepared, small(prepared, **layers), tmp_path / "cut", policy, budget=Budget(steps=5), **given)
    resumed = small(prepared, **layers)
    found = run(prepared, resumed, tmp_path / "cut", policy, budget=Budget(steps=10), **given)
    assert found.state == expected.state and found.flops == expected.flops
    born = expected.state[policy.name]["born"].values()
    assert {birth for _, scales in born for birth in scales} == {0, 2, 4, 6, 8}  # before and after the interruption
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.bits
def test_a_grown_checkpoint_reopens_and_peft_opens_its_adapter(tiny, tmp_path) -> None:
    model = grown(increlora(max_rank=5)(tiny(), Inputs(seed=1)))
    checkpoint.save(model, None, tmp_path / "c")
    again, _ = checkpoint.load(tmp_path / "c")
    assert torch.equal(logits(again), logits(model))
    assert [layer.counts for layer in growing(again).values()] == [layer.counts for layer in growing(model).values()]
    theirs = PeftModel.from_pretrained(tiny(), tmp_path / "c" / "adapter")
    assert set(theirs.peft_config["default"].rank_pattern.values()) == {1, 2}
    assert_same_model(logits(theirs), logits(model), model)


@pytest.mark.parametrize("family", ("gpt2",))
def test_merging_gives_a_plain_checkpoint_of_the_same_function(tiny, tmp_path, family) -> None:
    model = grown(increlora(max_rank=6)(tiny(family)))
    before = logits(model)
    merged = merge()(model)
    assert torch.allclose(logits(merged), before, atol=1e-4) and not torch.allclose(before, logits(tiny(family)))
    checkpoint.save(merged, None, tmp_path / "c")
    assert_same_model(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "c")), logits(merged), merged)


def test_what_does_not_fit_is_one_clear_error(tiny, prepared, tmp_path) -> None:
    with pytest.raises(PretrainError, match="rank 0: accepted: 1 or more"):
        increlora(rank=0)
    with pytest.raises(PretrainError, match="targets q_prj"):
        increlora(targets=("q_prj",))(tiny())
    with pytest.raises(PretrainError, match="adapted already"):
        increlora()(lora(rank=2)(tiny()))
    for given, message in (
        ({"incre_interval": 0}, "incre_interval 0: accepted: above 0"),
        ({"top_h": 0}, "top_h 0"),
        ({"beta1": 1.0}, "beta1 1.0"),
        ({"reg_orth_coef": -1}, "reg_orth_coef -1: accepted: 0 or more"),
    ):
        with pytest.raises(PretrainError, match=message):
            allocation(**given)
    plain = small(prepared)
    for target in (1.0, 7.0):
        with pytest.raises(PretrainError, match=r"accepted: from 2, the mean rank now, to 6, the surgery's max_rank"):
            run(prepared, small(prepared, rank=2), tmp_path / "a", allocation(target_rank=target))
    with pytest.raises(PretrainError, match="accepted: a model that the surgery increlora adapted"):
        run(prepared, merge()(plain), tmp_path / "b", allocation())

"""Experts of a dense model's neurons and one router: the dense model where an expert has all, otherwise the formulas."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from small_recipe import small_recipe
from test_objectives import context, rows
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

from pretrain import methods
from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.generation.loop import decode
from pretrain.core.meter import count_flops
from pretrain.core.models.attention import attend
from pretrain.core.models.families import blocks, hidden
from pretrain.engine import run
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.surgery import Inputs
from pretrain.surgery.experts.read_me import ReadMe, dense, experts_of, inside, mixtures, router_of

IDS_BL = torch.randint(3, 97, (3, 14), generator=torch.Generator().manual_seed(0))
MASK_BL = (torch.arange(14) >= torch.tensor([[0], [4], [9]])).long()
SMALL = {"embedding_dim": 16}
FAMILIES = ["llama", "qwen3"]


def text(domains=3, seed=0, length=24, names=()):
    """Two batches of a row for each domain, their last quarter padding."""
    source = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(2):
        ids_BL = torch.cat(
            [torch.randint(3 + 10 * d, 40 + 10 * d, (1, length), generator=source) for d in range(domains)]
        )
        mask_BL = (torch.arange(length) < length * 3 // 4).long().expand(domains, -1)
        batches.append({"input_ids": ids_BL, "attention_mask": mask_BL, "domain_B": torch.arange(domains)})
    return Inputs(batches=batches, domains=names, seed=seed)


def plainly(tiny, name="llama", **fields):
    """A model whose weights are large enough that experts differ."""
    return tiny(name, initializer_range=0.3, **fields)


def mixed(tiny, name="llama", domains=3, fields=None, **more):
    """A model with experts, whose router chooses each of them for some tokens."""
    model = ReadMe(**SMALL | (fields or {}))(plainly(tiny, name, **more), text(domains))
    router_of(model, "test").out.weight.data.mul_(3)
    return model


def masked(model, ids_BL, expert_BL):
    """The same with every neuron computed, and those of other experts set to zero: as the authors train."""
    twin, handles = copy.deepcopy(model), []
    with dense(twin, "test"):
        for ffn in mixtures(twin):
            mask_BLF = inside(ffn.members_XM, ffn.neurons)[expert_BL]
            handles.append(
                ffn.down_proj.register_forward_pre_hook(lambda _, args, mask_BLF=mask_BLF: args[0] * mask_BLF)
            )
        return twin(ids_BL, use_cache=False).logits


@pytest.mark.bits
@pytest.mark.parametrize("name", FAMILIES)
def test_one_expert_of_all_neurons_is_the_dense_model(tiny, name):
    plain, inputs = plainly(tiny, name), text(1)
    model = ReadMe(remain_rate=1.0, **SMALL)(copy.deepcopy(plain), inputs)
    assert inputs.extra["metrics"] == {"read_me/experts": 1.0} | {
        f"read_me/neurons_of_{n}": 1.0 for n in ("expert", "all", "any")
    }
    assert torch.equal(model(IDS_BL).logits, plain(IDS_BL).logits)
    assert torch.equal(model(IDS_BL, attention_mask=MASK_BL).logits, plain(IDS_BL, attention_mask=MASK_BL).logits)
    assert torch.equal(decode(model, IDS_BL, max_new_tokens=5), decode(plain, IDS_BL, max_new_tokens=5))


@pytest.mark.parametrize("name", FAMILIES)
def test_each_token_takes_the_neurons_of_its_expert_alone(tiny, name):
    model = mixed(tiny, name)
    with torch.no_grad():
        expert_BL = experts_of(model, IDS_BL)
        assert len(expert_BL.unique()) > 1
        torch.testing.assert_close(model(IDS_BL).logits, masked(model, IDS_BL, expert_BL), atol=1e-5, rtol=1e-4)
        first = masked(model, IDS_BL, torch.zeros_like(IDS_BL))
    assert not torch.allclose(model(IDS_BL).logits, first, atol=1e-2)


def test_the_choice_is_made_once_before_the_blocks_and_is_the_same_in_all(tiny):
    model = mixed(tiny, num_hidden_layers=4)
    seen, asked = [], []
    for ffn in mixtures(model):
        ffn.register_forward_pre_hook(lambda module, _: seen.append(module.reads().expert_BL))
    router_of(model, "test").register_forward_hook(lambda _, __, out: asked.append(out.argmax(-1)))
    with torch.no_grad():
        model(IDS_BL)
    assert len(asked) == 1 and len(seen) == 4 and all(expert_BL is seen[0] for expert_BL in seen)
    assert seen[0].shape == IDS_BL.shape and torch.equal(seen[0], asked[0])
    assert torch.equal(experts_of(model, IDS_BL), asked[0])
    for block in blocks(model):  # which have no part in it
        for weight in block.parameters():
            weight.data.add_(0.5)
    assert torch.equal(experts_of(model, IDS_BL), asked[0])


@pytest.mark.parametrize("rate", [0.5, 0.25])
def test_flops_fall_by_what_the_experts_lack(tiny, rate):
    model = mixed(tiny, fields={"remain_rate": rate})
    with torch.no_grad():
        (_, before), (_, after), (_, routing) = (
            count_flops(partial(*call))
            for call in ((plainly(tiny), IDS_BL), (model, IDS_BL), (experts_of, model, IDS_BL))
        )
    assert before - (after - routing) == 2 * IDS_BL.numel() * 2 * 3 * 32 * round(
        48 * (1 - rate)
    )  # two blocks' matrices


def test_an_experts_neurons_are_those_of_the_largest_mean_size_on_its_domain(tiny):
    plain, inputs = plainly(tiny), text(3)
    model = ReadMe(**SMALL)(copy.deepcopy(plain), inputs)
    for number, block in enumerate(blocks(plain)):
        for domain in range(3):
            values = []
            handle = block.mlp.down_proj.register_forward_pre_hook(
                lambda _, args, values=values: values.append(args[0][0])
            )
            with torch.no_grad():
                for batch in inputs.batches:
                    plain(batch["input_ids"][domain, :18][None])  # what is padding comes after
            handle.remove()
            mean_F = torch.cat(values).abs().mean(0)
            assert torch.equal(mixtures(model)[number].members_XM[domain], mean_F.topk(24).indices.sort().values)
    metrics = inputs.extra["metrics"]
    assert metrics["read_me/experts"] == 3 and metrics["read_me/neurons_of_expert"] == 0.5
    assert metrics["read_me/neurons_of_all"] < 0.5 < metrics["read_me/neurons_of_any"]  # they overlap, and differ


def test_one_expert_of_several_domains_is_chosen_on_all_of_the_text(tiny):
    together = ReadMe(experts=1, **SMALL)(plainly(tiny), text(3, names=("a", "b", "c")))
    inputs = text(3)
    for batch in inputs.batches:
        del batch["domain_B"]
    undivided = ReadMe(**SMALL)(plainly(tiny), inputs)
    for a, b in zip(mixtures(together), mixtures(undivided), strict=True):
        assert len(a.members_XM) == 1 and torch.equal(a.members_XM, b.members_XM)


def naive_router(router, ids_BL, head_width, theta=10000.0):
    """The authors' router written out: their rotary table, scores that are not divided by √width, biases, pre-norm."""
    config = LlamaConfig(hidden_size=head_width, num_attention_heads=1, head_dim=head_width, rope_theta=theta)
    x_BLD = router.embed.weight[ids_BL]
    length = ids_BL.shape[1]
    cos, sin = LlamaRotaryEmbedding(config)(x_BLD, torch.arange(length)[None])

    def norm(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    def heads(layer, x):
        return F.linear(x, layer.weight, layer.bias).unflatten(-1, (-1, head_width)).transpose(1, 2)

    for block in router.blocks:
        normed = norm(x_BLD, block.attention_norm.weight)
        query, key = apply_rotary_pos_emb(heads(block.query, normed), heads(block.key, normed), cos, sin)
        score = (query @ key.transpose(2, 3)) * block.scaling
        score = score.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
        out = (score.softmax(-1) @ heads(block.value, normed)).transpose(1, 2).flatten(-2)
        x_BLD = x_BLD + F.linear(out, block.output.weight, block.output.bias)
        inner = F.linear(norm(x_BLD, block.feed_forward_norm.weight), block.up.weight, block.up.bias)
        x_BLD = x_BLD + F.linear(F.silu(inner), block.down.weight, block.down.bias)
    return F.linear(norm(x_BLD, router.norm.weight), router.out.weight, router.out.bias)


@pytest.mark.parametrize(("width", "heads", "normalizer"), [(16, 2, 1.0), (16, 4, 2.5), (32, 4, 1.0)])
def test_the_router_is_the_authors_transformer(tiny, width, heads, normalizer):
    fields = {"embedding_dim": width, "n_head": heads, "normalizer": normalizer, "n_layer": 3}
    model = mixed(tiny, fields=fields)
    router = router_of(model, "test")
    for parameter in router.parameters():  # norms that are not the ones they begin as
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    logits = []
    router.register_forward_hook(lambda _, __, out: logits.append(out))
    with torch.no_grad():
        model(IDS_BL)
        wanted = naive_router(router, IDS_BL, width // heads)
    torch.testing.assert_close(logits[0], wanted, atol=1e-5, rtol=1e-5)


def test_the_router_begins_with_the_models_table_and_kaimings_matrices(tiny):
    plain = plainly(tiny)
    router = router_of(ReadMe(**SMALL)(copy.deepcopy(plain), text()), "test")
    assert torch.equal(router.embed.weight, plain.model.embed_tokens.weight[:, :16])
    weight = router.blocks[0].query.weight
    assert float(weight.abs().max()) <= math.sqrt(6 / 16) and float(weight.std()) == pytest.approx(
        math.sqrt(2 / 16), rel=0.2
    )
    assert float(router.out.bias.abs().max()) <= 0.25 and bool(router.out.bias.any())
    again, other = (router_of(ReadMe(**SMALL)(copy.deepcopy(plain), text(seed=s)), "test") for s in (0, 1))
    assert torch.equal(again.out.weight, router.out.weight) and not torch.equal(other.out.weight, router.out.weight)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_a_cache_gives_the_tokens_of_passes_without(tiny, name, implementation):
    model = mixed(tiny, name)
    model.set_attn_implementation(implementation)
    given = {"attention_mask": MASK_BL, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached_BN = model.generate(IDS_BL, eos_token_id=None, **given)
    assert torch.equal(cached_BN, decode(model, IDS_BL, attention_mask_BL=MASK_BL, max_new_tokens=8))
    taken = set()
    for row in range(3):
        ids = IDS_BL[row][MASK_BL[row] == 1][None]
        for _ in range(8):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(ids[0, -8:], cached_BN[row, -8:])
        taken |= set(experts_of(model, ids)[0, -8:].tolist())
    assert len(taken) > 1  # the new tokens take different experts


@pytest.mark.parametrize("made", [lambda model: DynamicCache(), lambda model: DynamicCache(config=model.config)])
def test_the_routers_keys_lie_in_the_models_cache(tiny, made):
    model = mixed(tiny, fields={"n_layer": 3})
    cache = made(model)
    with torch.no_grad():
        for part_BL in IDS_BL.split([6, 1, 1, 6], 1):
            logits = model(part_BL, past_key_values=cache).logits
        torch.testing.assert_close(logits, model(IDS_BL).logits[:, -6:], atol=1e-5, rtol=1e-4)
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(3, 2, 14, 8)] * 2 + [(3, 2, 14, 8)] * 3
    other = DynamicCache(config=model.config)
    plainly(tiny)(IDS_BL, past_key_values=other)
    with pytest.raises(
        PretrainError, match="a cache without what the router has read; accepted: one that this model made"
    ):
        model(IDS_BL[:, :1], past_key_values=other)
    cache.layers[-1].crop(-5)
    with pytest.raises(PretrainError, match=r"a mask of shape .* over \d+ positions that the router has read"):
        model(IDS_BL[:, :2], past_key_values=cache)


def test_documents_that_share_a_row_choose_as_they_do_alone(tiny):
    model = mixed(tiny)
    batch = CausalLM().prepare(rows([20, 31], [45]), context(60))
    seen = []
    router_of(model, "test").register_forward_hook(lambda _, __, out: seen.append(out.argmax(-1)))
    with torch.no_grad():
        states_BLE = hidden(model, input_ids=batch["tokens_BL"], **attend(model, batch, causal=True))
        for row, (start, end) in ((0, (0, 20)), (0, (20, 51)), (1, (0, 45))):
            piece = batch["tokens_BL"][row, start:end][None]
            assert torch.equal(experts_of(model, piece)[0], seen[0][row, start:end])
            alone = hidden(model, input_ids=piece, use_cache=False)[0]
            torch.testing.assert_close(states_BLE[row, start:end], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_masked_neurons_and_the_router_has_none(tiny, checkpointing):
    model = mixed(tiny).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids_BL = IDS_BL[:, :9]
    model(ids_BL, use_cache=False).logits.square().mean().backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    twin.gradient_checkpointing_disable()
    expert_BL, handles = experts_of(twin, ids_BL), []
    with dense(twin, "test"):
        for ffn in mixtures(twin):
            mask_BLF = inside(ffn.members_XM, ffn.neurons)[expert_BL]
            handles.append(
                ffn.down_proj.register_forward_pre_hook(lambda _, args, mask_BLF=mask_BLF: args[0] * mask_BLF)
            )
        twin(ids_BL, use_cache=False).logits.square().mean().backward()
    theirs = {name: p.grad for name, p in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad) == (".router." in name), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[name], atol=1e-5, rtol=1e-3)


def test_a_checkpoint_keeps_experts_and_router_and_freezes_the_router(tiny, tmp_path):
    model = mixed(tiny)
    checkpoint.save(model, None, tmp_path / "c")
    again, _ = checkpoint.load(tmp_path / "c")
    assert torch.equal(again(IDS_BL).logits, model(IDS_BL).logits)
    assert checkpoint.surgery_of(again)[0]["config"]["experts"] == 3
    assert {name for name, p in again.named_parameters() if not p.requires_grad} == {
        name for name, _ in again.named_parameters() if ".router." in name
    }
    copied = copy.deepcopy(model)
    router_of(copied, "test").out.bias.data[1] += 1e3
    assert bool((experts_of(copied, IDS_BL) == 1).all()) and not bool((experts_of(model, IDS_BL) == 1).all())
    with torch.no_grad():
        copied(IDS_BL)  # its blocks ask its own router
        torch.testing.assert_close(
            copied(IDS_BL).logits, masked(copied, IDS_BL, torch.ones_like(IDS_BL)), atol=1e-5, rtol=1e-4
        )


def test_an_adapter_on_the_experts_matrices_merges_to_the_same_function(tiny):
    model = mixed(tiny)
    before = model(IDS_BL).logits
    adapted = methods.LoRA(rank=4, where="all")(copy.deepcopy(model))
    torch.testing.assert_close(adapted(IDS_BL).logits, before, atol=1e-5, rtol=1e-4)
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    with torch.no_grad():
        changed = adapted(IDS_BL).logits
        merged = methods.MergeAdapters()(adapted)
        torch.testing.assert_close(merged(IDS_BL).logits, changed, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(changed, before, atol=1e-2)


def test_models_of_the_same_experts_are_merged_and_others_refused(tiny, tmp_path):
    first, second = mixed(tiny), mixed(tiny)
    for weight in second.parameters():
        weight.data.mul_(1.1)
    paths = []
    for number, model in enumerate((first, second)):
        checkpoint.save(model, None, tmp_path / str(number))
        paths.append(str(tmp_path / str(number)))
    made = methods.LinearMerge(models=(paths[1],))(copy.deepcopy(first), Inputs(models=[first, second]))
    assert torch.allclose(mixtures(made)[0].up_proj.weight, 1.05 * mixtures(first)[0].up_proj.weight)
    mixtures(second)[0].members_XM[0] = mixtures(second)[0].members_XM[1]
    checkpoint.save(second, None, tmp_path / "1")
    with pytest.raises(PretrainError, match="model.layers.0.mlp.members_XM .* differs, and has no mean"):
        methods.LinearMerge(models=(paths[1],))(copy.deepcopy(first), Inputs(models=[first, second]))


@pytest.mark.parametrize(
    ("fields", "inputs", "words"),
    [
        ({"experts": 2}, text(3), "experts 2 of a text of 3 domains: accepted: 0 for as many, or 1"),
        (
            {},
            text(3, names=("a", "b", "c", "rare")),
            "the text has no row of domain 'rare': accepted: more calibration",
        ),
        ({"embedding_dim": 64}, text(), "embedding_dim 64: accepted: at most 32, the model's width"),
        ({"n_head": 5}, text(), "embedding_dim 16 in n_head 5: accepted: heads of an even width that divides 8"),
        ({"n_head": 1}, text(), "embedding_dim 16 in n_head 1: accepted: heads of an even width that divides 8"),
        ({}, None, "read_me: it needs text to calibrate on"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(tiny, fields, inputs, words):
    with pytest.raises(PretrainError, match=words) as error:
        ReadMe(**SMALL | fields)(tiny(), inputs)
    assert "\n" not in str(error.value)


def test_other_models_are_refused(tiny):
    with pytest.raises(PretrainError, match="family 'gpt2': accepted: llama"):
        ReadMe(**SMALL)(tiny("gpt2"), text())
    with pytest.raises(PretrainError, match="this model has a router already; accepted: one read_me"):
        ReadMe(**SMALL)(mixed(tiny), text())
    with pytest.raises(
        PretrainError, match="a feed-forward of up_proj, act_fn, drop, down_proj: accepted: one of gate_"
    ):
        ReadMe(**SMALL)(methods.ReLU2()(tiny()), text())
    with pytest.raises(PretrainError, match="remain_rate 0: accepted: above 0, at most 1"):
        ReadMe(remain_rate=0)
    with pytest.raises(PretrainError, match="the model has no router: accepted: one that the surgery read_me made"):
        experts_of(tiny(), IDS_BL)
    with pytest.raises(PretrainError, match="this pass has none; accepted: input_ids"):
        mixed(tiny)(inputs_embeds=torch.randn(3, 14, 32))


def test_a_recipe_makes_an_expert_of_each_domain_and_trains_router_and_experts_in_turn(tmp_path, stories):
    chosen = [story for story in stories if len(story["text"]) < 4000][:24]
    short = {"length": 32, "batch_rows": 2, "budget": {"steps": 2}, "evaluate_tokens": 256}
    router = {"stage": "train", "corpus": "corpus", "objective": "read_me_router", **short}
    surgery = {
        "stage": "surgery", "name": "mixture", "checkpoint": "model", "corpus": "corpus", "calibration_rows": 64,
        "length": 32, "surgeries": [{"method": "read_me", "embedding_dim": 8}],
    }  # fmt: skip
    text = small_recipe(
        tmp_path, chosen, surgery, router | {"name": "router", "init": "mixture"},
        {"stage": "train", "name": "experts", "corpus": "corpus", "init": "router", **short},
        router | {"name": "again", "init": "experts"},
        {"stage": "evaluate", "name": "evaluation", "checkpoint": "again", "corpus": "corpus", "evaluations": ["held_out", "expert_cache"]},
        budget={"steps": 2}, evaluate_tokens=256, held_out=0.2,
    )  # fmt: skip
    for number in range(len(chosen)):  # a domain is a file's suffix
        if number % 2:
            (tmp_path / "text" / f"{number}.py").rename(tmp_path / "text" / f"{number}.txt")
    (tmp_path / "r.yaml").write_text(text)
    result = run(tmp_path / "r.yaml", output=tmp_path / "run", report=False, say=lambda line: None)
    assert result.stages["mixture"]["metrics"]["read_me/experts"] == 2
    weights = {
        name: checkpoint.load(tmp_path / "run" / name / "checkpoint")[0].state_dict()
        for name in ("mixture", "router", "experts", "again")
    }
    for before, after, moving in (
        ("mixture", "router", True),
        ("router", "experts", False),
        ("experts", "again", True),
    ):
        for name, weight in weights[after].items():
            same = torch.equal(weight, weights[before][name])
            assert same != (not name.endswith("members_XM") and (".router." in name) == moving), (after, name)
    metrics = result.stages["evaluation"]["metrics"]
    assert metrics["loss"] > 0 and 0 <= metrics["hit_rate_lru"] <= metrics["hit_rate_belady"] <= 1

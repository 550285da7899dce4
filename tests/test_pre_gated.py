"""Routers that read what the mixture before is given: exactly that, in training, decoding and files, and nothing else."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import zoo
from small_recipe import small_recipe
from transformers import AutoModelForCausalLM

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.experts.places import mixtures
from pretrain.core.models.families import at
from pretrain.engine import run
from pretrain.surgery import Inputs
from pretrain.surgery.adapters.lora import LoRA
from pretrain.surgery.adapters.merge_adapters import MergeAdapters
from pretrain.surgery.experts.orthogonal_growth import OrthogonalGrowth
from pretrain.surgery.experts.pre_gated import PreGated
from pretrain.surgery.experts.uncurl import Uncurl
from pretrain.surgery.merging.linear_merge import LinearMerge

TOKENS = torch.arange(3, 43)[None]
DEEP = {
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "minimax": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
}


def deep(kind, seed=0):
    """A tiny model of three mixtures."""
    return zoo.make(kind, seed, num_hidden_layers=3, **DEEP.get(kind, {}))


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def routers(model):
    return [at(model, router) for router in mixtures(model, "test", PreGated.families).values()]


def by_hooks(model, tokens=TOKENS):
    """The logits of a plain model each of whose routers is handed what the one before was given."""
    given = []

    def earlier(module, args):
        given.append(args[0])
        return (given[max(0, len(given) - 2)],)

    handles = [router.register_forward_pre_hook(earlier) for router in routers(model)]
    answer = logits(model, tokens)
    for handle in handles:
        handle.remove()
    return answer


@pytest.mark.bits
@pytest.mark.parametrize("kind", PreGated.families)
def test_each_router_reads_what_the_mixture_before_is_given_and_the_first_its_own(kind):
    plain = deep(kind)
    wanted, before = by_hooks(plain), logits(plain)
    gated = PreGated()(copy.deepcopy(plain))
    assert torch.equal(logits(gated), wanted) and not torch.allclose(wanted, before, atol=1e-3)
    assert torch.equal(logits(gated), wanted)  # nothing is left of the pass before
    assert gated.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in gated.state_dict().items())


@pytest.mark.bits
@pytest.mark.parametrize("kind", PreGated.families)
def test_a_model_of_one_mixture_stays_what_it_was(kind):
    more = {"layer_types": ["full_attention"]} if kind in DEEP else {}
    plain = zoo.make(kind, num_hidden_layers=1, **more)
    assert torch.equal(logits(PreGated()(copy.deepcopy(plain))), logits(plain))


def test_blocks_without_experts_between_are_passed_over():
    plain = zoo.make("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[1])
    gated = PreGated()(copy.deepcopy(plain))
    assert len(routers(gated)) == 3 and torch.equal(logits(gated), by_hooks(plain))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_next", "granitemoe"])
def test_token_by_token_with_a_cache_it_is_what_it_is_at_once(kind):
    gated, cache, steps = PreGated()(deep(kind)), None, []
    with torch.no_grad():
        for token in TOKENS[0]:
            answer = gated(token[None, None], past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            steps.append(answer.logits)
    assert torch.allclose(torch.cat(steps, 1), logits(gated), atol=2e-3)


def gradients(model, batches, *, recompute):
    """Of a loss on several passes that come before the one backward pass."""
    model.train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = sum(model(ids, use_cache=False).logits.square().mean() for ids in batches)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_a_block_that_is_computed_again_reads_the_pass_that_it_was_in():
    batches = [TOKENS, TOKENS.flip(1)]
    kept = gradients(PreGated()(deep("olmoe")), batches, recompute=False)
    again = gradients(PreGated()(deep("olmoe")), batches, recompute=True)
    assert all(torch.allclose(again[name], value, rtol=1e-4, atol=1e-6) for name, value in kept.items())


def test_a_router_is_trained_through_the_states_that_it_reads():
    gated = PreGated()(deep("mixtral"))
    given = []
    handle = routers(gated)[0].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    answer = gated(TOKENS, output_router_logits=True)
    handle.remove()
    (second,) = torch.autograd.grad(answer.router_logits[1].square().sum(), given, retain_graph=True)
    assert bool(second.any())
    (weight,) = torch.autograd.grad(answer.logits.square().mean(), [routers(gated)[1].weight])
    assert bool(weight.any())
    assert torch.allclose(answer.router_logits[1], given[0] @ routers(gated)[1].weight.T, atol=1e-5)


@pytest.mark.bits
@pytest.mark.parametrize("kind", PreGated.families)
def test_its_checkpoint_opens_as_what_was_saved_and_plain_transformers_refuses_it(kind, tmp_path):
    gated = PreGated()(deep(kind))
    checkpoint.save(gated, None, tmp_path / "c")
    again, _ = checkpoint.load(tmp_path / "c")
    assert torch.equal(logits(again), logits(gated))
    assert checkpoint.surgery_of(again) == [{"method": "pre_gated", "config": {}, "foreign": True}]
    with pytest.raises(ValueError, match=r"open it with pretrain.load"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "c")


def test_an_adapter_lies_over_it_and_folds_in(tmp_path):
    gated = PreGated()(deep("qwen3_moe"))
    before = logits(gated)
    tuned = LoRA(rank=4)(gated)
    assert torch.allclose(logits(tuned), before, atol=1e-5)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    checkpoint.save(tuned, None, tmp_path / "c")
    again, _ = checkpoint.load(tmp_path / "c")
    assert torch.equal(logits(again), logits(tuned))
    merged = MergeAdapters()(again)
    assert torch.allclose(logits(merged), logits(tuned), atol=2e-3)
    assert [entry["method"] for entry in checkpoint.surgery_of(merged)] == ["pre_gated"]


def test_it_merges_with_its_like_and_with_no_plain_model(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        checkpoint.save(PreGated()(deep("mixtral", seed)), None, tmp_path / name)
    checkpoint.save(deep("mixtral", 2), None, tmp_path / "plain")
    models = (str(tmp_path / "a"), str(tmp_path / "b"))
    merged = LinearMerge(models=models)(PreGated()(deep("mixtral")), Inputs())
    states = [deep("mixtral", seed).state_dict() for seed in range(3)]
    for name, value in merged.state_dict().items():
        mean = sum(each[name] for each in states) / 3
        assert torch.allclose(value, mean, atol=1e-6), name
    assert torch.equal(logits(merged), by_hooks(plain_of(merged)))
    with pytest.raises(PretrainError, match="been through no recorded surgery; accepted: pre_gated"):
        LinearMerge(models=(models[0], str(tmp_path / "plain")))(PreGated()(deep("mixtral")), Inputs())


def plain_of(gated):
    """A plain model of the same weights."""
    plain = type(gated)(gated.config).eval()
    plain.load_state_dict(gated.state_dict())
    return plain


def test_it_grows_and_shrinks_by_what_its_routers_say():
    gated = PreGated()(deep("mixtral"))
    grown = OrthogonalGrowth(depth=1, width=2, noise=0.0)(gated)
    assert torch.allclose(logits(grown), logits(gated), atol=2e-3)
    ids = torch.randint(3, 96, (2, 32), generator=torch.Generator().manual_seed(0))
    pruned = Uncurl(experts=4, top_k=2)(grown, Inputs(batches=[{"input_ids": ids}]))
    assert torch.allclose(logits(pruned), logits(gated), atol=2e-3)
    assert [entry["method"] for entry in checkpoint.surgery_of(pruned)] == ["pre_gated"]


def test_two_threads_of_one_model_copied_do_not_share_a_pass():
    first = PreGated()(deep("mixtral"))
    second = copy.deepcopy(first)
    wanted = [logits(first), logits(second, TOKENS.flip(1))]
    found = [[], []]
    threads = [
        threading.Thread(target=lambda m, t, into: [into.append(logits(m, t)) for _ in range(5)], args=each)
        for each in ((first, TOKENS, found[0]), (second, TOKENS.flip(1), found[1]))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, want) for want, several in zip(wanted, found, strict=True) for each in several)


def test_what_it_cannot_change_is_one_clear_line(tiny):
    with pytest.raises(PretrainError, match=r"^pre_gated: family 'llama': accepted: mixtral, .*minimax$"):
        PreGated()(tiny("llama"))
    with pytest.raises(PretrainError, match="pre-gated already; accepted: one pre_gated"):
        PreGated()(PreGated()(deep("mixtral")))
    gated = PreGated()(deep("mixtral"))
    with pytest.raises(PretrainError, match="this pass has none; accepted: input_ids, not inputs_embeds"):
        gated(inputs_embeds=torch.zeros(1, 4, 32))


def test_a_recipe_trains_gates_and_tunes_it(tmp_path, stories):
    small = {name: value for name, value in zoo.fields("qwen3_moe").items() if name != "vocab_size"}
    tuning = {"stage": "train", "name": "tuned", "corpus": "corpus", "init": "gated", "length": 32, "batch_rows": 2, "evaluate_tokens": 256}  # fmt: skip
    text = small_recipe(
        tmp_path, stories[:8],
        {"stage": "surgery", "name": "gated", "checkpoint": "model", "surgeries": ["pre_gated"]},
        tuning | {"budget": {"steps": 4}, "schedule": "constant"},
        model={"family": "qwen3_moe", **small}, budget={"steps": 2}, evaluate_tokens=256,
    )  # fmt: skip
    (tmp_path / "r.yaml").write_text(text)
    result = run(tmp_path / "r.yaml", output=tmp_path / "run", report=False, say=lambda line: None)
    assert result.stages["tuned"]["flops"] > 0
    tuned, _ = checkpoint.load(tmp_path / "run" / "tuned" / "checkpoint")
    assert [entry["method"] for entry in checkpoint.surgery_of(tuned)] == ["pre_gated"]
    start, _ = checkpoint.load(tmp_path / "run" / "gated" / "checkpoint")
    moved = [not torch.equal(a.weight, b.weight) for a, b in zip(routers(tuned), routers(start), strict=True)]
    assert all(moved)

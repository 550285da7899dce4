"""Fewer experts for a task: exact where copies are undone, and otherwise groups of those that are routed alike."""

from __future__ import annotations

import pytest
import torch
import zoo
from small_recipe import small_recipe
from transformers import AutoModelForCausalLM

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.experts.places import number_of_experts
from pretrain.engine import run
from pretrain.surgery import Inputs
from pretrain.surgery.experts.orthogonal_growth import OrthogonalGrowth
from pretrain.surgery.experts.uncurl import Seen, Uncurl

TOKENS = torch.arange(3, 43)[None]


def text(seed=0):
    ids = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(seed))
    return Inputs(
        batches=[{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in (ids[:2], ids[2:])], seed=seed
    )


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


def assert_near(ours, theirs, within=1e-5):
    assert float((ours - theirs).abs().max()) <= within * float(theirs.abs().max())


@torch.no_grad()
def shuffle(model, seed=0):
    """Another order of each expert's hidden units: the model computes the same."""
    numbers = torch.Generator().manual_seed(seed)
    for name, weight in model.state_dict().items():
        if name.endswith("gate_up_proj"):
            down = model.state_dict()[name.replace("gate_up_proj", "down_proj")]
            for expert in range(len(weight)):
                order = torch.randperm(down.shape[-1], generator=numbers)
                weight[expert] = weight[expert].unflatten(0, (2, -1))[:, order].flatten(0, 1)
                down[expert] = down[expert][:, order]
    return model


@pytest.mark.parametrize("kind", Uncurl.families)
def test_copies_of_experts_in_whatever_order_of_their_units_become_what_they_were(kind):
    model = zoo.make(kind)
    before = logits(model)
    grown = shuffle(OrthogonalGrowth(depth=1, width=2, noise=0.0)(model))
    assert_near(logits(grown), logits(OrthogonalGrowth(depth=1, width=2, noise=0.0)(zoo.make(kind))))
    pruned = Uncurl(experts=4, top_k=2)(grown, text())
    assert number_of_experts(pruned) == 4 and pruned.config.num_experts_per_tok == 2
    assert_near(logits(pruned), before)
    for name, weight in pruned.state_dict().items():
        if name.endswith(("gate.weight", "router.weight")):
            assert torch.allclose(weight, model.state_dict()[name], atol=1e-6), name


def test_experts_that_are_routed_alike_become_one_and_the_more_used_counts_more():
    model = zoo.make("mixtral")
    gate = model.model.layers[0].mlp.gate.weight.data
    gate[2] = 0.5 * gate[0]  # of the same direction: chosen in the same places, less or more
    experts = model.model.layers[0].mlp.experts
    for weights in (experts.gate_up_proj.data, experts.down_proj.data):
        weights[2] = 3 * weights[0]  # already in the same order
    pruned = Uncurl(experts=3, top_k=1)(model, text())
    chosen = {}
    handle = model.model.layers[0].mlp.gate.register_forward_pre_hook(
        lambda module, args: chosen.setdefault("x", []).append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for batch in text().batches:
            model(batch["input_ids"])
    handle.remove()
    uses = (torch.cat(chosen["x"]) @ gate.T).topk(2).indices.flatten().bincount(minlength=4).double()
    share = uses[2] / (uses[0] + uses[2])
    merged = pruned.model.layers[0].mlp.experts.down_proj.data[0]
    assert torch.allclose(merged, experts.down_proj.data[0] * float(1 + 2 * share), rtol=1e-4, atol=1e-6)
    kept = pruned.model.layers[0].mlp.experts.down_proj.data[1:]
    assert torch.equal(kept, experts.down_proj.data[[1, 3]])


def test_tokens_of_padding_are_not_counted():
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    padded = {
        "input_ids": torch.cat([ids, torch.full((2, 9), 5)], 1),
        "attention_mask": torch.cat([mask, mask[:, :9] * 0], 1),
    }
    model = zoo.make("mixtral")
    plain, other = (
        Uncurl(experts=2)(model, Inputs(batches=[batch])).state_dict()
        for batch in ({"input_ids": ids, "attention_mask": mask}, padded)
    )
    assert all(torch.allclose(plain[name], other[name], atol=1e-5) for name in plain)


def test_likeness_is_the_correlation_of_the_logits():
    numbers = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    numbers[:, 4] = 2.0  # always the same
    seen = Seen(5, 2)
    for part in numbers.split(20):
        seen.add(part)
    wanted = torch.corrcoef(numbers[:, :4].T.double())
    assert torch.allclose(seen.alike_XX()[:4, :4], wanted)
    assert torch.allclose(seen.alike_XX()[4, :4], torch.zeros(4, dtype=torch.float64), atol=1e-6)
    assert seen.tokens == 50 and float(seen.chosen_X.sum()) == 100


def test_experts_that_nothing_tells_apart_still_make_as_many_as_are_asked_for():
    model = zoo.make("mixtral")
    for block in model.model.layers:
        block.mlp.gate.weight.data[1:] = block.mlp.gate.weight.data[0]
    assert number_of_experts(Uncurl(experts=3)(model, text())) == 3


def test_the_same_seed_gives_the_same_model_and_the_given_one_stays_as_it_was():
    model = zoo.make("olmoe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, other = (Uncurl(experts=2)(model, text(3)).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_plain_transformers_opens_it(tmp_path):
    pruned = Uncurl(experts=3)(zoo.make("qwen3_moe"), text())
    checkpoint.save(pruned, None, tmp_path / "c")
    assert_near(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "c").eval()), logits(pruned))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"experts": 4}, "experts 4, top_k 2 of a model of 4 experts: accepted: fewer"),
        ({"experts": 3, "top_k": 4}, "experts 3, top_k 4 of a model of 4 experts: accepted: "),
    ],
)
def test_what_is_no_reduction_is_one_clear_line(fields, words):
    with pytest.raises(PretrainError, match=words):
        Uncurl(**fields)(zoo.make("mixtral"), text())


def test_it_needs_text_and_experts(tiny):
    with pytest.raises(PretrainError, match="it needs text"):
        Uncurl(experts=2)(zoo.make("mixtral"))
    with pytest.raises(PretrainError, match=r"family 'llama': accepted: mixtral, .*olmoe"):
        Uncurl(experts=2)(tiny("llama"), text())


def test_a_recipe_trains_prunes_and_trains_on(tmp_path, stories):
    small = {name: value for name, value in zoo.fields("qwen3_moe").items() if name != "vocab_size"}
    text = small_recipe(
        tmp_path, stories[:8],
        {"stage": "surgery", "name": "pruned", "checkpoint": "model", "corpus": "corpus", "calibration_rows": 8, "length": 32, "surgeries": [{"method": "uncurl", "experts": 2}]},
        {"stage": "train", "name": "on", "corpus": "corpus", "init": "pruned", "length": 32, "batch_rows": 2, "budget": {"steps": 2}, "evaluate_tokens": 256},
        model={"family": "qwen3_moe", **small}, budget={"steps": 2}, evaluate_tokens=256,
    )  # fmt: skip
    (tmp_path / "r.yaml").write_text(text)
    result = run(tmp_path / "r.yaml", output=tmp_path / "run", report=False, say=lambda line: None)
    assert result.stages["on"]["flops"] > 0
    config = checkpoint.load_config(tmp_path / "run" / "on" / "checkpoint")
    assert (config.num_experts, config.num_experts_per_tok) == (2, 2)

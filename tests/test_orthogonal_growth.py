"""Growth of mixtures of experts: equal where the paper's construction is exact, and otherwise what it says."""

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

TOKENS = torch.arange(3, 43)[None]
WIDE, DEEP = {"depth": 1, "noise": 0.0}, {"width": 1, "first": 0, "last": 0}


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


def assert_near(ours, theirs, within=1e-5):
    assert float((ours - theirs).abs().max()) <= within * float(theirs.abs().max())


@pytest.mark.parametrize("kind", OrthogonalGrowth.families)
@pytest.mark.parametrize("normalised", [False, True])
def test_without_noise_more_experts_and_as_many_more_chosen_change_no_logit(kind, normalised):
    model = zoo.make(kind)
    if not hasattr(model.config, "norm_topk_prob") and not normalised:
        pytest.skip("always normalised")
    if hasattr(model.config, "norm_topk_prob"):
        model = zoo.make(kind, norm_topk_prob=normalised)
    for width in (2, 3):
        grown = OrthogonalGrowth(width=width, **WIDE)(model)
        assert number_of_experts(grown) == 4 * width and grown.config.num_experts_per_tok == 2 * width
        assert_near(logits(grown), logits(model))


def test_with_as_many_chosen_as_before_the_copies_change_the_logits():
    grown = OrthogonalGrowth(**WIDE)(zoo.make("mixtral"))
    for block in grown.model.layers:
        block.mlp.gate.top_k = 2
    theirs = logits(zoo.make("mixtral"))
    assert float((logits(grown) - theirs).abs().max()) > 1e-2 * float(theirs.abs().max())


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_next"])
def test_the_deeper_model_runs_each_inner_block_twice_in_a_row(kind):
    order = [0, 1, 1, 2, 2, 3]
    layers = {"layer_types": ["full_attention"] * 4} if kind == "qwen3_next" else {}
    model = zoo.make(kind, num_hidden_layers=4, **layers)
    grown = OrthogonalGrowth(depth=2, width=1, first=1, last=1)(model)
    assert grown.config.num_hidden_layers == 6
    ours = logits(grown)
    model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in order])
    model.config.num_hidden_layers = 6
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in order]
    assert_near(ours, logits(model))


def test_deeper_changes_logits_unless_the_copied_blocks_add_nothing():
    model = zoo.make("mixtral")
    first = logits(model)
    assert float((logits(OrthogonalGrowth(**DEEP)(model)) - first).abs().max()) > 1e-2 * float(first.abs().max())
    for block in model.model.layers:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.experts.down_proj.data.zero_()
    assert torch.equal(logits(OrthogonalGrowth(**DEEP)(model)), logits(model))


def test_blocks_without_experts_stay_so_where_they_go():
    model = zoo.make("qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3])
    dense = [not hasattr(block.mlp, "experts") for block in model.model.layers]
    assert dense == [True, False, True, True]
    grown = OrthogonalGrowth(depth=2, width=2, first=0, last=1)(model)
    assert [not hasattr(block.mlp, "experts") for block in grown.model.layers] == [
        i for i in dense[:3] for _ in "ab"
    ] + dense[3:]


def test_copies_have_noise_of_a_hundredth_of_each_deviation_and_the_old_experts_none():
    model = zoo.make("mixtral")
    grown = OrthogonalGrowth(depth=1)(model, Inputs(seed=3))
    old, new = model.state_dict(), grown.state_dict()
    for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"):
        before, after = (weights[f"model.layers.1.{name}"] for weights in (old, new))
        assert torch.equal(after[:4], before)
        noise, wanted = after[4:] - before, 0.01 * before.std()
        assert float(noise.std() / wanted) == pytest.approx(1, abs=0.2) and abs(float(noise.mean())) < 0.2 * wanted
    again, other = (OrthogonalGrowth(depth=1)(model, Inputs(seed=seed)).state_dict() for seed in (3, 4))
    assert all(torch.equal(new[name], again[name]) for name in new)
    assert not torch.equal(new["model.layers.1.mlp.gate.weight"], other["model.layers.1.mlp.gate.weight"])


def test_each_expert_has_noise_of_its_own_deviation():
    model = zoo.make("mixtral")
    model.model.layers[0].mlp.experts.down_proj.data[2] *= 100
    down = OrthogonalGrowth(depth=1)(model).model.layers[0].mlp.experts.down_proj.data
    noise = (down[4:] - down[:4]).std((1, 2))
    assert float(noise[2]) > 50 * float(noise[1])


def test_depth_and_width_do_not_depend_on_their_order():
    model = zoo.make("olmoe")
    one = OrthogonalGrowth(width=2, **WIDE)(OrthogonalGrowth(depth=2, **DEEP)(model)).state_dict()
    other = OrthogonalGrowth(depth=2, **DEEP)(OrthogonalGrowth(width=2, **WIDE)(model)).state_dict()
    both = OrthogonalGrowth(noise=0.0, first=0, last=0)(model).state_dict()
    assert all(torch.equal(one[name], other[name]) and torch.equal(one[name], both[name]) for name in one)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "granitemoe"])
def test_plain_transformers_opens_what_has_grown(kind, tmp_path):
    grown = OrthogonalGrowth(first=0, last=0)(zoo.make(kind))
    checkpoint.save(grown, None, tmp_path / "c")
    assert_near(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "c").eval()), logits(grown))


def test_what_cannot_grow_is_one_clear_line(tiny):
    with pytest.raises(PretrainError, match=r"family 'llama': accepted: mixtral, .*olmoe"):
        OrthogonalGrowth()(tiny("llama"))
    with pytest.raises(PretrainError, match="first 2 and last 2 of 2 blocks leave none to copy: accepted: "):
        OrthogonalGrowth()(zoo.make("mixtral"))


def test_a_recipe_trains_grows_and_trains_on(tmp_path, stories):
    small = {name: value for name, value in zoo.fields("qwen3_moe").items() if name != "vocab_size"}
    grow = {"method": "orthogonal_growth", "first": 0, "last": 1}
    text = small_recipe(
        tmp_path, stories[:8], {"stage": "surgery", "name": "grown", "checkpoint": "model", "surgeries": [grow]},
        {"stage": "train", "name": "on", "corpus": "corpus", "init": "grown", "length": 32, "batch_rows": 2, "budget": {"steps": 2}, "evaluate_tokens": 256},
        model={"family": "qwen3_moe", **small}, budget={"steps": 2}, evaluate_tokens=256,
    )  # fmt: skip
    (tmp_path / "r.yaml").write_text(text)
    result = run(tmp_path / "r.yaml", output=tmp_path / "run", report=False, say=lambda line: None)
    assert result.stages["on"]["flops"] > result.stages["model"]["flops"]
    config = checkpoint.load_config(tmp_path / "run" / "on" / "checkpoint")
    assert (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == (3, 8, 4)

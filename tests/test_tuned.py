"""What adapters train and cost beside a frozen model, as it is told without building one, against the built model."""

from __future__ import annotations

import pytest
import torch
from test_estimates import made

import pretrain.methods as methods
from pretrain.core import checkpoint
from pretrain.core.meter import count_flops
from pretrain.dial.configs import shape_from
from pretrain.dial.tuned import Layers
from pretrain.objectives.efficiency.flexi_depth_lm import FlexiDepthLM
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.objectives.language.masked_lm import MaskedLM
from pretrain.recipe import check
from pretrain.stages._estimates import Left, left_in, operated
from pretrain.stages._expected import _beside, expect

LENGTH = 64
SURGERIES = {
    "lora": methods.LoRA(),
    "wide lora": methods.LoRA(rank=32, where="all"),
    "feed-forward": methods.LoRA(rank=4, where="feed_forward"),
    "names": methods.LoRA(rank=4, where="all", targets=("down_proj", "output.dense", "c_proj", "Wo")),
    "dora": methods.LoRA(rank=4, where="all", dora=True),
    "dylora": methods.DyLoRA(rank=16),
    "increlora": methods.IncreLoRA(rank=2, max_rank=8),
    "dsee": methods.DSEE(rank=8, nonzero=32),
    "svfit": methods.SVFit(rank=16),
    "whole svfit": methods.SVFit(where="attention"),
    "intrinsic_dimension": methods.IntrinsicDimension(dimension=100),
    "spafit": methods.SPAFIT(n1=0, n2=1, scales=True),
    "late spafit": methods.SPAFIT(n1=1, n2=1, rank=16, where="attention", last_biases=False),
    "ia3": methods.PeftAdapter("IA3", {"target_modules": ["k_proj", "v_proj", "down_proj", "c_attn", "key", "value", "Wqkv"],
                                       "feedforward_modules": ["down_proj"]}),
    "peft": methods.PeftAdapter("LORA", {"r": 24, "target_modules": ["q_proj", "v_proj", "c_attn", "query", "value", "Wqkv"]}),
    "lst": methods.LST(reduction=4, importance="magnitude", drop_every=0),
    "flexi_depth": methods.FlexiDepth(reduction=4),
}  # fmt: skip
UNFIT = {("lst", "modernbert"), ("lst", "qwen2"), ("flexi_depth", "bert"), ("flexi_depth", "modernbert")}


def batch(causal):
    tokens_BL = torch.randint(5, 600, (4, LENGTH))
    ones_BL = torch.ones_like(tokens_BL)
    target_BL = torch.full_like(tokens_BL, -100)
    target_BL[:, : -1 if causal else LENGTH // 4] = tokens_BL[:, : -1 if causal else LENGTH // 4]
    return {"tokens_BL": tokens_BL, "document_BL": ones_BL, "position_BL": ones_BL.cumsum(1) - 1,
            "target_BL": target_BL, "weight": (target_BL != -100).sum()}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert", "modernbert"])
@pytest.mark.parametrize("name", SURGERIES)
def test_what_is_trained_is_counted_by_the_rank_and_costs_what_the_meter_counts(name, family):
    """Weights exactly but for ModernBERT's norms, of which the first is none; FLOPs within 2%, BERT's within 5%.

    BERT drops scores, so that no fused kernel makes their gradients: of keys that need none it makes none.
    """
    if (name, family) in UNFIT:
        pytest.skip("not of this family")
    surgery, (model, config) = SURGERIES[name], made(family)
    shape = shape_from(config)
    tuning = surgery.tuning(Layers(shape, config["model_type"]), None)
    torch.manual_seed(0)
    model = surgery(model).train()
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert tuning.trained == pytest.approx(trained, rel=0.05 if family == "modernbert" else 0)
    causal = family not in ("bert", "modernbert")
    given, objective = batch(causal), CausalLM() if causal else MaskedLM()
    if name == "flexi_depth":
        objective = FlexiDepthLM()
    _, counted = count_flops(lambda: objective.loss(model, given).value.backward())
    share, tokens = float(given["weight"]) / given["tokens_BL"].numel(), given["tokens_BL"].numel()
    flops = shape.flops(LENGTH, share, 2.0) + _beside(shape, tuning, LENGTH, share)
    assert flops * tokens + tuning.batch == pytest.approx(counted, rel=0.05 if family == "bert" else 0.02)


def train(**more):
    """A `train` stage of a model of 600 entries, which goes on from itself."""
    stages = [
        {"stage": "data", "name": "corpus", "sources": ["stdlib"]},
        {"stage": "tokenizer", "name": "tokenizer", "corpus": "corpus", "vocab_size": 600},
        {"stage": "train", "name": "model", "corpus": "corpus", "tokenizer": "tokenizer", "length": 64,
         "model": {"family": "llama", "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4},
         "budget": {"steps": 10}} | more,
    ]  # fmt: skip
    return check({"stages": stages}, None).stages[-1]


def test_the_estimate_of_an_adapted_model_follows_the_rank():
    given = {"corpus": Left({"train": 1e6, "validation": 1e4}, {"train": 100.0}), "tokenizer": Left(vocabulary=600)}
    whole = expect(train(), given)
    few, many = (
        expect(train(surgeries=[{"method": "lora", "rank": rank, "where": "all"}]), given) for rank in (2, 128)
    )
    merged = expect(train(surgeries=[{"method": "lora"}, {"method": "merge_adapters"}]), given)
    assert few.flops < 0.75 * whole.flops and many.flops > 1.5 * few.flops
    assert few.memory_bytes < whole.memory_bytes - 100e6  # six blocks have 7 million weights of 16 bytes
    assert many.memory_bytes > few.memory_bytes + 40e6 and many.disk_bytes > few.disk_bytes + 20e6
    assert merged.flops == whole.flops and merged.memory_bytes == whole.memory_bytes


def test_an_adapter_that_a_checkpoint_records_is_known(tmp_path):
    model, config = made("llama")
    kept = methods.LoRA(rank=4, where="all")
    checkpoint.save(kept(model), None, tmp_path / "lora")
    wanted = kept.tuning(Layers(shape_from(config), "llama"), None)
    assert left_in(tmp_path / "lora").tuning == wanted
    assert operated(left_in(tmp_path / "lora"), [methods.MergeAdapters()]).tuning is None
    cut = operated(Left(config=config), [methods.DyLoRA(rank=8), methods.DyLoRATruncate(rank=2)]).tuning
    assert cut.trained == operated(Left(config=config), [methods.LoRA(rank=2)]).tuning.trained

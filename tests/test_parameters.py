"""Roles of parameters: what a matrix, a table, a head and a vector are, whatever they are called and shaped."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BeitConfig, BeitModel, ViTConfig, ViTModel

from pretrain.core.batch import Vocabulary
from pretrain.core.models.families import linears
from pretrain.core.models.heads import with_head
from pretrain.core.models.parameters import described, role
from pretrain.objectives.retrieval.retromae_v2 import RetroMAEv2
from pretrain.optim import decay_groups
from pretrain.optim.optimizers.adamw import AdamW
from pretrain.optim.optimizers.conda import Conda
from pretrain.surgery.adapters.increlora import IncreLoRA
from pretrain.surgery.adapters.lora import LoRA
from pretrain.surgery.adapters.peft_adapter import PeftAdapter
from pretrain.training import state
from pretrain.training.background import Background
from pretrain.training.distributed import World
from pretrain.training.running import Trainee

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SMALL |= {"image_size": 16, "patch_size": 8}


def roles(model: nn.Module) -> dict[str, str]:
    return {name: role(parameter) for name, parameter in described(model)}


def groups(model: nn.Module) -> tuple[set[str], set[str], set[str]]:
    """The names of what decays, of what does not, and of what Conda rotates."""
    named = described(model)
    names = {id(p): n for n, p in named}
    made = Conda(weight_decay=0.1).build(named).param_groups
    apart = [{names[id(p)] for g in made if test(g) for p in g["params"]} for test in (
        lambda g: g["weight_decay"] > 0, lambda g: g["weight_decay"] == 0, lambda g: g["rotate"]
    )]  # fmt: skip
    decayed = [g for g in decay_groups(named, 0.1) if g["weight_decay"]]
    assert {names[id(p)] for g in decayed for p in g["params"]} == apart[0]
    return apart[0], apart[1], apart[2]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bert", "modernbert", "t5"])
def test_of_a_family_the_blocks_matrices_are_rotated_and_norms_and_biases_do_not_decay(tiny, family):
    model = tiny(family)
    decayed, plain, rotated = groups(model)
    assert {f"{name}.weight" for name in linears(model)} <= rotated
    table = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    assert table in decayed - rotated
    assert plain == {n for n, p in model.named_parameters() if p.ndim < 2 or "relative_attention_bias" in n}
    assert not any("wpe" in n or "position_embeddings" in n or n.startswith("lm_head") for n in rotated)


def test_the_biases_that_t5_adds_to_attention_neither_decay_nor_are_rotated(tiny):
    found = roles(tiny("t5"))
    biases = {name for name in found if "relative_attention_bias" in name}
    assert len(biases) == 2 and {found[name] for name in biases} == {"vector"}


def test_an_untied_head_is_one_and_a_tied_one_a_table(tiny):
    tied, untied = (roles(tiny("llama", tie_word_embeddings=tie)) for tie in (True, False))
    assert untied["lm_head.weight"] == "head" and untied["model.embed_tokens.weight"] == "table"
    assert tied["model.embed_tokens.weight"] == "table" and "lm_head.weight" not in tied
    model = with_head(tiny("bert"), "sequence", ("a", "b"), Vocabulary(97, pad=0))
    assert roles(model)["classifier.weight"] == "head"


def test_what_an_objective_trains_beside_the_model_is_told_apart_too(tiny):
    """RetroMAE's decoder for an encoder with rotary positions has a table of its own, whose name says nothing."""
    trainee = Trainee(tiny("modernbert"), [RetroMAEv2()], [1.0])
    found = roles(trainee)
    assert found["beside.0.positions.weight"] == "table" and found["beside.0.query.weight"] == "matrix"
    assert "beside.0.positions.weight" not in groups(trainee)[2]


def test_scales_are_vectors_whatever_their_shape_and_factors_of_rank_1_matrices(tiny):
    scaled = PeftAdapter("IA3", {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]})
    trained = {n: p for n, p in described(scaled(tiny())) if p.requires_grad}
    assert len(trained) == 4 and {p.ndim for p in trained.values()} == {2}
    assert {role(p) for p in trained.values()} == {"vector"}
    for adapter in (LoRA(rank=1), IncreLoRA(rank=1, max_rank=2)):
        trained = {n: p for n, p in described(adapter(tiny())) if p.requires_grad}
        assert {role(p) for p in trained.values() if p.ndim == 2} == {"matrix"}


def test_of_pictures_the_class_token_is_a_vector_and_positions_are_a_table():
    found = roles(ViTModel(ViTConfig(**SMALL)))
    assert found["embeddings.cls_token"] == "vector" and found["embeddings.position_embeddings"] == "table"
    assert found["embeddings.patch_embeddings.projection.weight"] == "matrix"
    found = roles(BeitModel(BeitConfig(**SMALL, use_relative_position_bias=True)))
    biases = {n for n in found if n.endswith("relative_position_bias_table")}
    assert len(biases) == 2 and {found[n] for n in biases} == {"vector"}


def test_a_training_state_of_before_finds_its_parameters_in_other_groups(tiny, tmp_path):
    """They were grouped by their dimensions: the biases of T5's attention stood among the matrices."""
    model, alone = tiny("t5"), World(0, 1, torch.device("cpu"))
    by_dimensions = [[p for p in model.parameters() if (p.ndim >= 2) is wide] for wide in (True, False)]
    before = torch.optim.AdamW([{"params": ps} for ps in by_dimensions])
    for number, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float(number + 1))
    before.step()
    with Background(alone) as background:
        state.save(tmp_path, 1, model, before, {}, {}, alone, 1, background)
    now = AdamW().build(described(model))
    state.load(state.newest(tmp_path), model, now)
    assert all(torch.equal(now.state[p]["exp_avg"], before.state[p]["exp_avg"]) for p in model.parameters())
    assert [g["weight_decay"] for g in now.param_groups] == [0.1, 0.0]


def test_what_nobody_has_described_goes_by_its_dimensions():
    assert role(nn.Parameter(torch.zeros(2, 2))) == "matrix" and role(nn.Parameter(torch.zeros(2))) == "vector"

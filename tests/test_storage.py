"""Frozen weights stay in the type they were stored in: half the memory, the same training to the bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_attention import rows
from torch import nn
from transformers.pytorch_utils import Conv1D

from pretrain.core.batch import Context, Vocabulary
from pretrain.core.checkpoint import load, save, stored_dtype
from pretrain.core.models.families import head, new_model
from pretrain.core.models.storage import narrow
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.objectives.language.masked_lm import MaskedLM
from pretrain.surgery import Inputs
from pretrain.surgery.adapters.dsee import DSEE
from pretrain.surgery.adapters.dylora import DyLoRA
from pretrain.surgery.adapters.increlora import IncreLoRA
from pretrain.surgery.adapters.intrinsic_dimension import IntrinsicDimension
from pretrain.surgery.adapters.lora import LoRA
from pretrain.surgery.adapters.lst import LST
from pretrain.surgery.adapters.merge_adapters import MergeAdapters
from pretrain.surgery.adapters.peft_adapter import PeftAdapter
from pretrain.surgery.adapters.spafit import SPAFIT
from pretrain.surgery.adapters.svfit import SVFit

VOCABULARY = Vocabulary(97, pad=0, bos=1, eos=2, mask=3, special=frozenset(range(4)), tokens=("Ġa",) * 97)
SHAPES = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "bert": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
}
ADAPTERS = [
    LoRA(rank=2), LoRA(rank=2, dora=True), PeftAdapter("IA3", {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}),
    DyLoRA(rank=4), IncreLoRA(rank=1, max_rank=2), SVFit(), SPAFIT(rank=2, scales=True, where="attention"),
    DSEE(rank=2, nonzero=8), IntrinsicDimension(dimension=40, where="attention"), LST(reduction=2, drop_every=0),
]  # fmt: skip
MERGED = [a for a in ADAPTERS if a.adapts]
ids = [f"{a.name}{n}" for n, a in enumerate(ADAPTERS)]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Checkpoints in bfloat16, one a family."""
    folder = tmp_path_factory.mktemp("stored")
    for name, shape in SHAPES.items():
        task = "masked" if name == "bert" else "causal"
        model = new_model(name, shape, task=task, vocabulary=VOCABULARY, seed=0)
        save(model.to(torch.bfloat16), None, folder / name)
    return folder


def adapted(folder, adapter, *, narrowed):
    """As the train stage opens it."""
    model, _ = load(folder, dtype=torch.float32)
    model = adapter(model, Inputs(seed=0)).train()
    if narrowed:
        assert narrow(model, stored_dtype(folder)) > 0
    return model


def trained(model, autocast=False, steps=2):
    """The losses and the trained weights of a few steps."""
    objective = MaskedLM() if model.config.model_type == "bert" else CausalLM()
    batch = objective.prepare(rows([(25, 30), (50,)]), Context(VOCABULARY, 60, np.random.default_rng(0)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = objective.loss(model, batch).value
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True)) and all(
        torch.equal(one[1][name], other[1][name]) for name in one[1] | other[1]
    )


def frozen_bytes(model):
    return sum(p.nbytes for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=ids)
def test_an_adapter_on_narrow_weights_is_trained_as_on_wide_ones_to_the_bit(stored, adapter, autocast):
    wide, held = (adapted(stored / "llama", adapter, narrowed=n) for n in (False, True))
    assert same(trained(wide, autocast), trained(held, autocast))
    assert all(p.dtype == torch.float32 for p in held.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_other_families_and_their_biases_are_too(stored, name):
    for adapter in (LoRA(rank=2), DyLoRA(rank=2), SPAFIT(rank=2)):
        wide, held = (adapted(stored / name, adapter, narrowed=n) for n in (False, True))
        assert same(trained(wide), trained(held))


@pytest.mark.parametrize("adapter", ADAPTERS, ids=ids)
def test_the_matrices_of_frozen_layers_take_half_the_memory(stored, adapter):
    held = adapted(stored / "llama", adapter, narrowed=True)
    layers = [m for m in held.modules() if type(m) in (nn.Linear, Conv1D) and not m.weight.requires_grad]
    assert len(layers) >= 21 and {m.weight.dtype for m in layers} == {torch.bfloat16}
    kept = held.get_input_embeddings().weight.nbytes + sum(
        p.nbytes for p in held.parameters() if p.ndim == 1 and not p.requires_grad
    )
    wide = adapted(stored / "llama", adapter, narrowed=False)
    assert frozen_bytes(held) - kept == (frozen_bytes(wide) - kept) / 2


@pytest.mark.parametrize("adapter", ADAPTERS, ids=ids)
def test_the_checkpoint_keeps_both_types_and_opens_as_it_was_trained(stored, adapter, tmp_path):
    held = adapted(stored / "llama", adapter, narrowed=True)
    trained(held)
    save(held, None, tmp_path / "made")
    assert stored_dtype(tmp_path / "made") == torch.bfloat16
    model, _ = load(tmp_path / "made")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids_BL = torch.randint(4, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(ids_BL).logits, held.eval()(ids_BL).logits)


@pytest.mark.parametrize("adapter", MERGED, ids=[f"{a.name}{n}" for n, a in enumerate(MERGED)])
def test_it_merges_to_what_training_on_wide_weights_merges_to(stored, adapter, tmp_path):
    merged = []
    for narrowed in (False, True):
        model = adapted(stored / "llama", adapter, narrowed=narrowed)
        trained(model)
        save(model, None, tmp_path / str(narrowed))
        merged.append(MergeAdapters()(load(tmp_path / str(narrowed))[0]).state_dict())
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0] | merged[1])


def test_a_weight_that_the_type_cannot_hold_stays_wide(stored):
    model = adapted(stored / "llama", LoRA(rank=2, init="pissa", where="query_value"), narrowed=True)
    types = {
        name.split(".")[-1]: m.base_layer.weight.dtype for name, m in model.named_modules() if hasattr(m, "base_layer")
    }
    assert types == {"q_proj": torch.float32, "v_proj": torch.float32}
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_a_float32_checkpoint_and_trained_weights_are_left_alone(stored):
    model, _ = load(stored / "llama", dtype=torch.float32)
    assert narrow(model, torch.bfloat16) == 0 and {p.dtype for p in model.parameters()} == {torch.float32}
    model.requires_grad_(False)
    before = copy.deepcopy(model)
    assert narrow(model, torch.float32) == 0
    assert all("forward" not in vars(m) for m in model.modules()) and torch.equal(
        before.lm_head.weight, model.lm_head.weight
    )


def test_the_head_is_handed_out_in_the_type_it_computes_in(stored):
    model = adapted(stored / "llama", LoRA(rank=2), narrowed=True)
    assert model.lm_head.weight.dtype == torch.bfloat16 and head(model)[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert head(model)[0] is model.lm_head.weight


def test_nothing_wide_is_kept_for_the_backward_pass(stored):
    model = adapted(stored / "llama", LoRA(rank=2), narrowed=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        layer = model.model.layers[0].mlp.up_proj
        layer(torch.randn(4, 32, requires_grad=True))
    assert [x.dtype for x in kept] == [torch.bfloat16]

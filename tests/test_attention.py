"""Attention among packed documents: every kernel says what the dense mask says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pretrain.core.batch import LAYOUT, Context, Row, Vocabulary, document_mask, rows_to_tensors, to_device
from pretrain.core.errors import PretrainError
from pretrain.core.meter import count_flops
from pretrain.core.models import attention
from pretrain.core.models.attention import BLOCK, attend, block_mask, choose, using
from pretrain.core.models.families import attention_inputs, family, hidden, new_model
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.objectives.language.drbert import DrBERT
from pretrain.objectives.language.electra import Electra
from pretrain.objectives.language.mask_later import MaskLater
from pretrain.objectives.language.masked_lm import MaskedLM
from pretrain.objectives.language.prefix_lm import PrefixLM
from pretrain.objectives.language.random_token_substitution import RandomTokenSubstitution
from pretrain.objectives.retrieval.bag_of_words import BagOfWords
from pretrain.objectives.retrieval.retromae_v2 import RetroMAEv2

LENGTH = 3 * BLOCK - 10  # the last block is not full
VOCABULARY = Vocabulary(97, pad=0, bos=1, eos=2, mask=3, special=frozenset(range(4)), tokens=("Ġa",) * 97)
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SLIDING = {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1}
MODELS = {
    "llama": ("causal", SHAPE | {"num_key_value_heads": 2}),
    "mistral": ("causal", SHAPE | {"num_key_value_heads": 4, "sliding_window": 70}),
    "qwen2": ("causal", SHAPE | {"num_key_value_heads": 2} | SLIDING),
    "qwen3": ("causal", SHAPE | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16} | SLIDING),
    "gpt2": ("causal", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}),
    "bert": ("masked", SHAPE),
    "modernbert": (
        "masked",
        SHAPE | {"num_hidden_layers": 4, "local_attention": 140, "cls_token_id": 1, "sep_token_id": 2},
    ),
}
PACKED = ((100, 150, 90), (374,), (5, 200))
SINGLE = ((374,), (300,), (131,))


def model_of(name, **fields):
    task, shape = MODELS[name]
    no_dropout = {
        "bert": {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
        "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    }
    return new_model(name, shape | no_dropout.get(name, {}) | fields, task=task, vocabulary=VOCABULARY, seed=0)


def rows(lengths, seed=0):
    g = np.random.default_rng(seed)
    return [
        Row(
            g.integers(4, 97, sum(pieces)).astype(np.int32),
            np.cumsum((0, *pieces[:-1])).astype(np.int32),
            np.arange(len(pieces)),
            0,
            index,
        )
        for index, pieces in enumerate(lengths)
    ]


def batch_of(lengths, length=LENGTH):
    return rows_to_tensors(rows(lengths), length, pad=0)


@pytest.fixture(autouse=True)
def backward_on_cpu(monkeypatch):
    """PyTorch lets flex_attention's reference go backward on GPUs alone; it can on a CPU."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)


def states(model, batch, kernel):
    with using(kernel):
        return hidden(model, input_ids=batch["tokens_BL"], **attend(model, batch, causal=family(model).causal))


def rounding(*tensors):
    """Softmax and sums in another order: a few dozen roundings of the largest number, block after block."""
    return 64 * torch.finfo(tensors[0].dtype).eps * max(float(x.detach().abs().max()) for x in tensors)


def gradients(model):
    """Those that are not noise: softmax takes a shift of all keys away, so that a bias of keys has gradient 0."""
    named = model.named_parameters()
    return [p.grad for name, p in named if p.grad is not None and not name.endswith(("key.bias", "k_proj.bias"))]


def close(got, expected, times=1):
    return float((got - expected).detach().abs().max()) <= times * rounding(got, expected)


@pytest.mark.parametrize(
    "window,ahead", [(None, False), (70, False), (70, True), (200, False), (200, True), (1, False)]
)
@pytest.mark.parametrize("causal,prefix", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("lengths", [PACKED, SINGLE, ((1,) * 374, (128, 128), (256, 118))])
def test_blocks_and_the_rule_inside_them_are_the_dense_mask(lengths, causal, prefix, window, ahead):
    batch = batch_of(lengths)
    if prefix:
        batch["prefix_BL"] = (batch["position_BL"] < 40) & (batch["document_BL"] > 0)
    expected = document_mask(batch["document_BL"], causal=causal, prefix_BL=batch.get("prefix_BL"))[:, 0]
    if window is not None:
        distance = batch["position_BL"][:, :, None] - batch["position_BL"][:, None]
        expected = expected & (distance.abs() <= window if ahead else distance < window)
    mask = block_mask(batch, causal=causal, window=window, ahead=ahead)
    rows_, q, k = (torch.arange(n) for n in expected.shape)
    rule = mask.mask_mod(rows_[:, None, None], torch.tensor(0), q[:, None], k)
    assert torch.equal(rule, expected)

    whole = torch.nn.functional.pad(expected, (0, 10, 0, 10)).unflatten(1, (3, BLOCK)).unflatten(3, (3, BLOCK))
    partly, fully = (
        listed(*lists)
        for lists in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    )
    assert not (partly & fully).any()
    assert not (whole.any(4).any(2) & ~(partly | fully)).any()  # no pair is left out
    assert not (fully & ~whole.all(4).all(2)).any()  # and none is let in


def listed(number_BHN, index_BHNN):
    wanted = torch.arange(index_BHNN.shape[-1]) < number_BHN[..., None]
    return torch.zeros(index_BHNN.shape, dtype=torch.bool).scatter(-1, index_BHNN.long(), wanted)[:, 0]


def test_blocks_between_documents_and_ahead_of_a_causal_row_are_not_visited():
    mask = block_mask(batch_of(((128, 128, 118),)), causal=True)
    assert mask.kv_num_blocks.tolist() == [[[1, 1, 1]]] and mask.full_kv_num_blocks.sum() == 0
    mask = block_mask(batch_of(((374,),)), causal=True)
    assert mask.kv_num_blocks.tolist() == [[[1, 1, 3]]] and mask.full_kv_num_blocks.tolist() == [[[0, 1, 0]]]


@pytest.mark.parametrize("name", MODELS)
def test_flex_gives_the_states_and_gradients_of_the_dense_mask(name):
    model, batch = model_of(name).train(), batch_of(PACKED)
    inside_BL, found = batch["document_BL"] > 0, {}
    for kernel in ("dense", "flex"):
        model.zero_grad()
        out = states(model, batch, kernel)[inside_BL]
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found[kernel] = [out, *gradients(model)]
    assert close(found["flex"][0], found["dense"][0])
    for got, expected in zip(found["flex"][1:], found["dense"][1:], strict=True):
        assert close(got, expected, times=16)  # a sum over a thousand positions more


@pytest.mark.parametrize("kernel", ["dense", "flex"])
@pytest.mark.parametrize("name", MODELS)
def test_a_document_is_not_moved_by_another_in_its_row(name, kernel):
    model, batch = model_of(name).eval(), batch_of(PACKED)
    changed_BL = batch["document_BL"] == 2
    other = batch | {"tokens_BL": torch.where(changed_BL, 5, batch["tokens_BL"])}
    with torch.no_grad():
        before, after = states(model, batch, kernel), states(model, other, kernel)
    assert torch.equal(before[~changed_BL], after[~changed_BL])
    assert not torch.equal(before[changed_BL], after[changed_BL])


@pytest.mark.parametrize(
    "name,fields",
    [
        ("llama", {}),
        ("gpt2", {}),
        ("qwen2", {"sliding_window": LENGTH}),
        ("bert", {}),
        ("modernbert", {"local_attention": 2 * LENGTH}),
    ],
)
def test_rows_of_one_document_need_no_mask(name, fields):
    model = model_of(name, **fields).train()
    batch = batch_of(SINGLE if family(model).causal else ((LENGTH,), (LENGTH,)))
    inside_BL, found = batch["document_BL"] > 0, {}
    for kernel in ("dense", "whole"):
        model.zero_grad()
        out = states(model, batch, kernel)[inside_BL]
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found[kernel] = [out, *gradients(model)]
    assert close(found["whole"][0], found["dense"][0])
    for got, expected in zip(found["whole"][1:], found["dense"][1:], strict=True):
        assert close(got, expected, times=16)


@pytest.fixture
def elsewhere(monkeypatch):
    """A batch as if it lay on a GPU: on the device `meta`, where nothing can be read."""
    monkeypatch.setattr(attention, "has_flex", lambda device: True)
    return lambda lengths, length=LENGTH: to_device(batch_of(lengths, length), "meta")


def test_the_kernel_follows_from_the_rows_without_reading_the_device(elsewhere):
    llama, bert = model_of("llama"), model_of("bert")
    assert choose(llama, elsewhere(SINGLE), causal=True) == "whole"
    assert choose(llama, elsewhere(PACKED), causal=True) == "flex"
    assert choose(llama, elsewhere(SINGLE) | {"prefix_BL": torch.ones(3, LENGTH, device="meta")}, causal=True) == "flex"
    assert choose(llama, elsewhere(SINGLE), causal=False) == "flex"
    assert choose(bert, elsewhere(((LENGTH,),)), causal=False) == "whole"
    assert choose(bert, elsewhere(SINGLE), causal=False) == "flex"  # padding would be seen
    unsaid = {k: v for k, v in elsewhere(SINGLE).items() if k not in LAYOUT}
    assert choose(llama, unsaid, causal=True) == "flex"
    assert choose(llama, batch_of(SINGLE), causal=True) == "dense"  # on a CPU


def test_a_window_shorter_than_the_row_is_no_whole_row(elsewhere):
    batch = elsewhere(SINGLE)
    assert choose(model_of("mistral", sliding_window=LENGTH), batch, causal=True) == "whole"
    assert choose(model_of("mistral", sliding_window=LENGTH - 1), batch, causal=True) == "flex"


def test_what_flex_cannot_do_is_left_to_the_dense_mask(elsewhere, monkeypatch, tiny):
    batch, llama = elsewhere(PACKED), model_of("llama")
    assert choose(llama, elsewhere(((60, 60),), 200), causal=True) == "dense"  # short
    assert choose(tiny("t5"), batch, causal=False) == "dense"  # relative positions are a mask of their own
    dropping = model_of("bert", attention_probs_dropout_prob=0.1)
    assert choose(dropping.train(), batch, causal=False) == "dense"
    assert choose(dropping.eval(), batch, causal=False) == "flex"
    for counted in (batch, elsewhere(SINGLE)):
        assert count_flops(lambda counted=counted: choose(llama, counted, causal=True))[0] == "dense"
    assert choose(llama, batch, causal=True) == "flex"
    llama.set_attn_implementation("eager")
    assert choose(llama, batch, causal=True) == "dense"
    monkeypatch.setattr(attention, "has_flex", lambda device: False)
    assert choose(model_of("llama"), batch, causal=True) == "dense"


def test_a_block_that_takes_rows_out_of_the_mask_gets_a_dense_one(elsewhere):
    from pretrain.surgery.architecture.flexi_depth import FlexiDepth

    model = FlexiDepth()(model_of("llama"))
    assert choose(model, elsewhere(PACKED), causal=True) == "dense"


def test_dropout_under_flex_is_an_error_and_an_unknown_kernel_too():
    model = model_of("bert", attention_probs_dropout_prob=0.5).train()
    with pytest.raises(PretrainError, match=r"flex attention: dropout 0\.5: accepted: 0"):
        states(model, batch_of(PACKED), "flex")
    with pytest.raises(PretrainError, match="unknown attention kernel 'flash'"), using("flash"):
        pass


def test_other_masks_reach_transformers_own_function_unchanged():
    model, g = model_of("llama"), torch.Generator().manual_seed(0)
    layer = model.model.layers[0].self_attn
    q, k, v = (torch.randn(2, n, 20, 8, generator=g) for n in (4, 2, 2))
    for mask in (None, torch.randn(2, 1, 20, 20, generator=g), torch.rand(2, 1, 20, 20, generator=g) > 0.2):
        ours, theirs = (f(layer, q, k, v, mask, scaling=0.3)[0] for f in (attention._attention, sdpa_attention_forward))
        assert torch.equal(ours, theirs)


def test_flex_follows_autocast_as_sdpa_does(monkeypatch):
    model, batch, types = model_of("llama").eval(), batch_of(PACKED), set()

    def seen(*qkv, **given):
        types.update(x.dtype for x in qkv)
        return flex_attention(*qkv, **given)

    monkeypatch.setattr(attention, "flex_attention", seen)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        dense, flex = (states(model, batch, kernel) for kernel in ("dense", "flex"))
    assert types == {torch.bfloat16}  # rotary positions leave queries and keys in float32, and values in bfloat16
    exact = states(model, batch, "dense")
    inside = batch["document_BL"] > 0
    error = float((dense - exact)[inside].detach().abs().max())
    assert error > 0 and float((flex - exact)[inside].detach().abs().max()) < 2 * error


def test_activations_computed_anew_meet_the_same_mask():
    model, batch = model_of("llama").train(), batch_of(PACKED)
    found = []
    for again in (False, True):
        model.zero_grad()
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        states(model, batch, "flex").square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_next_batch_compiles_nothing_anew():
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    flex = torch.compile(attention.flex_attention, dynamic=False, backend=counter)
    q = torch.randn(3, 2, LENGTH, 16)
    for lengths in (PACKED, SINGLE, ((374,), (10, 20), (200, 100))):
        flex(q, q, q, block_mask=block_mask(batch_of(lengths), causal=True))
    assert counter.frame_count == 1


OBJECTIVES = [
    ("llama", CausalLM()), ("gpt2", CausalLM()), ("llama", PrefixLM()), ("bert", MaskedLM()), ("modernbert", MaskedLM()),
    ("bert", Electra()), ("bert", DrBERT()), ("bert", MaskLater(rate=0.3)), ("modernbert", MaskLater(rate=0.3)),
    ("bert", RandomTokenSubstitution(objective="rts")), ("bert", BagOfWords()), ("bert", RetroMAEv2()),
]  # fmt: skip


@pytest.mark.parametrize("name,objective", OBJECTIVES, ids=[f"{n}-{o.name}" for n, o in OBJECTIVES])
def test_an_objectives_loss_is_the_same_by_either_kernel(name, objective):
    model = model_of(name).eval()
    context = Context(VOCABULARY, LENGTH, np.random.default_rng(0))
    torch.manual_seed(0)
    modules = objective.modules(model)
    if modules is not None:
        modules.eval()
    batch = objective.prepare(rows(PACKED), context)
    found = []
    for kernel in ("dense", "flex"):
        torch.manual_seed(1)
        with using(kernel):
            found.append(objective.loss(model, batch, modules).value)
    assert close(*found)


def test_cpus_take_the_dense_mask_bit_for_bit():
    model, batch = model_of("llama").eval(), batch_of(PACKED)
    mask = document_mask(batch["document_BL"], causal=True)
    given, chosen = attention_inputs(model, mask, batch["position_BL"]), attend(model, batch, causal=True)
    assert given.keys() == chosen.keys() and torch.equal(given["attention_mask"], chosen["attention_mask"])

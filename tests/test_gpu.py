"""On a CUDA device: kernels agree, documents stay apart, training resumes, memory is what it should be.

They ask for pytest, numpy, torch and transformers alone, and for no file but those that they write.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from pretrain.core.batch import Context, Row, Vocabulary, rows_to_tensors, to_device
from pretrain.core.generation.loop import decode
from pretrain.core.hardware import pick_device, precision
from pretrain.core.meter import count_flops
from pretrain.core.models.attention import attend, block_mask, choose, using
from pretrain.core.models.cross_entropy import linear_cross_entropy
from pretrain.core.models.families import blocks, family, hidden, new_model
from pretrain.core.models.fast import accelerate
from pretrain.core.models.storage import narrow
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.objectives.language.masked_lm import MaskedLM
from pretrain.optim.optimizers.adamw import AdamW
from pretrain.optim.schedules.constant import Constant
from pretrain.surgery.adapters.dylora import DyLoRA
from pretrain.training.budget import Budget
from pretrain.training.loader import Loader
from pretrain.training.loop import Settings, autocast, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LENGTH = 500  # the last block of positions is not full
PACKED, SINGLE = ((100, 250, 150), (500,), (5, 300)), ((500,), (300,), (131,))
VOCABULARY = Vocabulary(512, pad=0, bos=1, eos=2, mask=3, special=frozenset(range(4)), tokens=("Ġa",) * 512)
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
SLIDING = {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1}
MODELS = {
    "llama": ("causal", SHAPE | {"num_key_value_heads": 2}),
    "mistral": ("causal", SHAPE | {"num_key_value_heads": 4, "sliding_window": 70}),
    "qwen3": ("causal", SHAPE | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16} | SLIDING),
    "gpt2": ("causal", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": LENGTH, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "bert": ("masked", SHAPE | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "modernbert": ("masked", SHAPE | {"num_hidden_layers": 4, "local_attention": 140, "cls_token_id": 1, "sep_token_id": 2}),
}  # fmt: skip
WHOLE = ("llama", "gpt2")  # families of which a whole row with padding at its end needs no mask


def model_of(name):
    task, shape = MODELS[name]
    return new_model(name, shape, task=task, vocabulary=VOCABULARY, seed=0).to("cuda")


def rows(lengths, seed=0):
    g = np.random.default_rng(seed)
    return [
        Row(
            g.integers(4, 512, sum(pieces)).astype(np.int32),
            np.cumsum((0, *pieces[:-1])).astype(np.int32),
            np.arange(len(pieces)),
            0,
            index,
        )
        for index, pieces in enumerate(lengths)
    ]


def batch_of(lengths, seed=0):
    return to_device(rows_to_tensors(rows(lengths, seed), LENGTH, pad=0), "cuda")


def states(model, batch, kernel):
    with using(kernel):
        return hidden(model, input_ids=batch["tokens_BL"], **attend(model, batch, causal=family(model).causal))


def error(got, expected):
    """The largest difference, as a share of the largest number."""
    return float((got - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.fixture(autouse=True)
def exact():
    """Matrix products of float32 in float32, so that what differs is the kernel."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("kernel", ["flex", "whole"])
@pytest.mark.parametrize("name", MODELS)
def test_kernels_give_the_states_and_gradients_of_the_dense_mask(name, kernel):
    if kernel == "whole" and name not in WHOLE:
        pytest.skip("not for this family and these rows")
    model, batch, found = model_of(name).train(), batch_of(SINGLE if kernel == "whole" else PACKED), {}
    inside_BL = batch["document_BL"] > 0
    for each in ("dense", kernel):
        model.zero_grad()
        out = states(model, batch, each)[inside_BL]
        (out * torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out)).sum().backward()
        named = [(n, p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None]
        # Softmax takes a shift of all keys away: the gradient of their bias is nothing but rounding.
        found[each] = [("states", out), *((n, g) for n, g in named if not n.endswith(("key.bias", "k_proj.bias")))]
    for (what, got), (_, expected) in zip(found[kernel], found["dense"], strict=True):
        # float32 attention may still be in TF32 inside a kernel, of 10 bits: 2^-11 a product, averaged over many.
        assert error(got, expected) < 2e-3, what


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", ["dense", "flex"])
@pytest.mark.parametrize("name", MODELS)
def test_a_document_is_not_moved_by_another_in_its_row(name, kernel, half):
    model, batch = model_of(name).eval(), batch_of(PACKED)
    changed_BL = batch["document_BL"] == 2
    other = batch | {"tokens_BL": torch.where(changed_BL, 5, batch["tokens_BL"])}
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=half):
        before, after = states(model, batch, kernel), states(model, other, kernel)
    assert torch.equal(before[~changed_BL], after[~changed_BL])
    assert not torch.equal(before[changed_BL], after[changed_BL])


def test_the_kernel_is_chosen_by_the_rows():
    model = model_of("llama")
    assert choose(model, batch_of(PACKED), causal=True) == "flex"
    assert choose(model, batch_of(SINGLE), causal=True) == "whole"
    assert count_flops(lambda: choose(model, batch_of(PACKED), causal=True))[0] == "dense"


def test_packed_rows_take_no_memory_of_a_square():
    """At 16,384 positions a dense mask alone would be a GiB."""
    long = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = new_model("llama", long | {"max_position_embeddings": 1 << 14}, vocabulary=VOCABULARY).to("cuda").train()
    batch = to_device(rows_to_tensors(rows([(1000,) * 16]), 1 << 14, pad=0), "cuda")
    for _ in range(2):  # the first compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            hidden(model, input_ids=batch["tokens_BL"], **attend(model, batch, causal=True)).square().mean().backward()
    assert torch.cuda.max_memory_allocated() - before < 1 << 29


@pytest.mark.parametrize("name", ["llama", "bert", "modernbert"])
def test_a_training_step_in_bfloat16_moves_weights_kept_in_float32(name):
    model, objective = model_of(name).train(), CausalLM() if MODELS[name][0] == "causal" else MaskedLM()
    accelerate(model)
    batch = to_device(objective.prepare(rows(PACKED), Context(VOCABULARY, LENGTH, np.random.default_rng(0))), "cuda")
    optimizer = AdamW(lr=3e-3).build(model.named_parameters())
    losses = []
    for _ in range(8):
        with autocast(torch.device("cuda"), "auto"):
            loss = objective.loss(model, batch).value
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert precision(torch.device("cuda")) == torch.bfloat16 and optimizer.defaults["fused"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_faster_arithmetic_is_transformers_up_to_rounding():
    model, batch = model_of("llama").train(), batch_of(SINGLE)
    quick = copy.deepcopy(model)
    accelerate(quick)
    found = []
    for each in (model, quick):
        out = states(each, batch, "whole")
        out.square().sum().backward()
        found.append([out, *(p.grad for p in each.parameters() if p.grad is not None)])
    assert all(error(got, expected) < 1e-4 for got, expected in zip(found[1], found[0], strict=True))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_the_fused_cross_entropy_is_pytorchs(half):
    g = torch.Generator("cuda").manual_seed(0)
    hidden_BLE = torch.randn(4, 700, 64, device="cuda", generator=g, requires_grad=True)
    weight_VE = torch.randn(1000, 64, device="cuda", generator=g).mul_(0.1).requires_grad_(True)
    target_BL = torch.randint(0, 1000, (4, 700), device="cuda", generator=g)
    target_BL[:, ::7] = -100
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        ours, _ = linear_cross_entropy(hidden_BLE, weight_VE, target_BL)
        logits_BLV = torch.nn.functional.linear(hidden_BLE, weight_VE)
    theirs = torch.nn.functional.cross_entropy(logits_BLV.float().flatten(0, 1), target_BL.flatten())
    pairs = [(ours, theirs)]
    pairs += zip(
        *(torch.autograd.grad(x, (hidden_BLE, weight_VE), retain_graph=True) for x in (ours, theirs)), strict=True
    )
    # bfloat16 keeps 8 bits: the rounding of probabilities on one side, of the logits' gradient on the other.
    assert all(error(got.float(), expected.float()) < (2e-2 if half else 1e-5) for got, expected in pairs)


class Documents:
    """Random documents in memory, as `Shards` hands them out."""

    domain_names = ["all"]
    given: dict = {}
    folder = "memory"

    def __init__(self, count=64):
        g = np.random.default_rng(0)
        self.documents = [g.integers(4, 512, n).astype(np.int32) for n in g.integers(20, 700, count)]
        self.domains_N = np.zeros(count, np.uint16)
        self.lengths_N = np.array([len(d) for d in self.documents])

    def plan(self, length):
        from pretrain.corpus.packing import pack

        return pack(self.lengths_N, self.domains_N, length)

    def piece(self, document, start, length):
        return self.documents[document][start : start + length]


def run(folder, steps, **settings):
    """Train a small model; its weights and the losses from the log."""
    model, objective = model_of("llama"), CausalLM()
    loader = Loader(Documents(), [objective], VOCABULARY, length=LENGTH, batch_rows=4, micro_rows=2)
    given = {"save_every": 3, "log_every": 1, "bar": False} | settings
    train(model, loader, [objective], AdamW(lr=1e-3), Constant(), Settings(budget=Budget(steps=steps), **given), folder)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {n: p.detach().clone() for n, p in model.named_parameters()}, [
        x["loss"] for x in lines if x["event"] == "step"
    ]


def test_a_resumed_training_ends_in_the_bits_of_one_that_ran_through(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        through, _ = run(tmp_path / "through", 6)
        run(tmp_path / "again", 3)
        again, losses = run(tmp_path / "again", 6)
    finally:
        torch.use_deterministic_algorithms(before)
    assert len(losses) == 6 and all(torch.equal(again[name], through[name]) for name in through)


def test_compiled_blocks_train_to_the_same_losses(tmp_path):
    _, plain = run(tmp_path / "plain", 6, save_every=0)
    _, compiled = run(tmp_path / "compiled", 6, save_every=0, compile=True)
    assert np.allclose(plain, compiled, rtol=5e-3)  # in bfloat16, of 8 bits, rounded in other places


def test_recomputed_activations_meet_the_block_mask():
    model, batch = model_of("llama").train(), batch_of(PACKED)
    found = []
    for again in (False, True):
        model.zero_grad()
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        states(model, batch, "flex").square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(error(got, expected) < 1e-5 for got, expected in zip(*found, strict=True))


def test_sharded_blocks_take_the_block_mask(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, batch = model_of("llama").train(), batch_of(PACKED)
    expected = states(model, batch, "flex").detach()
    init_process_group("nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cuda", (1,))
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model.model, mesh=mesh)
        out = states(model, batch, "flex")
        out.square().mean().backward()
        assert error(out, expected) < 1e-6
        assert all(torch.isfinite(p.grad.full_tensor()).all() for p in model.model.parameters())
    finally:
        destroy_process_group()


def test_greedy_decoding_gives_the_tokens_of_generate():
    model = model_of("llama").eval()
    prompt_BL = torch.randint(4, 512, (3, 20), generator=torch.Generator().manual_seed(0)).to("cuda")
    ours_BN = decode(model, prompt_BL, max_new_tokens=40)
    theirs_BN = model.generate(
        prompt_BL, attention_mask=torch.ones_like(prompt_BL), max_new_tokens=40, min_new_tokens=40, do_sample=False
    )
    assert ours_BN.shape == (3, 60) and torch.equal(ours_BN, theirs_BN)


def test_frozen_bfloat16_weights_take_half_the_memory_and_train_alike():
    wide = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8}
    batch = to_device(CausalLM().prepare(rows(PACKED), Context(VOCABULARY, LENGTH, np.random.default_rng(0))), "cuda")
    held, losses = [], []
    for dtype in (torch.float32, torch.bfloat16):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model = DyLoRA(rank=4)(new_model("llama", wide, vocabulary=VOCABULARY).to(torch.bfloat16).float()).train()
        narrow(model, dtype)
        model.to("cuda")
        held.append(torch.cuda.memory_allocated() - before)
        with torch.autocast("cuda", torch.bfloat16), using("flex"):
            loss = CausalLM().loss(model, batch).value
        loss.backward()
        losses.append(float(loss.detach()))
        del model, loss
    assert losses[0] == losses[1]
    assert held[1] < 0.52 * held[0]


def test_float32_products_are_in_tf32_once_the_device_is_picked():
    assert pick_device().type == "cuda" and torch.get_float32_matmul_precision() == "high"


def test_the_block_mask_is_the_dense_one_on_this_device():
    from torch.nn.attention.flex_attention import create_mask

    batch = batch_of(PACKED)
    mask = block_mask(batch, causal=True)
    dense_B1LL = create_mask(mask.mask_mod, 3, 1, LENGTH, LENGTH, device="cuda")
    document_BL = batch["document_BL"]
    expected_BLL = (document_BL[:, :, None] == document_BL[:, None]).tril()
    assert torch.equal(dense_B1LL[:, 0], expected_BLL)

"""FlexiDepth: gates all open and all closed, one way computed in evaluation and both in training, its cache, its loss."""

from __future__ import annotations

import pytest
import torch
from test_objectives import context, rows
from test_training import small
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.core.errors import PretrainError
from pretrain.core.generation.loop import decode
from pretrain.core.models.families import at, base, blocks, family, head
from pretrain.objectives.efficiency.flexi_depth_lm import FlexiDepthLM
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.surgery import Inputs
from pretrain.surgery.architecture.flexi_depth import FlexiDepth, depths, routed
from pretrain.training.budget import Budget
from pretrain.training.loop import Settings

IDS_BL = torch.randint(3, 97, (3, 14), generator=torch.Generator().manual_seed(0))
FAMILIES = ["llama", "qwen3", "gpt2"]
UNDROPPED = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MASK_BL = (torch.arange(14) >= torch.tensor([[0], [4], [9]])).long()


class Fixed(nn.Module):
    """A router that says the same of every token, or what is right for its place."""

    def __init__(self, *gates):
        super().__init__()
        self.gates = gates

    def forward(self, x_BLE):
        every_L = torch.tensor([self.gates[i % len(self.gates)] for i in range(x_BLE.shape[1])])
        return every_L.expand(x_BLE.shape[:2]).to(x_BLE.dtype)


def plainly(tiny, name="llama", layers=4, **fields):
    """A model in float64, without dropout, with norms and biases that are not the ones and zeros they begin as."""
    fields |= {"n_layer": layers, **UNDROPPED} if name == "gpt2" else {"num_hidden_layers": layers}
    model, source = tiny(name, **fields).double(), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=source)
    return model


def flexible(tiny, name="llama", *gates, layers=None, wide=True, **fields):
    """A model of four blocks in float64; without fixed gates its routers are made to differ between tokens."""
    model = plainly(tiny, name, initializer_range=0.3, **fields)
    FlexiDepth(layers, reduction=4)(model)
    for block in routed(model):
        if gates:
            block.router = Fixed(*gates)
        elif wide:
            block.router.head.weight.data.mul_(3)
        if block.adapter.up_proj.bias is not None:  # which are zero at first
            nn.init.normal_(block.adapter.up_proj.bias)
            nn.init.normal_(block.adapter.down_proj.bias)
    return model


def unnormed(model):
    """The model without its last norm, and that norm."""
    entry = family(model)
    norm = getattr(base(model), entry.final_norm)
    setattr(base(model), entry.final_norm, nn.Identity())
    return base(model), norm


def adapted(block, x):
    """An adapter's output, written out."""
    names, state = ("down", "up", "gate"), block.adapter.state_dict()
    down, up, gate = (state.get(f"{name}_proj.weight") for name in names)
    if gate is not None:
        return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    inner = nn.functional.gelu(x @ up.T + state["up_proj.bias"], approximate="tanh")
    return inner @ down.T + state["down_proj.bias"]


@pytest.mark.bits
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_with_all_gates_open_the_logits_are_the_models_own(tiny, name, training):
    plain = plainly(tiny, name, initializer_range=0.3)
    model = flexible(tiny, name, 1.0).train(training)
    assert torch.equal(model(IDS_BL).logits, plain(IDS_BL).logits)
    assert torch.equal(model(IDS_BL, attention_mask=MASK_BL).logits, plain(IDS_BL, attention_mask=MASK_BL).logits)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_with_all_gates_closed_every_token_takes_the_adapters(tiny, name, training):
    model = flexible(tiny, name, 0.25, layers=2).train(training)
    first = plainly(tiny, name, layers=2)
    first.load_state_dict(model.state_dict(), strict=False)
    states, norm = unnormed(first)
    with torch.no_grad():
        x_BLE = states(IDS_BL).last_hidden_state
        for block in routed(model):
            x_BLE = x_BLE + 0.75 * adapted(block, at(block, family(model).norms[1])(x_BLE))
        torch.testing.assert_close(model(IDS_BL).logits, norm(x_BLE) @ head(model)[0].T)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_evaluation_computes_one_way_and_gets_what_training_gets_from_both(tiny, name, implementation):
    model = flexible(tiny, name)
    model.set_attn_implementation(implementation)
    padded = {"attention_mask": MASK_BL, "position_ids": (MASK_BL.cumsum(1) - 1).clamp(min=0)}
    for more in ({}, padded) if implementation == "sdpa" else ({},):  # in float64 the other makes NaN of padding
        both = model.train()(IDS_BL, **more).logits
        one = model.eval()(IDS_BL, **more).logits
        shares = [float((block.gate_BL > 0.5).double().mean()) for block in routed(model)]
        assert all(0.05 < share < 0.95 for share in shares)  # some tokens go each way
        real = more.get("attention_mask", torch.ones_like(IDS_BL)) == 1
        torch.testing.assert_close(one[real], both[real])


@pytest.mark.parametrize("name", FAMILIES)
def test_one_token_that_passes_a_block_by_is_the_formulas(tiny, name):
    model = flexible(tiny, name, 0.9, 0.2, layers=1)
    last, plain, entry = routed(model)[0], plainly(tiny, name, initializer_range=0.3), family(model)
    ffn_norm, ffn, seen = at(last, entry.norms[1]), at(last, entry.feed_forward), {}
    own = at(blocks(plain)[3], entry.attention)
    own.register_forward_hook(lambda m, i, out: seen.update(out=out[0]))
    with torch.no_grad():
        x_BLE = base(plain)(IDS_BL, output_hidden_states=True).hidden_states[3]
        u_BLE = x_BLE + seen["out"]  # attention sees the keys and values of all tokens
        taken = u_BLE + 0.9 * ffn(ffn_norm(u_BLE))
        passed = x_BLE + 0.8 * adapted(last, ffn_norm(x_BLE))
        wanted = torch.where((torch.arange(14) % 2 == 0)[:, None], taken, passed)
        wanted = getattr(base(model), entry.final_norm)(wanted) @ head(model)[0].T
        torch.testing.assert_close(model(IDS_BL).logits, wanted, atol=1e-5, rtol=1e-5)  # norms are taken in float32


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_a_cache_gives_the_tokens_of_passes_without(tiny, name):
    model = flexible(tiny, name)
    given = {"attention_mask": MASK_BL, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached_BN = model.generate(IDS_BL, eos_token_id=None, **given)
    ours_BN = decode(model, IDS_BL, attention_mask_BL=MASK_BL, max_new_tokens=8)
    assert torch.equal(cached_BN, ours_BN)
    taken = []
    for row in range(3):
        ids = IDS_BL[row][MASK_BL[row] == 1][None]
        for _ in range(8):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            taken.append(int(depths(model, ids)[0, -1]))
        assert torch.equal(ids[0, -8:], cached_BN[row, -8:])
    assert len(set(taken)) > 1  # the tokens take different numbers of blocks


@pytest.mark.parametrize(("name", "matrices", "inner"), [("llama", 3, 48), ("gpt2", 2, 128)])
def test_flops_of_evaluation_fall_with_each_token_that_passes_by(tiny, name, matrices, inner):
    def flops(model):
        model.set_attn_implementation("eager")  # whose products are counted
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(IDS_BL)
        return counter.get_total_flops()

    whole, half, none = (flops(flexible(tiny, name, *gates, layers=2)) for gates in ((1.0,), (1.0, 0.0), (0.0,)))
    assert whole == flops(plainly(tiny, name))
    tokens, width = IDS_BL.numel(), 32
    saved = 2 * 2 * tokens * (2 * width * width + matrices * width * (inner - inner // 4))  # queries, output, FFN
    assert whole - none == saved + 2 * 2 * 2 * tokens * 14 * width  # and the two products of attention
    assert whole - half == (whole - none) // 2


def test_a_fused_projection_that_something_wraps_is_asked_and_not_read(tiny):
    model = flexible(tiny, "gpt2")
    with torch.no_grad():
        for block in routed(model):
            block.attn.c_attn = nn.Sequential(block.attn.c_attn, nn.Linear(96, 96).double())
        torch.testing.assert_close(model.eval()(IDS_BL).logits, model.train()(IDS_BL).logits)


def test_depths_count_the_blocks_that_each_token_takes(tiny):
    model = flexible(tiny, "llama", 0.9, 0.1, layers=3)
    routed(model)[0].router = Fixed(0.9)
    assert depths(model, IDS_BL).tolist() == [[4 if i % 2 == 0 else 2 for i in range(14)]] * 3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_only_routers_and_adapters_have_gradients_and_move(tiny, prepared, tmp_path, name):
    model = tiny(name, vocab_size=512)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    FlexiDepth(reduction=4)(model)
    settings = Settings(budget=Budget(steps=3), bar=False, save_every=0)
    done = small(prepared, lambda *_, **__: model, tmp_path, settings=settings, objective=FlexiDepthLM())
    after = done.trainee.model.state_dict()
    assert all(torch.equal(after[weight], tensor) for weight, tensor in before.items())
    learnt = {weight for weight, p in model.named_parameters() if p.requires_grad}
    assert learnt == set(after) - set(before) and all(".1." in weight for weight in learnt)
    fresh = FlexiDepth(reduction=4)(tiny(name, vocab_size=512)).state_dict()
    assert all(not torch.equal(after[weight], fresh[weight]) for weight in learnt)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_is_the_text_plus_the_squared_sum_of_gates(tiny, name, checkpointing):
    model = flexible(tiny, name, layers=3).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = FlexiDepthLM().prepare(rows([20, 31], [45]), context(60))
    found = FlexiDepthLM(alpha=0.3).loss(model, batch)
    plain = CausalLM().loss(model, batch)
    has_target_BL = batch["target_BL"] != -100
    gates = [block.gate_BL[has_target_BL] for block in routed(model)]
    penalty = sum(gates).square().mean()
    torch.testing.assert_close(found.value, plain.value + 0.3 * penalty)
    assert found.parts["penalty"].item() == pytest.approx(float(penalty.detach()))
    skipped = sum((gate <= 0.5).double().mean() for gate in gates)
    assert found.parts["skipped"].item() == pytest.approx(float(skipped))
    learnt = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(plain.value + 0.3 * penalty, learnt)
    for mine, theirs in zip(torch.autograd.grad(found.value, learnt), wanted, strict=True):
        assert bool(theirs.any())
        torch.testing.assert_close(mine, theirs)


def test_a_penalty_makes_tokens_pass_blocks_by(tiny):
    model = FlexiDepth(reduction=4)(tiny(num_hidden_layers=4)).train()
    objective = FlexiDepthLM(alpha=1.0)
    batch = objective.prepare(rows([20, 31], [45]), context(60))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(25):
        found = objective.loss(model, batch)
        found.value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(objective.loss(model, batch).parts["skipped"]) > 1.8  # of two


def test_new_weights_come_from_the_seed(tiny):
    one, again, other = (FlexiDepth()(tiny(), Inputs(seed=seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    name = "model.layers.1.adapter.up_proj.weight"
    assert not torch.equal(one[name], other[name]) and one[name].shape == (3, 32)
    own = FlexiDepth()(tiny("gpt2")).transformer.h[1].adapter
    assert own.gate_proj is None and own.up_proj.weight.shape == (8, 32)
    assert not own.up_proj.bias.any() and not own.down_proj.bias.any()


def test_wrong_fields_and_models_are_refused(tiny):
    for fields, message in (
        ({"layers": 0}, "layers 0: accepted: 1 or more"),
        ({"reduction": 0}, "reduction 0: accepted: 1 or more"),
        ({"threshold": 1.0}, "threshold 1.0: accepted: above 0, below 1"),
    ):
        with pytest.raises(PretrainError, match=message):
            FlexiDepth(**fields)
    with pytest.raises(PretrainError, match="layers 3: accepted: 1 to 2"):
        FlexiDepth(3)(tiny())
    with pytest.raises(PretrainError, match="reduction 64: accepted: at most 32"):
        FlexiDepth(reduction=64)(tiny())
    with pytest.raises(PretrainError, match="the model has cross-attention"):
        FlexiDepth()(tiny("gpt2", add_cross_attention=True))
    with pytest.raises(PretrainError, match="has routers already"):
        FlexiDepth()(FlexiDepth()(tiny()))
    with pytest.raises(PretrainError, match="alpha -1.0: accepted: 0 or more"):
        FlexiDepthLM(alpha=-1.0)
    with pytest.raises(PretrainError, match="the model has no routers: accepted: one that the surgery flexi_depth"):
        FlexiDepthLM().loss(tiny(), FlexiDepthLM().prepare(rows([20]), context(20)))
    assert len(routed(FlexiDepth()(tiny()))) == len(blocks(tiny())) // 2

"""GPTQ: its integers are those of the paper's recursion, packed words are AutoGPTQ's, packed and dense models agree."""

from __future__ import annotations

import json

import pytest
import torch
from closeness import assert_same_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import linears
from pretrain.surgery import Inputs
from pretrain.surgery._calibration import Blocks, inverse_factor, parts, weight_of
from pretrain.surgery.compression._grid import grid, nearest, pack, round_to_nearest, unpack
from pretrain.surgery.compression.gptq import GPTQ, PackedLinear, solve

TOKENS = torch.arange(3, 23)[None]
FAMILIES = ["llama", "qwen3", "gpt2", "bert", "modernbert"]


def batches(rows=6, length=24, seed=0):
    """Three documents a row and padding at the end, in batches of two rows."""
    ids = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))
    documents = torch.tensor([1] * 10 + [2] * 9 + [0] * (length - 19)).expand(rows, length)
    positions = torch.cat([torch.arange(10), torch.arange(9), torch.arange(length - 19)]).expand(rows, length)
    whole = {"input_ids": ids, "attention_mask": documents, "position_ids": positions}
    return [{k: v[b : b + 2] for k, v in whole.items()} for b in range(0, rows, 2)]


def problem(outputs=6, inputs=20, tokens=200, seed=0, dtype=torch.float64):
    """A weight and inputs that are correlated, as a layer's are."""
    generator = torch.Generator().manual_seed(seed)
    x_NI = torch.randn(tokens, inputs, generator=generator, dtype=dtype) @ torch.randn(
        inputs, inputs, generator=generator, dtype=dtype
    )
    return torch.randn(outputs, inputs, generator=generator, dtype=dtype), 2 * x_NI.T @ x_NI / tokens


def settings(**changed):
    return {
        "bits": 3, "group_size": 8, "symmetric": False, "desc_act": False, "damping": 0.01, "block_size": 7
    } | changed  # fmt: skip


def loss(weight_OI, found, hessian_II):
    error_OI = weight_OI - found.dense()
    return torch.einsum("oi,ij,oj->", error_OI, hessian_II, error_OI).item()


def by_hand(weight_OI, hessian_II, bits, group_size, symmetric, order, damping):
    """Optimal brain quantisation in a fixed order: the inverse of what is left is made anew for each column."""
    W, H = weight_OI[:, order].clone(), hessian_II[order][:, order].clone()
    H += damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    codes = torch.empty_like(W)
    for i in range(W.shape[1]):
        if i % group_size == 0:
            scale, zero = grid(W[:, i : i + group_size], bits, symmetric)
        codes[:, i] = nearest(W[:, i], scale, zero, bits)
        inverse = torch.linalg.inv(H[i:, i:])
        error = (W[:, i] - scale * (codes[:, i] - zero)) / inverse[0, 0]
        W[:, i:] -= error[:, None] * inverse[0][None]
    return codes[:, torch.argsort(order)]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("desc_act", [False, True])
def test_the_codes_are_those_of_optimal_brain_quantisation_in_a_fixed_order(desc_act, symmetric):
    weight_OI, hessian_II = problem()
    order = torch.argsort(hessian_II.diagonal(), descending=True) if desc_act else torch.arange(20)
    found = solve(weight_OI, hessian_II, **settings(desc_act=desc_act, symmetric=symmetric))
    assert torch.equal(found.code_OI.double(), by_hand(weight_OI, hessian_II, 3, 8, symmetric, order, 0.01))
    assert found.group_I.tolist() == [int((order == i).nonzero()) // 8 for i in range(20)]


@pytest.mark.parametrize("group_size", [-1, 6, 20, 128])
def test_blocks_of_columns_change_nothing(group_size):
    weight_OI, hessian_II = problem()
    first, *others = [
        solve(weight_OI, hessian_II, **settings(block_size=b, group_size=group_size)) for b in (1, 3, 20, 128)
    ]
    for other in others:
        assert torch.equal(first.code_OI, other.code_OI)
        torch.testing.assert_close(first.dense(), other.dense())


def test_the_factor_is_the_papers():
    _, hessian_II = problem()
    U = inverse_factor(hessian_II, 0.01, "gptq")
    damped = hessian_II + 0.01 * hessian_II.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    assert torch.equal(U, U.triu())
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(damped))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 8])
def test_the_layers_own_loss_is_below_that_of_rounding_to_nearest(bits, group_size):
    for seed in range(5):
        weight_OI, hessian_II = problem(seed=seed)
        mine = solve(weight_OI, hessian_II, **settings(bits=bits, group_size=group_size))
        plain = round_to_nearest(weight_OI, bits, group_size, symmetric=False)
        assert loss(weight_OI, mine, hessian_II) < loss(weight_OI, plain, hessian_II)


@pytest.mark.parametrize("symmetric", [False, True])
def test_with_inputs_that_know_nothing_of_one_another_it_rounds_to_nearest(symmetric):
    weight_OI, _ = problem()
    for hessian_II in (torch.eye(20), 3.0 * torch.eye(20), torch.zeros(20, 20)):
        mine = solve(weight_OI, hessian_II.double(), **settings(symmetric=symmetric))
        plain = round_to_nearest(weight_OI, 3, 8, symmetric)
        assert torch.equal(mine.code_OI, plain.code_OI) and torch.equal(mine.dense(), plain.dense())


def test_grids_hold_zero_and_the_extremes():
    weight_OC = torch.tensor([[-1.0, 0.5, 0.0, 2.0], [0.25, 0.5, 1.0, 0.75], [0.0, 0.0, 0.0, 0.0]])
    scale_O, zero_O = grid(weight_OC, 2, symmetric=False)
    assert scale_O.tolist() == [1.0, pytest.approx(1 / 3, rel=1e-3), pytest.approx(2 / 3, rel=1e-3)]
    assert zero_O.tolist() == [1.0, 0.0, 2.0] and torch.equal(scale_O.half().float(), scale_O)
    scale_O, zero_O = grid(weight_OC, 2, symmetric=True)
    assert scale_O[0].item() == pytest.approx(4 / 3, rel=1e-3) and zero_O.tolist() == [2.0, 2.0, 2.0]
    scale_O, zero_O = grid(-weight_OC[1:2], 2, symmetric=False)  # all below 0
    assert scale_O[0].item() == pytest.approx(1 / 3, rel=1e-3) and zero_O.tolist() == [3.0]
    found = round_to_nearest(weight_OC, 8, -1, symmetric=False)
    assert (found.dense() - weight_OC).abs().max() <= found.scale_OG.max() / 2 * 1.01
    assert not found.dense()[2].any() and found.dense()[0, 2] == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 31, 32, 50, 96])
def test_what_is_packed_comes_out_again_bit_by_bit(bits, count):
    codes = torch.randint(0, 2**bits, (count, 5), generator=torch.Generator().manual_seed(count))
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (-(-count * bits // 32), 5)
    assert torch.equal(unpack(words, bits, count), codes.int())
    for column in range(5):  # one long number, the first code lowest
        whole = sum(int(code) << (bits * i) for i, code in enumerate(codes[:, column]))
        assert sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words[:, column])) == whole


def test_words_of_three_bits_are_split_as_in_autogptq():
    codes = torch.arange(32)[:, None] * 5 % 8
    first, second, third = (int(w) & 0xFFFFFFFF for w in pack(codes, 3)[:, 0])
    c = codes[:, 0].tolist()
    assert first == sum(c[j] << 3 * j for j in range(10)) | (c[10] & 3) << 30
    assert second == c[10] >> 2 | sum(c[11 + j] << 3 * j + 1 for j in range(10)) | (c[21] & 1) << 31
    assert third == c[21] >> 1 | sum(c[22 + j] << 3 * j + 2 for j in range(10))


def autogptq_weight(layer, bits, offset):
    """What the layout says, number by number: scales[g] * (code - zero[g]), the transposed weight."""

    def code(words, place):
        whole = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
        return whole >> bits * place & 2**bits - 1

    weight = torch.empty(layer.in_features, layer.out_features)
    for i in range(layer.in_features):
        g = int(layer.g_idx[i])
        for o in range(layer.out_features):
            zero = code(layer.qzeros[g], o) + offset
            weight[i, o] = layer.scales[g, o].float() * (code(layer.qweight[:, o], i) - zero)
    return weight.T


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_buffers_of_a_layer_are_those_of_the_format(bits, symmetric):
    weight_OI, hessian_II = problem(outputs=9, dtype=torch.float32)
    found = solve(weight_OI, hessian_II, **settings(bits=bits, symmetric=symmetric, desc_act=True))
    layer = PackedLinear(nn.Linear(20, 9), bits, 8, symmetric)
    layer.fill(found)
    shapes = {name: tuple(buffer.shape) for name, buffer in layer.named_buffers()}
    assert shapes == {
        "qweight": (-(-20 * bits // 32), 9), "qzeros": (3, -(-9 * bits // 32)), "scales": (3, 9), "g_idx": (20,)
    }  # fmt: skip
    assert torch.equal(layer.dense(), found.dense())
    assert torch.equal(autogptq_weight(layer, bits, int(symmetric)), found.dense())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_blocks_alone_give_what_the_model_gives(tiny, name):
    model, given = tiny(name), batches()
    whole = Blocks(model, given)
    assert {n for step in parts(model).values() for n in step} == {
        n for n, m in whole.blocks[0].named_modules() if isinstance(m, nn.Linear | Conv1D)
    }
    states = []
    last = whole.blocks[-1].register_forward_hook(
        lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out)
    )
    alone = [  # each document in a batch of its own, without padding
        model(batch["input_ids"][:, start:stop]) and states.pop()
        for batch in given for start, stop in ((0, 10), (10, 19))
    ]  # fmt: skip
    last.remove()
    for number in range(len(whole)):
        whole.advance(number)
    torch.testing.assert_close(
        torch.cat([state[:, :19] for state in whole.states]),
        torch.cat([torch.cat(pair, 1) for pair in zip(alone[::2], alone[1::2], strict=True)]), atol=1e-5, rtol=1e-4,
    )  # fmt: skip


def test_padding_has_no_part_in_the_hessian(tiny):
    model, given = tiny(), batches()
    changed = [
        batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 5)} for batch in given
    ]
    first, second = (Blocks(model, some) for some in (given, changed))
    names = [name for step in parts(model).values() for name in step]
    for name, hessian in first.hessians(0, first.layers(0, names)).items():
        torch.testing.assert_close(hessian, second.hessians(0, second.layers(0, [name]))[name])
    entered = []
    layer = first.layers(0, ["mlp.down_proj"])
    entered = torch.cat([found["mlp.down_proj"][0] for found in first.seen(0, layer)])
    assert len(entered) == 6 * 19
    torch.testing.assert_close(first.hessians(0, layer)["mlp.down_proj"], 2 * entered.T @ entered / len(entered))


@pytest.mark.bits
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_and_dense_models_are_the_same_and_near_the_original(tiny, name):
    plain, inputs = tiny(name), Inputs(batches=batches())
    dense = GPTQ(group_size=16, pack=False)(tiny(name), inputs)
    packed = GPTQ(group_size=16)(tiny(name), inputs)
    assert not checkpoint.surgery_of(dense) and type(dense) is type(plain)
    for path, layer in linears(packed).items():
        assert isinstance(layer, PackedLinear)
        assert torch.equal(layer.dense(), weight_of(linears(dense)[path]))
        assert (layer.bias is None) == (getattr(linears(plain)[path], "bias", None) is None)
    mine, theirs = packed(TOKENS).logits, dense(TOKENS).logits
    if name == "gpt2":  # its layers multiply by the transposed matrix, which rounds otherwise
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    else:
        assert torch.equal(mine, theirs)
    assert not torch.equal(theirs, plain(TOKENS).logits)
    torch.testing.assert_close(theirs, plain(TOKENS).logits, atol=0.1, rtol=0.1)
    changed = {n for n, p in dense.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    assert changed == {f"{path}.weight" for path in linears(plain)}


def test_biases_of_qwen2_stay():
    from pretrain.core.models.families import new_model

    fields = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    model = new_model("qwen2", fields).eval()
    for layer in linears(model).values():
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
    before = model(TOKENS).logits
    biases = {n: m.bias.clone() for n, m in linears(model).items() if m.bias is not None}
    assert len(biases) == 6
    packed = GPTQ(bits=8)(model, Inputs(batches=batches()))
    assert all(torch.equal(linears(packed)[n].bias, bias) for n, bias in biases.items())
    torch.testing.assert_close(packed(TOKENS).logits, before, atol=0.02, rtol=0.05)


@pytest.mark.bits
def test_each_block_is_calibrated_on_what_the_quantised_ones_before_it_give(tiny):
    inputs, method = Inputs(batches=batches()), GPTQ(bits=3, pack=False)
    made = method(tiny(), inputs)
    second = "model.layers.1.mlp.down_proj"
    half = tiny()
    half.model.layers[0].load_state_dict(made.model.layers[0].state_dict())
    whole = Blocks(half, inputs.batches)
    whole.advance(0)
    names = [name for step in parts(half).values() for name in step]
    hessians = whole.hessians(1, whole.layers(1, names))
    wanted = method._solved(linears(half)[second], hessians["mlp.down_proj"])
    torch.testing.assert_close(linears(made)[second].weight, wanted.dense())
    inside = GPTQ(bits=3, pack=False, true_sequential=True)(tiny(), inputs)
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(linears(inside)[first].weight, linears(made)[first].weight)
    assert not torch.equal(linears(inside)[second].weight, linears(made)[second].weight)


def test_rounding_needs_no_text_and_errs_more(tiny):
    plain, given = tiny(), batches(rows=16)
    dense = {s: GPTQ(bits=3, solver=s, pack=False)(tiny(), Inputs(batches=given)) for s in ("rtn", "gptq")}
    again = GPTQ(bits=3, solver="rtn", pack=False)(tiny())
    errors = {}
    for solver, model in dense.items():
        whole = Blocks(plain, given)
        layers = whole.layers(0, [name for step in parts(plain).values() for name in step])
        hessians = whole.hessians(0, layers)
        errors[solver] = {}
        for name, layer in layers.items():
            delta = weight_of(layer) - weight_of(model.model.layers[0].get_submodule(name))
            errors[solver][name] = torch.einsum("oi,ij,oj->", delta, hessians[name], delta).item()
    assert all(errors["gptq"][name] < errors["rtn"][name] for name in errors["rtn"])
    for name, layer in linears(again).items():
        assert torch.equal(layer.weight, linears(dense["rtn"])[name].weight)
        assert torch.equal(layer.weight, round_to_nearest(weight_of(linears(plain)[name]), 3, 128, False).dense())


@pytest.mark.bits
@pytest.mark.parametrize("name, tied", [("llama", True), ("gpt2", True), ("bert", False)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_saved_and_loaded_it_is_the_same_model(tiny, tmp_path, name, tied, symmetric):
    from transformers.utils.quantization_config import GPTQConfig

    model = tiny(name, tie_word_embeddings=tied)
    packed = GPTQ(bits=4, group_size=16, symmetric=symmetric, desc_act=True)(model, Inputs(batches=batches()))
    checkpoint.save(packed, None, tmp_path / "c")
    loaded, _ = checkpoint.load(tmp_path / "c")
    assert torch.equal(loaded(TOKENS).logits, packed(TOKENS).logits)
    assert {n: b.dtype for n, b in loaded.named_buffers()} == {n: b.dtype for n, b in packed.named_buffers()}
    checkpoint.save(loaded, None, tmp_path / "again")
    file = "model.safetensors" if name == "llama" else "pretrain.safetensors"  # which of them transformers looks for
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()
    said = json.loads((tmp_path / "c/config.json").read_text())["quantization_config"]
    known = GPTQConfig(**{k: v for k, v in said.items() if k != "quant_method"})
    assert (known.bits, known.group_size, known.sym, known.desc_act) == (4, 16, symmetric, True)
    assert known.format == ("gptq" if symmetric else "gptq_v2")


def test_the_dense_result_opens_in_plain_transformers(tiny, tmp_path):
    import transformers

    dense = GPTQ(pack=False)(tiny(), Inputs(batches=batches()))
    checkpoint.save(dense, None, tmp_path / "c")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c").eval()
    assert_same_model(plain(TOKENS).logits, dense(TOKENS).logits, dense)
    assert "quantization_config" not in json.loads((tmp_path / "c/config.json").read_text())


@pytest.mark.parametrize("bits, group_size", [(4, 16), (3, -1), (8, 128)])
def test_bytes_on_disk_are_as_many_as_the_format_counts(tiny, tmp_path, bits, group_size):
    plain = tiny()
    shapes = [layer.weight.shape for layer in linears(plain).values()]
    rest = 4 * (plain.num_parameters() - sum(o * i for o, i in shapes))
    wanted = rest
    for o, i in shapes:
        groups = 1 if group_size == -1 else -(-i // group_size)
        wanted += 4 * o * (-(-i * bits // 32)) + groups * (2 * o + 4 * (-(-o * bits // 32))) + 4 * i
    checkpoint.save(GPTQ(bits, group_size, solver="rtn")(plain), None, tmp_path / "c")
    size = (tmp_path / "c/model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "c/model.safetensors").read_bytes()[:8], "little")
    assert size == wanted + 8 + header


@pytest.mark.bits
def test_training_mode_is_left_as_it_was(tiny):
    assert not GPTQ(solver="rtn")(tiny()).training
    trained = GPTQ(pack=False)(tiny("gpt2").train(), Inputs(batches=batches()))
    assert trained.training  # and dropout had no part in it
    still = GPTQ(pack=False)(tiny("gpt2"), Inputs(batches=batches()))
    assert all(torch.equal(p, still.get_parameter(n)) for n, p in trained.named_parameters())


def test_layers_that_get_no_input_are_rounded_to_nearest(tiny):
    model = tiny()
    nn.init.zeros_(model.model.layers[0].input_layernorm.weight)
    made = GPTQ(pack=False)(model, Inputs(batches=batches()))
    first = "model.layers.0.self_attn.q_proj"
    plain = round_to_nearest(weight_of(linears(tiny())[first]), 4, 128, False).dense()
    assert torch.equal(linears(made)[first].weight, plain)


def test_wrong_fields_and_models_are_refused(tiny):
    with pytest.raises(PretrainError, match="gptq: bits 5: accepted: 2, 3, 4, 8"):
        GPTQ(5)
    with pytest.raises(PretrainError, match="gptq: group_size 0: accepted: -1, or 1 or more"):
        GPTQ(group_size=0)
    with pytest.raises(PretrainError, match="gptq: damping 0: accepted: above 0, below 1"):
        GPTQ(damping=0)
    with pytest.raises(PretrainError, match="gptq: block_size 0: accepted: 1 or more"):
        GPTQ(block_size=0)
    with pytest.raises(PretrainError, match="gptq: solver 'awq': accepted: gptq, rtn"):
        GPTQ(solver="awq")
    with pytest.raises(PretrainError, match="desc_act True: accepted: only with solver gptq"):
        GPTQ(desc_act=True, solver="rtn")
    with pytest.raises(
        PretrainError, match="gptq: it needs text to calibrate on: accepted: a surgery stage with `corpus`"
    ):
        GPTQ()(tiny(), Inputs())
    with pytest.raises(PretrainError, match="q_proj is a PackedLinear: accepted: plain linear layers"):
        GPTQ(solver="rtn")(GPTQ(solver="rtn")(tiny()))
    with pytest.raises(PretrainError, match=r"attention_mask of shape \(2, 1\): accepted: \(2, 24\)"):
        bad = [batch | {"attention_mask": torch.ones(2, 1)} for batch in batches()]
        GPTQ()(tiny(), Inputs(batches=bad))
    with pytest.raises(PretrainError, match="the Hessian is singular without it"):
        inverse_factor(-torch.eye(3), 0.01, "gptq")


@pytest.mark.bits
def test_a_factorised_layer_is_quantised_factor_by_factor(tiny, tmp_path):
    from pretrain.core.models.families import linears
    from pretrain.surgery.compression.pela import PELA, LowRank

    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 90, (4, 24), generator=generator)}]
    dense = {}
    for solver in ("gptq", "rtn"):
        model = PELA(1.5)(tiny(hidden_size=64, intermediate_size=96))
        plain = {n: layer.dense().clone() for n, layer in linears(model).items()}
        model = GPTQ(bits=4, group_size=-1, solver=solver)(model, Inputs(batches=batches))
        assert all(isinstance(layer, LowRank) for layer in linears(model).values())
        factors = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
        assert len(factors) == 2 * len(plain)
        checkpoint.save(model, None, tmp_path / solver)
        again, _ = checkpoint.load(tmp_path / solver)
        ids = batches[0]["input_ids"]
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)
            dense[solver] = (
                (model(ids).logits - PELA(1.5)(tiny(hidden_size=64, intermediate_size=96))(ids).logits).square().mean()
            )
    assert dense["gptq"] < dense["rtn"]

"""PolyCom: the two activations against their formulas, parameter-equal feed-forwards, and checkpoints."""

from __future__ import annotations

import pytest
import torch

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import blocks, new_model
from pretrain.surgery import Inputs
from pretrain.surgery._feed_forward import FeedForward
from pretrain.surgery.architecture.polycom import Activation, PolyCom

TOKENS = torch.arange(3, 23)[None]
FAMILIES = ["llama", "qwen3", "gpt2", "bert", "modernbert", "t5"]


def activation(kind, order=3, coefficients=None, dtype=torch.float64):
    made = Activation(kind, order, 1e-6, torch.zeros((), dtype=dtype))
    if coefficients is not None:
        with torch.no_grad():
            made.a.copy_(torch.tensor(coefficients))
    return made


def by_hand(kind, a, x):
    """Each power written out; its norm over the last dimension."""
    total = a[0] * torch.ones_like(x)
    for i in range(1, len(a)):
        if kind == "polyrelu":
            total = total + a[i] * torch.where(x > 0, x, torch.zeros_like(x)) ** i
        else:
            power = x**i
            total = total + a[i] * power / torch.sqrt((power**2).mean(-1, keepdim=True) + 1e-6)
    return total


def answer(model):
    inputs = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    return model(input_ids=TOKENS, **inputs).logits


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["polyrelu", "polynorm"])
def test_values_and_gradients_are_those_of_the_formula(kind, order):
    torch.manual_seed(order)
    layer = activation(kind, order, torch.randn(order + 1).tolist())
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    mine, theirs = layer(x), by_hand(kind, layer.a, x)
    torch.testing.assert_close(mine, theirs)
    weights = torch.randn_like(x)
    for a, b in zip(
        torch.autograd.grad((mine * weights).sum(), [x, layer.a]),
        torch.autograd.grad((theirs * weights).sum(), [x, layer.a]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(lambda x, a: torch.func.functional_call(layer, {"a": a}, x), (x, layer.a))


@pytest.mark.parametrize("kind", ["polyrelu", "polynorm"])
def test_only_the_input_and_numbers_for_each_token_are_kept(kind):
    layer, kept = activation(kind, dtype=torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(5, 40, requires_grad=True))
    assert kept.count(200) == 1 and all(n <= 5 for n in kept if n != 200)


def test_the_start_is_thirds_and_the_coefficients_0_1_0_0_are_relu():
    x = torch.randn(4, 9)
    assert torch.equal(activation("polyrelu", coefficients=[0, 1, 0, 0], dtype=torch.float32)(x), x.relu())
    for kind in ("polyrelu", "polynorm"):
        torch.testing.assert_close(activation(kind).a.detach(), torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]).double())
    # of one constant row each normed power is 1, up to eps
    torch.testing.assert_close(
        activation("polynorm")(torch.full((1, 8), 2.0).double()), torch.ones(1, 8).double(), atol=1e-6, rtol=0
    )


def test_powers_are_taken_in_float32_under_autocast():
    layer = activation("polynorm", dtype=torch.float32)
    x = torch.randn(3, 16).mul(200).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = layer(x)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow, by_hand("polynorm", layer.a.detach(), x.float()).bfloat16())


FORMS = [("llama", {}, True), ("qwen3", {}, True), ("modernbert", {}, True), ("gpt2", {}, False), ("bert", {}, False)]
FORMS += [("t5", {"feed_forward_proj": "relu"}, False), ("t5", {"feed_forward_proj": "gated-gelu"}, True)]


@pytest.mark.parametrize("name, fields, gated", FORMS)
def test_every_feed_forward_changes_and_keeps_its_number_of_weights(tiny, name, fields, gated):
    plain, model = tiny(name, **fields), PolyCom()(tiny(name, **fields))
    layers = len(blocks(plain)) * (2 if name == "t5" else 1)
    assert sum(isinstance(m, Activation) for m in model.modules()) == layers
    assert sum(isinstance(m, FeedForward) for m in model.modules()) == layers * gated
    assert model.num_parameters() == plain.num_parameters() + 4 * layers
    answer(model).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    old = plain.state_dict()
    for key, value in model.state_dict().items():
        if key in old and value.shape == old[key].shape:
            assert torch.equal(value, old[key])  # what is not a gated feed-forward stays as it was
        elif key in old and value.ndim == 2:
            assert 72 in value.shape and value.std().item() == pytest.approx(old[key].std().item(), rel=0.1)


@pytest.mark.bits
def test_relu_coefficients_make_t5_what_it_was(tiny):
    plain, model = tiny("t5", feed_forward_proj="relu"), PolyCom("polyrelu")(tiny("t5", feed_forward_proj="relu"))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Activation):
                module.a.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert torch.equal(answer(model), answer(plain))


@pytest.mark.bits
@pytest.mark.parametrize("kind", ["polyrelu"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_saved_and_loaded_it_is_the_same_model(tiny, tmp_path, name, kind):
    model = PolyCom(kind, order=2)(tiny(name))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Activation):
                module.a.add_(torch.tensor([0.1, -0.2, 0.3]))
    checkpoint.save(model, None, tmp_path / "c")
    loaded, _ = checkpoint.load(tmp_path / "c")
    assert torch.equal(answer(loaded), answer(model))


def test_new_matrices_come_from_the_seed_and_not_from_the_stream_that_made_the_model():
    fields = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 97,
    }

    def make(seed):
        return PolyCom()(new_model("llama", fields, seed=seed), Inputs(seed=seed))

    one, again, other = make(0), make(0), make(1)
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in one.state_dict().items())
    up = one.model.layers[0].mlp.up_proj.weight.flatten()
    assert not torch.equal(up, other.model.layers[0].mlp.up_proj.weight.flatten())
    for parameter in one.parameters():
        if parameter.numel() >= up.numel() and parameter.flatten()[: up.numel()].data_ptr() != up.data_ptr():
            assert abs(torch.corrcoef(torch.stack([up, parameter.flatten()[: up.numel()]]))[0, 1]) < 0.1


def test_wrong_fields_and_models_are_refused(tiny):
    with pytest.raises(PretrainError, match="polycom: order 0: accepted: 1 or more"):
        PolyCom(order=0)(tiny())
    with pytest.raises(PretrainError, match="polycom: activation 'gelu': accepted: polynorm, polyrelu"):
        PolyCom("gelu")(tiny())
    with pytest.raises(PretrainError, match="has such activations already"):
        PolyCom()(PolyCom()(tiny()))

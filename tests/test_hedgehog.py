"""Hedgehog: linear attention against its formula, its forms against each other, generation, and distillation."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from test_objectives import context, rows
from test_train_stage import recipe  # noqa: F401
from transformers import AttentionInterface, AutoModelForCausalLM, StaticCache

import pretrain
from pretrain import engine
from pretrain.core import checkpoint
from pretrain.core.batch import document_mask
from pretrain.core.errors import PretrainError
from pretrain.core.generation.forward import why_not
from pretrain.core.models.families import attention_inputs, linears
from pretrain.decoding.cache.prepacking import Prepacking
from pretrain.decoding.cache.pyramid_infer import PyramidInfer
from pretrain.objectives.distillation.hedgehog_distillation import HedgehogDistillation
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.recipe import load
from pretrain.surgery.architecture._linear_attention import quadratic, recurrent, weights
from pretrain.surgery.architecture.hedgehog import FeatureMap, Hedgehog, attentions, distilling

FAMILIES = ["llama", "qwen3", "gpt2"]
FOUND: dict[str, torch.Tensor] = {}


@pytest.fixture
def sharp(tiny):
    """`sharp(family)`: a plain model whose attention is far from uniform, in float64."""

    def make(family="llama", **fields):
        model = tiny(family, **fields).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2 and any(part in name for part in ("q_proj", "k_proj", "c_attn")):
                    parameter.mul_(15)
        return model

    return make


def operated(model, activation="softmax", scale=0.5):
    """A copy after the surgery, its feature maps moved away from the identity."""
    model = Hedgehog(activation=activation)(copy.deepcopy(model))
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in attentions(model):
            for feature in (layer.feature_q, layer.feature_k):
                feature.weight.add_(scale * torch.randn_like(feature.weight))
    return model


def ids(length, number=2, seed=0):
    return torch.randint(3, 97, (number, length), generator=torch.Generator().manual_seed(seed))


def features(length=23, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.rand(2, 3, length, 8, generator=generator, dtype=dtype) + 0.01 for _ in range(2))
    return q, k, torch.randn(2, 3, length, 5, generator=generator, dtype=dtype)


def by_hand(x, weight, activation):
    """φ of one vector, written out."""
    x, weight = x.tolist(), [row.tolist() for row in weight]
    y = [sum(w * v for w, v in zip(row, x, strict=True)) for row in weight]
    both = torch.tensor([y, [-v for v in y]], dtype=torch.float64).exp()
    return (both / both.sum(1, keepdim=True) if activation == "softmax" else both).flatten()


@pytest.mark.parametrize("activation", ["softmax", "exp"])
def test_features_are_those_of_the_formula_at_first_with_the_identity(activation):
    layer, x = FeatureMap(2, 4, activation, torch.zeros((), dtype=torch.float64)), torch.randn(1, 2, 3, 4).double()
    eye = torch.eye(4)
    for moved in (False, True):
        if moved:
            torch.nn.init.normal_(layer.weight)
        for head in range(2):
            wanted = by_hand(x[0, head, 1], layer.weight[head] if moved else eye, activation)
            torch.testing.assert_close(layer(x)[0, head, 1], wanted)
    assert torch.isfinite(FeatureMap(2, 4, "softmax", torch.zeros(()))(x.float() * 1e4)).all()
    assert layer(x.bfloat16()).dtype == torch.float32  # sums over a whole text need it


def test_each_row_of_the_weights_sums_to_one_over_what_it_sees():
    q, k, _ = features()
    seen = (torch.rand(2, 1, 23, 23) < 0.3) | torch.eye(23, dtype=torch.bool)
    seen[0, 0, 4] = False
    found = weights(q, k, seen)
    total = torch.ones(2, 3, 23, dtype=torch.float64)
    total[0, :, 4] = 0
    torch.testing.assert_close(found.sum(-1), total)
    assert (found >= 0).all() and not found.masked_select(~seen).any()
    row = seen[1, 0, 9]
    scores = torch.stack([q[1, 2, 9] @ k[1, 2, j] for j in range(23)]) * row
    torch.testing.assert_close(found[1, 2, 9], scores / scores.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding", [0, 6])
def test_the_quadratic_the_chunked_and_the_recurrent_form_agree(padding, dtype):
    q, k, v = features(dtype=dtype)
    kept = torch.ones(2, 23, dtype=torch.bool)
    kept[0, :padding] = False
    seen = torch.ones(23, 23, dtype=torch.bool).tril() & kept[:, None, None]
    wanted, (S, z) = quadratic(q, k, v, seen)
    torch.testing.assert_close(wanted, weights(q, k, seen) @ v, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(S, torch.einsum("bl,bhlf,bhld->bhfd", kept.to(dtype), k, v))
    torch.testing.assert_close(z, torch.einsum("bl,bhlf->bhf", kept.to(dtype), k))
    for chunk in (1, 7, 64):
        y, state = recurrent(q, k, v, kept if padding else None, chunk=chunk)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state, (S, z), rtol=1e-5, atol=1e-5)
        begun, state = recurrent(q[:, :, :9], k[:, :, :9], v[:, :, :9], kept[:, :9], chunk=chunk)
        rest, state = recurrent(q[:, :, 9:], k[:, :, 9:], v[:, :, 9:], kept[:, 9:], state, chunk=chunk)
        torch.testing.assert_close(torch.cat([begun, rest], 2), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state, (S, z), rtol=1e-5, atol=1e-5)


def naive(module, query, key, value, attention_mask, **_):
    """Linear attention as an attention function of a plain model, one position at a time; keeps its weights."""
    layer, groups = module.hedgehog, query.shape[1] // key.shape[1]
    found, kept = torch.zeros(query.shape, dtype=query.dtype), torch.zeros(*query.shape[:3], query.shape[2])
    for head in range(query.shape[1]):
        q, k, v = query[:, head], key[:, head // groups], value[:, head // groups]
        phi_q, phi_k = (
            torch.cat([(x @ w[head].T).softmax(-1), (-x @ w[head].T).softmax(-1)], -1)
            for x, w in ((q, layer.feature_q.weight), (k, layer.feature_k.weight))
        )
        for i in range(query.shape[2]):
            score = (phi_q[:, i, None] * phi_k[:, : i + 1]).sum(-1)
            share = score / score.sum(-1, keepdim=True)
            kept[:, head, i, : i + 1] = share
            found[:, head, i] = (share[..., None] * v[:, : i + 1]).sum(1)
    FOUND["weights"] = kept.detach()
    return found.transpose(1, 2), None


AttentionInterface.register("hedgehog_by_hand", naive)


def plain_by_hand(plain, model):
    """The plain model, its attention computed by `naive` with the feature maps of the operated one."""
    plain = copy.deepcopy(plain)
    plain.set_attn_implementation("hedgehog_by_hand")
    layers = [m for m in plain.modules() if type(m).__name__.endswith("Attention")]
    for theirs, ours in zip(layers, attentions(model), strict=True):
        object.__setattr__(theirs, "hedgehog", ours)
    return plain


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_the_plain_model_with_linear_attention(sharp, family):
    plain = sharp(family)
    model, tokens = operated(plain), ids(11)
    wanted = plain_by_hand(plain, model)(tokens, use_cache=False).logits
    torch.testing.assert_close(model(tokens).logits, wanted)
    assert (wanted - plain(tokens).logits).abs().max() > 1e-3
    assert set(linears(model)) == set(linears(plain))
    names = {name for name, _ in model.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert len(names) == 4 and all(name.endswith(("feature_q.weight", "feature_k.weight")) for name in names)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_steps_give_the_whole_pass_with_a_state_that_does_not_grow(sharp, family):
    model, tokens = operated(sharp(family)), ids(30)
    wanted, cache, found, sizes = model(tokens, use_cache=False).logits, None, [], []
    for begin, end in [(0, 13), (13, 14), (14, 15), (15, 29), (29, 30)]:
        out = model(tokens[:, begin:end], past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits
        found.append(logits)
        sizes.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))
    torch.testing.assert_close(torch.cat(found, 1), wanted)
    heads, width = 4, 8
    assert set(sizes) == {2 * 2 * heads * (2 * width) * (width + 1) * 8} and cache.get_seq_length() == 30
    cache.reset()
    torch.testing.assert_close(model(tokens[:, :13], past_key_values=cache).logits, wanted[:, :13])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_left_padding_is_that_of_each_prompt_alone(sharp, family):
    model, tokens = operated(sharp(family)), ids(12)
    given = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    together = model.generate(tokens.masked_fill(mask == 0, 0), attention_mask=mask, **given)
    for row, start in ((0, 7), (1, 0)):
        alone = tokens[row : row + 1, start:]
        for number in range(9):  # without any cache
            alone = torch.cat([alone, model(alone, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            assert together[row, 12 + number] == alone[0, -1]
    beams = [model.generate(tokens, num_beams=3, use_cache=cache, **given) for cache in (True, False)]
    assert torch.equal(*beams)
    assert why_not(model, 20) is not None  # so that `pretrain generate` takes this path


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_do_not_see_each_other(sharp, family):
    model, tokens = operated(sharp(family)), ids(20, 1)
    document = torch.tensor([[1] * 8 + [2] * 9 + [0] * 3])
    position = torch.cat([torch.arange(n) for n in (8, 9, 3)])[None]
    inputs = attention_inputs(model, document_mask(document, causal=True), position)
    found = model(tokens, **inputs).logits
    torch.testing.assert_close(found[:, :8], model(tokens[:, :8]).logits)
    torch.testing.assert_close(found[:, 8:17], model(tokens[:, 8:17]).logits)
    by_position = model(tokens, position_ids=position, use_cache=False).logits
    torch.testing.assert_close(by_position[:, :17], found[:, :17])
    with pytest.raises(PretrainError, match="accepted: use_cache False for packed documents"):
        model(tokens, **inputs | {"use_cache": True})


@pytest.mark.bits
@pytest.mark.parametrize("activation", ["exp"])
def test_a_checkpoint_gives_the_same_logits_and_plain_transformers_refuses_it(tiny, tmp_path, activation):
    model, tokens = operated(tiny("qwen3"), activation, 0.1), ids(9)
    checkpoint.save(model, None, tmp_path / "c")
    again, _ = checkpoint.load(tmp_path / "c")
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    checkpoint.save(again, None, tmp_path / "d")
    assert torch.equal(checkpoint.load(tmp_path / "d")[0](tokens).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="pretrain_qwen3"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "c")


def taught(family_model):
    """Objective, model and batch of packed documents."""
    objective, model = HedgehogDistillation(), Hedgehog()(copy.deepcopy(family_model))
    assert objective.modules(model) is None
    return objective, model, objective.prepare(rows([14, 9], [20]), context(24))


@pytest.mark.parametrize("family", FAMILIES)
def test_while_distilled_the_model_is_the_softmax_model_and_its_entropy_bounds_the_loss(sharp, family):
    plain = sharp(family)
    objective, model, batch = taught(plain)
    with torch.no_grad(), distilling(model):
        assert torch.allclose(model(ids(9)).logits, plain(ids(9)).logits, rtol=0, atol=1e-12)
    loss = objective.loss(model, batch)
    assert loss.parts["kl"] > 1e-3 and all(layer.comparison is None for layer in attentions(model))
    # The softmax weights of transformers' own eager attention.
    plain.set_attn_implementation("eager")
    inputs = attention_inputs(plain, document_mask(batch["document_BL"], causal=True), batch["position_BL"])
    found = plain(batch["tokens_BL"], output_attentions=True, **inputs).attentions
    entropy = torch.stack([torch.special.entr(p).sum(-1).mean(1) for p in found]).mean(0)
    inside = batch["document_BL"] != 0
    assert batch["weight"] == inside.sum() == 43
    torch.testing.assert_close(loss.value - loss.parts["kl"], entropy[inside].mean())
    assert not loss.nll_BL[~inside].any()
    torch.testing.assert_close(loss.nll_BL.sum() / 43, loss.value.detach())


def test_the_loss_is_the_cross_entropy_of_the_weights(sharp):
    plain = sharp("llama", num_hidden_layers=1)
    objective, model, _ = taught(plain)
    batch = objective.prepare(rows([24]), context(24))
    plain_by_hand(plain, model)(batch["tokens_BL"], use_cache=False)
    plain.set_attn_implementation("eager")
    p = plain(batch["tokens_BL"], output_attentions=True, use_cache=False).attentions[0].detach()
    wanted = sum(
        -p[0, h, i, j] * FOUND["weights"][0, h, i, j].log() for h in range(4) for i in range(24) for j in range(i + 1)
    ) / (4 * 24)
    assert float(objective.loss(model, batch).value.detach()) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_feature_maps_learn_and_the_weights_come_nearer(sharp, family):
    objective, model, batch = taught(sharp(family).float())
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(15):
        loss = objective.loss(model, batch)
        loss.value.backward()
        losses.append(float(loss.parts["kl"]))
        given = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert given == {name for name in before if "feature" in name}
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == given == {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        assert not objective.loss(model, batch).value.requires_grad


def test_finetuning_reaches_every_weight_and_autocast_keeps_the_sums_wide(tiny):
    model = Hedgehog()(tiny("llama"))
    batch = CausalLM().prepare(rows([14, 9], [20]), context(24))
    exact = CausalLM().loss(model, batch).value
    exact.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(float(CausalLM().loss(model, batch).value) - float(exact)) < 0.02
    with torch.no_grad():
        cache = model.to(torch.bfloat16)(ids(9), use_cache=True).past_key_values
    assert cache.layers[0].keys.dtype == torch.float32


def test_a_recipe_distils_then_finetunes_then_generates(recipe, tmp_path):  # noqa: F811
    change = ["model.surgeries=[hedgehog]", "model.objective=hedgehog_distillation", "model.budget={steps: 2}"]
    change += ["model.checkpointing=true"]
    done = engine.run(load(recipe, change, tmp_path / "out"), say=engine.silent)
    assert {"hedgehog", "hedgehog_distillation"} <= set(done.stages["model"]["methods"])
    more = [f"model.init={done.folder / 'model'}", "model.model={}", "model.objective=causal_lm", change[2]]
    again = engine.run(load(recipe, more, tmp_path / "more"), say=engine.silent)
    model, tokenizer = pretrain.load(again.folder / "model" / "checkpoint")
    assert len(attentions(model)) == 1 and all(p.requires_grad for p in model.parameters())
    from pretrain.stages.decode import continue_prompt

    assert continue_prompt(model, tokenizer, "def f", max_new_tokens=5, temperature=0)["tokens"] > 0


def test_what_does_not_fit_is_one_error(tiny):
    def refused(match, call, *given, **more):
        with pytest.raises(PretrainError, match=match):
            call(*given, **more)

    llama = Hedgehog()(tiny("llama"))
    refused("attention HedgehogAttention: accepted: that of transformers", Hedgehog(), llama)
    refused("hedgehog: activation 'elu': accepted: softmax, exp", Hedgehog, activation="elu")
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    refused("sliding_window 8: accepted: full attention", Hedgehog(), tiny("qwen3", **windows))
    refused("without linear attention: accepted: one after hedgehog", HedgehogDistillation().modules, tiny("llama"))
    tokens, mask = ids(6), torch.ones(2, 5, dtype=torch.long)
    refused(r"attention_mask of shape \(2, 5\): accepted: 2 rows of 6 tokens", llama, tokens, attention_mask=mask)
    static = StaticCache(config=llama.config, max_cache_len=9)
    refused("cache StaticLayer: accepted: DynamicCache", llama, tokens, past_key_values=static)
    filled = tiny("llama")(tokens, use_cache=True).past_key_values
    refused("cache that holds keys and values: accepted: an empty one", llama, tokens, past_key_values=filled)
    ours = llama(tokens, use_cache=True).past_key_values
    refused("state cannot be cropped; accepted: no assistant model", ours.crop, -1)
    refused("keeps no keys and values", tiny("llama"), tokens, past_key_values=ours)
    refused(
        "prepacking: attention 'linear_attention': accepted: sdpa, eager",
        Prepacking().generate,
        llama,
        tokens[:, :4],
        max_new_tokens=2,
    )
    with PyramidInfer()(llama):
        refused("cache PyramidLayer: accepted: DynamicCache", llama, tokens)


def test_the_rows_of_a_state_can_be_chosen(tiny):
    model, tokens = Hedgehog()(tiny("llama")), ids(6)
    cache = model(tokens, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    alone = model(tokens, use_cache=True).past_key_values
    torch.testing.assert_close(cache.layers[1].keys, alone.layers[1].keys)
    torch.testing.assert_close(cache.layers[1].values, alone.layers[1].values)
    assert cache.get_max_length() == -1 and not inspect.isabstract(type(cache.layers[0]))

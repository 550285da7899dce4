"""The surgeries of the speed-run records: what each leaves unchanged, the cache, packed documents, recomputation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pretrain.core import checkpoint
from pretrain.core.batch import Context, Row, Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.generation.forward import Forward
from pretrain.core.meter import recomputing
from pretrain.core.method import method_class
from pretrain.core.models.cross_entropy import linear_cross_entropy
from pretrain.core.models.families import blocks, head, linears
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.surgery import Inputs
from pretrain.surgery._tokens import resize

NEW = {
    "qk_norm": {"gain": True}, "relu2": {}, "logit_softcap": {"cap": 5.0}, "value_embeddings": {},
    "value_residual": {}, "input_skip": {"start": 0.7},
}  # fmt: skip
CASES = [(name, family) for name in NEW for family in ("llama", "qwen3", "gpt2")]
READERS = [(name, family) for name, family in CASES if name in ("value_embeddings", "value_residual", "input_skip")]
IDS = torch.tensor([[7, 5, 9, 11, 40, 2, 33, 8], [6, 41, 9, 3, 12, 50, 4, 21]])


def operated(tiny, name, family, **fields):
    """A tiny model of lively weights after the surgery, its new numbers drawn by one seed."""
    plain = tiny(family, num_hidden_layers=3, initializer_range=0.2)
    return method_class(name)(**(NEW[name] | fields))(copy.deepcopy(plain), Inputs(seed=3)), plain


def logits(model, ids_BL=IDS):
    with torch.no_grad():
        return model(input_ids=ids_BL).logits


def packed(model):
    """The loss and the gradients of two documents in a row."""
    row = Row(IDS[0].numpy().astype(np.int32), np.array([0, 3], np.int32), np.array([0, 1]), 0, 0)
    objective = CausalLM()
    batch = objective.prepare([row], Context(Vocabulary(99, 0), 10, np.random.default_rng(0)))
    loss = objective.loss(model, batch)
    loss.value.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss, gradients


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name, fields", [("value_embeddings", {"mix": 0.0}), ("value_residual", {"mix": 0.0}), ("input_skip", {"start": 0.0})])  # fmt: skip
def test_at_a_share_of_zero_the_model_is_the_plain_one(tiny, name, fields, family):
    model, plain = operated(tiny, name, family, **fields)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(operated(tiny, name, family)[0]), logits(plain), atol=1e-2)


def test_value_embeddings_alone_are_values_of_the_token(tiny):
    model, _ = operated(tiny, "value_embeddings", "llama", layers=(1,), mix=1.0)
    seen = []
    layer = model.model.layers[1].self_attn.v_proj
    layer.register_forward_hook(lambda _, __, out: seen.append(out))
    logits(model)
    assert torch.equal(seen[0], layer.table(IDS))
    every = [
        hasattr(block.self_attn.v_proj, "table") for block in blocks(operated(tiny, "value_embeddings", "llama")[0])
    ]
    assert every == [True, False, True]  # the last, and every second one before it


def test_value_residual_of_one_gives_all_blocks_the_first_ones_values(tiny):
    model, _ = operated(tiny, "value_residual", "llama", mix=1.0)
    seen = []
    for block in blocks(model):
        block.self_attn.v_proj.register_forward_hook(lambda _, __, out: seen.append(out))
    logits(model)
    assert len(seen) == 3 and torch.equal(seen[1], seen[0]) and torch.equal(seen[2], seen[0])


def test_an_input_skip_adds_the_embedding_to_what_a_block_is_given(tiny):
    model, plain = operated(tiny, "input_skip", "llama", start=2.0)
    for block in blocks(model)[1:]:
        block.entrance.share.data[1] = 0
    with torch.no_grad():
        tripled = plain(inputs_embeds=3 * plain.model.embed_tokens(IDS)).logits
    torch.testing.assert_close(logits(model), tripled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family, queries", [("llama", "q_proj"), ("gpt2", "c_attn"), ("bert", "self.query"), ("modernbert", "Wqkv")])  # fmt: skip
@pytest.mark.parametrize("part", ["queries", "keys", "values"])
def test_with_normed_queries_and_keys_logits_do_not_depend_on_the_scale_of_their_weights(tiny, family, queries, part):
    plain = tiny(family, initializer_range=0.2)
    width = 32

    def scaled(model):
        model, number = copy.deepcopy(model), ("queries", "keys", "values").index(part)
        for name, layer in linears(model, "attention").items():
            path = name.removesuffix(".linear")
            fused = path.endswith(("c_attn", "Wqkv"))
            mine = path.endswith((("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))[number])
            if fused or mine:
                rows = slice(width * number, width * (number + 1)) if fused else slice(None)
                at = (slice(None), rows) if family == "gpt2" else (rows,)
                layer.weight.data[at] *= 4
                if layer.bias is not None:
                    layer.bias.data[rows] *= 4
        return model

    normed = method_class("qk_norm")(eps=1e-12)(copy.deepcopy(plain))
    same = part != "values"
    close = torch.allclose(logits(scaled(normed)), logits(normed), atol=1e-4)
    assert close == same
    assert not torch.allclose(logits(scaled(plain)), logits(plain), atol=1e-2)


def test_normed_queries_have_the_rms_of_their_start_and_qwen3_which_has_such_norms_is_unchanged(tiny):
    seen = []
    model = method_class("qk_norm")(start=1.5)(tiny("llama", initializer_range=0.2))
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, __, out: seen.append(out))
    logits(model)
    rms_BLN = seen[0].unflatten(-1, (4, 8)).square().mean(-1).sqrt()
    torch.testing.assert_close(rms_BLN, torch.full_like(rms_BLN, 1.5), rtol=1e-4, atol=0)
    plain = tiny("qwen3", initializer_range=0.2)
    torch.testing.assert_close(
        logits(method_class("qk_norm")()(copy.deepcopy(plain))), logits(plain), rtol=0, atol=1e-3
    )


def test_squared_relu_with_a_gate_keeps_all_weights_and_without_as_many(tiny):
    plain = tiny("llama")
    gated, bare = (method_class("relu2")(gate=gate)(copy.deepcopy(plain), Inputs()) for gate in (True, False))
    assert all(torch.equal(value, gated.state_dict()[name]) for name, value in plain.state_dict().items())
    assert bare.num_parameters() == plain.num_parameters() and bare.model.layers[0].mlp.up_proj.weight.shape == (72, 32)
    x = torch.randn(5, 32)
    for mlp, act in ((gated.model.layers[0].mlp, lambda m: F.relu(m.gate_proj(x)) ** 2 * m.up_proj(x)),
                     (bare.model.layers[0].mlp, lambda m: F.relu(m.up_proj(x)) ** 2)):  # fmt: skip
        torch.testing.assert_close(mlp(x), mlp.down_proj(act(mlp)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("untie", [False, True])
def test_blocks_of_zero_writers_are_the_identity(tiny, family, untie):
    plain = tiny(family, tie_word_embeddings=True)
    model = method_class("zero_init")(untie=untie)(copy.deepcopy(plain), Inputs())
    states = model.base_model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], states[-2])  # the last one is after the final norm
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (not untie) == model.config.tie_word_embeddings
    if untie:
        assert float(model.get_output_embeddings().weight.detach().std()) == pytest.approx(0.001, rel=0.1)


def test_a_soft_cap_bounds_the_logits_and_a_high_one_changes_nothing(tiny):
    low, plain = operated(tiny, "logit_softcap", "llama", cap=0.5)
    assert logits(plain).abs().max() > 1 and logits(low).abs().max() < 0.5
    torch.testing.assert_close(logits(low), 0.5 * torch.tanh(logits(plain) / 0.5))
    high, _ = operated(tiny, "logit_softcap", "llama", cap=1e4)
    torch.testing.assert_close(logits(high), logits(plain), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [5, 600])  # one chunk, and several
def test_the_loss_of_capped_logits_and_its_gradients_are_those_of_the_formula(rows):
    torch.manual_seed(0)
    h, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, rows, 8), (13, 8), (13,)))
    target, weight = torch.randint(13, (1, rows)), torch.rand(1, rows, dtype=torch.float64)
    mine, nll = linear_cross_entropy(h, w, target, bias_V=b, weight_BL=weight, softcap=2.0)
    capped = 2 * torch.tanh((h @ w.T + b) / 2)
    theirs_N = F.cross_entropy(capped[0], target[0], reduction="none")
    torch.testing.assert_close(nll[0], theirs_N.detach())
    theirs = (theirs_N * weight[0]).sum() / rows
    torch.testing.assert_close(mine, theirs)
    for a, c in zip(torch.autograd.grad(mine, [h, w, b]), torch.autograd.grad(theirs, [h, w, b]), strict=True):
        torch.testing.assert_close(a, c)


def test_training_and_likelihoods_see_the_cap_and_what_cannot_refuses(tiny):
    from pretrain.core.models.likelihood import document_nll, judged

    model, _ = operated(tiny, "logit_softcap", "llama", cap=0.5)
    logits_LV = logits(model, IDS[:1])[0]
    nll_L = F.cross_entropy(logits_LV[:-1], IDS[0, 1:], reduction="none")
    assert document_nll(model, [IDS[0].numpy()], length=16)[0] == pytest.approx(float(nll_L.sum()), rel=1e-5)
    states_NE = model.model(input_ids=IDS[:1]).last_hidden_state[0, :-1]
    torch.testing.assert_close(judged(model, states_NE.detach(), IDS[0, 1:])[0].float(), nll_L, rtol=1e-4, atol=1e-5)
    loss, _ = packed(model)
    assert float(loss.value.detach()) < 1 + np.log(99)  # uncapped it is several nats more
    with pytest.raises(PretrainError, match="logits capped at 0.5: accepted here: a model without logit_softcap"):
        head(model)


@pytest.mark.parametrize("name, family", CASES)
def test_tokens_by_the_cache_have_the_logits_of_the_whole_text(tiny, name, family):
    model, _ = operated(tiny, name, family)
    whole = logits(model)
    quick = Forward(model, 8)
    with torch.no_grad():
        ours = [quick.prefill(IDS[:, :4])] + [quick.step(IDS[:, i : i + 1]) for i in range(4, 8)]
        first = model(input_ids=IDS[:, :4], use_cache=True)
        theirs, cache = [first.logits[:, -1]], first.past_key_values
        for i in range(4, 8):
            out = model(input_ids=IDS[:, i : i + 1], past_key_values=cache, use_cache=True)
            theirs.append(out.logits[:, -1])
    for by_token in (ours, theirs):
        torch.testing.assert_close(torch.stack(by_token, 1), whole[:, 3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, family", CASES)
def test_documents_that_share_a_row_do_not_see_one_another(tiny, name, family):
    model, _ = operated(tiny, name, family)
    apart = [
        F.cross_entropy(logits(model, ids)[0, :-1], ids[0, 1:], reduction="none") for ids in (IDS[:1, :3], IDS[:1, 3:])
    ]
    nll_L = packed(model)[0].nll_BL[0]
    torch.testing.assert_close(torch.cat([nll_L[:2], nll_L[3:7]]), torch.cat(apart), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, family", READERS)
def test_recomputed_activations_give_the_same_gradients_also_of_two_passes_at_once(tiny, name, family):
    model, _ = operated(tiny, name, family)

    def gradients():
        torch.manual_seed(0)  # of dropout
        model.train()
        first, second = model(input_ids=IDS[:1]).logits, model(input_ids=IDS[1:]).logits
        (first.square().mean() + second.sin().mean()).backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        return found

    plain = gradients()
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": recomputing}
    )
    again = gradients()
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, msg=key)


@pytest.mark.parametrize("name, family", READERS)
def test_a_copy_reads_its_own_tokens_and_a_pass_without_tokens_is_refused(tiny, name, family):
    model, _ = operated(tiny, name, family)
    copied, whole = copy.deepcopy(model), logits(model)
    assert torch.equal(logits(copied), whole)
    with torch.no_grad():
        embedded_BLE = model.get_input_embeddings().weight[IDS]
    with pytest.raises(PretrainError, match="accepted: input_ids, not inputs_embeds"):
        copied(inputs_embeds=embedded_BLE)
    assert all(getattr(module, "this_pass", None) is None for module in model.modules())


@pytest.mark.parametrize("values", ["value_embeddings", "value_residual"])
def test_all_of_them_go_together_and_come_back_from_a_checkpoint(tiny, tmp_path, values):
    model = tiny("llama", initializer_range=0.2)
    for name in ("qk_norm", "relu2", "logit_softcap", values, "input_skip"):
        model = method_class(name)(**NEW[name])(model, Inputs(seed=1))
    checkpoint.save(model, None, tmp_path / "c")
    again, _ = checkpoint.load(tmp_path / "c")
    assert torch.equal(logits(again), logits(model))
    assert packed(again)[1].keys() == dict(model.named_parameters()).keys()  # each is trained


def test_the_vocabulary_does_not_change_after_a_surgery_that_knows_it(tiny):
    for name in ("value_embeddings", "logit_softcap"):
        with pytest.raises(PretrainError, match=f"120 entries for a model of {name}: accepted: .* before that surgery"):
            resize(operated(tiny, name, "llama")[0], 120)


def test_new_numbers_come_from_the_seed(tiny):
    tables = [
        method_class("value_embeddings")()(tiny("llama"), Inputs(seed=seed))
        .model.layers[1]
        .self_attn.v_proj.table.weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])
    assert float(tables[0].detach().std()) == pytest.approx(32**-0.5, rel=0.1)


def test_layers_that_there_are_not_and_a_second_time_are_refused(tiny):
    with pytest.raises(PretrainError, match=r"value_embeddings: layers \[2\]: accepted: 0 to 1"):
        method_class("value_embeddings")(layers=(2,))(tiny("llama"))
    for name in ("qk_norm", "value_embeddings", "value_residual", "input_skip", "logit_softcap"):
        once, _ = operated(tiny, name, "llama")
        with pytest.raises(PretrainError, match=f"^{name}: .*accepted: "):
            method_class(name)()(once)

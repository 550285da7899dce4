"""The query layer: queries of the position alone, keys and values of the states below."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pretrain.core.batch import Context, Row, Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.meter import recomputing
from pretrain.core.method import method_class
from pretrain.core.models.families import at, blocks, family
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.surgery import Inputs

IDS = torch.tensor([[7, 5, 9, 11, 40, 2, 33, 8]])
FAMILIES = ("llama", "qwen3", "gpt2")


def operated(tiny, kind, **fields):
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) if kind == "gpt2" else {}
    plain = tiny(kind, initializer_range=0.2, **dropouts)
    return method_class("query_layer")(**{"std": 1.0, **fields})(copy.deepcopy(plain), Inputs(seed=3)), plain


def queries_of(model):
    block, entry = blocks(model)[-1], family(model)
    return at(block, f"{entry.attention}.{entry.queries[0]}")


def logits(model, ids_BL=IDS, **more):
    with torch.no_grad():
        return model(input_ids=ids_BL, **more).logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_with_the_states_of_a_text_for_its_table_the_model_is_the_plain_one_on_that_text(tiny, kind):
    model, plain = operated(tiny, kind)
    seen, norm = [], at(blocks(plain)[-1], family(plain).norms[0])
    norm.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    wanted = logits(plain)
    assert not torch.allclose(logits(model), wanted, atol=1e-2)
    queries_of(model).table.weight.data[: IDS.shape[1]] = seen[0]
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)


def test_the_last_block_is_the_papers_formula(tiny):
    model, _ = operated(tiny, "gpt2")
    block, seen = blocks(model)[-1], {}
    block.register_forward_hook(lambda _, given, out: seen.update(x=given[0], out=out))
    logits(model)
    x_LE, fused = seen["x"][0], block.attn.c_attn
    length, width, heads = *x_LE.shape, model.config.n_head
    h_LE = block.ln_1(x_LE)
    k_LE, v_LE = (h_LE @ fused.keys_values.weight + fused.keys_values.bias).split(width, -1)
    q_LE = fused.table.weight[:length] @ fused.linear.weight + fused.linear.bias
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in (q_LE, k_LE, v_LE))
    scores = q @ k.mT / (width // heads) ** 0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    attended = (F.softmax(scores, -1) @ v).transpose(0, 1).flatten(1)
    x_LE = x_LE + block.attn.c_proj(attended)
    wanted = x_LE + block.mlp(block.ln_2(x_LE))
    torch.testing.assert_close(seen["out"][0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_cached_token_asks_as_it_does_in_the_whole_text(tiny, kind):
    model, _ = operated(tiny, kind)
    with torch.no_grad():
        first = model(input_ids=IDS[:, :5], use_cache=True)
        rest = model(input_ids=IDS[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_documents_of_a_row_each_ask_from_their_own_beginning_recomputed_or_not(tiny, kind):
    model, _ = operated(tiny, kind)
    row = Row(IDS[0].numpy().astype(np.int32), np.array([0, 3], np.int32), np.array([0, 1]), 0, 0)
    objective = CausalLM()
    batch = objective.prepare([row], Context(Vocabulary(99, 0), 10, np.random.default_rng(0)))
    alone = [F.cross_entropy(logits(model, ids)[0, :-1], ids[0, 1:], reduction="sum") for ids in IDS.split([3, 5], 1)]
    model.train()
    loss = objective.loss(model, batch).value
    torch.testing.assert_close(loss.detach(), sum(alone) / 6, rtol=0, atol=1e-5)
    loss.backward()
    table = queries_of(model).table.weight
    plain, table.grad = table.grad.clone(), None
    assert plain[1:4].abs().amax(1).gt(0).all() and plain[5:].eq(0).all()  # the first sees one key, whatever it asks
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recomputing})
    objective.loss(model, batch).value.backward()
    torch.testing.assert_close(table.grad, plain)


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_of_a_batch_are_each_what_they_are_alone(tiny, kind):
    model, _ = operated(tiny, kind)
    both = torch.cat([IDS, IDS.flip(1)])
    torch.testing.assert_close(logits(model, both), torch.cat([logits(model), logits(model, IDS.flip(1))]), rtol=0, atol=1e-5)  # fmt: skip


def test_positions_beyond_the_table_ask_as_its_last(tiny):
    model, _ = operated(tiny, "llama", positions=4)
    table = queries_of(model).table.weight
    before = logits(model)
    table.data[3] += 1
    assert [torch.equal(a, b) for a, b in zip(logits(model)[0], before[0], strict=True)] == [True] * 3 + [False] * 5


def test_a_second_query_layer_is_refused(tiny):
    model, _ = operated(tiny, "llama")
    with pytest.raises(PretrainError, match="query_layer: q_proj is a query layer already: accepted: a linear layer"):
        method_class("query_layer")()(model)

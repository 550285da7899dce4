"""Caches that are pruned after the prompt: what stays, how much memory it takes, and positions that stay."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from pretrain.core.errors import PretrainError
from pretrain.core.generation.cache import cache_bytes, layers_of
from pretrain.core.generation.loop import decode
from pretrain.decoding.cache._press import Read
from pretrain.decoding.cache.expected_attention import ExpectedAttention
from pretrain.decoding.cache.h2o import H2O
from pretrain.decoding.cache.snapkv import SnapKV
from pretrain.decoding.cache.streaming_llm import StreamingLLM

METHODS = [StreamingLLM(), SnapKV(window_size=8), H2O(), ExpectedAttention()]
LENGTH = 40


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tiny):
    return tiny(request.param, initializer_range=0.3)


def ids(seed=0):
    return torch.randint(3, 97, (1, LENGTH), generator=torch.Generator().manual_seed(seed))


def read(model, method=None):
    """The cache of a prompt, pruned by a method or whole."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        if method is None:
            model(ids(), past_key_values=cache)
        else:
            with method(model):
                model(ids(), past_key_values=cache)
    return cache


def places(whole, pruned):
    """By layer and head of keys, the places of what stayed."""
    rows = []
    for layer, kept in zip(layers_of(whole), layers_of(pruned), strict=True):
        rows.append([])
        for key_LD, kept_KD, value_LD, its_KD in zip(
            layer.keys[0], kept.keys[0], layer.values[0], kept.values[0], strict=True
        ):
            same_KL = torch.isclose(kept_KD[:, None], key_LD[None], atol=1e-4).all(-1)
            assert bool((same_KL.sum(1) == 1).all())
            at_K = same_KL.int().argmax(1)
            assert torch.allclose(value_LD[at_K], its_KD, atol=1e-4)
            rows[-1].append(at_K.tolist())
    return rows


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_asked_share_stays_in_order_and_memory_falls_with_it(model, method):
    whole, pruned = read(model), read(model, method)
    assert cache_bytes(pruned) * 2 == cache_bytes(whole)
    for layer in places(whole, pruned):
        for row in layer:
            assert len(row) == LENGTH // 2 and row == sorted(set(row))


def test_streaming_keeps_the_first_and_the_last(model):
    for layer in places(read(model), read(model, StreamingLLM(n_sink=3))):
        assert layer == [[0, 1, 2, *range(LENGTH - 17, LENGTH)]] * len(layer)


def test_snapkv_keeps_its_window_and_h2o_the_last_half_of_what_stays(model):
    whole = read(model)
    for method, last in ((SnapKV(window_size=8), 8), (H2O(), LENGTH // 4), (H2O(recent=0.2), LENGTH // 10)):
        for layer in places(whole, read(model, method)):
            assert all(row[-last:] == [*range(LENGTH - last, LENGTH)] for row in layer)


def layer_with(weights):
    """A layer of one head, 6 tokens, whose last query attends to its keys in the ratios of `weights`."""
    key_1LD = torch.eye(6)[None] * 10
    query_1LD = torch.zeros(1, 6, 6)
    query_1LD[0, -1] = torch.log(torch.tensor(weights)) / 10
    return Read(query_1LD, key_1LD, torch.ones(1, 6, 6), 1.0, None)


def test_scores_are_the_attention_that_is_paid():
    paid = [4.0, 1.0, 8.0, 2.0, 1.0, 1.0]
    layer = layer_with(paid)
    share = torch.tensor(paid) / sum(paid)
    assert torch.allclose(SnapKV(window_size=1, kernel_size=1).scores(layer, 3)[0, :5], share[:5], atol=1e-5)
    earlier = torch.tensor([sum(1 / n for n in range(first, 6)) for first in range(1, 7)])  # even before the last
    wanted = share + torch.cat([earlier[:5], torch.zeros(1)])
    assert torch.allclose(H2O(recent=0.0).scores(layer, 3)[0], wanted, atol=1e-5)


def test_expected_attention_is_the_mean_over_normal_queries_at_the_mean_rotation():
    """Against draws of queries; the rotation of the positions to come is put on the mean query before."""
    generator = torch.Generator().manual_seed(0)
    query_HLD = torch.randn(2, 400, 4, generator=generator) * 0.7 + 0.3
    key_GLD = torch.randn(1, 400, 4, generator=generator)
    layer = Read(query_HLD, key_GLD, torch.ones(1, 400, 4), 0.5, None)
    found_L = ExpectedAttention(n_sink=0, value_norm=False).scores(layer, 100)[0]
    draws = [torch.distributions.MultivariateNormal(q.mean(0), q.T.cov(correction=0)) for q in query_HLD]
    expected_HL = torch.stack([(d.sample((200_000,)) @ key_GLD[0].T * 0.5).exp().mean(0) for d in draws])
    assert torch.allclose(found_L, (expected_HL / expected_HL.sum(1, keepdim=True)).mean(0), rtol=0.05)


def test_new_tokens_have_the_positions_after_the_whole_prompt(model):
    """Of a model that attends to the last token alone the rest of the cache does not matter, positions do."""
    with torch.no_grad():
        cache = read(model, StreamingLLM(n_sink=0, compression_ratio=0.5))
        mask_1K = torch.ones(1, LENGTH // 2 + 1, dtype=torch.long)
        token_11 = torch.tensor([[5]])
        ours = model(
            token_11, past_key_values=cache, attention_mask=mask_1K, position_ids=torch.tensor([[LENGTH]])
        ).logits
        whole = torch.cat([ids(), token_11], 1)
        hidden = torch.ones(1, 1, LENGTH + 1, LENGTH + 1, dtype=torch.bool).tril()
        hidden[..., LENGTH, : LENGTH // 2] = False  # the last token does not see what was dropped
        theirs = model(whole, attention_mask=torch.zeros(hidden.shape).masked_fill(~hidden, -1e9)).logits[:, -1:]
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_a_prompt_no_longer_than_what_always_stays_is_whole(model):
    short_1L = ids()[:, :5]
    for method in (StreamingLLM(), SnapKV(), ExpectedAttention()):
        assert torch.equal(
            method.generate(model, short_1L, max_new_tokens=4), decode(model, short_1L, max_new_tokens=4)
        )


def test_what_cannot_be_pruned_is_named(model):
    with pytest.raises(PretrainError, match="snapkv: kernel_size 4: accepted: an odd number"):
        SnapKV(kernel_size=4)
    with pytest.raises(PretrainError, match="compression_ratio 1.0: accepted"):
        H2O(compression_ratio=1.0)
    with H2O()(model), pytest.raises(PretrainError, match="pruned on this model already; accepted: one at a time"):
        SnapKV().generate(model, ids())

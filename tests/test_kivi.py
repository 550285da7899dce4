"""A cache in a few bits: what the bits stand for, what stays whole, and what it takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.core.errors import PretrainError
from pretrain.core.generation.loop import decode
from pretrain.decoding.cache.kivi import KIVI, Packed


@settings(max_examples=60)
@given(st.sampled_from([2, 4, 8]), st.sampled_from([4, 8, 32]), st.integers(0, 10_000))
def test_each_number_is_the_nearest_of_its_groups_levels(bits, group, seed):
    states = torch.randn(1, 2, 3, 2 * group, generator=torch.Generator().manual_seed(seed))
    packed = Packed.of(states, bits, group)
    opened, grouped = packed.opened(), states.unflatten(-1, (-1, group))
    step = (grouped.amax(-1) - grouped.amin(-1)) / (2**bits - 1)
    assert bool(((opened - states).abs().unflatten(-1, (-1, group)) <= step[..., None] * 0.5001).all())
    ends = opened.unflatten(-1, (-1, group))
    assert torch.allclose(ends.amin(-1), grouped.amin(-1)) and torch.allclose(
        ends.amax(-1), grouped.amax(-1), atol=1e-5
    )
    assert packed.codes.nbytes == states.numel() * bits // 8


def test_a_group_of_equal_numbers_is_kept():
    states = torch.full((1, 1, 2, 8), 3.25)
    assert torch.equal(Packed.of(states, 2, 4).opened(), states)


def test_keys_go_by_channel_and_values_by_token_and_the_newest_stay_whole(tiny):
    model = tiny("llama", initializer_range=0.3)
    layer = KIVI(bits=2, group_size=4, residual_length=8).cache(model).layers[0]
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 1, 2, 21, 8, generator=generator)
    first = layer.update(key[:, :, :19], value[:, :, :19])
    assert torch.equal(first[0], key[:, :, :19]) and torch.equal(first[1], value[:, :, :19])  # the prompt sees its own
    assert layer.keys.shape[2] == 3 and layer.values.shape[2] == 8 and layer.get_seq_length() == 19
    keys, values = layer.update(key[:, :, 19:20], value[:, :, 19:20])
    assert torch.equal(keys[:, :, 16:], key[:, :, 16:20]) and torch.equal(values[:, :, 11:], value[:, :, 11:20])
    by_channel = Packed.of(key[:, :, :16].transpose(2, 3), 2, 4, turned=True).opened()
    assert torch.equal(keys[:, :, :16], by_channel) and not torch.allclose(by_channel, key[:, :, :16], atol=1e-2)
    assert torch.equal(values[:, :, :11], Packed.of(value[:, :, :11], 2, 4).opened())
    assert layer.values.shape[2] == 8 and layer.keys.shape[2] == 4


def test_it_takes_less_and_more_bits_are_nearer(tiny):
    model = tiny("llama", initializer_range=0.3)
    ids_1L = torch.randint(3, 97, (1, 48), generator=torch.Generator().manual_seed(0))
    whole = model(ids_1L).logits[0, -1].detach()
    apart, sizes = [], []
    with torch.no_grad():
        for bits in (2, 4, 8):
            cache = KIVI(bits=bits, group_size=8, residual_length=8).cache(model)
            model(ids_1L[:, :-1], past_key_values=cache)
            sizes.append(sum(layer.nbytes for layer in cache.layers))
            apart.append(float((model(ids_1L[:, -1:], past_key_values=cache).logits[0, -1] - whole).abs().max()))
    assert apart[0] > apart[1] > apart[2] and apart[2] < 0.05 * float(whole.abs().max())
    full = 2 * 47 * sum(4 * 8 * layer.keys.shape[1] for layer in cache.layers)
    assert sizes[0] < sizes[1] < sizes[2] < full


def test_short_texts_are_whole_and_wrong_sizes_are_named(tiny):
    model = tiny("gpt2", initializer_range=0.4)
    ids_1L = torch.randint(3, 97, (1, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(KIVI().generate(model, ids_1L, max_new_tokens=8), decode(model, ids_1L, max_new_tokens=8))
    with pytest.raises(PretrainError, match="kivi: residual_length 100, group_size 32: accepted: whole groups"):
        KIVI(residual_length=100)
    with pytest.raises(PretrainError, match="kivi: bits 3"):
        KIVI(bits=3)

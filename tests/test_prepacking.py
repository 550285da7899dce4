"""Prepacking: what shared rows give a prompt is what it has alone."""

from __future__ import annotations

import pytest
import torch

from pretrain.core.errors import PretrainError
from pretrain.decoding.cache.prepacking import Prepacking

LENGTHS = (3, 17, 1, 9, 8, 17, 5, 2)
MODELS = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("qwen3", {}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("gpt2", {"n_positions": 30}),
]


def prompts_of(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (n,), generator=generator) for n in lengths]


def padded(prompts):
    longest = max(map(len, prompts))
    ids_BL, mask_BL = torch.zeros(len(prompts), longest, dtype=torch.long), torch.zeros(len(prompts), longest)
    for b, prompt in enumerate(prompts):
        ids_BL[b, longest - len(prompt) :], mask_BL[b, longest - len(prompt) :] = prompt, 1
    return ids_BL, mask_BL.long()


def alone(model, prompt, new):
    """Greedy tokens without any cache, one prompt at a time."""
    with torch.no_grad():
        for _ in range(new):
            prompt = torch.cat([prompt, model(prompt[None], use_cache=False).logits[0, -1].argmax()[None]])
    return prompt


@pytest.mark.parametrize("row", [0, 40])
@pytest.mark.parametrize(("family", "fields"), MODELS)
def test_logits_and_cache_of_a_prompt_are_those_that_it_has_alone(tiny, family, fields, row):
    model, prompts = tiny(family, **fields).double(), prompts_of()
    logits_BV, cache = Prepacking(row=row).prefill(model, prompts)
    for b, prompt in enumerate(prompts):
        with torch.no_grad():
            own = model(prompt[None], use_cache=True)
        assert torch.allclose(logits_BV[b], own.logits[0, -1], atol=1e-12)
        for mine, theirs in zip(cache.layers, own.past_key_values.layers, strict=True):
            kept = theirs.keys.shape[2]  # a window keeps the last
            assert mine.keys.shape[2] == 17
            assert torch.allclose(mine.keys[b, :, 17 - kept :], theirs.keys[0], atol=1e-12)
            assert torch.allclose(mine.values[b, :, 17 - kept :], theirs.values[0], atol=1e-12)
            assert not mine.keys[b, :, : 17 - len(prompt)].any()


@pytest.mark.parametrize(("family", "fields"), MODELS)
def test_greedy_continuations_are_those_of_each_prompt_alone(tiny, family, fields):
    model, prompts = tiny(family, **fields).double(), prompts_of(seed=1)
    ids_BL, mask_BL = padded(prompts)
    output_BN = Prepacking().generate(model, ids_BL, attention_mask_BL=mask_BL, max_new_tokens=12)
    assert torch.equal(output_BN[:, :17], ids_BL)
    for row_N, prompt in zip(output_BN, prompts, strict=True):
        assert torch.equal(row_N[17:], alone(model, prompt, 12)[len(prompt) :])


def test_the_model_sees_few_rows(tiny):
    model, shapes = tiny("llama"), []
    model.model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    Prepacking().prefill(model, prompts_of())
    Prepacking(row=31).prefill(model, prompts_of())
    assert shapes == [(4, 17), (2, 31)]  # 62 tokens


def test_what_cannot_be_packed_is_refused(tiny):
    with pytest.raises(PretrainError, match="row -1: accepted: 0"):
        Prepacking(row=-1)
    for prompts in ([], [torch.tensor([], dtype=torch.long)], [torch.ones(2, 2, dtype=torch.long)]):
        with pytest.raises(PretrainError, match="prompts of shapes .* accepted: one or more"):
            Prepacking().prefill(tiny("llama"), prompts)
    with pytest.raises(PretrainError, match="31 tokens: accepted: up to the model's 30"):
        Prepacking().prefill(tiny("gpt2", n_positions=30), prompts_of((31,)))
    ids_BL, mask_BL = padded(prompts_of((2, 5)))
    for wrong in (mask_BL.flip(1), mask_BL[:, 1:]):
        with pytest.raises(PretrainError, match="padding on the left"):
            Prepacking().generate(tiny("llama"), ids_BL, attention_mask_BL=wrong)

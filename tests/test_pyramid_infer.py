"""PyramidInfer: which tokens each layer keeps, and that nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
from closeness import assert_same_model

from pretrain.core.errors import PretrainError
from pretrain.core.generation.cache import cache_bytes
from pretrain.decoding.cache import _pyramid
from pretrain.decoding.cache._pyramid import pivotal, scores
from pretrain.decoding.cache.pyramid_infer import PyramidInfer

WHOLE = PyramidInfer(prefill_decay_ratio=1.0, gen_decay_ratio=1.0, gen_compress_ratio=1.0)
SMALL = PyramidInfer(
    recent_ratio=0.15, prefill_decay_ratio=0.4, min_context_length=6, distance_weight=3.0, streamingllm_sink_len=2,
    gen_decay_ratio=0.2, exceed_length_to_compress=4,
)  # fmt: skip
MODELS = [
    ("llama", {"num_hidden_layers": 4}),
    ("qwen3", {"num_hidden_layers": 4}),
    ("gpt2", {"n_layer": 4, "n_positions": 200}),
]


def sharp(tiny, family, fields):
    """A model whose attention is far from uniform, in float64."""
    model = tiny(family, **fields).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and any(part in name for part in ("q_proj", "k_proj", "c_attn")):
                parameter.mul_(25)
    return model


def prompt_of(length, rows=2, padding=0):
    ids_BL = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(length))
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[0, :padding] = 0
    return ids_BL, mask_BL


def places(cache):
    return [layer.place_BK.tolist() for layer in cache.layers]


@pytest.mark.bits
@pytest.mark.parametrize(("family", "fields"), MODELS)
def test_with_everything_kept_tokens_and_logits_are_the_plain_models(tiny, family, fields):
    model, (ids_BL, mask_BL) = sharp(tiny, family, fields), prompt_of(70, padding=9)
    given = {"attention_mask": mask_BL, "max_new_tokens": 50, "eos_token_id": None, "pad_token_id": 0}
    for more in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        plain_BN = model.generate(ids_BL, **given, **more)
        with WHOLE(model):
            assert torch.equal(model.generate(ids_BL, **given, **more), plain_BN)
    greedy_BN = model.generate(ids_BL, **given, do_sample=False)
    assert torch.equal(WHOLE.generate(model, ids_BL, attention_mask_BL=mask_BL, max_new_tokens=50), greedy_BN)
    with torch.no_grad():
        plain = model(ids_BL).logits
        with WHOLE(model):
            assert torch.equal(model(ids_BL).logits, plain)


class Reference:
    """One row, all tokens computed in all layers every time; a token that is not kept is one that is not looked at."""

    def __init__(self, model, method):
        self.model, self.method, self.weights = model, method, []
        model.set_attn_implementation("eager")
        self.blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
        for block in self.blocks:
            attention = block.attn if hasattr(block, "attn") else block.self_attn
            attention.register_forward_hook(lambda _, __, output: self.weights.append(output[1][0].mean(0)))

    def run(self, ids_N, sees):
        """Logits, with what each layer's queries look at."""
        model, self.weights = self.model, []
        position_1N = torch.arange(len(ids_N))[None]
        if hasattr(model, "transformer"):
            states, norm = (
                model.transformer.wte(ids_N)[None] + model.transformer.wpe(position_1N),
                model.transformer.ln_f,
            )
        else:
            states, norm = model.model.embed_tokens(ids_N)[None], model.model.norm
        for block, seen in zip(self.blocks, sees, strict=True):
            mask = torch.full((1, 1, len(ids_N), len(ids_N)), -1e30, dtype=torch.float64)
            for query, keys in enumerate(seen):
                mask[0, 0, query, list(keys)] = 0
            if hasattr(model, "transformer"):
                states = block(states, None, mask)
            else:
                turned = model.model.rotary_emb(states, position_1N)
                states = block(states, attention_mask=mask, position_embeddings=turned)
        return model.lm_head(norm(states))[0, -1]

    def best(self, layer, queries, keys, keep):
        factor = torch.linspace(1.0, self.method.distance_weight, len(queries))
        score = {
            k: sum(float(f * self.weights[layer][q, k]) for f, q in zip(factor, queries, strict=True)) for k in keys
        }
        return sorted(sorted(keys, key=score.get, reverse=True)[:keep])

    @torch.no_grad()
    def __call__(self, prompt_L, new):
        """The kept places of each layer and the logits, after the prompt and after each of `new` tokens."""
        method, length, layers = self.method, len(prompt_L), len(self.blocks)
        recent, block = int(length * method.recent_ratio) + 1, method.exceed_length_to_compress
        kept, sees = [list(range(length))], [[range(q + 1) for q in range(length)]]
        for layer in range(layers):
            found = self.run(prompt_L, sees + [sees[-1]] * (layers - len(sees)))
            context = kept[-1][:-recent]
            share = method.prefill_decay_ratio
            share += (1 - share) * (1 + math.cos(math.pi * layer / layers)) / 2
            keep, sinks = int(len(context) * share), method.streamingllm_sink_len
            if layer + 1 < layers:
                if keep > method.min_context_length:
                    queries = range(length - recent, length)
                    context = sorted(context[:sinks] + self.best(layer, queries, context[sinks:], keep - sinks))
                kept.append(context + list(range(length - recent, length)))
                alive = set(kept[-1])
                sees.append([[k for k in range(q + 1) if k in alive or k == q] for q in range(length)])
        yield [list(places) for places in kept], found
        ids_N, fresh = prompt_L, [[] for _ in kept]
        for token in new:
            ids_N = torch.cat([ids_N, token[None]])
            now = len(ids_N) - 1
            for layer in range(layers):
                fresh[layer].append(now)
                sees[layer].append(kept[layer] + fresh[layer])
            found = self.run(ids_N, sees)
            for layer in range(layers):
                if len(fresh[layer]) == recent + block:
                    share = method.gen_decay_ratio
                    share += (1 - share) * (1 + math.cos(math.pi * layer / layers)) / 2
                    keep = max(1, int(block * method.gen_compress_ratio * share))
                    oldest, fresh[layer] = fresh[layer][:block], fresh[layer][block:]
                    kept[layer] += self.best(layer, fresh[layer], oldest, keep)
            yield [old + newer for old, newer in zip(kept, fresh, strict=True)], found


@pytest.mark.parametrize(("family", "fields"), MODELS)
def test_kept_tokens_and_logits_are_those_of_a_computation_from_attention_weights(tiny, family, fields):
    ids_BL, _ = prompt_of(40)
    new_BM = torch.randint(3, 97, (2, 25), generator=torch.Generator().manual_seed(1))
    wanted = [list(Reference(sharp(tiny, family, fields), SMALL)(*row)) for row in zip(ids_BL, new_BM, strict=True)]
    model = sharp(tiny, family, fields)
    with torch.no_grad(), SMALL(model):
        output = model(ids_BL, use_cache=True)
        for step in range(26):
            for layer, rows in enumerate(places(output.past_key_values)):
                assert rows == [wanted[0][step][0][layer], wanted[1][step][0][layer]], (step, layer)
            for row in range(2):
                # eager softmax is float32
                given = {"length": 65, "dtype": torch.float32}
                assert_same_model(output.logits[row, -1], wanted[row][step][1], model, **given)
            if step < 25:
                output = model(new_BM[:, step : step + 1], past_key_values=output.past_key_values)
    assert wanted[0][0][0][3] != wanted[1][0][0][3]  # rows choose for themselves
    assert len(wanted[0][-1][0][3]) < len(wanted[0][-1][0][0]) < 65


def test_a_cache_holds_the_bytes_that_the_lengths_say(tiny):
    model, (ids_BL, _) = tiny("llama", num_hidden_layers=6), prompt_of(120, rows=3)
    for method in (SMALL, PyramidInfer(prefill_decay_ratio=0.5, min_context_length=10), PyramidInfer()):
        with method(model):
            output = model.generate(
                ids_BL,
                max_new_tokens=50,
                return_dict_in_generate=True,
                eos_token_id=None,
                pad_token_id=0,
                do_sample=False,
            )
        lengths = method.lengths(120, 6, new=49)  # nothing follows the last
        assert list(lengths) == [layer.keys.shape[2] for layer in output.past_key_values.layers]
        assert cache_bytes(output.past_key_values) == sum(lengths) * 3 * 2 * (2 * 8) * 4
        assert list(lengths) == sorted(lengths, reverse=True)


def test_the_default_lengths_are_the_released_configurations():
    # 32 blocks, 2048 tokens: the last 410 whole; the rest times 0.9 + 0.1 (1 + cos(pi l / 32)) / 2 after block l.
    context, wanted = 2048 - 410, []
    for layer in range(32):
        wanted.append(context + 410)
        context = int(context * (0.1 * (math.cos(math.pi * layer / 32) + 1) / 2 + 0.9))
    assert list(PyramidInfer().lengths(2048, 32)) == wanted
    assert wanted[0] == wanted[1] == 2048 and wanted[31] < 800
    assert PyramidInfer().lengths(70, 4) == (70, 70, 70, 70)  # 55 tokens of context are below the least
    assert PyramidInfer(layerwise_downsample_interval=2, prefill_decay_ratio=0.5).lengths(1001, 4) == (
        1001,
        1001,
        1001,
        801,
    )


@pytest.mark.bits
def test_padding_goes_first_and_the_first_tokens_stay(tiny):
    model, (ids_BL, mask_BL) = sharp(tiny, "llama", {"num_hidden_layers": 4}), prompt_of(60, padding=15)
    method = PyramidInfer(prefill_decay_ratio=0.5, min_context_length=4)
    with torch.no_grad(), method(model):
        cache = model(ids_BL, attention_mask=mask_BL, use_cache=True).past_key_values
        garbage_BL = ids_BL.masked_fill(mask_BL == 0, 50)
        again = model(garbage_BL, attention_mask=mask_BL, use_cache=True)
        assert torch.equal(cache.layers[3].keys[0, :, -40:], again.past_key_values.layers[3].keys[0, :, -40:])
    padded, whole = places(cache)[3]
    assert padded.count(-1) == 0 and padded[:4] == [15, 16, 17, 18] and whole[:4] == [0, 1, 2, 3]
    unseen_BC, place_BQ = torch.zeros(1, 6), torch.tensor([[-1, -1, -1, 3, 4, 5, 6]])
    assert pivotal(unseen_BC, place_BQ, 3, 0).tolist() == [[3, 4, 5]]  # even where nobody looks at the others


def test_a_row_is_continued_as_it_is_alone_whatever_stands_beside_it(tiny):
    model, (ids_BL, mask_BL) = sharp(tiny, "llama", {"num_hidden_layers": 4}), prompt_of(60, rows=3, padding=15)
    mask_BL[2, :30] = 0
    options = {"max_new_tokens": 30, "temperature": 1.0}
    rows = SMALL.generate(model, ids_BL, attention_mask_BL=mask_BL, max_new_tokens=30)
    for row, padding in enumerate((15, 0, 30)):
        alone = SMALL.generate(model, ids_BL[row : row + 1, padding:], max_new_tokens=30)
        assert torch.equal(rows[row, padding:], alone[0])
    drawn = [
        SMALL.generate(model, ids_BL, attention_mask_BL=mask_BL, generator=torch.Generator().manual_seed(3), **options)
        for _ in range(2)
    ]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], rows)


@pytest.mark.parametrize("at_once", [1, 100, 700, 5000])
def test_scores_of_some_heads_and_queries_at_a_time_are_those_of_all(monkeypatch, at_once):
    source = torch.Generator().manual_seed(0)
    query, key, weight = (
        torch.randn(size, generator=source, dtype=torch.float64) for size in ((2, 6, 7, 8), (2, 3, 20, 8), (7, 20))
    )
    place_BK = torch.arange(20).repeat(2, 1)
    place_BK[0, :4] = -1
    whole = scores(query, key, place_BK, 0.3, weight)
    seen_BQK = (place_BK >= 0)[:, None] & (torch.arange(20) <= torch.arange(13, 20)[:, None])
    logits = (query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3).masked_fill(~seen_BQK[:, None], -math.inf)
    assert torch.allclose(whole, (logits.softmax(-1).mean(1) * weight).sum(1), atol=1e-12)
    monkeypatch.setattr(_pyramid, "AT_ONCE", at_once)
    assert torch.allclose(scores(query, key, place_BK, 0.3, weight), whole, atol=1e-12)


def test_several_tokens_in_one_pass_see_what_was_kept_and_themselves(tiny):
    model, (ids_BL, _) = sharp(tiny, "gpt2", MODELS[2][1]), prompt_of(60)
    method = PyramidInfer(prefill_decay_ratio=0.5, min_context_length=4, exceed_length_to_compress=100)
    with torch.no_grad(), method(model):
        first = model(ids_BL[:, :50], use_cache=True).past_key_values
        together = model(ids_BL[:, 50:], past_key_values=first).logits
        one = model(ids_BL[:, :50], use_cache=True).past_key_values
        for at in range(10):
            single = model(ids_BL[:, 50 + at : 51 + at], past_key_values=one).logits
            assert torch.allclose(single[:, 0], together[:, at], atol=1e-12)
        for mine, theirs in zip(one.layers, first.layers, strict=True):
            assert torch.allclose(mine.score_BT, theirs.score_BT, atol=1e-12)


@pytest.mark.bits
def test_the_model_is_as_it_was_afterwards(tiny):
    for family, fields in MODELS:
        model, (ids_BL, _) = tiny(family, **fields), prompt_of(90)
        before, plain = model.config._attn_implementation, model(ids_BL).logits
        with pytest.raises(ZeroDivisionError), SMALL(model):
            assert model(ids_BL).logits.shape == plain.shape
            assert not torch.equal(model(ids_BL).logits[:, -1], plain[:, -1])
            raise ZeroDivisionError
        assert model.config._attn_implementation == before and torch.equal(model(ids_BL).logits, plain)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert not any(hasattr(module, "pyramid_infer") for module in model.modules())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prefill_decay_ratio": 0.0}, "prefill_decay_ratio 0.0: accepted: above 0, at most 1"),
        ({"gen_compress_ratio": 1.5}, "gen_compress_ratio 1.5"),
        ({"recent_ratio": -0.1}, "recent_ratio -0.1: accepted: from 0 to 1"),
        ({"distance_weight": 0.0}, "distance_weight 0.0: accepted: above 0"),
        ({"prefill_decay_strategy": "linear"}, "'linear': accepted: cosine, constant"),
        ({"exceed_length_to_compress": 0}, "exceed_length_to_compress 0: accepted: 1 or more"),
        ({"min_context_length": -1}, "min_context_length -1: accepted: 0 or more"),
    ],
)
def test_shares_that_are_none_are_refused(fields, message):
    with pytest.raises(PretrainError, match=message):
        PyramidInfer(**fields)


def test_what_it_cannot_run_on_is_refused(tiny):
    from transformers import DynamicCache, StaticCache

    windowed = tiny("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(PretrainError, match="sliding_window 4: accepted: full"), PyramidInfer()(windowed):
        pass
    model, (ids_BL, mask_BL) = tiny("llama"), prompt_of(20)
    filled = DynamicCache()
    model(ids_BL, past_key_values=filled)
    with PyramidInfer()(model):
        with pytest.raises(PretrainError, match="already"), PyramidInfer()(model):
            pass
        with pytest.raises(PretrainError, match="use_cache False"):
            model(ids_BL, use_cache=False)
        for cache in (filled, StaticCache(model.config, max_cache_len=30)):
            with pytest.raises(PretrainError, match="accepted: an empty DynamicCache"):
                model(ids_BL, past_key_values=cache)
        with pytest.raises(PretrainError, match=r"attention_mask of shape \(2, 19\)"):
            model(ids_BL, attention_mask=mask_BL[:, 1:])
        cache = model(ids_BL, use_cache=True).past_key_values
        with pytest.raises(PretrainError, match="cannot be cropped"):
            cache.crop(-1)

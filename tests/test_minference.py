"""MInference: which keys each head keeps, that attention is to these alone, and that all kept is the plain model."""

from __future__ import annotations

import json

import pytest
import torch
from closeness import UNIT, assert_rounding, assert_same_model
from decoding_cases import WIDE, padded, prompt
from torch.nn.functional import one_hot, scaled_dot_product_attention

from pretrain.core.errors import PretrainError
from pretrain.core.generation.loop import decode
from pretrain.decoding.long_context import _sparse_attention as sparse
from pretrain.decoding.long_context._sparse_attention import BLOCK, Pattern, choose, gathered, last_scores
from pretrain.decoding.long_context.minference import MInference, candidates, search

SMALL = MInference(vertical=8, slash=16)  # two blocks of keys at most, and eight columns
MIXED = [
    Pattern("a_shape", (5, 20)), Pattern("vertical_slash", (40, 110)), Pattern("block_sparse", (2,)),
    Pattern("vertical_slash", (3, 2)),
]  # fmt: skip


def states(length, heads=4, groups=2, width=16, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, length, width), (groups, length, width), (groups, length, width)]
    return [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]


def masked(query_HLD, key_GLD, value_GLD, mask_HLL, scaling):
    return scaled_dot_product_attention(
        query_HLD[None], key_GLD[None], value_GLD[None], attn_mask=mask_HLL[None], scale=scaling, enable_gqa=True
    )[0]


def by_the_book(query_LD, key_LD, pattern, scaling, last_q):
    """`mask_LL` of a head, from the definitions: query by query, and then what the queries of a block share."""
    length, (kind, sizes) = len(query_LD), pattern
    i_L1, j_L = torch.arange(length)[:, None], torch.arange(length)
    causal_LL = j_L <= i_L1
    if kind == "a_shape":
        own_LL = (j_L < sizes[0]) | (i_L1 - j_L < sizes[1])
    elif kind == "vertical_slash":
        weight_LL = ((query_LD @ key_LD.T) * scaling).masked_fill(~causal_LL, -torch.inf).softmax(-1)
        last = range(max(0, length - last_q), length)
        vertical = [sum(float(weight_LL[i, j]) for i in last) for j in range(length)]
        slash = [sum(float(weight_LL[i, i - s]) for i in last if i >= s) for s in range(length)]
        forced = [min(30, sizes[0]), min(100, sizes[1])]
        best = [
            set(range(first)) | set(sorted(range(first, length), key=lambda n: -line[n])[: size - first])
            for line, size, first in zip((vertical, slash), sizes, forced, strict=True)
        ]
        own_LL = torch.tensor([[j in best[0] or i - j in best[1] for j in range(length)] for i in range(length)])
    else:
        own_LL = torch.zeros(length, length, dtype=torch.bool)
        parts = list(zip(query_LD.split(BLOCK), key_LD.split(BLOCK), strict=True))
        for m, (query_QD, _) in enumerate(parts):
            score = [float(query_QD.mean(0) @ key_QD.mean(0)) for _, key_QD in parts[: m + 1]]
            for n in sorted(range(m + 1), key=lambda n: -score[n])[: sizes[0]]:
                own_LL[m * BLOCK : (m + 1) * BLOCK, n * BLOCK : (n + 1) * BLOCK] = True
    # The last block is filled up with queries that only widen its diagonals.
    if kind == "block_sparse":
        return own_LL & causal_LL
    slashes = set(range(sizes[1])) if kind == "a_shape" else best[1]
    for m in range(-(-length // BLOCK)):
        of_block = range(m * BLOCK, (m + 1) * BLOCK)
        for j in range(length):
            if any(i - j in slashes for i in of_block):
                own_LL[m * BLOCK : (m + 1) * BLOCK, j] = True
    return own_LL & causal_LL


@pytest.mark.parametrize("length", [50, 64, 200])
def test_sparse_attention_is_attention_with_the_patterns_masks(length):
    query_HLD, key_GLD, value_GLD = states(length)
    kept = choose(query_HLD, key_GLD, MIXED, scaling=0.3, last_q=50)
    mask_HLL = torch.stack(
        [by_the_book(query_HLD[h], key_GLD[h // 2], pattern, 0.3, 50) for h, pattern in enumerate(MIXED)]
    )
    out_HLD = gathered(query_HLD, key_GLD, value_GLD, kept, 0.3)
    wanted_HLD = masked(query_HLD, key_GLD, value_GLD, mask_HLL, 0.3)
    torch.testing.assert_close(out_HLD, wanted_HLD, rtol=0, atol=1e-12)
    for head in range(4):
        for number in range(-(-length // BLOCK)):
            last = min((number + 1) * BLOCK, length) - 1
            assert kept.places(head, number).tolist() == mask_HLL[head, last].nonzero()[:, 0].tolist()
    if length == 200:
        assert 0.2 < mask_HLL.sum() / (4 * length * (length + 1) / 2) < 0.8  # some is left out


def test_work_is_proportional_to_what_is_kept(monkeypatch):
    query_HLD, key_GLD, value_GLD = states(500)
    kept, sizes, mm = choose(query_HLD, key_GLD, MIXED, scaling=0.3), [], torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b, **k: sizes.append(a.shape[0] * a.shape[1] * b.shape[1]) or mm(a, b, **k)
    )
    gathered(query_HLD, key_GLD, value_GLD, kept, 0.3)
    assert sum(sizes) == 2 * 16 * kept.pairs() < 0.6 * 2 * 16 * 4 * 500 * 500 / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_with_everything_kept_it_is_causal_attention(dtype):
    query_HLD, key_GLD, value_GLD = states(200, dtype=dtype)
    whole = [Pattern("vertical_slash", (1, 199)), Pattern("block_sparse", (4,))] * 2
    kept = choose(query_HLD, key_GLD, whole, scaling=0.25)
    wanted_HLD = masked(query_HLD, key_GLD, value_GLD, torch.ones(4, 200, 200, dtype=torch.bool).tril(), 0.25)
    out_HLD = gathered(query_HLD, key_GLD, value_GLD, kept, 0.25)
    assert out_HLD.dtype == dtype
    largest = value_GLD.abs().max().item()  # an output is a mean of values
    if dtype is torch.bfloat16:  # summed in float32: each side rounds the weights and the result
        torch.testing.assert_close(out_HLD, wanted_HLD, rtol=0, atol=4 * UNIT[dtype] * largest)
    else:
        assert_rounding(out_HLD, wanted_HLD, 200, steps=2, size=largest)


@pytest.mark.bits
def test_no_query_sees_the_future():
    query_HLD, key_GLD, value_GLD = states(300)
    kept = choose(query_HLD, key_GLD, MIXED, scaling=0.3)
    before_HLD = gathered(query_HLD, key_GLD, value_GLD, kept, 0.3)
    for at in (1, 63, 64, 150, 299):
        other = [x.clone() for x in (query_HLD, key_GLD, value_GLD)]
        for x in other:
            x[:, at:] += 3
        after_HLD = gathered(*other, kept, 0.3)
        assert torch.equal(after_HLD[:, :at], before_HLD[:, :at])
        assert not torch.allclose(after_HLD[:, at], before_HLD[:, at])


def planted(length, column, distance, width=128, strength=40.0):
    """Queries that look at one column and at one diagonal."""
    generator = torch.Generator().manual_seed(0)
    code_LD = torch.nn.functional.normalize(torch.randn(length, width, generator=generator), dim=1)
    line_D = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
    key_LD = code_LD.clone()
    key_LD[column] = line_D
    query_LD = strength * (code_LD.roll(distance, 0) + line_D)
    return query_LD[None], key_LD[None], torch.randn(1, length, 16, generator=generator)


def test_the_estimate_finds_a_planted_column_and_diagonal():
    query_1LD, key_1LD, _ = planted(700, 205, 333)
    vertical_L, slash_L = last_scores(query_1LD[0, -64:], key_1LD[0], 1.0)
    assert vertical_L.argmax() == 205 and slash_L.argmax() == 333
    assert vertical_L[205] == pytest.approx(32, abs=6) and slash_L[333] == pytest.approx(32, abs=6)
    assert float(vertical_L.sum()) == pytest.approx(64) == float(slash_L.sum())
    kept = choose(query_1LD, key_1LD, [Pattern("vertical_slash", (31, 101))], scaling=1.0)
    assert kept.column_HL[0].nonzero()[:, 0].tolist() == [*range(30), 205]
    assert kept.near_HN[0].nonzero()[:, 0].tolist() == [*range(1, 164), *range(334, 398)]  # 0 to 99, 333; 64 wide


def heads_of_each_kind(length=1024):
    """Three heads: near keys and the first one; a column and a broad diagonal; blocks that look at another block."""
    generator = torch.Generator().manual_seed(1)
    value_1LD = torch.randn(1, length, 8, generator=generator)

    def looking(back, breadth, column, strength):
        angle_LD = torch.arange(length)[:, None] * torch.linspace(0, 1 / breadth, 32)
        apart_D = back * torch.linspace(0, 1 / breadth, 32)
        key_LD = torch.cat([angle_LD.cos(), angle_LD.sin(), (torch.arange(length) == column)[:, None] * 9.0], 1)
        turned_LD = torch.cat([(angle_LD - apart_D).cos(), (angle_LD - apart_D).sin()], 1)
        return torch.cat([strength * turned_LD, torch.ones(length, 1)], 1)[None], key_LD[None], value_1LD

    other_M = torch.tensor([int(torch.randint(0, max(1, m), (), generator=generator)) for m in range(length // BLOCK)])
    code_MD = one_hot(torch.arange(length // BLOCK)).float()
    blocks = [9 * code_MD[other_M].repeat_interleave(BLOCK, 0)[None], code_MD.repeat_interleave(BLOCK, 0)[None]]
    return [looking(0, 100, 0, 0.15), looking(333, 20, 205, 0.25), (*blocks, value_1LD)]


def errors_of(query_1LD, key_1LD, value_1LD, patterns):
    dense_LD = scaled_dot_product_attention(query_1LD, key_1LD, value_1LD, is_causal=True, scale=1.0)
    found = {}
    for pattern in patterns:
        out_LD = gathered(query_1LD, key_1LD, value_1LD, choose(query_1LD, key_1LD, [pattern], scaling=1.0), 1.0)
        found[pattern] = float((out_LD - dense_LD).abs().sum() / dense_LD.abs().sum())
    return found


def test_the_search_finds_the_pattern_that_a_head_has(tiny, monkeypatch):
    """The model's three heads are given the constructed queries and keys."""
    model = tiny(num_attention_heads=3, num_key_value_heads=3, hidden_size=24, num_hidden_layers=1)
    made, forward = heads_of_each_kind(), sparse.AttentionInterface._global_mapping[sparse.NAME]
    widest = max(query.shape[-1] for query, _, _ in made)
    wide = [[torch.nn.functional.pad(x, (0, widest - x.shape[-1])) for x in head[:2]] + [head[2]] for head in made]
    query, key, value = (torch.stack([head[n][0] for head in wide])[None] for n in range(3))

    def given(module, *_, **__):
        return forward(module, query, key, value, None, scaling=1.0)

    monkeypatch.setitem(sparse.AttentionInterface._global_mapping, sparse.NAME, given)
    found = search(model, [prompt(1024, 0)], sink=4, local=250)
    assert [head["pattern"] for head in found["layers"][0]] == ["a_shape", "vertical_slash", "block_sparse"]
    for head, parts in zip(found["layers"][0], made, strict=True):
        errors = errors_of(*parts, candidates(*parts[:2], 4, 250, scaling=1.0))
        assert head["error"] == pytest.approx(min(errors.values()), rel=1e-4)
        assert head["error"] < 0.7 * sorted(errors.values())[1]


def test_candidates_cost_what_the_a_shape_costs_and_no_less():
    query_1LD, key_1LD, _ = planted(1024, 205, 333)

    def cost(kind, *sizes):
        return choose(query_1LD, key_1LD, [Pattern(kind, sizes)], scaling=1.0).pairs()

    first, *others = candidates(query_1LD, key_1LD, 4, 400, scaling=1.0)
    assert first == ("a_shape", (4, 400)) and {kind for kind, _ in others} == {"vertical_slash", "block_sparse"}
    budget = cost(*first[:1], *first[1])
    assert budget == sum(64 * min(64 * (m + 1), 463 + 4) for m in range(16))
    for kind, sizes in others:
        step = 50 if kind == "vertical_slash" else 1
        assert cost(kind, *sizes) <= budget < cost(kind, *sizes[:-1], sizes[-1] + step)
    assert [s[0] for k, s in others if k == "vertical_slash"] == [30, 100, 500]  # 1000 columns alone are more


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_with_everything_kept_logits_and_tokens_are_the_plain_models(tiny, family):
    more = {"n_positions": 200} if family == "gpt2" else {}
    model, ids_BL = tiny(family, **WIDE[family], **more), torch.cat([prompt(150, 0), prompt(150, 1)])
    with torch.no_grad():
        wanted_BV = model(ids_BL).logits[:, -1]
    for method in (MInference(), MInference(vertical=1, slash=149)):  # not one block sparse, and all of them
        logits_BV, _ = method.prefill(model, ids_BL)
        assert_same_model(logits_BV, wanted_BV, model, length=150)
        output_BN = method.generate(model, ids_BL, max_new_tokens=20)
        assert torch.equal(output_BN, decode(model, ids_BL, max_new_tokens=20))
    sparse_BV, _ = SMALL.prefill(model, ids_BL)
    assert not torch.allclose(sparse_BV, wanted_BV, atol=1e-2)


def test_padded_prompts_ends_and_samples_are_those_of_ordinary_decoding(tiny):
    model, method, ended = tiny(**WIDE["llama"]), MInference(vertical=1, slash=129), 0
    ids_BL, mask_BL = padded((30, 130, 7, 1), 3)
    for eos in (None, 40, 42):
        given = {"attention_mask_BL": mask_BL, "max_new_tokens": 16, "eos": eos, "pad": 96}
        output_BN = method.generate(model, ids_BL, **given)
        assert torch.equal(output_BN, decode(model, ids_BL, **given))
        ended += eos is not None and bool((output_BN[:, 130:] == 96).any())
    assert ended
    for top_p in (1.0, 0.7):
        one, two, plain = (
            run(
                model, ids_BL, attention_mask_BL=mask_BL, temperature=0.8, top_p=top_p, max_new_tokens=8,
                generator=torch.Generator().manual_seed(seed),
            )
            for run, seed in ((method.generate, 0), (method.generate, 1), (decode, 0))
        )  # fmt: skip
        assert torch.equal(one, plain) and not torch.equal(one, two)
    whole_1N = method.generate(model, ids_BL[1:2], max_new_tokens=12)
    eos = int(whole_1N[0, 135])
    stop = whole_1N[0, 130:].tolist().index(eos) + 131
    assert torch.equal(method.generate(model, ids_BL[1:2], max_new_tokens=12, eos=eos), whole_1N[:, :stop])


def test_a_padded_prompt_gets_what_it_gets_alone_and_decoding_is_dense(tiny):
    model = tiny(**WIDE["llama"]).double()
    ids_BL, mask_BL = padded((150, 260), 5)
    output_BN = SMALL.generate(model, ids_BL, attention_mask_BL=mask_BL, max_new_tokens=10)
    assert not torch.equal(output_BN, decode(model, ids_BL, attention_mask_BL=mask_BL, max_new_tokens=10))
    for row, length in enumerate((150, 260)):
        alone_1N = SMALL.generate(model, ids_BL[row : row + 1, -length:], max_new_tokens=10)
        assert torch.equal(output_BN[row, -length - 10 :], alone_1N[0])
    # What the prompt left in the cache is attended to whole: the same as `transformers` with that cache.
    from transformers import DynamicCache

    logits_1V, forward = SMALL.prefill(model, ids_BL[1:], new=3)
    cache = DynamicCache()
    for layer, (_, keys, values) in forward.cache.items():
        cache.update(keys[:, :, :260].clone(), values[:, :, :260].clone(), layer)
    token_11 = logits_1V.argmax(-1, keepdim=True)
    with torch.no_grad():
        wanted_1V = model(token_11.clone(), past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(forward.step(token_11), wanted_1V, rtol=0, atol=1e-10)


def test_patterns_found_by_the_search_are_used(tiny, tmp_path):
    model, path = tiny(**WIDE["llama"]), tmp_path / "patterns.json"
    batches = [torch.cat([prompt(260, 0), prompt(260, 1)]), prompt(300, 2)]
    found = search(model, batches, sink=8, local=40)
    path.write_text(json.dumps(found))
    layers = MInference(patterns=str(path)).of(model)
    assert [len(layer) for layer in layers] == [4, 4] and all(h.kind in sparse.SIZES for la in layers for h in la)
    everything = {
        "layers": [
            [{"pattern": "a_shape", "sink": 1, "local": 219}] * 4,
            [{"pattern": "block_sparse", "blocks": 3}] * 4,
        ]
    }
    path.write_text(json.dumps(everything))
    logits_1V, _ = MInference(patterns=str(path)).prefill(model, prompt(190, 5))
    with torch.no_grad():
        assert_same_model(logits_1V, model(prompt(190, 5)).logits[:, -1], model, length=190)
    for layer, head, size in (
        (0, 3, {"pattern": "a_shape", "sink": 1, "local": 1}),
        (1, 0, {"pattern": "block_sparse", "blocks": 1}),
    ):
        changed = json.loads(json.dumps(everything))
        changed["layers"][layer][head] = size
        path.write_text(json.dumps(changed))
        other_1V, _ = MInference(patterns=str(path)).prefill(model, prompt(190, 5))
        assert not torch.allclose(other_1V, logits_1V, atol=1e-4)


def test_the_flexible_mask_is_what_is_kept():
    from torch.nn.attention.flex_attention import create_mask

    for length in (256, 300):
        query_HLD, key_GLD, value_GLD = states(length)
        kept = choose(query_HLD, key_GLD, MIXED, scaling=0.3)
        mask = sparse.block_mask(kept)
        found_HLL = create_mask(mask.mask_mod, 1, 4, length, length, device="cpu")[0]
        out_HLD = gathered(query_HLD, key_GLD, value_GLD, kept, 0.3)
        wanted_HLD = masked(query_HLD, key_GLD, value_GLD, found_HLL, 0.3)
        torch.testing.assert_close(out_HLD, wanted_HLD, rtol=0, atol=1e-12)
        number = -(-length // BLOCK)
        some_HMM = torch.zeros(4, number, number, dtype=torch.int32)
        for head in range(4):
            for block in range(number):
                some_HMM[head, block, (kept.places(head, block) // BLOCK).unique()] = 1
        assert torch.equal(mask.to_dense()[0], some_HMM) and not some_HMM[:, -1].all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_flexible_attention_is_gathered_attention(dtype):
    query_HLD, key_GLD, value_GLD = (x.to("cuda", dtype) for x in states(1000, width=64))
    kept = choose(query_HLD, key_GLD, MIXED, scaling=0.125)
    torch.testing.assert_close(
        sparse.flexible(query_HLD, key_GLD, value_GLD, kept, 0.125),
        gathered(query_HLD, key_GLD, value_GLD, kept, 0.125), rtol=0, atol=0.03,
    )  # fmt: skip


def test_files_that_the_authors_published_are_read(tiny, tmp_path):
    """The form of their `configs/*_best_pattern.json`: a head that is missing has their default."""
    path = tmp_path / "Llama_best_pattern.json"
    first = {
        "0": ["vertical_and_slash", 30, 800, 185169],
        "1": ["stream_llm", 100, 800, 0.9],
        "3": ["block_sparse", 9, 9, 1],
    }
    path.write_text(json.dumps([first, {str(head): ["vertical_and_slash", 3500, 100, 0.675] for head in range(4)}]))
    model = tiny(**WIDE["llama"])
    usual = Pattern("vertical_slash", (1000, 6096))
    above, below = MInference(patterns=str(path)).of(model)
    assert above == [
        Pattern("vertical_slash", (30, 800)), Pattern("a_shape", (100, 800)), usual, Pattern("block_sparse", (100,)),
    ]  # fmt: skip
    assert below == [Pattern("vertical_slash", (3500, 100))] * 4
    for wrong in ([first], [first, {"0": ["other", 1, 1, 1]}], [first, {"0": ["stream_llm", 0, 1, 1]}], [first, 7]):
        path.write_text(json.dumps(wrong))
        with pytest.raises(PretrainError, match=r"accepted: 2 layers of 4 heads"):
            MInference(patterns=str(path)).of(model)


def test_what_cannot_be_done_is_one_clear_error(tiny, tmp_path):
    for name in ("vertical", "slash", "last_q"):
        with pytest.raises(PretrainError, match=f"minference: {name} 0: accepted: 1 or more"):
            MInference(**{name: 0})
    with pytest.raises(PretrainError, match="pads after tokens; accepted: prompts padded on the left"):
        SMALL.generate(tiny(), prompt(5, 0), attention_mask_BL=torch.tensor([[1, 1, 1, 0, 0]]))
    with pytest.raises(PretrainError, match="max_new_tokens 0: accepted: 1 or more"):
        SMALL.generate(tiny(), prompt(5, 0), max_new_tokens=0)
    with pytest.raises(PretrainError, match="no batches: accepted: one or more"):
        search(tiny(), [])
    with pytest.raises(PretrainError, match="search: local 0: accepted: 1 or more"):
        search(tiny(), [prompt(5, 0)], local=0)
    path = tmp_path / "patterns.json"
    with pytest.raises(PretrainError, match="missing file"):
        MInference(patterns=str(path)).generate(tiny(), prompt(5, 0))
    good = {"pattern": "vertical_slash", "vertical": 30, "slash": 50}
    for layers in (
        [[good] * 4], [[good] * 4, [good] * 3], [[good] * 4, [good] * 3 + [good | {"slash": 0}]],
        [[good] * 4, [good] * 3 + [{"pattern": "vertical_slash", "vertical": 1}]], [[good] * 4, [{"pattern": "x"}] * 4], 7,
    ):  # fmt: skip
        path.write_text(json.dumps({"layers": layers}))
        with pytest.raises(
            PretrainError, match=r"patterns .*accepted: 2 layers of 4 heads, each \{pattern: a_shape or"
        ):
            MInference(patterns=str(path)).generate(tiny(), prompt(5, 0))

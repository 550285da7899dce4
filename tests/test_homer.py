"""HOMER: what is kept of a long prompt, where it stands, and that a short one is decoded as ever."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from closeness import assert_same_model
from decoding_cases import WIDE, prompt

from pretrain.core.errors import PretrainError
from pretrain.decoding.long_context._homer import Chunk, merged, survivors
from pretrain.decoding.long_context.homer import FILE, Homer

METHOD = Homer(max_chunk_len=20, prefix=3, suffix=4, layers_warmup=1)
FIELDS = {
    "llama": {"num_hidden_layers": 6, "max_position_embeddings": 40},
    "qwen3": {"num_hidden_layers": 6, "max_position_embeddings": 40},
    "gpt2": {"n_layer": 6, "n_positions": 40},
}


def sharp(tiny, family="llama", **more):
    """A model in float64 whose attention is far from uniform."""
    return tiny(family, **WIDE[family], **(FIELDS[family] | more)).double()


class Reference:
    """Level by level, with the attention weights that `transformers`' eager attention gives."""

    def __init__(self, model, prefix, suffix):
        self.model, self.prefix, self.suffix, self.noted = model, prefix, suffix, []
        model.set_attn_implementation("eager")
        self.gpt2 = hasattr(model, "transformer")
        self.blocks = model.transformer.h if self.gpt2 else model.model.layers
        for block in self.blocks:
            attention = block.attn if self.gpt2 else block.self_attn
            attention.register_forward_hook(lambda _, __, output: self.noted.append(output[1][0]))

    def update(self, keys, values, *_, **__):
        self.cache.append([keys, values])
        return keys, values

    def block(self, number, chunk):
        """One more block on a chunk; returns the greatest attention of the last token by key."""
        states, positions, self.cache = chunk["states"], chunk["positions"], chunk["cache"]
        length = states.shape[1]
        mask = torch.full((1, 1, length, length), -1e30, dtype=torch.float64).triu(1)
        more = {}
        if not self.gpt2:
            more["position_embeddings"] = self.model.model.rotary_emb(states, torch.tensor([positions]))
        chunk["states"] = self.blocks[number](states, attention_mask=mask, past_key_values=self, use_cache=True, **more)
        return self.noted.pop()[:, -1].amax(0).tolist()

    @torch.no_grad()
    def __call__(self, ids, edges, layers, targets, bias=None):
        """`layers` by height, `edges` of the contexts; returns positions, tokens, cache and logits."""
        longest, chunks = max(b - a for a, b in itertools.pairwise(edges)), []
        for start, stop in itertools.pairwise(edges):
            tokens = [*ids[: self.prefix], *ids[start:stop], *ids[-self.suffix :]]
            positions = list(range(self.prefix + stop - start))
            positions += range(self.prefix + longest, self.prefix + longest + self.suffix)
            states = self.model.get_input_embeddings()(torch.tensor([tokens]))
            if self.gpt2:
                states = states + self.model.transformer.wpe(torch.tensor([positions]))
            chunks.append({"states": states, "positions": positions, "cache": [], "tokens": tokens})
        for height, numbers in enumerate(layers):
            if height:
                chunks = [self.merge(*chunks[i : i + 2]) for i in range(0, len(chunks), 2)]
            for chunk in chunks:
                for number in numbers:
                    scores = self.block(number, chunk)
                self.prune(chunk, scores, targets[height], None if bias is None else bias[numbers[-1]])
        chunk = chunks[0]
        norm = self.model.transformer.ln_f if self.gpt2 else self.model.model.norm
        return chunk, self.model.lm_head(norm(chunk["states"]))[0, -1]

    def prune(self, chunk, scores, target, bias):
        places, last = range(len(scores)), chunk["positions"][-1]
        if bias is not None:
            scores = [s - float(bias[last - p]) for s, p in zip(scores, chunk["positions"], strict=True)]
        inside = sorted(places[self.prefix : len(scores) - self.suffix], key=lambda i: (scores[i], i))
        gone = set(inside[: max(0, len(scores) - target)])
        stay = [i for i in places if i not in gone]
        chunk["states"] = chunk["states"][:, stay]
        chunk["positions"], chunk["tokens"] = ([chunk[n][i] for i in stay] for n in ("positions", "tokens"))
        chunk["cache"] = [[tensor[:, :, stay] for tensor in pair] for pair in chunk["cache"]]

    def merge(self, left, right):
        p, s = self.prefix, self.suffix

        def join(a, b):
            a, b = a.movedim(-2, 0), b.movedim(-2, 0)
            rows = [*((a[:p] + b[:p]) / 2), *a[p:-s], *b[p:-s], *((a[-s:] + b[-s:]) / 2)]
            return torch.stack(rows).movedim(0, -2)

        cache = [
            [join(a, b) for a, b in zip(one, other, strict=True)]
            for one, other in zip(left["cache"], right["cache"], strict=True)
        ]
        lists = {n: left[n][:-s] + right[n][p:] for n in ("positions", "tokens")}
        return {"states": join(left["states"], right["states"]), "cache": cache, **lists}


# 20 tokens a chunk, 3 + 4 of affixes: 13 of context, 6 where two merge. 6 blocks, of which 1 warms up and 5 merge:
# one merge: 2 a level and 1 more at first; two merges: 1 a level and 2 more; three merges: 1 a level and 1 more.
CASES = [
    (21, [3, 10, 17], [range(4), range(4, 6)], [13, 17]),
    (33, [3, 16, 29], [range(4), range(4, 6)], [13, 17]),
    (34, [3, 9, 16, 23, 30], [range(4), range(4, 5), range(5, 6)], [13, 13, 17]),
    (100, [3, 14, 26, 37, 49, 61, 72, 84, 96], [range(3), range(3, 4), range(4, 5), range(5, 6)], [13, 13, 13, 17]),
]


@pytest.mark.parametrize("family", list(FIELDS))
def test_the_cache_and_the_logits_are_those_of_a_computation_from_attention_weights(tiny, family, tmp_path):
    calibrated = Homer(**(vars(METHOD) | {"target_len": 17, "bias": str(tmp_path)}))
    text_BL = torch.cat([prompt(20, seed) for seed in range(20)])
    calibrated.calibrate(sharp(tiny, family), [{"input_ids": text_BL}], tmp_path)
    bias_ND = calibrated._bias(6, 20)
    kept = []
    for length, edges, layers, targets in CASES:
        for method, bias in ((Homer(**(vars(METHOD) | {"target_len": 17})), None), (calibrated, bias_ND)):
            ids_1L, model = prompt(length, length), sharp(tiny, family)
            chunk, logits_V = Reference(sharp(tiny, family), 3, 4)(ids_1L[0].tolist(), edges, layers, targets, bias)
            [found] = method.read(model, ids_1L)
            assert found.position_T.tolist() == chunk["positions"] and len(chunk["positions"]) == 17
            for mine, theirs in zip(found.cache, chunk["cache"], strict=True):
                for a, b in zip(mine, theirs, strict=True):
                    assert_same_model(a, b, model, dtype=torch.float32)  # of eager softmax
            token = method.generate(model, ids_1L, max_new_tokens=1)[0, -1]
            assert int(token) == int(logits_V.argmax())
            kept.append(chunk["tokens"])
    assert any(a != b for a, b in zip(kept[::2], kept[1::2], strict=True))  # the bias decides


def test_a_merge_is_the_mean_of_affixes_around_both_contexts():
    def chunk(values, positions):
        made = Chunk(torch.tensor(values)[None, :, None], torch.tensor(positions))
        made.cache = [(made.states_1TE[:, None] * 10, made.states_1TE[:, None] * 100)]
        return made

    whole = merged(chunk([1.0, 2.0, 3.0, 4.0], [0, 1, 2, 5]), chunk([3.0, 7.0, 8.0], [0, 4, 5]), 1, 1)
    assert whole.states_1TE[0, :, 0].tolist() == [2.0, 2.0, 3.0, 7.0, 6.0]
    assert whole.position_T.tolist() == [0, 1, 2, 4, 5]
    [(keys, values)] = whole.cache
    assert keys[0, 0, :, 0].tolist() == [20.0, 20.0, 30.0, 70.0, 60.0] and torch.equal(values, keys * 10)


def test_the_lowest_calibrated_scores_go_and_the_affixes_stay():
    score_T, position_T = torch.tensor([0.0, 0.5, 0.4, 0.4, 0.3, 0.6, 0.0]), torch.tensor([0, 1, 2, 2, 3, 4, 9])
    assert survivors(score_T, position_T, None, 2, 1, 1).tolist() == [0, 1, 3, 5, 6]  # of equal ones the earlier
    bias_D = torch.zeros(10)
    bias_D[9 - 4], bias_D[9 - 1] = 0.55, 0.25  # 0.6 is 0.05 and 0.5 is 0.25: they are near, or far, and nothing else
    assert survivors(score_T, position_T, bias_D, 2, 1, 1).tolist() == [0, 2, 3, 4, 6]
    assert survivors(score_T, position_T, None, 5, 1, 1).tolist() == [0, 6]


def test_no_window_exceeds_a_chunk_and_no_position_the_limit_at_four_times_the_limit_and_more(tiny, monkeypatch):
    model, windows, positions = sharp(tiny), [], []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda _, args: windows.append(args[0].shape[1]))
    whole = Chunk.keep
    monkeypatch.setattr(Chunk, "keep", lambda self, kept: (positions.append(self.position_T), whole(self, kept))[1])
    for length in (21, 33, 47, 90, 121, 160, 300):
        ids_1L = prompt(length, length)
        output_1N = METHOD.generate(model, ids_1L, max_new_tokens=20)
        assert output_1N.shape == (1, length + 20)
        [chunk] = METHOD.read(model, ids_1L)
        assert len(chunk.position_T) <= 20 and max(windows) <= 20
        assert all(keys.shape[2] == len(chunk.position_T) for keys, _ in chunk.cache) and len(chunk.cache) == 6
        assert max(int(position_T.max()) for position_T in positions) < 20  # and 20 new ones: a limit of 40
        plan = METHOD.plan(model, length)
        assert plan.spans[0][0] == 3 and plan.spans[-1][1] == length - 4
        assert [stop for _, stop in plan.spans[:-1]] == [start for start, _ in plan.spans[1:]]
        assert chunk.position_T[:3].tolist() == [0, 1, 2]
        assert (chunk.position_T[-4:] - chunk.position_T[-1]).tolist() == [-3, -2, -1, 0]


def test_new_tokens_see_what_was_kept_and_stand_after_the_suffix(tiny):
    model, ids_1L = sharp(tiny), prompt(90, 3)
    tokens_1N = METHOD.generate(model, ids_1L, max_new_tokens=12)[:, 90:]
    from transformers import DynamicCache

    [chunk] = METHOD.read(model, ids_1L)
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(chunk.cache):
        cache.update(keys, values, layer)
    start = int(chunk.position_T[-1]) + 1
    with torch.no_grad():
        logits = model(
            tokens_1N[:, :-1], past_key_values=cache, position_ids=torch.arange(start, start + 11)[None]
        ).logits
    assert torch.equal(logits.argmax(-1), tokens_1N[:, 1:])


def test_besides_the_chunk_at_work_one_a_level_is_alive(tiny, monkeypatch):
    model, alive, most = sharp(tiny), weakref.WeakSet(), [0]
    made = Chunk.__init__

    def noted(self, *args):
        made(self, *args)
        alive.add(self)
        most[0] = max(most[0], len(alive))

    monkeypatch.setattr(Chunk, "__init__", noted)
    for length, height in ((30, 1), (50, 2), (100, 3), (200, 4)):
        most[0] = 0
        assert METHOD.plan(model, length).height == height
        METHOD.read(model, prompt(length, 0))
        assert most[0] <= height + 2  # while two merge there is their sum as well


def test_the_schedule_is_the_authors_for_llama_2(tiny):
    # Chunks of 2048 tokens, 1848 of them context: 15 872 tokens of context are 16 chunks, merged four times. Of 32
    # blocks 12 warm up and 20 are five levels of 4.
    model = tiny("llama", num_hidden_layers=32, hidden_size=8, num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=4096)  # fmt: skip
    plan = Homer().plan(model, 16072)
    assert (plan.prefix, plan.suffix, plan.height, len(plan.spans)) == (100, 100, 4, 16)
    assert plan.layers == ((0, 16), (16, 20), (20, 24), (24, 28), (28, 32))
    assert plan.targets == (1124, 1124, 1124, 1124, 2048)
    plan = Homer().plan(model, 5000)  # two merges: 20 // 3 blocks a level and 2 more at first
    assert plan.layers == ((0, 20), (20, 26), (26, 32))


def test_the_bias_is_the_mean_attention_by_distance_and_padded_rows_are_left_out(tiny, tmp_path):
    model, rows_BL = sharp(tiny), torch.cat([prompt(30, seed) for seed in range(4)])
    mask_BL = torch.ones_like(rows_BL)
    mask_BL[3, 15:] = 0
    path = METHOD.calibrate(model, [{"input_ids": rows_BL, "attention_mask": mask_BL}], tmp_path / "new")
    assert path == tmp_path / "new" / FILE
    eager = sharp(tiny)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = eager(rows_BL[:3, :20], output_attentions=True).attentions
    wanted = torch.stack([a[:, :, -1].amax(1).mean(0).flip(0) for a in attentions])
    found = Homer(bias=str(path))._bias(6, 20)
    assert_same_model(found, wanted.float(), model)
    with pytest.raises(PretrainError, match="without a row of 20 tokens"):
        METHOD.calibrate(model, [{"input_ids": rows_BL[:, :19]}], tmp_path)
    with pytest.raises(PretrainError, match=r"bias of shape \(6, 20\).*7 blocks and at least 20 distances"):
        Homer(bias=str(path))._bias(7, 20)
    with pytest.raises(PretrainError, match="accepted: a file that `calibrate` wrote"):
        Homer(bias=str(tmp_path / "none")).read(model, prompt(30, 0))


@pytest.mark.parametrize(
    ("fields", "length", "message"),
    [
        ({"max_chunk_len": 40}, 50, "max_chunk_len 40: accepted: from 3 to 39"),
        ({"prefix": 15}, 50, "prefix 15 and suffix 4: accepted: together at most 18"),
        ({"target_len": 7}, 50, "target_len 7: accepted: from 8 to 20"),
        ({"target_len": 21}, 50, "target_len 21: accepted: from 8 to 20"),
        ({}, 500, "a prompt of 500 tokens: accepted: at most 423 in 6 blocks"),
    ],
)
def test_what_cannot_be_read_is_refused(tiny, fields, length, message):
    with pytest.raises(PretrainError, match=message):
        Homer(**(vars(METHOD) | fields)).generate(sharp(tiny), prompt(length, 0), max_new_tokens=2)


def test_other_mistakes_are_refused(tiny):
    with pytest.raises(PretrainError, match="max_new_tokens 21: accepted: at most 20, what the model's limit of 40"):
        METHOD.generate(sharp(tiny), prompt(50, 0), max_new_tokens=21)
    for name, value in (("suffix", 0), ("layers_warmup", -1), ("max_chunk_len", 2)):
        with pytest.raises(PretrainError, match=f"homer: {name} {value}: accepted: . or more"):
            Homer(**{name: value})

"""Token Recycling: the tokens of plain decoding, the paper's tree and matrix, and the pass that verifies a tree."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from closeness import assert_same_model
from decoding_cases import WIDE, chance, greedy, learnt, pairs, passes, prompt

from pretrain.core.errors import PretrainError
from pretrain.core.generation.forward import Forward
from pretrain.core.generation.loop import decode
from pretrain.core.generation.options import Options
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.decoding._tree import Sampler, Shape, _walk
from pretrain.decoding.speculative.token_recycling import TokenRecycling, _parents, _Recycled, tree
from pretrain.stages.decode import continue_prompt


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("nodes", [15, 80])
def test_the_tokens_are_the_greedy_ones(tiny, family, nodes):
    for seed in range(2):
        model, method = tiny(family, seed=seed, **WIDE[family]), TokenRecycling(nodes=nodes)
        for length in (1, 7, 20):  # the matrix stays from prompt to prompt
            ids_1L = prompt(length, seed)
            assert torch.equal(method.generate(model, ids_1L, max_new_tokens=30), greedy(model, ids_1L, 30))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_has_learnt_needs_fewer_passes_for_the_same_tokens(tiny, family):
    model, method = learnt(tiny(family)), TokenRecycling(nodes=30)
    count = 0
    for seed in range(6):
        ids_1L, made = prompt(4 + seed, seed, 20), []
        count += passes(model, lambda ids_1L=ids_1L, made=made: made.append(method.generate(model, ids_1L, max_new_tokens=40)))  # fmt: skip
        assert torch.equal(made[0], greedy(model, ids_1L, 40))
    assert count < 6 * 40 / 2


def test_every_number_of_new_tokens_is_met_exactly(tiny):
    for model in (learnt(tiny("gpt2")), tiny("gpt2", **WIDE["gpt2"])):
        method, ids_1L = TokenRecycling(nodes=40), prompt(5, 0, 20)
        for new in (*range(1, 9), 59):  # 59: up to the last position that the model has, with guesses beyond it
            assert torch.equal(method.generate(model, ids_1L, max_new_tokens=new), greedy(model, ids_1L, new))


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_samples_are_those_of_the_plain_loop_with_the_same_numbers(tiny, top_p):
    model, method = learnt(tiny()), TokenRecycling(nodes=30)
    for seed in range(6):
        how = {"max_new_tokens": 30, "temperature": 0.8, "top_p": top_p}
        ids_BL = torch.cat([prompt(6, seed, 20), prompt(6, seed + 50, 20)])
        ours, plain = (
            call(ids_BL, **how, generator=torch.Generator().manual_seed(seed))
            for call in (lambda *a, **k: method.generate(model, *a, **k), lambda *a, **k: decode(model, *a, **k))
        )
        assert torch.equal(ours, plain)


def test_the_stage_gives_the_same_continuation_with_it_and_without(tiny, prepared):
    model, tokenizer = tiny(vocab_size=512, initializer_range=0.2), load_tokenizer(prepared / "tokenizer")
    for how in ({"temperature": 0.0}, {"seed": 1}, {"seed": 2}):
        plain, ours = (
            continue_prompt(model, tokenizer, "def run(", max_new_tokens=20, method=method, **how)
            for method in (None, TokenRecycling())
        )
        assert ours["continuation"] == plain["continuation"] and ours["method"] == "token_recycling"


def test_samples_follow_the_distribution(tiny):
    model, ids_1L = tiny(vocab_size=5, initializer_range=0.3, num_hidden_layers=1), prompt(4, 0, 5)
    ours = TokenRecycling(k=2, nodes=4).generate(
        model, ids_1L.expand(700, -1), max_new_tokens=2, temperature=0.9, generator=torch.Generator().manual_seed(0)
    )[:, 4:]
    counts_VV = torch.bincount(ours[:, 0] * 5 + ours[:, 1], minlength=25).view(5, 5)
    assert chance(counts_VV, pairs(model, ids_1L, 0.9, 1.0)) > 1e-3


def test_the_tree_is_the_paper_s():
    paths = tree(8)
    assert Counter(map(len, paths)) == {1: 8, 2: 21, 3: 25, 4: 15, 5: 8, 6: 3} and len(set(paths)) == 80
    assert all(path[:-1] in paths for path in paths if len(path) > 1)
    assert all((*path[:-1], path[-1] - 1) in paths for path in paths if path[-1])
    assert {(7, 0), (0, 0, 7), (5, 0, 0), (0, 0, 0, 0, 2), (0, 0, 0, 0, 0, 1), (0, 0, 0, 1, 0, 0)} <= set(paths)
    children = Counter(path[:-1] for path in paths)
    second = [children[0, rank] for rank in range(8)] + [children[1, 0], children[1, 1], children[2, 0], children[5, 0]]
    assert [children[rank,] for rank in range(8)] == [8, 4, 3, 2, 1, 1, 1, 1]
    assert second == [8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1] and children[0, 0, 0] == 5 and children[0, 0, 0, 0] == 3
    assert max(rank for path in tree(3) for rank in path) == 2


def test_guesses_are_the_matrix_s_rows_breadth_first(tiny):
    matrix = {5: [6, 7, 8], 6: [9, 5, 6], 7: [5, 0, 1], 9: [1, 2, 3]}
    paths = sorted(tree(3))
    shape = Shape([0, *_parents(paths)], torch.device("cpu"), torch.float32)
    draft = _Recycled(matrix, shape, [p[-1] for p in paths], 3, 5)
    tokens, _ = draft.tree()
    for path, token in zip(paths, tokens[1:], strict=True):
        at = 5
        for rank in path:
            at = matrix.get(at, [0, 0, 0])[rank]
        assert token == at


def test_every_node_rewrites_its_row_with_the_top_k_after_it(tiny):
    model, method, ids_1L = tiny(**WIDE["llama"]), TokenRecycling(nodes=9, k=4), prompt(6, 0)
    out_1N = method.generate(model, ids_1L, max_new_tokens=2)
    matrix = method._matrices[model]
    with torch.no_grad():
        logits_LV = model(out_1N).logits[0]
    root = int(out_1N[0, 6])  # the last token before the only pass that verifies
    assert matrix[root] == logits_LV[6].topk(4).indices.tolist()
    assert set(matrix) == {root, 0}  # all guesses from an empty matrix are token 0
    shape = Shape([0, 0, 0], torch.device("cpu"), torch.float32)
    draft, logits_TV = _Recycled(matrix, shape, [0, 1], 4, 8), torch.randn(3, 97)
    draft.learn([8, 11, 11], logits_TV, [33, 44])
    assert matrix[8] == logits_TV[0].topk(4).indices.tolist()
    assert matrix[11] == logits_TV[2].topk(4).indices.tolist()  # the later of two
    assert draft.tree()[0][0] == 44


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_node_sees_what_is_decided_and_its_ancestors(tiny, family):
    model, ids_1L = tiny(family, **WIDE[family]), prompt(7, 1)
    parents = [0, 0, 0, 1, 1, 3, 2, 6]
    shape, tokens = Shape(parents, torch.device("cpu"), torch.float32), prompt(8, 2)[0].tolist()
    with torch.inference_mode():
        forward = Forward(model, 30)
        forward.prefill(ids_1L)
        mask_11TC = torch.cat([torch.zeros(8, 7), shape.mask_TT], 1)[None, None]
        states_1TE = forward.states(torch.tensor([tokens]), shape.depth_1T + 7, mask_11TC)
        logits_TV = forward.head(forward.norm(states_1TE[0]))
        branches = []
        for node in range(8):
            branch = [node]
            while branch[0]:
                branch.insert(0, parents[branch[0]])
            branches.append(branch)
            ids = torch.cat([ids_1L, torch.tensor([[tokens[b] for b in branch]])], 1)
            assert_same_model(logits_TV[node], model(ids).logits[0, -1], model)
        forward.keep(branches[7])  # the root and nodes 2, 6, 7
        after_1V = forward.step(torch.tensor([[9]]))
        ids = torch.cat([ids_1L, torch.tensor([[tokens[b] for b in branches[7]] + [9]])], 1)
        assert_same_model(after_1V, model(ids).logits[:, -1], model)


def test_the_walk_follows_the_model_s_own_tokens():
    tokens, children = [4, 5, 6, 7, 5], [[1, 2], [3], [4], [], []]
    logits_TV = torch.zeros(5, 9)
    for node, token in enumerate((6, 7, 5, 8, 2)):
        logits_TV[node, token] = 1
    assert _walk(tokens, children, logits_TV, [], [], Sampler(Options(), None)) == ([0, 2, 4], [6, 5, 2])
    logits_TV[0] = torch.arange(9.0)
    assert _walk(tokens, children, logits_TV, [], [], Sampler(Options(), None)) == ([0], [8])


def test_too_small_fields_and_other_families_are_one_clear_error(tiny):
    for name in ("k", "nodes"):
        with pytest.raises(PretrainError, match=f"token_recycling: {name} 0: accepted: 1 or more"):
            TokenRecycling(**{name: 0})
    with pytest.raises(PretrainError, match="attention_mask: pads after tokens"):
        TokenRecycling().generate(tiny(), prompt(3, 0), attention_mask_BL=torch.tensor([[1, 0, 1]]))
    with pytest.raises(PretrainError, match="accepted: max_new_tokens smaller by at least 4"):
        TokenRecycling().generate(tiny("gpt2"), prompt(4, 0), max_new_tokens=64)

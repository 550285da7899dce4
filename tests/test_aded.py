"""ADED: the tokens of plain decoding, the search's choices, and how the tri-grams follow what is decided."""

from __future__ import annotations

from math import log, sqrt
from random import Random

import pytest
import torch
from decoding_cases import WIDE, greedy, learnt, passes, prompt

from pretrain.core.errors import PretrainError
from pretrain.core.generation.loop import decode
from pretrain.decoding.speculative.aded import ADED, _Searched

WEIGHT = torch.zeros(1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_the_tokens_are_the_greedy_ones(tiny, family):
    for seed in range(2):
        model, method = tiny(family, seed=seed, **WIDE[family]), ADED(sequences=12, iterations=40)
        for length in (1, 7, 20):  # the tri-grams stay from prompt to prompt
            ids_1L = prompt(length, seed)
            assert torch.equal(method.generate(model, ids_1L, max_new_tokens=30), greedy(model, ids_1L, 30))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_has_learnt_needs_fewer_passes_for_the_same_tokens(tiny, family):
    model, method = learnt(tiny(family)), ADED()
    count = 0
    for seed in range(6):
        ids_1L, made = prompt(4 + seed, seed, 20), []
        count += passes(model, lambda ids_1L=ids_1L, made=made: made.append(method.generate(model, ids_1L, max_new_tokens=40)))  # fmt: skip
        assert torch.equal(made[0], greedy(model, ids_1L, 40))
    assert count < 6 * 40 / 1.5


def test_samples_are_those_of_the_plain_loop_with_the_same_numbers(tiny):
    model, method = learnt(tiny()), ADED()
    for seed in range(6):
        how = {"max_new_tokens": 30, "temperature": 0.8, "top_p": 0.9}
        ours = method.generate(model, prompt(6, seed, 20), **how, generator=torch.Generator().manual_seed(seed))
        plain = decode(model, prompt(6, seed, 20), **how, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(ours, plain)


def searched(generator_seed: int) -> dict[tuple[int, int], dict[int, float]]:
    """Random tri-grams of ten tokens."""
    p = torch.rand(10, 10, 10, generator=torch.Generator().manual_seed(generator_seed)) ** 4
    return {
        (a, b): {c: float(p[a, b, c]) for c in range(10) if p[a, b, c] > 0.05} for a in range(10) for b in range(10)
    }


def test_each_visit_is_the_child_of_the_highest_score():
    """Against the search replayed from its definition, with each decision made from a count of the paths so far."""
    trigrams, method = searched(0), ADED(length=3, successors=4, c1=2.0, c2=8.0)
    paths: list[tuple[tuple[int, ...], float]] = []
    random = Random(0)

    def top(before: int, token: int) -> list[tuple[int, float]]:
        return sorted(trigrams.get((before, token), {}).items(), key=lambda item: -item[1])[:4]

    for _ in range(60):
        path, total, end = (3, 4), 1.0, False
        while not end:
            visits = sum(p[: len(path)] == path for p, _ in paths)
            options, scores = top(*path[-2:]), []
            if not options:
                break
            known = {t for p, _ in paths if len(p) > len(path) and p[: len(path)] == path for t in [p[len(path)]]}
            for token, p in options:
                below = [score for q, score in paths if q[: len(path) + 1] == (*path, token)]
                explore = (2.0 + log((visits + 8.0 + 1) / 8.0)) * p * sqrt(visits) / (1 + len(below))
                scores.append(sum(below) / len(below) + explore if below else torch.inf)
            token, p = options[max(range(len(options)), key=scores.__getitem__)]
            end = not known or len(path) == 3
            path, total = (*path, token), total + p
        whole = path
        while len(whole) < 4 and (row := trigrams.get(whole[-2:])):
            (token,) = random.choices([*row], [*row.values()])  # drawn, as the authors' code does
            whole, total = (*whole, token), total + row[token]
        paths.append((path, total))
    root = method.search(trigrams, (3, 4), 60)
    assert root.visits == 60 and len({p for p, _ in paths}) > 12

    def compare(node, path):
        below = [score for q, score in paths if q[: len(path)] == path]
        assert node.visits == len(below) and node.score == pytest.approx(sum(below))
        for child in node.children or ():
            compare(child, (*path, child.token))

    compare(root, (3, 4))


def test_the_draft_is_the_most_visited_nodes_with_their_likeliest_next_tokens():
    trigrams, method = searched(1), ADED(sequences=6, iterations=80, length=3)
    draft = _Searched(method, trigrams, (6, 80), [1, 2], WEIGHT)
    tokens, shape = draft.tree()
    branches = {(2,)}
    for node in range(1, len(tokens)):
        branch = [tokens[node]]
        while node:
            node = shape.parents[node]
            branch.insert(0, tokens[node])
        branches.add(tuple(branch))
    assert len(branches) == len(tokens) <= 2 * 6 + 1  # no guess twice
    visits = {}

    def collect(node, path):
        for child in node.children or ():
            visits[(*path, child.token)] = child.visits
            collect(child, (*path, child.token))

    collect(method.search(trigrams, (1, 2), 80), (2,))
    least = sorted(visits.values())[-6]
    assert {path for path, count in visits.items() if count > least} <= branches
    for path in branches:
        row = trigrams[(1, 2) if len(path) == 1 else path[-2:]]
        likeliest = (*path, max(row, key=row.__getitem__))
        chosen = len(path) == 1 or visits.get(path, 0) >= least
        assert likeliest in branches or not chosen or visits.get(path, 0) == least


def test_tri_grams_of_the_window_gain_a_step_up_to_the_limit():
    method, trigrams = ADED(window=4, step=0.5, limit=1.2), {}
    draft = _Searched(method, trigrams, (4, 10), [1, 2, 3, 1, 2, 3], WEIGHT)
    assert trigrams == {(1, 2): {3: 1.0}, (2, 3): {1: 0.5}, (3, 1): {2: 0.5}}
    draft.learn([], torch.zeros(0), [7])
    assert trigrams == {(1, 2): {3: 1.2}, (2, 3): {1: 0.5, 7: 0.5}, (3, 1): {2: 0.5}}
    draft.learn([], torch.zeros(0), [8, 9])
    assert trigrams[2, 3] == {1: 0.5, 7: 0.5} and trigrams[3, 7] == {8: 0.5} and trigrams[7, 8] == {9: 0.5}


def test_without_tri_grams_there_is_only_the_root():
    tokens, shape = _Searched(ADED(), {}, (8, 24), [1, 2], WEIGHT).tree()
    assert tokens == [2] and shape.children == [[]]


def test_the_matrix_is_kept_from_prompt_to_prompt_and_apart_for_each_model(tiny):
    method, one, two = ADED(), tiny(seed=0), tiny(seed=1)
    method.generate(one, prompt(6, 0), max_new_tokens=8)
    before = {key: dict(row) for key, row in method._matrices[one].items()}
    method.generate(two, prompt(6, 1), max_new_tokens=8)
    assert method._matrices[one] == before and before
    method.generate(one, prompt(6, 1), max_new_tokens=8)
    assert before.keys() < method._matrices[one].keys()
    assert ADED() == method  # what is kept is no hyperparameter


def test_too_small_fields_and_other_families_are_one_clear_error(tiny):
    for name, least in (("sequences", 1), ("iterations", 1), ("length", 2), ("successors", 1), ("window", 3)):
        with pytest.raises(PretrainError, match=f"aded: {name} 0: accepted: {least} or more"):
            ADED(**{name: 0})

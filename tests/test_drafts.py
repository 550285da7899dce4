"""Drafts that are one sequence: copied from the text, or written by a small model; how many passes they save."""

from __future__ import annotations

import copy

import pytest
import torch
from decoding_cases import WIDE, greedy, learnt, passes, prompt

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.generation.loop import decode
from pretrain.decoding.speculative.prompt_lookup import PromptLookup
from pretrain.decoding.speculative.speculative_decoding import SpeculativeDecoding
from pretrain.decoding.speculative.suffix_decoding import SuffixDecoding, Texts

FAMILIES = ["llama", "qwen3", "gpt2"]


@pytest.fixture
def saved(tmp_path):
    def make(model, name="draft"):
        checkpoint.save(model, None, tmp_path / name)
        return str(tmp_path / name)

    return make


def counted(method, model, ids_1L, new):
    """The tokens, and the passes of the model that they took."""
    made = []
    count = passes(model, lambda: made.append(method.generate(model, ids_1L, max_new_tokens=new)))
    return made[0], count


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_the_greedy_ones_whatever_is_drafted(tiny, saved, family):
    for seed in range(2):
        model = tiny(family, seed=seed, **WIDE[family])
        draft = SpeculativeDecoding(saved(tiny(family, seed=9, **WIDE[family]), f"draft{seed}"))
        for method in (
            PromptLookup(),
            PromptLookup(match=1, copy=3),
            draft,
            SuffixDecoding(),
            SuffixDecoding(offset=3),
        ):
            for length, new in ((1, 30), (7, 1), (20, 2), (20, 30)):
                ids_1L = prompt(length, seed)
                assert torch.equal(method.generate(model, ids_1L, max_new_tokens=new), greedy(model, ids_1L, new))


@pytest.mark.parametrize("gamma", [1, 3, 8])
def test_a_draft_by_the_model_itself_is_all_kept(tiny, saved, gamma):
    model = tiny("llama", **WIDE["llama"])
    method, ids_1L = SpeculativeDecoding(saved(model), gamma), prompt(9, 0)
    tokens_1N, count = counted(method, model, ids_1L, 37)
    assert torch.equal(tokens_1N, greedy(model, ids_1L, 37))
    assert count == 1 + -(-36 // (gamma + 1))  # the prompt, then gamma tokens and the one after them at once


def test_a_small_model_that_has_learnt_the_same_saves_passes(tiny, saved):
    model, small = learnt(tiny("llama")), learnt(tiny("llama", num_hidden_layers=1))
    method, ids_1L = SpeculativeDecoding(saved(small), 4), prompt(6, 0, 20)
    tokens_1N, count = counted(method, model, ids_1L, 40)
    assert torch.equal(tokens_1N, greedy(model, ids_1L, 40)) and count < 25


def test_text_that_repeats_is_copied(tiny):
    """A model that has learnt a cycle of 16 tokens: the second round is copied from the first."""
    model = learnt(tiny("llama"), steps=0)
    cycle = [int(t) for t in torch.randperm(16, generator=torch.Generator().manual_seed(0)) + 3]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        row_1L = torch.tensor([cycle * 3])
        model(input_ids=row_1L, labels=row_1L).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ids_1L = torch.tensor([cycle + cycle[:2]])
    tokens_1N, count = counted(PromptLookup(match=2, copy=7), model, ids_1L, 40)
    assert torch.equal(tokens_1N, greedy(model, ids_1L, 40))
    assert tokens_1N[0, 18:].tolist() == [cycle[(i + 2) % 16] for i in range(40)]
    assert count == 1 + -(-39 // 8)


def test_the_latest_place_of_the_longest_match_is_copied(tiny):
    weight_VE = tiny("llama").get_input_embeddings().weight
    from pretrain.decoding.speculative.prompt_lookup import _Lookup

    draft = _Lookup(PromptLookup(match=2, copy=3), [1, 2, 3, 4, 2, 5, 6, 1, 2], weight_VE)
    assert draft.draft() == [2, 3, 4, 2]  # after 1 2, not after the later 2
    draft.learn([], torch.empty(0), [9])
    assert draft.draft() == [9]
    draft.learn([], torch.empty(0), [5])
    assert draft.draft() == [5, 6, 1, 2]


def test_samples_are_those_of_the_plain_loop_with_the_same_numbers(tiny, saved):
    model, small = learnt(tiny("llama")), learnt(tiny("llama", num_hidden_layers=1))
    for method in (PromptLookup(match=1), SpeculativeDecoding(saved(small), 4)):
        for seed in range(4):
            how = {"max_new_tokens": 30, "temperature": 0.8, "top_p": 0.9}
            ids_BL = torch.cat([prompt(6, seed, 20), prompt(6, seed + 50, 20)])
            ours, plain = (
                call(ids_BL, **how, generator=torch.Generator().manual_seed(seed))
                for call in (lambda *a, m=method, **k: m.generate(model, *a, **k), lambda *a, **k: decode(model, *a, **k))
            )  # fmt: skip
            assert torch.equal(ours, plain)


def test_a_draft_may_have_rows_of_padding(tiny, saved, prepared, tmp_path):
    """The table is longer than the tokenizer: what is drafted there is no token of the model."""
    from pretrain.corpus.tokenizers import load_tokenizer

    own = load_tokenizer(prepared / "tokenizer")
    model = tiny("llama", vocab_size=len(own), **WIDE["llama"])
    wide = copy.deepcopy(model)
    wide.resize_token_embeddings(len(own) + 64)
    checkpoint.save(wide, own, tmp_path / "wide")
    ids_1L = prompt(9, 0)
    method = SpeculativeDecoding(str(tmp_path / "wide"))
    tokens_1N, count = counted(method, model, ids_1L, 20)
    assert torch.equal(tokens_1N, greedy(model, ids_1L, 20)) and count < 20


def grown(texts, context, **fields):
    """The tokens of the best tree by their way from the last token, and the sum of their probabilities."""
    made = Texts()
    for text in texts:
        made.extend(made.begin(), text)
    guess = made.guess(context, SuffixDecoding(**fields))
    ways = []
    for token, parent in zip(guess.tokens, guess.parents, strict=True):
        ways.append((*(ways[parent] if parent >= 0 else ()), token))
    return ways, guess.score


def test_a_tree_of_suffixes_has_the_shares_of_what_followed_the_match():
    """By hand: after 1 2 came 3 twice and 4 once, and nothing yet at the end: 2/4 and 1/4; after 1 2 3 5 and 6."""
    text = [1, 2, 3, 5, 1, 2, 3, 6, 1, 2, 4, 9, 1, 2]
    ways, score = grown([text], text, offset=3)
    assert ways[:2] == [(3,), (3, 5)] or ways[:2] == [(3,), (4,)]
    assert {*ways} == {(3,), (4,), (3, 5), (3, 6), (4, 9)}  # at most 2 + 3 tokens after a match of two
    assert score == pytest.approx(2 / 4 + 1 / 4 + 1 / 4 + 1 / 4 + 1 / 4)
    assert grown([text], text, offset=3, least=0.3) == ([(3,)], 0.5)
    assert grown([text], text, factor=0.5)[0] == [(3,)]  # one token for a match of two
    assert grown([text], [7, 8])[0] == []


def test_the_longest_match_wins_among_trees_of_one_score_and_more_is_drafted_the_more_has_matched():
    text = [
        5,
        1,
        2,
        3,
        4,
        8,
        8,
        5,
        1,
        2,
        3,
        4,
    ]  # five tokens match, so that five are drafted; each has followed once of two
    ways, score = grown([text], text)
    assert ways == [(8,), (8, 8), (8, 8, 5), (8, 8, 5, 1), (8, 8, 5, 1, 2)] and score == pytest.approx(5 / 2)
    assert len(grown([text], text, depth=6)[0]) == 3  # a match and its draft are 6 tokens at most


def test_what_was_answered_before_is_drafted_again(tiny):
    model, ids_1L = learnt(tiny("llama")), prompt(6, 0, 20)
    method, plain = SuffixDecoding(), SuffixDecoding(answers=0)
    first_1N, count = counted(method, model, ids_1L, 40)
    again_1N, fewer = counted(method, model, ids_1L, 40)
    assert torch.equal(first_1N, again_1N) and torch.equal(first_1N, greedy(model, ids_1L, 40))
    assert fewer <= count / 2
    assert counted(plain, model, ids_1L, 40)[1] == counted(plain, model, ids_1L, 40)[1] == count


def test_the_oldest_answers_are_forgotten():
    texts = Texts()
    for number in range(4):
        texts.extend(texts.begin(), [number, 7])
    texts.forget(2)
    assert [*texts.texts.values()] == [[2, 7], [3, 7]] and [*texts.places] == [*texts.texts]


def test_a_draft_may_be_a_stage_that_wrote_a_checkpoint(tiny, saved, tmp_path):
    model = tiny("llama", **WIDE["llama"])
    checkpoint.save(model, None, tmp_path / "stage" / "checkpoint")
    ids_1L = prompt(9, 0)
    of_stage = SpeculativeDecoding(str(tmp_path / "stage")).generate(model, ids_1L, max_new_tokens=9)
    assert torch.equal(of_stage, greedy(model, ids_1L, 9))
    with pytest.raises(PretrainError, match="no checkpoint at"):
        SpeculativeDecoding(str(tmp_path / "nowhere")).generate(model, ids_1L, max_new_tokens=9)

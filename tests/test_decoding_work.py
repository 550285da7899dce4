"""What decoding computes: positions and passes of each model, counted without a trace left in the models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from decoding_cases import WIDE, learnt, passes, prompt

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.generation.computed import counting
from pretrain.core.generation.forward import Forward
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.decoding.ensembles.proxy_tuning import ProxyTuning
from pretrain.decoding.speculative.speculative_decoding import SpeculativeDecoding
from pretrain.decoding.speculative.suffix_decoding import SuffixDecoding
from pretrain.decoding.speculative.token_recycling import TokenRecycling
from pretrain.stages import Job
from pretrain.stages.decode import Decode, continue_prompt, continued

GREEDY = {"temperature": 0.0, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def kept(tiny, prepared, tmp_path_factory):
    """A checkpoint's folder, its model and its tokenizer."""
    folder = tmp_path_factory.mktemp("work")
    model = tiny(vocab_size=512, initializer_range=0.2, max_position_embeddings=256)
    checkpoint.save(model, load_tokenizer(prepared / "tokenizer"), folder)
    return folder, *checkpoint.load(folder)


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tree_is_counted_with_all_its_nodes_and_a_prompt_once(tiny, family):
    model, ids_1L, rounds = tiny(family, **WIDE[family]), prompt(7, 0), []
    for nodes in (3, 15):
        with counting(model) as found:
            method = TokenRecycling(nodes=nodes)
            rounds.append(passes(model, lambda method=method: method.generate(model, ids_1L, max_new_tokens=20)))
        one, later = found["checkpoint"], rounds[-1] - 1
        assert (one.passes, one.prompt, one.positions) == (later + 1, 1, 7 + later * (nodes + 1))
        assert one.logits == 1 + later * (nodes + 1)


def test_a_draft_of_changing_length_is_counted_as_it_was_in_each_pass(tiny, monkeypatch):
    model, read, states = learnt(tiny()), [], Forward.states
    monkeypatch.setattr(
        Forward, "states", lambda self, ids, *more: (read.append(ids.numel()), states(self, ids, *more))[1]
    )
    with counting(model) as found:
        SuffixDecoding().generate(model, prompt(9, 1, 20), max_new_tokens=40)
    one = found["checkpoint"]
    assert one.positions == sum(read) and one.passes == len(read) < 41 and len(set(read[1:])) > 1


def test_a_draft_model_is_counted_by_itself(kept):
    folder, model, _ = kept
    with counting(model) as found:
        out_1N = SpeculativeDecoding(draft=str(folder), gamma=3).generate(model, prompt(8, 2), max_new_tokens=9)
    ours, draft = found["checkpoint"], found["method.draft"]
    assert out_1N.shape[1] == 17
    # The draft is the model: after the prompt's token two rounds of four, of which the draft reads all but the last
    # guess of each; what it has left unread it reads in the next.
    assert (ours.passes, ours.positions, ours.logits) == (3, 8 + 4 + 4, 1 + 4 + 4)
    assert (draft.positions, draft.logits) == (8 + 3 + 4, 1 + 3 + 4)


def test_one_model_under_two_names_is_counted_once(kept):
    folder, model, _ = kept
    with counting(model) as found:
        ProxyTuning(expert=str(folder), anti_expert=str(folder)).generate(model, prompt(5, 3), max_new_tokens=4)
    assert [found[name].positions for name in ("checkpoint", "method.expert", "method.anti_expert")] == [8, 16, 0]


def test_models_that_generate_runs_are_counted_too(tiny):
    from pretrain.core.generation import forward

    model, ids_1L = tiny(), prompt(6, 4)
    options = {"max_new_tokens": 5, "temperature": 0.0, "eos": (), "pad": 0}
    with counting(model) as ours:
        continued(model, ids_1L, options)
    with counting(model) as theirs:
        model.generate(ids_1L, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours == theirs and ours["checkpoint"].positions == 6 + 4 and forward.why_not(model, 11) is None


@pytest.mark.parametrize("method", [None, SuffixDecoding(), TokenRecycling(nodes=6)])
def test_tokens_stay_and_no_hook_does(method, tiny):
    model, ids_1L = learnt(tiny()), prompt(6, 5, 20)
    options = {"max_new_tokens": 20, "temperature": 0.0}
    plain_1N = continued(model, ids_1L, options, method)
    before = hooks(model)
    with counting(model):
        assert hooks(model) == before + 2
        assert torch.equal(continued(model, ids_1L, options, method), plain_1N)
    assert hooks(model) == before


def test_no_hook_stays_after_an_error(kept, monkeypatch):
    _, model, tokenizer = kept
    before = hooks(model)

    def broken(*_, **__):
        raise PretrainError("no")

    monkeypatch.setattr(TokenRecycling, "decode", broken)
    with pytest.raises(PretrainError, match="no"):
        continue_prompt(model, tokenizer, "def f", method=TokenRecycling(), **GREEDY)
    assert hooks(model) == before


def test_more_nodes_cost_more_and_a_pass_says_how_many_tokens_it_gave(kept, tmp_path):
    folder, _, _ = kept
    found = {}
    for nodes in (0, 15, 80):
        method = {"method": "token_recycling", "nodes": nodes} if nodes else None
        stage = Decode(checkpoint=str(folder), prompts=["def f", "import os"], method=method, **GREEDY)
        found[nodes] = stage.run(Job(tmp_path, {"checkpoint": Path(folder)}))
        samples = json.loads((tmp_path / "samples.json").read_text())["samples"]
        given = sum(sample["written"] - 1 for sample in samples)
        metrics = found[nodes]["metrics"]
        assert metrics["passes"] == sum(sample["passes"] for sample in samples)
        assert metrics["tokens_per_pass"] == pytest.approx(given / metrics["passes"])
    assert 3 * found[0]["flops"] < found[15]["flops"] and 3 * found[15]["flops"] < found[80]["flops"]
    assert found[0]["metrics"]["tokens_per_pass"] == 1 <= found[80]["metrics"]["tokens_per_pass"]


def test_of_a_model_of_two_stacks_nothing_is_counted(tiny):
    with counting(tiny("t5")) as found:
        pass
    assert found == {}

"""AST-Probe: trees and their sequences, the losses written out, what a probe finds that is there, sides, errors."""

from __future__ import annotations

import ast
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import TINY

from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.evaluation.probes import _syntax as syntax
from pretrain.evaluation.probes._syntax import Tree, agreement, constituents, sequences, snippets
from pretrain.evaluation.probes.ast_probe import AstProbe, Probe, ranking_loss, token_states

CODE = '''
import os


class Thing:
    """A thing."""

    @staticmethod
    def twice(a, b=1):
        """Its docstring."""
        # a comment
        é = "ü"; return f"{a}{b}" + a.b  # another


def empty():
    "nothing else"


async def long(x):
    def inner(y):
        return y
    return [inner(i) for i in range(x) if i > 0 and (i, x) != (1, 2)]
'''


@pytest.fixture
def tokenizer(prepared):
    return load_tokenizer(prepared / "tokenizer")


def nodes(tree, start=0):
    """All the named nodes of a tree."""
    if isinstance(tree, Tree):
        yield tree.label, tree.start - start, tree.end - start
        for child in tree.children:
            yield from nodes(child, start)


def test_the_sequences_of_real_functions_give_their_trees_back(prepared):
    count = 0
    for document in Corpus(prepared / "corpus").documents("train"):
        try:
            module, tokens = ast.parse(document["text"]), syntax._Tokens(document["text"])
        except syntax._FAILURES:
            continue
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                tree = tokens.tree(node)
                d, c, u, height = sequences(tree)
                assert len(u) == tree.end - tree.start == len(d) + 1 == len(c) + 1 and max(d) == height
                true = Counter(nodes(tree, tree.start))
                assert constituents(d, c, u) == true and agreement(constituents(d, c, u), true) == (1, 1, 1)
                count += 1
    assert count > 100


def test_a_tree_becomes_the_paper_s_binary_one():
    # R(a, S(T(b)), V(c, W(d))): three children, a chain over one token, one of two children.
    tree = Tree("R", 0, 4, (0, Tree("S", 1, 2, (Tree("T", 1, 2, (1,)),)), Tree("V", 2, 4, (2, Tree("W", 3, 4, (3,))))))
    d, c, u, height = sequences(Tree("Q", 0, 4, (tree,)))
    assert (d, height) == ([3, 2, 1], 3) and c == [("Q", "R"), (), ("V",)] and u == [(), ("S", "T"), (), ("W",)]
    even = Tree("R", 0, 4, (Tree("V", 0, 2, (0, 1)), Tree("W", 2, 4, (2, 3))))  # a height is that of the taller side
    assert sequences(even) == ([1, 2, 1], [("V",), ("R",), ("W",)], [(), (), (), ()], 2)
    assert constituents([1.0, 5.0, 2.0], c, u) == Counter({
        ("no root", 0, 4): 1, ("Q", 0, 2): 1, ("R", 0, 2): 1, ("V", 2, 4): 1, ("S", 1, 2): 1, ("T", 1, 2): 1, ("W", 3, 4): 1,
    })  # fmt: skip
    said, true = Counter(["a", "a", "b", "x"]), Counter(["a", "b", "c"])
    assert agreement(said, true) == pytest.approx((2 / 4, 2 / 3, 4 / 7)) and agreement(Counter(), true) == (0, 0, 0)


def test_functions_are_taken_without_comments_and_docstrings():
    found = list(snippets(CODE, 100))
    assert [" ".join(s.tokens) for s in found] == [
        '@ staticmethod def twice ( a , b = 1 ) : é = "ü" ; return f"{a}{b}" + a . b',
        "async def long ( x ) : def inner ( y ) : return y return [ inner ( i ) for i in range ( x ) "
        "if i > 0 and ( i , x ) != ( 1 , 2 ) ]",
    ]
    tree = constituents(found[0].d, found[0].c, found[0].u)
    assert {("FunctionDef", 0, 22), ("Return", 16, 22), ("BinOp", 17, 22), ("Attribute", 19, 22)} <= set(tree)
    assert {("arguments", 5, 10), ("JoinedStr", 17, 18), ("Constant", 14, 15), ("Assign", 12, 15)} <= set(tree)
    # A function that is too long is searched for others.
    assert [" ".join(s.tokens) for s in snippets(CODE, 9)] == ["def inner ( y ) : return y"]
    assert list(snippets("def f(:", 9)) == list(snippets("x = '''", 9)) == list(snippets("a\0", 9)) == []
    assert list(snippets(CODE.replace("\n", "\r\n"), 100)) == found


def test_the_ranking_loss_is_the_sum_over_pairs():
    d, true = torch.tensor([[0.5, 3.0, 2.0, 9.0], [1.0, 0.0, 4.0, 0.3]]), torch.tensor([[1, 2, 1, -1], [4, 1, 2, 3]])
    losses = []
    for b in range(2):
        pairs = [(i, j) for i in range(4) for j in range(4) if true[b, i] > true[b, j] >= 0]
        losses += [max(0.0, 1 - float(d[b, i] - d[b, j])) for i, j in pairs]
    assert float(ranking_loss(d, true)) == pytest.approx(np.mean(losses))
    assert float(ranking_loss(d[:1, :1], true[:1, :1])) == 0


def test_a_probe_computes_what_the_paper_says():
    some = [s for s in snippets(CODE, 100)]
    rng = np.random.default_rng(0)
    states = [rng.normal(size=(len(s.tokens), 9)).astype(np.float32) for s in some]
    probe = Probe(9, 4, some[:1], 0)
    losses = {"d": [], "c": [], "u": []}
    projection, c, u = (x.detach().numpy() for x in (probe.projection_EK, probe.vectors_KC, probe.vectors_KU))
    assert (
        np.abs(projection).max() <= 0.05
        and projection.shape == (9, 4)
        and Probe(9, 20, some, 0).projection_EK.shape == (9, 9)
    )
    for s, h in zip(some, states, strict=True):
        seen = h @ projection
        step = np.diff(seen, axis=0)
        d = (step**2).sum(1)
        losses["d"] += [max(0, 1 - (d[i] - d[j])) for i in range(len(d)) for j in range(len(d)) if s.d[i] > s.d[j]]
        for name, logits, true, known in (("c", step @ c, s.c, probe.c), ("u", seen @ u, s.u, probe.u)):
            for row, label in zip(logits, true, strict=True):
                if label in known:
                    losses[name].append(np.log(np.exp(row).sum()) - row[known.index(label)])
    assert probe.loss(some, states).item() == pytest.approx(sum(np.mean(x) for x in losses.values()), rel=1e-5)
    assert probe.skew().item() == pytest.approx(np.linalg.norm(projection.T @ projection - np.eye(4)) ** 2, rel=1e-5)


def holding(some, noise=0.0, seed=0):
    """States that hold the trees: each step as long as d says and in a direction that c tells, beside them u."""
    c = list(dict.fromkeys(x for s in some for x in s.c))
    u = list(dict.fromkeys(x for s in some for x in s.u))
    rng, found = np.random.default_rng(seed), []
    for s in some:
        steps = np.stack([np.sqrt(3 * d) * np.eye(len(c))[c.index(x)] for d, x in zip(s.d, s.c, strict=True)])
        walked = np.concatenate([np.zeros((1, len(c))), steps.cumsum(0)])
        marks = np.eye(len(u))[[u.index(x) for x in s.u]]
        h = np.concatenate([walked, marks], axis=1)
        found.append((h + noise * rng.normal(size=h.shape)).astype(np.float32))
    return found


def test_trees_that_the_states_hold_are_recovered_and_others_are_not(prepared):
    some = [s for d in Corpus(prepared / "corpus").documents("train") for s in snippets(d["text"], 30)][:120]
    method = AstProbe(epochs=40, lr=2e-2, batch=16, orthogonal=0.0)
    scores = []
    for states in (holding(some), [np.random.default_rng(len(h)).permutation(h) for h in holding(some)]):
        probe = method.fit(some[:80], states[:80], some[80:100], states[80:100])
        pairs = zip(some[100:], states[100:], strict=True)
        scores.append(np.mean([agreement(probe.recover(h), constituents(s.d, s.c, s.u))[2] for s, h in pairs]))
    assert scores[0] > 0.8 and scores[1] < scores[0] - 0.3


@pytest.mark.parametrize("family", TINY)
def test_a_token_s_state_is_the_mean_of_its_subwords(tiny, tokenizer, family):
    model = tiny(family, vocab_size=512, **({"n_positions": 256} if family == "gpt2" else {}))
    some = list(snippets(CODE, 100))
    model.train()
    together = token_states(model, tokenizer, some, 1)
    small = token_states(model, tokenizer, some, 1, batch_tokens=1)
    assert model.training
    model.eval()
    inner = model.get_encoder() if family == "t5" else model.base_model
    for s, found, alone in zip(some, together, small, strict=True):
        parts = [encode(tokenizer, [(" " if i else "") + t])[0].tolist() for i, t in enumerate(s.tokens)]
        ends = [] if family in ("llama", "qwen3", "gpt2") else [tokenizer.eos_token_id]
        ids = torch.tensor([[tokenizer.bos_token_id, *(x for part in parts for x in part), *ends]])
        with torch.no_grad():
            h = inner(input_ids=ids, output_hidden_states=True).hidden_states[1][0, 1:].numpy()
        at = 0
        for number, part in enumerate(parts):
            assert found[number] == pytest.approx(h[at : at + len(part)].mean(0), abs=1e-4)
            at += len(part)
        assert alone == pytest.approx(found, abs=1e-4) and len(found) == len(s.tokens)


def test_what_has_no_room_is_left_out(tiny, tokenizer):
    some = list(snippets(CODE + "\n\ndef tiny(): pass\n", 100))
    found = token_states(tiny("gpt2", vocab_size=512, n_positions=20), tokenizer, some, 1)
    assert found[0] is None and found[-1] is not None


def test_a_document_s_functions_are_on_one_side_and_each_once(prepared):
    documents = list(Corpus(prepared / "corpus").documents("train"))
    method = AstProbe(validation=0.2, test=0.3)
    sides = method.split([*documents, *documents])
    again = method.split(documents[::-1])
    every = [s.tokens for some in sides.values() for s in some]
    assert len(every) == len(set(every)) > 50 and all(sides.values())
    counted = Counter(t for d in documents for t in {s.tokens for s in snippets(d["text"], 100)})
    copied = {tokens for tokens, count in counted.items() if count > 1}
    owner = {side: {s.tokens for s in some} for side, some in sides.items()}
    for document in documents[:5]:
        own = {s.tokens for s in snippets(document["text"], 100)} - copied
        assert sum(bool(own & some) for some in owner.values()) == bool(own)
    assert sum(map(len, again.values())) == len(every)
    assert sum(map(len, AstProbe(snippets=3).split(documents).values())) < len(every)


@pytest.mark.bits
def test_real_documents_are_measured_and_a_few_steps_do_better_than_none(tiny, prepared, tokenizer):
    documents = list(Corpus(prepared / "corpus").documents("train"))
    model = tiny(vocab_size=512)
    found = AstProbe(tokens=40, epochs=2, rank=16, test=0.3)(model, tokenizer, documents)
    assert set(found.intervals) == {"ast_precision", "ast_recall", "ast_f1"} and found.metrics["ast_layer"] == 1
    for name, (low, high) in found.intervals.items():
        assert 0 <= low <= found.metrics[name] <= high <= 1
    again = AstProbe(tokens=40, epochs=2, rank=16, test=0.3)(model, tokenizer, documents)
    assert again.metrics == found.metrics


def test_what_cannot_be_measured_is_refused(tiny, tokenizer):
    for fields, said in (
        ({"rank": 0}, "rank 0: accepted: 1 or more"),
        ({"tokens": 1}, "tokens 1: accepted: 2 or more"),
        ({"test": 0.9, "validation": 0.1}, "validation 0.1, test 0.9: accepted: shares that leave some"),
        ({"test": 0.0}, "test 0.0: accepted"),
    ):
        with pytest.raises(PretrainError, match=said):
            AstProbe(**fields)
    with pytest.raises(PretrainError, match="1 documents give .* functions of at most 100 tokens; accepted: more doc"):
        AstProbe()(tiny(vocab_size=512), tokenizer, [{"text": CODE}])
    with pytest.raises(PretrainError, match="layer 3: accepted: -3 to 2, for 2 blocks"):
        AstProbe(layer=3)(tiny(vocab_size=512), tokenizer, [{"text": CODE}])

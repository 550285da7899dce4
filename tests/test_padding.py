"""Batches of a handful of shapes, whose padding changes neither the loss nor the gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gradient_cases import Case, build, distance
from hypothesis import given
from hypothesis import strategies as st
from test_gradients import ALONE, ROUNDING

from pretrain.core.batch import Context, Example, Row, Vocabulary, padded_length
from pretrain.core.encoding import Encoder
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.objectives.labelled.seq2seq import Seq2Seq

CASES = [("span_corruption", "t5"), ("ul2", "t5"), ("seq2seq", "t5"), ("seq2seq", "llama")]
HOMES = ("language.span_corruption", "labelled.seq2seq")


def as_long_as_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    for home in HOMES:
        monkeypatch.setattr(f"pretrain.objectives.{home}.padded_length", lambda longest, length: longest)


@given(st.integers(0, 4000), st.integers(1, 2048))
def test_lengths_are_rounded_up_to_at_most_eight_steps_of_a_row(longest, length):
    padded = padded_length(longest, length)
    step = max(1, min(64, length // 8))
    assert longest <= padded < longest + step and padded % step == 0


@pytest.fixture
def made(request, prepared, tmp_path) -> Case:
    name, family = request.param
    return build(name, {}, family, prepared, tmp_path)


def batches(case: Case, length: int, steps: int) -> Iterator[dict[str, torch.Tensor]]:
    """Of eight rows each, packed of pieces or of words, at random."""
    rng = np.random.default_rng(0)
    ordinary = np.flatnonzero(~case.context.vocabulary.special_V)

    def row(index: int) -> Any:
        if case.objective.reads == "examples":
            text, target = ("word " * int(rng.integers(1, length // n)) for n in (4, 12))
            return Example({"text": text, "target": target}, 0, index)
        starts = np.sort(rng.choice(length - 1, rng.integers(0, 4), replace=False)) + 1
        tokens = rng.choice(ordinary, length - int(rng.integers(2))).astype(np.int32)
        return Row(tokens, np.append(0, starts[starts < len(tokens)]).astype(np.int32), np.arange(9), 0, index)

    for _ in range(steps):
        rows = [row(index) for index in range(8)]
        yield case.objective.prepare(rows, replace(case.context, length=length, rng=rng))


def shapes(case: Case, length: int) -> int:
    return len({tuple((k, v.shape) for k, v in batch.items()) for batch in batches(case, length, 40)})


@pytest.mark.parametrize("length", [128, 512])
@pytest.mark.parametrize("made", CASES, indirect=True)
def test_a_training_of_forty_steps_has_a_handful_of_shapes(made, length, monkeypatch):
    assert shapes(made, length) <= 6
    as_long_as_the_longest(monkeypatch)
    assert shapes(made, length) > 8


@pytest.mark.parametrize("made", CASES, indirect=True)
def test_padding_changes_neither_the_loss_nor_the_gradients(made, monkeypatch):
    made.context = replace(made.context, length=64)
    padded = made.batch()
    as_long_as_the_longest(monkeypatch)
    exact = made.batch()
    assert all(padded[name].shape[1] > value.shape[1] for name, value in exact.items() if value.ndim == 2)
    (found, loss), (expected, expected_loss) = (made.gradients([[batch]], ALONE) for batch in (padded, exact))
    assert loss == pytest.approx(expected_loss, rel=ROUNDING) and distance(expected, found) < ROUNDING


def test_targets_are_padded_beside_inputs_that_are_full(tiny, prepared, tmp_path):
    """The padding of a decoder then has nothing in the encoder to attend to."""
    case = build("span_corruption", {}, "t5", prepared, tmp_path)
    batch = case.batch()
    inputs = int((batch["document_BL"] > 0).sum(1).min())
    batch |= {name: batch[name][:, :inputs] for name in ("tokens_BL", "document_BL")}
    assert (batch["document_BL"] > 0).all() and not (batch["owner_BM"] > 0).all()
    gradients, loss = case.gradients([[batch]], ALONE)
    assert np.isfinite(loss) and all(torch.isfinite(g).all() for g in gradients.values())


def test_prompts_may_fill_all_the_positions_that_a_model_has(tiny, prepared, monkeypatch):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    context = Context(Vocabulary.of(tokenizer), 64, np.random.default_rng(0), encoder=Encoder(tokenizer))
    model, objective = tiny("gpt2", vocab_size=512), Seq2Seq(prompt="{text}=", answer=4)  # of 64 positions
    some = [Example({"text": "word " * 90, "target": "xyz"[:n]}, 0, n) for n in (1, 3)]
    padded = objective.prepare(some, context)
    assert padded["prompt_BL"].shape[1] + padded["target_BM"].shape[1] > 64
    as_long_as_the_longest(monkeypatch)
    exact = objective.prepare(some, context)
    assert exact["prompt_BL"].shape[1] + exact["target_BM"].shape[1] == 64
    with torch.no_grad():
        losses = [float(objective.loss(model, batch).value) for batch in (padded, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=ROUNDING)

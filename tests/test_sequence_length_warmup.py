"""Rows that are short at first: their cuts, the same tokens in the same order, FLOPs, and a resume inside the ramp."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from policy_run import run, steps

from pretrain.core.batch import Row, Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.corpus.shards import Shards
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.policies import Policy
from pretrain.policies.pacing.batch_size_warmup import BatchSizeWarmup
from pretrain.policies.pacing.sequence_length_warmup import SequenceLengthWarmup
from pretrain.training.budget import Budget
from pretrain.training.loader import Loader

ROW = 64  # tokens
RAMP = SequenceLengthWarmup(at=(0.3, 0.6))


class Longer(CausalLM):
    """Takes more text than it shows."""

    name = "longer"

    def raw_length(self, length):
        return length + 4


class Watch(Policy):
    """Notes each step's rows."""

    name = "watch"

    def __init__(self):
        self.shapes, self.tokens = [], []

    def before_step(self, training, state, batches):
        self.shapes.append(sum(len(batch["tokens_BL"]) for batch in batches) * 1000 + batches[0]["tokens_BL"].shape[1])
        self.tokens += [
            row[kept > 0] for b in batches for row, kept in zip(b["tokens_BL"], b["document_BL"], strict=True)
        ]


def loader(prepared, objective=None, **given):
    vocabulary, shards = Vocabulary.of(load_tokenizer(prepared / "tokenizer")), Shards(prepared / "tokens" / "train")
    return Loader(shards, [objective or CausalLM()], vocabulary, length=ROW, batch_rows=4, **given)


def test_a_cut_row_has_its_pieces_in_order_and_those_over_a_cut_twice():
    row = Row(np.arange(10, dtype=np.int32), np.array([0, 3, 8], np.int32), np.array([7, 8, 9]), domain=2, index=5)
    parts = row.cut(4)
    assert [part.tokens_L.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [part.starts_D.tolist() for part in parts] == [[0, 3], [0], [0]]
    assert [part.documents_D.tolist() for part in parts] == [[7, 8], [8], [9]]
    assert {(part.domain, part.index) for part in parts} == {(2, 5)}
    whole = row.cut(10)[0]
    assert np.array_equal(whole.tokens_L, row.tokens_L) and np.array_equal(whole.starts_D, row.starts_D)


@pytest.mark.parametrize("workers, micro_rows", [(0, None), (2, 2)])
def test_the_length_doubles_at_the_shares_and_the_tokens_are_those_of_full_rows(
    prepared, tiny, tmp_path, workers, micro_rows
):
    short, plain = Watch(), Watch()
    given = {"workers": workers, "micro_rows": micro_rows, "budget": Budget(steps=10)}
    trained = run(prepared, tiny(vocab_size=512), tmp_path / "a", RAMP, short, **given)
    run(prepared, tiny(vocab_size=512), tmp_path / "b", plain, **given)
    lengths = [shape % 1000 for shape in short.shapes]
    assert lengths == [16] * 3 + [32] * 3 + [64] * 4 and trained.loader.cuts == 1
    assert all(abs(shape // 1000 - 8 * ROW // length) <= 2 for shape, length in zip(short.shapes, lengths, strict=True))
    assert torch.equal(torch.cat(short.tokens), torch.cat(plain.tokens))
    assert [row["tokens"] for row in steps(tmp_path / "a")] == [row["tokens"] for row in steps(tmp_path / "b")]
    spent = [[row["flops"] for row in steps(tmp_path / folder)] for folder in "ab"]
    first, last = ([flops[i] - flops[i - 1] for flops in spent] for i in (2, 9))
    assert first[0] < first[1] and last[0] == pytest.approx(last[1], rel=1e-6)  # attention alone costs less


@pytest.mark.bits
@pytest.mark.parametrize("stop, workers, spread", [(2, 0, 1), (4, 2, 1), (6, 2, 1), (2, 2, 8)])
def test_a_run_that_stops_inside_the_ramp_goes_on_to_the_bit(prepared, tiny, tmp_path, stop, workers, spread):
    together = (replace(RAMP, spread=spread), BatchSizeWarmup(at=(0.5,)))

    def trained(folder, steps_=10, **given):
        budget = {"budget": Budget(steps=steps_), "workers": workers, "save_every": 1, "keep": 20}
        return run(prepared, tiny(vocab_size=512), folder, *together, **(budget | given))

    whole = trained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for path in (tmp_path / "again" / "state").glob("step-*"):
        if int(path.name.removeprefix("step-")) > stop:
            shutil.rmtree(path)
    again = trained(tmp_path / "again")
    assert again.step == whole.step == 10 and again.spent | {"seconds": 0} == whole.spent | {"seconds": 0}
    for (name, value), other in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    log = [json.loads(line) for line in (tmp_path / "again" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if row["event"] == "step"][-(10 - stop) :] == list(range(stop + 1, 11))


def test_processes_share_cut_rows(prepared):
    def rows(rank, world):
        each = loader(prepared, rank=rank, world=world)
        each.cuts = 4
        return [batches[0]["tokens_BL"] for step in range(3) for batches in each.step(step, 0.0)]

    for first, second, whole in zip(rows(0, 2), rows(1, 2), rows(0, 1), strict=True):
        assert first.shape[1] == 16 and torch.equal(torch.cat([first, second]), whole)


@pytest.mark.parametrize("spread", [1, 3, 16])
def test_in_an_epoch_each_piece_of_each_row_comes_once_however_they_are_dealt_out(prepared, spread):
    each = loader(prepared)
    each.cuts, each.spread = 4, spread
    pieces = [piece for place in range(len(each.plan)) for piece in each._dealt("*", 0, place)]
    assert len(pieces) == 4 * len(each.plan) and len(set(pieces)) == len(pieces)


def test_a_step_has_pieces_of_many_rows_where_they_are_dealt_out(prepared):
    def rows(spread):
        each = loader(prepared)
        each.cuts, each.spread = 4, spread
        return [len(set(batches[0]["row_B"].tolist())) for step in range(4) for batches in each.step(step, 0.0)]

    assert rows(1) == [4] * 4 and rows(16) == [16] * 4


def test_the_mean_length_over_the_budget_is_that_of_the_stretches():
    assert RAMP.attended() == pytest.approx(0.3 / 4 + 0.3 / 2 + 0.4)
    assert SequenceLengthWarmup(at=()).attended() == 1


def test_lengths_and_objectives_that_cannot_be_cut_are_refused(prepared, tiny, tmp_path):
    with pytest.raises(PretrainError, match="length 64 in 3 rows: accepted: a divisor that leaves 2 tokens or more"):
        loader(prepared).cuts = 3
    with pytest.raises(PretrainError, match="length 64 in 64 rows: accepted"):
        loader(prepared).cuts = 64
    with pytest.raises(PretrainError, match="rows cut in 2: objective longer: accepted: one on rows of that length"):
        loader(prepared, Longer()).cuts = 2
    with pytest.raises(PretrainError, match="sequence_length_warmup: length 12: accepted: a multiple of 8, 16 or more"):
        SequenceLengthWarmup(at=(0.1, 0.2, 0.3)).start(SimpleNamespace(loader=SimpleNamespace(length=12)), {})

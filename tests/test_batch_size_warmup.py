"""A batch that is doubled on the way: its rows, its rate, and a resume."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
from policy_run import run, steps

from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.corpus.shards import Shards
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.optim.schedules.linear import Linear
from pretrain.policies.pacing.batch_size_warmup import BatchSizeWarmup
from pretrain.training.budget import Budget
from pretrain.training.loader import Loader

ROW = 64  # tokens


def sizes(folder):
    tokens = [0, *(row["tokens"] for row in steps(folder))]
    return [(b - a) / ROW for a, b in itertools.pairwise(tokens)]


@pytest.mark.parametrize("micro_rows", [None, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_rows_double_at_the_shares_and_the_rate_follows_their_root(prepared, tiny, tmp_path, workers, micro_rows):
    policy, budget = BatchSizeWarmup(at=(0.1, 0.3)), Budget(tokens=100 * ROW)
    trained = run(
        prepared, tiny(vocab_size=512), tmp_path, policy, budget=budget, workers=workers, micro_rows=micro_rows
    )
    found = sizes(tmp_path)
    reached = 0.0
    for rows in found:
        expected = 2 if reached < 10 * ROW else 4 if reached < 30 * ROW else 8
        assert 0.7 * expected < rows <= expected  # the last tokens of a row may be padding
        reached += rows * ROW
    assert trained.loader.batch_rows == 8 and found[0] <= 2 and found[-1] > 4
    rates = [row["lr"] for row in steps(tmp_path)]
    assert rates[0] == pytest.approx(1e-2 / 2) and rates[-1] == pytest.approx(1e-2)
    assert any(rate == pytest.approx(1e-2 / math.sqrt(2)) for rate in rates)


def test_the_same_rows_come_in_the_same_order_as_without(prepared, tiny, tmp_path):
    """With and without reading ahead: what was fetched for the smaller batch is not lost."""
    seen = []

    def rows(folder, policies, workers):
        from pretrain.policies import Policy

        class Watch(Policy):
            name = "watch"

            def before_step(self, training, state, batches):
                seen[-1] += [int(row) for batch in batches for row in batch["row_B"]]

        seen.append([])
        run(
            prepared,
            tiny(vocab_size=512),
            tmp_path / folder,
            *policies,
            Watch(),
            workers=workers,
            budget=Budget(steps=10),
        )

    rows("a", [BatchSizeWarmup(at=(0.3, 0.6))], 0)
    rows("b", [BatchSizeWarmup(at=(0.3, 0.6))], 2)
    rows("c", [], 0)
    assert seen[0] == seen[1] == seen[2][: len(seen[0])] and len(seen[0]) == 3 * 2 + 3 * 4 + 4 * 8


def test_a_schedule_falls_by_what_is_spent_and_not_by_steps(prepared, tiny, tmp_path):
    policy, budget = BatchSizeWarmup(at=(0.5,), scale_lr=False), Budget(tokens=100 * ROW)
    run(prepared, tiny(vocab_size=512), tmp_path, policy, budget=budget, schedule=Linear(warmup=0.0))
    before = 0
    for row in steps(tmp_path):
        assert row["lr"] == pytest.approx(1e-2 * (1 - before / (100 * ROW)), abs=1e-2 * 0.09)  # a step, and rounding
        before = row["tokens"]


def test_a_batch_that_cannot_be_halved_is_refused(prepared, tiny, tmp_path):
    with pytest.raises(PretrainError, match="batch_size_warmup: batch_rows 8: accepted: a multiple of 16"):
        run(prepared, tiny(vocab_size=512), tmp_path, BatchSizeWarmup(at=(0.1, 0.2, 0.3, 0.4)))


@pytest.mark.parametrize("micro_rows", [None, 1])
def test_processes_share_a_smaller_batch(prepared, micro_rows):
    vocabulary, shards = Vocabulary.of(load_tokenizer(prepared / "tokenizer")), Shards(prepared / "tokens" / "train")

    def rows(rank, world):
        loader = Loader(
            shards, [CausalLM()], vocabulary, length=ROW, batch_rows=8, micro_rows=micro_rows, rank=rank, world=world
        )
        loader.batch_rows = 2
        micro_batches = [loader.step(step, 0.0) for step in range(3)]
        return [[int(row) for batches in step for row in batches[0]["row_B"]] for step in micro_batches]

    shares = [rows(rank, 2) for rank in (0, 1)]
    assert [len(step) for share in shares for step in share] == [1] * 6
    assert [first + second for first, second in zip(*shares, strict=True)] == rows(0, 1)


def test_a_batch_that_processes_cannot_share_is_refused(prepared):
    vocabulary, shards = Vocabulary.of(load_tokenizer(prepared / "tokenizer")), Shards(prepared / "tokens" / "train")
    loader = Loader(shards, [CausalLM()], vocabulary, length=ROW, batch_rows=8, world=2)
    for rows in (0, 1, 5):
        with pytest.raises(PretrainError, match=f"batch_rows {rows}: accepted: a multiple of micro_rows x processes"):
            loader.batch_rows = rows
    assert loader.batch_rows == 8


def test_a_size_that_micro_batches_do_not_divide_is_refused_before_anything_is_trained(prepared):
    vocabulary = Vocabulary.of(load_tokenizer(prepared / "tokenizer"))
    shards = Shards(prepared / "tokens" / "train")
    loader = Loader(shards, [CausalLM()], vocabulary, length=64, batch_rows=12, micro_rows=4)
    with pytest.raises(PretrainError, match=r"batch_rows 6: accepted: a multiple of micro_rows x processes \(4 x 1\)"):
        BatchSizeWarmup().start(SimpleNamespace(loader=loader), {})

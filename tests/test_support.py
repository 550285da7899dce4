"""What the table of support says of a method and a model type is what comes of trying it."""

from __future__ import annotations

import json
import random

import pytest
import support
import zoo

RECORD = json.loads(support.PAGE.read_text())
PAIRS = [
    (kind, name) for kind, row in RECORD.items() for name in (*row["works"], *row["refused"]) if name in support.names()
]
SAMPLE = random.Random(0).sample(PAIRS, 40)


@pytest.fixture(scope="module")
def bench(prepared, stories, tmp_path_factory):
    return support.Bench(prepared, stories, tmp_path_factory.mktemp("support"))


def check(bench, kind, name):
    with support.known(kind):
        outcome = bench.outcome(name, kind)
    assert (outcome == support.WORKS) == (name in RECORD[kind]["works"]), outcome


def test_the_types_of_the_table_are_those_of_the_zoo_and_at_least_forty_train_and_are_tuned():
    assert {*RECORD} == {*zoo.TASKS}
    trained = {"causal": "causal_lm", "masked": "masked_lm", "seq2seq": "span_corruption"}
    able = [kind for kind, row in RECORD.items() if {trained[row["kind"]], "lora"} <= {*row["works"]}]
    assert len(able) >= 40 and len(able) > 0.9 * len(RECORD), {*RECORD} - {*able}


@pytest.mark.parametrize(("kind", "name"), SAMPLE, ids="-".join)
def test_a_pair_comes_out_as_recorded(bench, kind, name):
    check(bench, kind, name)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "name"), PAIRS, ids="-".join)
def test_every_pair_comes_out_as_recorded(bench, kind, name):
    check(bench, kind, name)

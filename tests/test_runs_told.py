"""What lists and tables of runs show: the metric that matters, and no difference where tokens are others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.runs.command import _metrics
from pretrain.runs.comparison import OTHER_TOKENS, _results
from pretrain.runs.shelf import Run

MEASURED = {"loss": 4.0, "perplexity": 54.6, "bits_per_byte": 1.9, "loss/py": 4.1, "bits_per_byte/py": 2.0}


@pytest.fixture
def made(tmp_path):
    """`made(name, entries, metrics)`: a run of a model of a vocabulary, and an evaluation of it."""

    def make(name, entries, metrics=MEASURED, **extra) -> Run:
        folder = tmp_path / name
        for stage in ("model", "judged"):
            (folder / stage).mkdir(parents=True)
        tokenizer = {"model": {"vocab": dict(zip("abcd", range(entries), strict=False))}, "normalizer": None, **extra}
        (folder / "model" / "checkpoint").mkdir()
        (folder / "model" / "checkpoint" / "config.json").write_text("{}")
        (folder / "model" / "checkpoint" / "tokenizer.json").write_text(json.dumps(tokenizer))
        record = {"config": {}, "flops": 1, "seconds": 1.0, "finished": "", "inputs": {}, "name": "model"}
        records = {
            "model": record | {"stage": "train", "metrics": {"tokens": 9.0} | metrics},
            "judged": record
            | {"stage": "evaluate", "name": "judged", "metrics": metrics, "inputs": {"checkpoint": "model"}},
        }
        stages = {stage: folder / stage for stage in records}
        return Run(folder, stages, dict.fromkeys(stages, "finished"), records)

    return make


def rows(*runs):
    return {name: cells for name, *cells in _results(runs)}


def test_perplexities_of_two_vocabularies_get_no_difference_and_bits_per_byte_do(made):
    shown = rows(made("a", 2), made("b", 3, MEASURED | {"bits_per_byte": 1.8, "perplexity": 99.0}))
    for stage in ("model", "judged"):
        assert shown[f"{stage}: perplexity"] == ["54.6", "99", OTHER_TOKENS]
        assert shown[f"{stage}: loss/py"][-1] == OTHER_TOKENS == shown[f"{stage}: loss"][-1]
        assert shown[f"{stage}: bits_per_byte"][-1].endswith("-5.3%")
    assert shown["model: tokens"][-1] == "the same"


def test_runs_of_the_same_tokens_are_compared_in_all(made):
    shown = rows(made("a", 2), made("b", 2, MEASURED | {"perplexity": 99.0}, padding={"length": 8}))
    assert shown["judged: perplexity"][-1].endswith("+81.3%")


def test_of_several_runs_those_of_other_tokens_are_named(made):
    shown = rows(made("a", 2), made("b", 3), made("c", 2, MEASURED | {"perplexity": 99.0}))
    assert shown["judged: perplexity"] == ["54.6", f"54.6 ({OTHER_TOKENS})", "99 (+44.4, +81.3%)"]


def test_a_loss_that_is_none_of_tokens_and_a_tokenizer_that_is_gone_are_compared_as_ever(made):
    labels = {"accuracy": 0.5, "loss": 1.0}
    assert rows(made("a", 2, labels), made("b", 3, labels))["judged: loss"][-1] == "the same"
    gone = made("c", 3)
    (Path(gone.stages["model"]) / "checkpoint" / "tokenizer.json").unlink()
    assert rows(made("d", 2), gone)["judged: perplexity"][-1] == "the same"


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (MEASURED, "judged: on test: bits_per_byte 1.9"),
        ({"loss": 1.0, "label_loss": 2.0, "accuracy": 0.5}, "judged: on test: accuracy 0.5"),
        ({"ece": 0.1, "documents": 3.0}, "judged: on test: ece 0.1; documents 3"),
    ],
)
def test_a_list_shows_the_metric_that_says_how_good_a_model_is(made, metrics, words):
    assert _metrics(made("a", 2, metrics)) == words

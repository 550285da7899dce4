"""What a run is worth: tokens a weight, and what counts of adjacent tokens come to on the very same documents."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open
from small_recipe import small_recipe

from pretrain.corpus.bigrams import Bigrams
from pretrain.corpus.shards import Shards
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.evaluation.likelihood.held_out import tokens_of
from pretrain.experiments.trials import Trial
from pretrain.recipe import parse
from pretrain.report.regime import by_document

EVALUATE = {
    "stage": "evaluate", "name": "evaluation", "checkpoint": "model", "corpus": "corpus", "compressors": False,
    "evaluations": [{"method": "held_out", "resamples": 10}],
}  # fmt: skip


@pytest.fixture
def outcome(tmp_path, stories):
    """`outcome(metric)`: that of a small training."""
    text = small_recipe(
        tmp_path, stories[:40], EVALUATE, held_out=0.3, optimizer="adamw", budget={"steps": 20}, save_every=0
    )
    for path in (tmp_path / "text").glob("*.py"):
        if int(path.stem) % 2:  # a second domain
            path.rename(path.with_suffix(".md"))

    def run(metric, curve=None):
        trial = Trial(
            "t", parse(text) | {"seed": 0}, str(tmp_path / "runs" / "t"), str(tmp_path / "runs" / "stages"), "model", "steps",
            20, metric, curve,
        )  # fmt: skip
        return trial.run()

    return run


def test_the_bigram_line_is_of_the_training_split_on_the_documents_that_are_judged(outcome, tmp_path):
    found = outcome("evaluation.loss")
    folder = tmp_path / "runs" / "t"
    tokenizer = load_tokenizer(folder / "tokenizer" / "tokenizer")
    (shards,) = (Shards(path) for path in (tmp_path / "runs" / "stages" / ".tokens").glob("*/train"))
    documents = list(Corpus(folder / "corpus" / "corpus").documents("test"))
    tokens = tokens_of(tokenizer, documents)
    seen = json.loads((folder / "model" / "stage.json").read_text())["metrics"]["tokens"]
    line = Bigrams.of(shards, int(seen)).nll(tokens).sum() / sum(len(ids) - 1 for ids in tokens)
    assert found["regime"]["bigram"] == pytest.approx(line, rel=1e-9)
    assert found["final"] > line  # twenty steps learn less
    in_bits = outcome("evaluation.bits_per_byte")
    share = in_bits["final"] / found["final"]
    assert in_bits["regime"]["bigram"] == pytest.approx(line * share, rel=1e-6)


def test_tokens_per_weight_are_those_of_the_trained_checkpoint(outcome, tmp_path):
    found = outcome("evaluation.loss")
    record = json.loads((tmp_path / "runs" / "t" / "model" / "stage.json").read_text())
    with safe_open(tmp_path / "runs" / "t" / "model" / "checkpoint" / "model.safetensors", "pt") as file:
        weights = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert found["regime"]["tokens_per_weight"] == record["metrics"]["tokens"] / weights > 0


@pytest.mark.parametrize("metric", ["evaluation.loss", "evaluation.bits_per_byte", "evaluation.loss/py"])
def test_a_likelihood_is_the_mean_of_its_documents_shares(outcome, tmp_path, metric):
    found = outcome(metric)
    assert np.mean(found["documents"]) == pytest.approx(found["final"], abs=1e-5) and len(found["documents"]) > 1


def test_other_metrics_have_no_line(outcome):
    found = outcome("model.loss", "loss")
    assert found["documents"] is None and "bigram" not in found["regime"]


@pytest.mark.parametrize(("metric", "evaluation"), [("probe_loss", "probe"), ("label_loss", "task")])
def test_a_likelihood_of_labels_is_the_mean_of_its_documents_shares(tmp_path, metric, evaluation):
    (tmp_path / "evaluation").mkdir()
    rows = [{"domain": "ab"[i % 2], "nll": float(i), "targets": 1.0} for i in range(6)]
    other = [{"domain": "a", "nll": 9.0, "targets": 3.0, "bytes": 5.0}]
    (tmp_path / "evaluation" / "documents.json").write_text(json.dumps({"held_out": other, evaluation: rows}))
    assert by_document(tmp_path, f"evaluation.{metric}").tolist() == [0, 1, 2, 3, 4, 5]
    assert by_document(tmp_path, f"evaluation.{metric}/b").tolist() == [1, 3, 5]
    assert by_document(tmp_path, "evaluation.loss").tolist() == [3]
    assert by_document(tmp_path, "evaluation.probe_accuracy") is None


def test_a_report_tokenises_the_held_out_documents_once_for_both_of_its_lines(outcome, tmp_path, monkeypatch):
    from pretrain.evaluation.likelihood import _bigrams
    from pretrain.report.data import collect, with_bigrams

    calls = []
    monkeypatch.setattr(_bigrams, "tokens_of", lambda *given: calls.append(given) or tokens_of(*given))
    outcome("model.loss")
    folder = tmp_path / "runs" / "t"
    page = collect(folder)
    with_bigrams(page, folder)
    (evaluation,) = page["evaluations"]
    assert evaluation["bigram"] > evaluation["bigram_whole"] > 0  # the model has read a part of the text
    assert len(calls) == 1
    with_bigrams(again := collect(folder), folder)
    assert len(calls) == 1 and again["evaluations"][0]["bigram"] == evaluation["bigram"]


def test_a_report_draws_the_pairs_of_each_domain_and_those_of_all_are_their_mean_by_bytes(outcome, tmp_path):
    from pretrain.report.data import collect, with_bigrams

    outcome("evaluation.bits_per_byte")  # which keeps a line without domains
    with_bigrams(page := collect(tmp_path / "runs" / "t"), tmp_path / "runs" / "t")
    (evaluation,), (chart,) = page["evaluations"], page["bars"]
    weights = {domain: size["bytes"] for domain, size in evaluation["sizes"].items()}
    for line, by_domain in zip(
        (evaluation["bigram"], evaluation["bigram_whole"]), evaluation["bigram_domains"], strict=True
    ):
        assert {*by_domain} == {*evaluation["domains"]} and len({*by_domain.values()}) > 1
        mean = sum(by_domain[domain] * weights[domain] for domain in weights) / sum(weights.values())
        assert line == pytest.approx(mean, rel=1e-9)
    pairs = next(bar for bar in chart["tools"] if bar["name"] == "pairs of tokens")
    assert pairs["values"] == [evaluation["bigram_domains"][0][domain] for domain in chart["domains"]]

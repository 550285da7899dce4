"""A data stage that goes on with an earlier one: thresholds change, and nothing is read or measured again."""

from __future__ import annotations

import json

import pytest
import yaml

from pretrain import engine
from pretrain.core.errors import PretrainError
from pretrain.corpus.store import Corpus
from pretrain.data.filters.gopher_quality import GopherQuality
from pretrain.recipe import load
from pretrain.stages.data import Data


@pytest.fixture
def recipe(tmp_path, stories):
    """A recipe of two stages, and where it runs."""
    rows = [
        {"text": s["text"][:600], "domain": s["domain"], "id": f"{n}", "label": n % 3}
        for n, s in enumerate(stories[:80])
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shares = {"validation": 0.2, "test": 0.2}
    tagged = {"name": "tagged", "stage": "data", "sources": [str(tmp_path / "rows.jsonl")], **shares}
    tagged |= {"operations": [{"method": "gopher_quality", "tag": True}]}
    clean = {"name": "clean", "stage": "data", "corpus": "tagged"}
    clean |= {
        "operations": [
            {"method": "c4_quality", "sentences": 0},
            {"method": "gopher_quality", "least_words": 8, "stop_words": 0, "letter_words": 0.5},
        ]
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"name": "two", "stages": [tagged, clean]}))
    return tmp_path / "recipe.yaml", tmp_path / "run"


def ids(corpus, split):
    return [document["id"] for document in corpus.documents(split, ("id",))]


def test_documents_keep_their_side_and_columns_and_a_threshold_runs_the_second_stage_alone(recipe, monkeypatch):
    path, folder = recipe
    engine.run(load(path, [], folder), say=lambda line: None)
    before, after = (Corpus(folder / name / "corpus") for name in ("tagged", "clean"))
    for split in ("validation", "test"):  # though training text that operations have changed has another hash
        assert ids(after, split) == ids(before, split) != []
    kept = ids(after, "train")
    assert [n for n in ids(before, "train") if n in set(kept)] == kept and 0 < len(kept) < len(ids(before, "train"))
    assert set(after.columns) == set(before.columns) > {"label", "gopher_quality_words"}
    info = after.info
    assert info["read"] == sum(before.info["documents"].values())
    assert info["funnel"][1]["before"]["documents"] == before.info["documents"]["train"]

    monkeypatch.setattr(GopherQuality, "measure", None)
    engine.run(load(path, ["clean.operations.1.least_words=20"], folder), say=lambda line: None)
    fewer = Corpus(folder / "clean" / "corpus")
    assert len(ids(fewer, "train")) < len(kept) and set(ids(fewer, "train")) < set(kept)


def test_what_is_added_to_a_corpus_is_split_as_that_is_so_that_no_group_is_parted(tmp_path):
    for name, half in (("first", 0), ("second", 1)):
        rows = [{"text": f"text {n} of {half}", "group": f"{n}"} for n in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first = {"name": "first", "stage": "data", "sources": [str(tmp_path / "first.jsonl")], "split_seed": 3}
    first |= {"validation": 0.3, "test": 0.2, "near_duplicates": None}
    second = {"name": "second", "stage": "data", "corpus": "first", "sources": [str(tmp_path / "second.jsonl")]}
    second |= {"validation": 0.1, "split_seed": 5, "near_duplicates": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"name": "two", "stages": [first, second]}))
    said = []
    engine.run(load(tmp_path / "recipe.yaml", [], tmp_path / "run"), say=said.append)
    corpus = Corpus(tmp_path / "run" / "second" / "corpus")
    sides = {}
    for split in ("train", "validation", "test"):
        for row in corpus.documents(split, ("group",)):
            sides.setdefault(row["group"], []).append(split)
    assert len(sides) == 60 and all(len(each) == 2 and len(set(each)) == 1 for each in sides.values())
    told = "documents are split as in first: validation 0.3, test 0.2, split_seed 3"
    assert any(told in line for line in said)


def test_the_plan_of_a_stage_that_goes_on_has_the_splits_of_the_corpus(recipe):
    from pretrain.forecast import forecast
    from pretrain.identity import plan

    path, folder = recipe
    left = [each.estimate.left for each in forecast(plan(load(path, [], folder), folder / "stages"))]
    assert left[1].bytes["validation"] == pytest.approx(left[0].bytes["validation"], rel=0.01)


def test_without_sources_and_corpus_there_is_nothing_to_read():
    with pytest.raises(PretrainError, match="accepted: at least one, or a corpus"):
        Data(stage="data")


def test_a_stage_without_a_corpus_is_what_it_was():
    plain = Data(stage="data", sources=["x"])
    assert "corpus" not in plain.config() and plain.references() == {}
    assert Data(stage="data", corpus="tagged").config()["corpus"] == "tagged"

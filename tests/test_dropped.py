"""Dropped documents: each has its reason in a table, the funnel adds up, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.core.files import damage
from pretrain.corpus.payload import payload
from pretrain.corpus.store import Corpus
from pretrain.data import _dropped
from pretrain.data._dropped import FILE, Ledger
from pretrain.data._work import desk, working
from pretrain.data.deduplication.deduplicate import Deduplicate
from pretrain.report import page
from pretrain.stages import Job
from pretrain.stages.data import Data

documents = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
            "domain": st.sampled_from(["a", "b"]),
            "label": st.none() | st.sampled_from(["x", "y"]),
            "why": st.sampled_from(["", "", "short", "odd"]),
        }
    ),
    min_size=1,
    max_size=30,
)
HERE = {"deadline": None, "max_examples": 25, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def marked(corpus: Dataset, batch: int) -> Dataset:
    """Drop what has a reason in its column `why`, batch by batch."""
    kept = []
    with desk() as here:
        for start in range(0, len(corpus), batch):
            why = corpus[start : start + batch]["why"]
            rows = start + np.flatnonzero([bool(word) for word in why])
            here.drop("marked", corpus, rows, [word for word in why if word], rows / 2)
            kept += [start + n for n, word in enumerate(why) if not word]
    return corpus.select(kept)


def noted(folder: Path, rows: list[dict[str, object]], batch: int, **more: int):
    """The corpus after `marked`, the table and the funnel."""
    ledger = Ledger(folder, **more)
    corpus = Dataset.from_list([{**row, "id": str(n)} for n, row in enumerate(rows)])
    with working(folder, ledger):
        kept = marked(corpus, batch)
        ledger.settle("marked", corpus, kept)
        ledger.close()
    table = parquet.read_table(folder / FILE).to_pylist() if (folder / FILE).exists() else []
    (folder / FILE).unlink(missing_ok=True)
    return corpus, kept, table, ledger.funnel


@settings(**HERE)
@given(rows=documents, batch=st.integers(1, 7))
def test_kept_and_dropped_are_the_corpus_in_order_and_the_funnel_adds_up(tmp_path, rows, batch):
    corpus, kept, table, (passage,) = noted(tmp_path, rows, batch)
    dropped = [row for row in corpus if row["why"]]
    assert [(r["id"], r["reason"], r["domain"], r["text"]) for r in table] == [
        (r["id"], r["why"], r["domain"], r["text"]) for r in dropped
    ]
    assert [r["measured"] for r in table] == [int(r["id"]) / 2 for r in dropped]
    assert [r["bytes"] for r in table] == [len(payload(r)) for r in dropped]
    assert sorted([*kept["id"], *(r["id"] for r in table)], key=int) == list(corpus["id"])
    for measure in ("documents", "bytes"):
        gone = sum(size[measure] for size in passage["reasons"].values())
        assert passage["before"][measure] - gone == passage["after"][measure]
        for end, given_ in (("before", corpus), ("after", kept)):
            whole = {"documents": len(given_), "bytes": sum(len(payload(row)) for row in given_)}
            assert passage[end][measure] == whole[measure]
            assert sum(domain[end][measure] for domain in passage["domains"].values()) == whole[measure]
    for domain in passage["domains"].values():
        assert domain["before"]["documents"] - sum(domain["reasons"].values()) == domain["after"]["documents"]


@settings(**HERE)
@given(rows=documents, batch=st.integers(1, 7), block=st.integers(1, 5))
def test_the_size_of_batches_changes_nothing(tmp_path, monkeypatch, rows, batch, block):
    first = noted(tmp_path, rows, batch)[2:]
    with monkeypatch.context() as patch:
        patch.setattr(_dropped, "BLOCK", block)
        patch.setattr(_dropped, "GROUP", block)
        assert noted(tmp_path, rows, len(rows))[2:] == first


def test_texts_are_cut_and_thin_out_and_every_document_keeps_its_row(tmp_path):
    rows = [{"text": f"{n:03} and more", "domain": "a", "why": "short"} for n in range(40)]
    _, _, table, (passage,) = noted(tmp_path, rows, 40, characters=3, texts=4)
    assert len(table) == 40 and passage["reasons"] == {"short": {"documents": 40, "bytes": 480}}
    with_text = [n for n, row in enumerate(table) if row["text"] is not None]
    assert with_text == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32] and table[12]["text"] == "012"
    assert len(passage["examples"]) == 3 and all(e["text"].endswith("more") for e in passage["examples"])
    for nothing in ({"characters": 0}, {"texts": 0}):
        assert {row["text"] for row in noted(tmp_path, rows, 7, **nothing)[2]} == {None}


def test_of_an_operation_that_gives_no_reason_what_is_gone_is_looked_up(tmp_path):
    corpus = Dataset.from_list([{"text": t, "domain": "a", "id": str(n)} for n, t in enumerate("abcacb")])
    ledger = Ledger(tmp_path)
    some = corpus.select([0, 2, 3])
    ledger.settle("chooses", corpus, some)
    ledger.settle("rewrites", some, Dataset.from_list([{"text": "z", "domain": "a", "id": "9"}]))
    ledger.close()
    table = parquet.read_table(tmp_path / FILE).to_pylist()
    assert [(row["operation"], row["id"], row["reason"]) for row in table] == [
        ("chooses", n, _dropped.UNKNOWN) for n in "145"
    ]
    assert [passage["reasons"] != {} for passage in ledger.funnel] == [True, False]


def test_duplicates_are_dropped_with_what_they_are_and_how_alike(tmp_path):
    words = [f"word{n}" for n in range(60)]
    texts = [" ".join(words), "something else", " ".join(words), " ".join([*words[:59], "other"])]
    ledger = Ledger(tmp_path)
    with working(tmp_path, ledger):
        assert list(Deduplicate()(Dataset.from_dict({"text": texts}))["text"]) == texts[:2]
    ledger.close()
    exact, near = parquet.read_table(tmp_path / FILE).to_pylist()
    assert (exact["reason"], exact["measured"]) == ("exact copy", 1.0)
    assert near["reason"] == "near-duplicate" and 0.8 <= near["measured"] < 1


@pytest.fixture
def ran(tmp_path, stories):
    """The folder of a data stage with two operations, and what it said."""
    source = tmp_path / "rows.jsonl"
    rows = [{"text": f"<b>{n}</b> {s['text']}", "domain": s["domain"]} for n, s in enumerate(stories[:40])]
    near = [row | {"text": row["text"] + " end"} for row in rows[:3]]
    source.write_text("\n".join(json.dumps(row) for row in [*rows, *near]))
    operations = ["deduplicate", {"method": "bertin", "share": 0.5, "sampling": "random"}]
    stage = Data.model_validate({"stage": "data", "sources": [str(source)], "operations": operations})
    (tmp_path / "run" / "data").mkdir(parents=True)
    stage.run(Job(tmp_path / "run" / "data", {}, say=lambda line: None))
    return tmp_path / "run"


def test_a_stage_puts_the_table_beside_the_corpus_under_its_checksums(ran):
    corpus = ran / "data" / "corpus"
    info = Corpus(corpus).info
    table = parquet.read_table(corpus / FILE).to_pylist()
    first, second = info["funnel"]
    assert [p["operation"] for p in info["funnel"]] == ["deduplicate", "bertin"] and first["after"] == second["before"]
    assert len(table) == info["removed"]["deduplicate"] + info["removed"]["bertin"]
    assert second["after"] == {name: info[name]["train"] for name in ("documents", "bytes")}
    assert not (ran / "data" / "work").exists() and not damage(corpus)
    (corpus / FILE).write_bytes((corpus / FILE).read_bytes()[:-9] + b"otherwise")
    assert FILE in damage(corpus)


def test_a_corpus_says_how_long_its_documents_are_and_shows_some(ran):
    corpus = Corpus(ran / "data" / "corpus")
    train = {row["id"]: row for row in corpus.documents("train")}
    sizes = [len(row["text"].encode()) for row in train.values()]
    lengths = {int(edge): count for edge, count in corpus.info["lengths"]["train"].items()}
    assert lengths == {edge: sum(edge // 2 <= size < edge for size in sizes) for edge in lengths}
    assert sum(lengths.values()) == len(train) and list(lengths) == sorted(lengths)
    kept = corpus.info["kept"]
    assert len(kept) == min(20, len(train)) == len({row["id"] for row in kept})
    assert all(train[row["id"]]["text"].startswith(row["text"]) and row["text"] for row in kept)
    for passage in corpus.info["funnel"]:
        dropped = sum(reason["documents"] for reason in passage["reasons"].values())
        assert sum(passage["lengths"].values()) == dropped


def test_the_report_shows_the_funnel_and_dropped_documents_escaped(ran):
    info = Corpus(ran / "data" / "corpus").info
    shown = page.funnel(info["funnel"], "data") + page.documents(info)
    assert "not drawn" in shown and "near-duplicate: " in shown and "data/corpus/dropped.parquet" in shown
    assert "&lt;b&gt;" in shown and "</b> " not in shown
    assert page.funnel([], "data") == ""


def test_how_much_the_table_keeps_is_no_part_of_what_a_stage_is():
    stage = {"stage": "data", "sources": [{"stdlib": True}]}
    plain, more = (Data.model_validate(stage | given_) for given_ in ({}, {"dropped_characters": 5}))
    assert plain.config() == more.config() and "dropped_texts" not in plain.config()


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_of_a_copy_it_is_noted_which_document_was_kept(tmp_path, threshold):
    texts = [" ".join(f"word{n * 100 + m}" for m in range(60)) for n in range(3)]
    rows = [texts[0], texts[1], texts[0], f"{texts[1]} more", texts[2], f"{texts[1]} more", texts[0]]
    corpus = Dataset.from_list([{"text": text, "domain": "d", "id": f"doc-{n}"} for n, text in enumerate(rows)])
    ledger = Ledger(tmp_path)
    with working(tmp_path, ledger):
        Deduplicate(threshold=threshold)(corpus)
        ledger.close()
    found = {row["id"]: row["copy_of"] for row in parquet.read_table(tmp_path / FILE).to_pylist()}
    if threshold:  # the second `more` is a copy of what went itself
        assert found == {"doc-2": "doc-0", "doc-3": "doc-1", "doc-5": "doc-1", "doc-6": "doc-0"}
    else:
        assert found == {"doc-2": "doc-0", "doc-5": "doc-3", "doc-6": "doc-0"}

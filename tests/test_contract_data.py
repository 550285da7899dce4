"""What every data operation owes: from a recipe, the same in any batches, nothing lost but documents, nothing to no end."""

from __future__ import annotations

import sys

import pyarrow.parquet as parquet
import pytest
from datasets import Dataset, concatenate_datasets
from examples_training import Material, example, names, reread

from pretrain.core.errors import PretrainError
from pretrain.core.registry import methods
from pretrain.data._dropped import UNKNOWN, Ledger
from pretrain.data._work import working

OPERATIONS = names("data operation")
WRITES = (
    "entigraph",
    "wrap",
    "llm2llm",
    "transform_llm",
)  # operations that put new documents after the one that each is made of
REWRITES = (
    "prompt_template", "c4_quality", "line_deduplication", "paragraph_deduplication", "exact_substring_deduplication",
    "mask_pii", "repair_text", "prox", "web_noise", "grammatical_errors",
)  # fmt: skip  # whose work is the text
CHANGES = dict.fromkeys(REWRITES, "text") | {"label_noise": "label"}  # the column that is an operation's work
BLOCKS = ("BLOCK", "SHARD", "BATCH_TOKENS")  # how many documents or tokens are taken at a time


def earlier(name: str, kept: Dataset) -> Dataset:
    """The documents that were there before, without new ones."""
    numbers = kept["number"][:]
    new = [n for n, number in enumerate(numbers) if n and number == numbers[n - 1]] if name in WRITES else []
    return kept.select(sorted({*range(len(kept))} - {*new}))


@pytest.fixture(scope="module")
def material(prepared, stories, tmp_path_factory):
    return Material(prepared, tmp_path_factory.mktemp("material"), stories)


@pytest.fixture(scope="module")
def corpus(stories) -> Dataset:
    """Short documents, two of them copies and two with a notice, with columns that operations read, and others."""
    notice = "\n\nFor more of this as it was at first write to Zoë Ã–sterreich, zoe@example.org, or call +43 1 58858 0."
    rows = [
        {
            "text": s["text"][:150] + notice * (n in (5, 7)),
            "domain": s["domain"],
            "label": str(n % 2),
            "quality": float(n * 7 % 11),
            "number": n,
        }
        for n, s in enumerate([*stories[:14], *stories[-6:]])
    ]
    return Dataset.from_list([*rows, rows[3] | {"number": 20}, rows[3] | {"number": 21}])


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_recipe_gives_it_back(material, tmp_path, name):
    operation = example(name, material)
    assert reread(operation, tmp_path) == operation


@pytest.mark.parametrize("name", OPERATIONS)
def test_it_gives_the_same_documents_again_in_any_batches(material, corpus, monkeypatch, tmp_path, name):
    operation = example(name, material)
    with working(tmp_path / "a"):
        first = operation(corpus).to_list()
        again = operation(corpus).to_list()  # with what is on the desk
    pieces = concatenate_datasets([corpus.select(range(5)), corpus.select(range(5, 6)), corpus.select(range(6, 22))])
    turned = corpus.select(range(21, -1, -1)).select(range(21, -1, -1))  # rows that do not lie as they are numbered
    for module in [m for n, m in sys.modules.items() if n.startswith(("pretrain.data.", "pretrain.core.models"))]:
        for block in BLOCKS:
            if isinstance(getattr(module, block, None), int):
                monkeypatch.setattr(module, block, 5)
    others = []
    for number, same in enumerate((pieces, turned)):
        with working(tmp_path / str(number)):
            others.append(operation(same).to_list())
    assert first and again == first and others == [first, first]


@pytest.mark.parametrize("name", OPERATIONS)
def test_columns_that_it_does_not_know_are_kept_and_documents_stay_in_order(material, corpus, name):
    operation = example(name, material)
    whole = operation(corpus)
    kept = earlier(name, whole)
    assert (len(whole) > len(kept) == len(corpus)) if name in WRITES else whole is not None
    assert set(kept.column_names) == {*corpus.column_names, *operation.adds}
    assert all(kept.features[column] == corpus.features[column] for column in corpus.column_names)
    numbers = kept["number"][:]
    assert numbers == sorted(set(numbers)) and numbers
    same = [column for column in corpus.column_names if column != CHANGES.get(name)]
    assert kept.select_columns(same).to_list() == corpus.select(numbers).select_columns(same).to_list()
    for column in corpus.column_names:
        assert (kept[column][:] != corpus.select(numbers)[column][:]) == (column == CHANGES.get(name))


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_it_reports_is_what_it_did(material, corpus, tmp_path, name):
    with working(tmp_path) as desk:
        kept = example(name, material)(corpus)
    chooses = ".selection." in methods()[name].module
    assert not chooses or [set(report) >= {"documents", "score_percentiles"} for report in desk.reports] == [True]
    for report in desk.reports:
        assert report["method"] == name
        for domain, counts in report.get("documents", {}).items():
            assert counts["before"] == corpus["domain"][:].count(domain)
            assert counts["after"] == kept["domain"][:].count(domain)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_document_and_one_document_are_kept_or_refused_in_one_line(material, corpus, name, count):
    """A choice among documents may need several; it says so."""
    few = corpus.select(range(count))
    try:
        operation = example(name, material)
        kept = operation(few)
    except PretrainError as error:
        assert "\n" not in str(error) and name in str(error) and "accepted: " in str(error)
    else:
        assert len(earlier(name, kept)) == count and set(kept.column_names) == {*corpus.column_names, *operation.adds}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_document_that_it_leaves_out_has_its_reason(material, corpus, tmp_path, name):
    ledger = Ledger(tmp_path)
    with working(tmp_path, ledger):
        whole = example(name, material)(corpus.add_column("id", [str(n) for n in range(len(corpus))]))
        kept = earlier(name, whole)
        assert not ledger.funnel and ledger.drops == len(corpus) - len(kept)
        ledger.settle(name, corpus, whole)
    (passage,) = ledger.funnel
    ledger.close()
    table = parquet.read_table(ledger.path).to_pylist() if ledger.path.exists() else []
    assert [row["id"] for row in table] == [str(n) for n in range(len(corpus)) if n not in set(kept["number"])]
    assert UNKNOWN not in passage["reasons"] and all(0 < len(reason) < 50 for reason in passage["reasons"])
    new = len(whole) - len(kept)
    assert passage["before"]["documents"] - passage["after"]["documents"] == len(table) - new


def test_operations_that_compute_nothing_say_how_long_they_take_and_plans_add_it_up(material):
    for name in OPERATIONS:
        operation = example(name, material)
        took = operation.seconds(1e9, 1e5)
        assert (took is None) == (not operation.speed) and (operation.computes or took), name
        assert not took or 1 < took < 3600, name

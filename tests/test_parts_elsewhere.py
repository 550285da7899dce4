"""Lines and paragraphs that stand elsewhere go, the first stays or none does, in any batches and however they are hashed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.core.errors import PretrainError
from pretrain.data import _mapped
from pretrain.data._dropped import Ledger
from pretrain.data._work import working
from pretrain.data.deduplication import _parts
from pretrain.data.deduplication._parts import Table, normal
from pretrain.data.deduplication.line_deduplication import LineDeduplication
from pretrain.data.deduplication.paragraph_deduplication import ParagraphDeduplication

lines = st.sampled_from(["One line.", "one LINE", "a 12", "A 34!", "b", "", "  ", "---", "Été", "ete", "c\td", "  b  "])
documents = st.lists(st.lists(lines, max_size=7), min_size=1, max_size=8)
KINDS = {LineDeduplication: "\n", ParagraphDeduplication: "\n\n"}


def corpus_of(rows):
    return Dataset.from_list([{"text": text, "number": n} for n, text in enumerate(rows)])


def said(part):
    """What a part of these tests is compared as, put down by hand."""
    return {
        "One line.": "one line", "one LINE": "one line", "a 12": "a 00", "A 34!": "a 00", "b": "b", "  b  ": "b",
        "Été": "ete", "ete": "ete", "c\td": "cd",
    }.get(part, "")  # fmt: skip


def stays(rows, common):
    """Of each document the parts that stay, by counting them one after another."""
    if common:
        among = Counter(part for row in rows for part in set(map(said, row)))
        return [[part for part in row if not said(part) or among[said(part)] <= common] for row in rows]
    seen, kept = {""}, []
    for row in rows:
        kept.append([])
        for part in row:
            if said(part) not in seen or not said(part):
                kept[-1].append(part)
            seen.add(said(part))
    return kept


@pytest.mark.parametrize("cls", KINDS)
@settings(deadline=None, max_examples=60)
@given(rows=documents, common=st.integers(0, 3), size=st.integers(1, 5))
def test_what_stays_is_what_counting_leaves_in_any_batches(cls, rows, common, size):
    rows = [[part for part in row if part.strip()] or ["b"] for row in rows]
    corpus = corpus_of([KINDS[cls].join(row) for row in rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_mapped, "SHARD", size)
        patch.setattr(_parts, "FIRST_SLOTS", 2)
        patch.setattr(_parts, "MOVED", 3)
        after = cls(common=common, least_words=0)(corpus)
    left = {n: KINDS[cls].join(row) for n, row in enumerate(stays(rows, common)) if row}
    words = {n: text for n, text in left.items() if text.split()}
    assert dict(zip(after["number"], after["text"], strict=True)) == words


@pytest.mark.parametrize("cls", KINDS)
@settings(deadline=None, max_examples=40)
@given(rows=documents, common=st.integers(0, 2))
def test_a_second_time_nothing_goes_and_a_text_without_copies_is_as_it_was(cls, rows, common):
    corpus = corpus_of(["\n".join(row) for row in rows])
    method = cls(common=common, least_words=0)
    once = method(corpus)
    assert method(once).to_list() == once.to_list() or common  # of what is in fewer documents now the count is another
    single = cls(least_words=1000)(corpus.select([0]))
    parts = [said(part) for part in method.split(corpus[0]["text"]) if said(part)]
    if cls is LineDeduplication and len(parts) == len(set(parts)):
        assert single.to_list() == corpus.select([0]).to_list()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(1, 40) | st.sampled_from([2**63, 2**64 - 1, 64, 128, 192]), max_size=20), max_size=12)
)
def test_a_table_counts_as_a_counter_does(batches):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_parts, "FIRST_SLOTS", 2)
        patch.setattr(_parts, "MOVED", 5)
        table, counts = Table(), Counter()
        for batch in batches:
            key_U = np.unique(np.array(batch, np.uint64))
            assert table.add(key_U, 3).tolist() == [counts[int(key)] for key in key_U]
            counts.update({int(key): 3 for key in key_U})
    every = np.array(sorted(counts), np.uint64)
    assert table.counts(every).tolist() == [counts[int(key)] for key in every]


def test_parts_are_compared_without_case_digits_punctuation_and_accents():
    assert normal("Seite 12 — «Été», N° 3!\nｅ\u0301 ٣\t水。") == "seite 00  ete n° 0\nｅ 0水"
    assert LineDeduplication(least_words=0)(corpus_of(["Page 1 of 20:", "x\npage 3 (of 45)\ny"]))["text"][1] == "x\ny"


def test_gaps_are_closed_and_what_stands_beside_them_is_as_it_was():
    after = LineDeduplication(least_words=0)(
        corpus_of(["menu", "  first\n\nmenu\n\nlast  \n\n\nend\n", "menu\n\nbody"])
    )
    assert after["text"][:] == ["menu", "  first\n\nlast  \n\n\nend\n", "body"]
    rows = ["the licence", "  first\n\n\nthe Licence.\n \n    last\n\n\nend\n", "body\n\nthe licence\n"]
    after = ParagraphDeduplication(least_words=0)(corpus_of(rows))
    assert after["text"][:] == ["the licence", "  first\n\n\n    last\n\n\nend\n", "body"]


def test_with_common_a_part_goes_from_all_documents_or_from_none():
    rows = ["menu\na\nmenu", "menu\nb", "menu\nc", "a\nd"]
    kept = lambda common: LineDeduplication(common=common, least_words=0)(corpus_of(rows))["text"][:]  # noqa: E731
    assert kept(1) == ["b", "c", "d"] and kept(2) == ["a", "b", "c", "a\nd"] and kept(3) == rows


def test_too_little_is_dropped_with_its_reason_and_characters_are_accounted_for(tmp_path):
    rows = [
        "one two three\nmenu of all",
        "menu of all\nfour five",
        "menu of all\nsix seven eight",
        "nine",
        "",
        "menu of all",
    ]
    corpus, ledger = corpus_of(rows), Ledger(tmp_path)
    with working(tmp_path, ledger) as desk:
        after = LineDeduplication(least_words=3)(corpus)
        ledger.settle("line_deduplication", corpus, after)
    ledger.close()
    assert after["number"][:] == [0, 2, 3, 4]  # a short one that lost nothing stays
    assert ledger.funnel[0]["reasons"]["little left"]["documents"] == 2
    assert [example["measured"] for example in ledger.funnel[0]["examples"]] == [2, 0]
    (report,) = desk.reports
    counts = report["characters"]
    assert counts["before"] == sum(map(len, rows)) and counts["dropped"] == len("four five") and report["changed"] == 3
    assert counts["before"] - counts["cut"] - counts["dropped"] == sum(map(len, after["text"]))


@pytest.mark.parametrize("cls", KINDS)
def test_a_corpus_without_text_is_refused_and_documents_without_text_stay(cls):
    with pytest.raises(PretrainError, match="accepted: one with text"):
        cls()(Dataset.from_dict({"image": [1]}))
    rows = [None, "", None, "a"]
    assert cls()(Dataset.from_dict({"text": rows}))["text"][:] == rows
    assert cls(common=1)(Dataset.from_dict({"text": rows}))["text"][:] == rows

"""Runs of tokens that stand in a corpus before are cut out: as comparing all windows says, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain.core.errors import PretrainError
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.data import _mapped
from pretrain.data._dropped import Ledger
from pretrain.data._work import working
from pretrain.data.deduplication import _repeats
from pretrain.data.deduplication._repeats import END, firsts, later
from pretrain.data.deduplication.exact_substring_deduplication import ExactSubstringDeduplication
from pretrain.stages.data import Data

rows_of_numbers = st.lists(
    st.lists(st.integers(0, 2), max_size=30) | st.lists(st.integers(0, 70_000), max_size=30), min_size=1, max_size=5
)
A = "one two three four five six seven eight nine ten"
letters = st.text(st.sampled_from("abé水 .\U0001f600"), max_size=40)


def joined(rows):
    return np.array([number for row in rows for number in [*row, END]], np.int32)


def by_comparing(rows, length):
    """Which tokens lie in a window that is equal to one which ends before it begins, by comparing all with all."""
    tokens, gone = joined(rows).tolist(), [False] * sum(len(row) + 1 for row in rows)
    for here in range(len(tokens) - length + 1):
        window = tokens[here : here + length]
        if END not in window and any(tokens[before : before + length] == window for before in range(here - length + 1)):
            gone[here : here + length] = [True] * length
    return gone


@settings(deadline=None, max_examples=150)
@given(rows=rows_of_numbers, length=st.integers(1, 12), windows=st.sampled_from([1, 3, 1 << 20]))
@example(rows=[[0] * 25], length=4, windows=1)
@example(rows=[[1, 2, 3, 4], [1, 2, 3, 4]], length=4, windows=2)
def test_copies_are_those_of_comparing_all_windows(rows, length, windows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_repeats, "WINDOWS", windows)
        assert later(joined(rows), length).tolist() == by_comparing(rows, length)


@settings(deadline=None, max_examples=50)
@given(rows=rows_of_numbers, length=st.integers(1, 8))
def test_a_hash_that_is_the_same_for_all_changes_nothing(rows, length):
    token_N = joined(rows)
    wanted = firsts(token_N, length).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_repeats, "_candidates", lambda token_N, length: np.ones(len(token_N), bool))
        assert firsts(token_N, length).tolist() == wanted


@settings(deadline=None, max_examples=40)
@given(rows=rows_of_numbers, length=st.integers(1, 8))
def test_windows_are_alike_that_a_suffix_array_puts_side_by_side(rows, length):
    library = pytest.importorskip("pydivsufsort")
    token_N = joined([*rows, [7]])
    marked = token_N.astype(np.int64) + 1 + np.cumsum(token_N == END)  # each mark is another sign
    marked[token_N != END] = token_N[token_N != END] + len(rows) + 3
    marked = marked.astype(np.uint32)
    order = library.divsufsort(marked)
    shared = library.kasai(marked, order)
    classes, groups = {}, np.cumsum(np.concatenate([[True], shared[: len(order) - 1] < length]))
    for place, group in zip(order.tolist(), groups.tolist(), strict=True):
        classes.setdefault(group, []).append(place)
    wanted = np.full(len(token_N), END)
    for places in classes.values():
        if len(places) > 1:
            wanted[places] = min(places)
    assert firsts(token_N, length).tolist() == wanted.tolist()


@pytest.mark.parametrize("unit", ["words", "bytes"])
@settings(deadline=None, max_examples=40)
@given(rows=st.lists(letters, min_size=1, max_size=6), length=st.integers(2, 9), size=st.integers(1, 3))
def test_what_is_left_is_the_same_in_any_batches_and_no_character_is_parted(unit, rows, length, size):
    corpus = Dataset.from_list([{"text": text, "number": n} for n, text in enumerate(rows)])
    method = ExactSubstringDeduplication(length=length, unit=unit, least_words=0)
    whole = method(corpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_mapped, "SHARD", size)
        patch.setattr(_repeats, "WINDOWS", 2)
        assert method(corpus).to_list() == whole.to_list()
    for number, text in zip(whole["number"], whole["text"], strict=True):
        rest = iter(rows[number])
        assert all(letter in rest for letter in text)  # what is left is a part of what was there, in its order


def test_the_first_copy_stays_and_a_run_that_goes_on_from_itself_stays_once():
    cut = lambda rows, **fields: ExactSubstringDeduplication(least_words=0, **fields)(  # noqa: E731
        Dataset.from_dict({"text": rows})
    )["text"][:]
    assert cut([f"{A}.\nEnd", f"Begin: {A}.\n  More", A.replace(" ", "\n")], length=8) == [f"{A}.\nEnd", "Begin: More"]
    assert cut(["ab " * 30 + "end"], length=10) == ["ab " * 10 + "end"]
    assert cut(["xy水火xy", "zy水火x"], length=8, unit="bytes") == ["xy水火xy", "z"]
    assert cut(["xx水", "yy氵水", "zz水"], length=3, unit="bytes") == ["xx水", "yy氵", "zz"]
    assert cut(["水xx火", "水xx灰"], length=4, unit="bytes") == ["水xx火", "灰"]  # two bytes of a third one agree


def test_tokens_are_those_of_a_tokenizer(prepared):
    folder = str(prepared / "tokenizer")
    tokenizer = load_tokenizer(prepared / "tokenizer")
    passage = "def main() -> None:  # 火 and é are of several tokens\n    return parser.parse_args()\n"
    count = len(tokenizer(passage, add_special_tokens=False)["input_ids"])
    rows = [f"x = 1\n{passage}", f"import os\n\n{passage}y = 2\n", f"{passage[:30]}, not all of it"]
    method = ExactSubstringDeduplication(tokenizer=folder, length=count - 4, least_words=0)
    after = method(Dataset.from_dict({"text": rows}))["text"][:]
    assert after[0] == rows[0] and after[2] == rows[2]
    assert after[1].startswith("import os") and "parse_args" not in after[1] and "y = 2" in after[1]
    longer = ExactSubstringDeduplication(tokenizer=folder, length=count + 5, least_words=0)
    assert longer(Dataset.from_dict({"text": rows}))["text"][:] == rows
    with pytest.raises(PretrainError, match="accepted: without a tokenizer"):
        ExactSubstringDeduplication(tokenizer=folder, unit="bytes")


def test_too_little_is_dropped_and_the_memory_is_told(tmp_path):
    corpus, ledger = (
        Dataset.from_dict({"text": [A, f"so {A}", f"{A} and a good deal more of it", None, "short"]}),
        Ledger(tmp_path),
    )
    with working(tmp_path, ledger) as desk:
        after = ExactSubstringDeduplication(length=8, least_words=5)(corpus)
        ledger.settle("exact_substring_deduplication", corpus, after)
    ledger.close()
    assert after["text"][:] == [A, "and a good deal more of it", None, "short"]
    assert ledger.funnel[0]["reasons"]["little left"]["documents"] == 1
    counts = desk.reports[0]["characters"]
    assert counts["before"] - counts["cut"] - counts["dropped"] == sum(len(text or "") for text in after["text"])
    few, many = (ExactSubstringDeduplication(unit=unit).memory(1e9) for unit in ("words", "bytes"))
    assert 1e9 < few < many < 30e9
    with pytest.raises(PretrainError, match="accepted: one with text"):
        ExactSubstringDeduplication()(Dataset.from_dict({"image": [1]}))


def test_a_plan_counts_the_memory_of_operations_that_hold_the_corpus_at_once(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 4000)
    (tmp_path / "b.txt").write_text("other text\n" * 4000)

    def planned(*operations):
        return Data(name="corpus", sources=[str(tmp_path)], operations=list(operations)).estimate({}).memory_bytes

    exact = {"method": "exact_substring_deduplication", "unit": "bytes"}
    assert planned(exact, "deduplicate") > planned("deduplicate") + 40 * 60_000

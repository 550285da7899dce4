"""Filters of web text: each rule at its threshold, tags that are read and not measured again, the same in any batches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain.core.errors import PretrainError
from pretrain.data import _mapped
from pretrain.data._dropped import Ledger
from pretrain.data._work import working
from pretrain.data.filters import _filter
from pretrain.data.filters._words import is_unspaced, words
from pretrain.data.filters.c4_quality import C4Quality
from pretrain.data.filters.column_filter import ColumnFilter
from pretrain.data.filters.fineweb_quality import FinewebQuality
from pretrain.data.filters.gopher_quality import GopherQuality
from pretrain.data.filters.gopher_repetition import DUPLICATE, TOP, GopherRepetition, of_n_grams, repeated

PROSE = "The river that flows to the sea has been there with us and the people of the valley for years. "
FILTERS = (GopherQuality, GopherRepetition, FinewebQuality)
CHINESE = "我们在河边住了很多年，看见水流向大海。" * 3
texts = st.lists(
    st.lists(st.sampled_from(["the", "of", "wood", "#", "...", "\n", "\n\n", "- ", "end.", "a" * 31]), max_size=60).map(
        " ".join
    ),
    min_size=1,
    max_size=12,
)


def why(method, text):
    """The reason for which a document is dropped; empty where it is kept."""
    return method.broken(np.array([method.measure(text)]))[2][0]


def corpus_of(rows):
    return Dataset.from_list([{"text": text, "number": n} for n, text in enumerate(rows)])


def test_words_are_what_spaces_and_marks_part_and_characters_where_there_are_no_spaces():
    assert words("Don't say e.g. 3.14, well-known... ==> a_b") == [
        "Don't", "say", "e.g", ".", "3.14", ",", "well", "-", "known", "...", "==", ">", "a_b",
    ]  # fmt: skip
    assert words("水 abc大海。") == ["水", "abc", "大", "海", "。"] and words(" \n") == []
    assert words("पंक्ति e\u0301te\u0301 है।") == ["पंक्ति", "e\u0301te\u0301", "है", "।"]  # with the marks after letters
    assert [is_unspaced(text) for text in ("", "abc", "abc 水", "水大 a", "สวัสดี", "Straße")] == [
        False, False, False, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text, reason",
    [
        (PROSE * 4, ""),
        (PROSE * 2, "words"),
        ("to be of it a " * 20, "mean word length"),
        (("the of " + "a" * 40 + " ") * 30, "mean word length"),
        (PROSE * 4 + "# " * 11, "hash marks"),
        (PROSE * 4 + "wait… " * 15, "ellipses"),
        ("\n".join("- " + PROSE for _ in range(4)), "bullet lines"),
        ((PROSE + "end" * 5 + "...\n") * 2 + PROSE * 2, "ellipsis lines"),
        (PROSE * 4 + "12345 " * 40, "words with letters"),
        ("Der Fluss der zum Meer hin geht war schon immer im Tal gewesen. " * 5, "stop words"),
    ],
)
def test_gopher_drops_by_the_first_rule_that_is_broken(text, reason):
    assert why(GopherQuality(), text) == reason


def test_a_number_at_a_threshold_is_kept():
    measured = dict(zip(GopherQuality.numbers, GopherQuality().measure(PROSE * 4), strict=True))
    at = GopherQuality(
        least_words=int(measured["words"]), most_words=int(measured["words"]),
        least_word_length=measured["word_length"], most_word_length=measured["word_length"],
        letter_words=measured["letter_words"], stop_words=int(measured["stop_words"]),
    )  # fmt: skip
    assert why(at, PROSE * 4) == "" and measured["stop_words"] == 6
    assert why(GopherQuality(least_words=int(measured["words"]) + 1), PROSE * 4) == "words"


def test_scripts_without_spaces_are_dropped_by_no_rule_about_words():
    assert why(GopherQuality(), CHINESE) == "" and why(GopherQuality(), CHINESE[:40]) == "words"
    assert np.isnan(GopherRepetition().measure(CHINESE)[4:]).all()
    lines = CHINESE.replace("。", "。\n")
    assert why(FinewebQuality(short=5), lines) == "characters of duplicate lines"
    assert why(FinewebQuality(short=5, line_characters=1.0, newlines=0.0), lines) == ""
    assert C4Quality(sentences=3).cleaned(CHINESE) == (CHINESE, "", 3)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("a\n\nb\n\na\n\na", "duplicate paragraphs"),
        ("first long paragraph\n\nb\n\nc\n\nd\n\nfirst long paragraph", "characters of duplicate paragraphs"),
        ("a\nb\na\nb\nb\nq", "duplicate lines"),
        ("this is a line\nb\nc\nd\nthis is a line\ne\nf", "characters of duplicate lines"),
        (" ".join(f"we say w{n}" for n in range(40)), "top 2 gram"),
        (" ".join(f"w{n}" for n in range(90)), ""),
        (" ".join(f"w{n}" for n in [*range(90), *range(40)]), "duplicate 5 grams"),
        (" ".join(f"w{n} w{n + 1} w{n + 2} w{n + 3}" for n in range(90)), ""),
    ],
)
def test_repetition_drops_by_the_first_rule_that_is_broken(text, reason):
    assert why(GopherRepetition(), text) == reason


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["a", "bb", "ccc", "d"]), max_size=60)
    | st.lists(st.sampled_from(["a", "bb"]), max_size=40)
)
@example(["a"] * 12)
@example(["a", "bb"] * 8)
def test_shares_of_n_grams_are_those_of_counting_them_all(text):
    def top(n):
        grams = [" ".join(text[i : i + n]) for i in range(len(text) - n + 1)]
        gram, count = Counter(grams).most_common(1)[0] if grams else ("", 0)
        return len(gram) * count

    def duplicates(n):
        seen, place, characters = set(), 0, 0
        while place + n <= len(text):
            gram = tuple(text[place : place + n])
            characters += len("".join(gram)) if gram in seen else 0
            place += n if gram in seen else 1
            seen.add(gram)
        return characters

    assert of_n_grams(text) == [*map(top, TOP), *map(duplicates, DUPLICATE)]
    later = [part for n, part in enumerate(text) if part in text[:n]]
    assert repeated(text) == (len(later), len("".join(later)))


@pytest.mark.parametrize(
    "text, reason",
    [
        ("\n \n", "empty"),
        ("\n".join(["a line without an end that is long enough"] * 9), "lines that end"),
        ("\n".join(["A line that ends and is long enough.", *(f"{n}." for n in range(9))]), "short lines"),
        ("\n".join(["One and the same long line, again and again."] * 2), "characters of duplicate lines"),
        ("\n".join(f"{n}{'x' * 40}." for n in range(9)), "line ends a word"),
        ("यह एक लंबी पंक्ति है जो समाप्त होती है।\n" + PROSE, ""),
    ],
)
def test_fineweb_drops_by_the_first_rule_that_is_broken(text, reason):
    assert why(FinewebQuality(), text) == reason


def test_c4_keeps_lines_that_are_sentences_and_documents_that_have_enough():
    lines = [
        "  This is a sentence[3]. And another one!  ", "Menu", "No end here", "To be continued...", "Two words.",
        "Enable JavaScript to go on.", "We use cookies on this site.", "x" * 1001 + " is a long one.", 'She said "yes"',
    ]  # fmt: skip
    kept = 'This is a sentence. And another one!\nShe said "yes"'
    assert C4Quality(sentences=3).cleaned("\n".join(lines)) == (kept, "", 3)
    assert C4Quality(sentences=4).cleaned("\n".join(lines))[1] == "sentences"
    assert C4Quality().cleaned("Lorem Ipsum dolor sit.")[1] == "lorem ipsum"
    assert C4Quality().cleaned("This has { in it.")[1] == "curly bracket"
    corpus = corpus_of(["\n".join(lines), "nothing", PROSE * 5])
    after = C4Quality(sentences=3)(corpus)
    assert list(after["text"]) == [kept, (PROSE * 5).strip()] and list(after["number"]) == [0, 2]


@pytest.mark.parametrize("cls", FILTERS)
@settings(deadline=None, max_examples=15)
@given(rows=texts, size=st.integers(1, 5))
def test_a_filter_keeps_the_same_in_any_batches_and_a_second_time_nothing_goes(cls, rows, size):
    method = cls(least_words=5) if cls is GopherQuality else cls()
    corpus = corpus_of(rows)
    kept = method(corpus)
    assert [n for n in kept["number"]] == [n for n, text in enumerate(rows) if not why(method, text)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_mapped, "SHARD", size)
        assert method(corpus).to_list() == kept.to_list()
    assert method(kept).to_list() == kept.to_list()


@pytest.mark.parametrize("cls", FILTERS)
def test_tags_are_read_and_nothing_is_measured_again(cls, monkeypatch, tmp_path):
    rows = [PROSE * 4, "", "a\nb\na\nb\nb\nq", PROSE * 2 + "# # #", CHINESE, "- a\n- b\nend.\n"]
    corpus, plain = corpus_of(rows), cls()
    tagged = cls(tag=True)(corpus)
    assert tagged.column_names == [*corpus.column_names, *plain.columns] and list(tagged["text"]) == rows
    again = cls(tag=True)(tagged)
    assert again.to_list() == tagged.to_list()
    monkeypatch.setattr(cls, "measure", None)
    assert list(plain(tagged)["number"]) == [n for n in range(len(rows)) if n in plain_kept(cls, corpus, monkeypatch)]
    number = plain.columns[0]
    strict = ColumnFilter(column=number, least=float(max(v for v in tagged[number] if v is not None)))
    assert 0 < len(strict(tagged)) < len(rows)


def plain_kept(cls, corpus, monkeypatch):
    """What a filter keeps that measures for itself."""
    monkeypatch.undo()
    return list(cls()(corpus)["number"])


def test_what_was_measured_before_an_interrupt_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(_mapped, "SHARD", 2)
    corpus, measured = corpus_of([PROSE * 4, "short", PROSE * 5, "#", "x"]), []
    plain = GopherQuality.measure

    def stops(self, text):
        measured.append(text)
        if text == "x" and len(measured) < 6:
            raise KeyboardInterrupt
        return plain(self, text)

    monkeypatch.setattr(GopherQuality, "measure", stops)
    for expected in (5, 6):
        ledger = Ledger(tmp_path / "table")
        with working(tmp_path / "work", ledger):
            try:
                kept = GopherQuality()(corpus)
            except KeyboardInterrupt:
                assert expected == 5
        ledger.close()
        assert len(measured) == expected
    assert list(kept["number"]) == [0, 2] and ledger.drops == 3


def test_percentiles_are_of_bounded_rows_from_the_whole_length(monkeypatch):
    monkeypatch.setattr(_filter, "SPREAD", 10)
    values = np.arange(100.0)[:, None]
    for size in (1, 7, 100):
        spread = _filter.Spread()
        for start in range(0, 100, size):
            spread.add(values[start : start + size])
        assert [row[0] for row in spread.rows] == [0, 16, 32, 48, 64, 80, 96]


def test_a_column_decides_by_numbers_or_by_values_and_says_why(tmp_path):
    rows = [
        {"text": "t", "id": str(n), "score": s, "kind": k}
        for n, (s, k) in enumerate([(1.0, "a"), (2.0, "b"), (None, None), (3.0, "c")])
    ]
    corpus, ledger = Dataset.from_list(rows), Ledger(tmp_path)
    with working(tmp_path, ledger):
        assert list(ColumnFilter(column="score", least=2.0, most=2.0)(corpus)["id"]) == ["1"]
        ledger.settle("column_filter", corpus, corpus.select([1]))
        assert list(ColumnFilter(column="score", least=3.0, missing=True)(corpus)["id"]) == ["2", "3"]
        assert list(ColumnFilter(column="kind", values=("a", "c"))(corpus)["id"]) == ["0", "3"]
    assert set(ledger.funnel[0]["reasons"]) == {"low score", "high score", "no score"}
    ledger.close()
    for fields, words_ in (
        ({"column": "scor", "least": 1.0}, "did you mean 'score'"),
        ({"column": "kind", "most": 1.0}, "accepted: numbers, or values"),
    ):
        with pytest.raises(PretrainError, match=words_):
            ColumnFilter(**fields)(corpus)
    with pytest.raises(PretrainError, match="either values"):
        ColumnFilter(column="score", least=1.0, values=("a",))


def test_a_corpus_without_text_is_refused_in_one_line():
    for method in (GopherQuality(), C4Quality(), GopherQuality(tag=True)):
        with pytest.raises(PretrainError, match="accepted: one with text") as error:
            method(Dataset.from_dict({"image": [1]}))
        assert "\n" not in str(error.value)

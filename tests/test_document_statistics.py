"""Numbers of documents are written once, and thresholds on them change without being measured again."""

from __future__ import annotations

import pytest
from datasets import Dataset

from pretrain.core.errors import PretrainError
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.data import _mapped
from pretrain.data._work import working
from pretrain.data.filters.column_filter import ColumnFilter
from pretrain.data.filters.document_statistics import DocumentStatistics
from pretrain.data.filters.gopher_quality import GopherQuality

ROWS = ["It's 3.14, isn't it?", "", "--- ###", "水 abc", None, "one two\nthree"]


def test_numbers_are_those_of_the_words_and_null_where_there_are_none():
    tagged = DocumentStatistics()(Dataset.from_dict({"text": ROWS}))
    numbers = [[row[column] for column in DocumentStatistics().columns] for row in tagged]
    assert numbers == [
        [20, 4, pytest.approx((4 + 4 + 5 + 2) / 4), 3 / 6], [0, 0, None, None], [7, 0, None, 0], [5, 2, 2, 1], [0, 0, None, None],
        [13, 3, pytest.approx(11 / 3), 1],
    ]  # fmt: skip
    gopher = GopherQuality(tag=True)(tagged)
    for ours, theirs in (("words", "words"), ("letter_words", "letter_words")):
        assert gopher[f"gopher_quality_{theirs}"][:] == tagged[f"document_statistics_{ours}"][:]


def test_thresholds_change_and_nothing_is_measured_again(monkeypatch, tmp_path):
    monkeypatch.setattr(_mapped, "SHARD", 2)
    with working(tmp_path) as desk:
        tagged = DocumentStatistics()(Dataset.from_dict({"text": ROWS}))
    assert desk.reports[0]["tagged"] == 6
    assert desk.reports[0]["percentiles"]["document_statistics_words"]["100"] == 4
    monkeypatch.setattr(DocumentStatistics, "measured", None)
    for least, kept in ((3, [0, 5]), (4, [0])):
        column = ColumnFilter(column="document_statistics_words", least=least)
        assert column(tagged)["text"][:] == [ROWS[n] for n in kept]


def test_a_second_time_changed_texts_are_measured_anew():
    tagged = DocumentStatistics()(Dataset.from_dict({"text": ROWS[:1]}))
    changed = tagged.map(lambda row: {"text": row["text"] + " Yes"})
    assert DocumentStatistics()(changed)["document_statistics_words"][:] == [5]


def test_tokens_are_the_tokenizers_and_languages_those_of_the_method(prepared):
    tagged = DocumentStatistics(tokenizer=str(prepared / "tokenizer"))(Dataset.from_dict({"text": ROWS}))
    tokenizer = load_tokenizer(prepared / "tokenizer")
    expected = [len(tokenizer(text or "", add_special_tokens=False)["input_ids"]) for text in ROWS]
    assert tagged["document_statistics_tokens"][:] == expected
    pytest.importorskip("py3langid")
    method = DocumentStatistics(language=True)
    english = method(Dataset.from_dict({"text": ["The house stands at the edge of the forest."]}))
    assert english["language"][:] == ["en"] and english.column_names == ["text", *method.adds]


def test_a_corpus_without_text_is_refused():
    with pytest.raises(PretrainError, match="accepted: one with text"):
        DocumentStatistics()(Dataset.from_dict({"image": [1]}))

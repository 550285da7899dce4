"""Taggers of a document's age and of its likeness to reference texts, and what column_filter makes of them."""

from __future__ import annotations

from datetime import UTC, date, datetime

import numpy as np
import pytest
from datasets import Dataset

from pretrain.core.errors import PretrainError
from pretrain.corpus.store import Corpus
from pretrain.data._work import working
from pretrain.data.filters.column_filter import ColumnFilter
from pretrain.data.filters.document_age import YEAR, DocumentAge, year_of
from pretrain.data.filters.reference_classifier import ReferenceClassifier


@pytest.mark.parametrize(("value", "year"), [
    ("2019", 2019), (2019, 2019), (2019.25, 2019.25), ("2019-07-02", 2019 + 182 / 365), ("20190702", 2019 + 182 / 365), ("2020/12/31", 2020 + 365 / 366),
    ("1900-12-31", 1900 + 364 / 365), ("2000-12-31", 2000 + 365 / 366), ("2019-07", 2019 + 181 / 365), (" 2019-07-02T23:59:59Z", 2019 + 182 / 365), (date(2019, 1, 1), 2019),
    (datetime(2019, 7, 2, 12, tzinfo=UTC), 2019 + 182 / 365), (None, None), ("", None), ("soon", None), ("2019-13-01", None), ("2019-02-30", None), ("0000", None), (19, None), (True, None),
    ("201907021", None), (float("nan"), None),
])  # fmt: skip
def test_a_date_is_its_year_and_the_share_of_it_gone_by(value, year):
    assert year_of(value) == year


def test_a_period_is_taken_by_the_column_filter(tmp_path):
    rows = [
        {"text": str(n), "date": each, YEAR: 1.0}
        for n, each in enumerate(["2012-12-31", "2013", "2015-06-01", "2016-01-01", None, "once"])
    ]
    with working(tmp_path) as desk:
        tagged = DocumentAge()(Dataset.from_list(rows))
    assert tagged["text"][:] == [row["text"] for row in rows] and tagged.column_names == ["text", "date", YEAR]
    assert (desk.reports[0]["without_date"], desk.reports[0]["unread"]) == (1, 1)
    assert ColumnFilter(column=YEAR, least=2013, most=2015.999)(tagged)["text"][:] == ["1", "2"]
    stamps = Dataset.from_dict({"text": ["a"], "made": [datetime(2021, 1, 1)]})
    assert DocumentAge(date="made")(stamps)[YEAR][:] == [2021.0]
    with pytest.raises(PretrainError, match=r"no column 'dates' \(did you mean 'date'\?\)"):
        DocumentAge(date="dates")(Dataset.from_list(rows))


@pytest.fixture(scope="module")
def texts(prepared):
    """Of a corpus of stories, and noise."""
    good = [d["text"] for d in Corpus(prepared / "corpus").documents("test")][:40]
    rng = np.random.default_rng(0)
    noise = [" ".join(rng.choice(["zq", "vx", "click", "here", "buy", "77", "now"], 60)) for _ in range(40)]
    return good, noise


def test_it_tells_what_is_like_the_reference_with_probabilities(prepared, texts):
    good, noise = texts
    corpus = Dataset.from_dict({"text": [*good, *noise], "n": [*range(len(good) + 40)]})
    operation = ReferenceClassifier(positive=(str(prepared / "corpus"),))
    tagged = operation(corpus)
    score_N = np.array(tagged["reference_classifier_quality"][:])
    assert tagged["n"][:] == corpus["n"][:] and 0 <= score_N.min() < score_N.max() <= 1
    assert np.median(score_N[: len(good)]) > np.median(score_N[len(good) :])
    assert score_N.tolist() == operation(tagged)["reference_classifier_quality"][:]  # measured anew, and the same
    kept = ColumnFilter(column="reference_classifier_quality", least=float(score_N[len(good) :].max()) + 1e-9)(tagged)
    assert len(kept) > 0 and max(kept["n"][:]) < len(good)


def test_both_sides_are_drawn_from_the_corpora_that_are_given(prepared, texts, tmp_path):
    same = str(prepared / "corpus")
    operation = ReferenceClassifier(positive=(same, same), negative=(same,), column="toxicity", documents=7)
    with working(tmp_path) as desk:
        tagged = operation(Dataset.from_dict({"text": texts[1][:3]}))
    assert tagged.column_names == ["text", "reference_classifier_toxicity"]
    assert (desk.reports[0]["positive"], desk.reports[0]["negative"]) == (7, 7)
    own = ReferenceClassifier(positive=(same,), documents=7)
    with working(tmp_path) as desk:
        own(Dataset.from_dict({"text": texts[1][:3]}))
    assert (desk.reports[0]["positive"], desk.reports[0]["negative"]) == (7, 3)


def test_no_reference_and_a_column_that_is_no_word_are_refused():
    with pytest.raises(PretrainError, match="positive: accepted: one corpus or more"):
        ReferenceClassifier(positive=())
    with pytest.raises(PretrainError, match="column 'a b': accepted: a word"):
        ReferenceClassifier(positive=("x",), column="a b")

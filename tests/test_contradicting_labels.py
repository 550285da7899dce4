"""Which texts of a corpus stand with more than one label: counted by the column, whatever it is called."""

from __future__ import annotations

import random

from pretrain.corpus import payload
from pretrain.corpus.payload import Labels


def counted(documents):
    labels = Labels()
    assert list(labels.over(documents)) == documents
    return labels.contradicting


def rows(count=40):
    return [{"text": f"text {n}", "package": "ab"[n % 2], "id": str(n), "domain": "t.csv"} for n in range(count)]


def test_each_text_counts_once_by_the_column_that_differs():
    again = [{"text": "text 0", "package": "b", "id": "x", "domain": "t.csv"}] * 3
    again += [{"text": "text 2", "package": "c", "id": "y"}, {"text": "text 3", "package": "b", "id": "z"}]
    assert counted(rows() + again) == {"package": {"texts": 2, "kept": False}}
    renamed = [{"label" if name == "package" else name: value for name, value in row.items()} for row in rows() + again]
    assert counted(renamed) == {"label": {"texts": 2, "kept": True}}


def test_numbers_are_told_apart_and_blanks_say_nothing():
    given = [{"text": str(n), "stars": n % 5} for n in range(40)]
    assert counted([*given, {"text": "0", "stars": 3}, {"text": "1", "stars": 1}]) == {
        "stars": {"texts": 1, "kept": False}
    }
    assert not counted([*given, {"text": "0", "stars": None}, {"text": "0", "stars": " "}])


def test_a_column_that_names_rows_or_holds_texts_is_no_label():
    given = rows() + [row | {"package": "a", "key": f"other {n}"} for n, row in enumerate(rows())]
    given = [row | {"key": row.get("key", f"key {n}"), "notes": "x" * (61 + n)} for n, row in enumerate(given)]
    assert counted(given) == {"package": {"texts": 20, "kept": False}}


def test_of_texts_without_labels_nothing_is_kept_in_memory(monkeypatch):
    labels = Labels()
    list(labels.over([{"text": str(random.random()), "domain": "a", "id": str(n)} for n in range(100)]))
    assert not labels.first and not labels.contradicting
    monkeypatch.setattr(payload, "REMEMBERED", 10)
    labels = Labels()
    list(labels.over(rows(100)))
    assert len(labels.first) == 10


def test_of_numbers_that_are_learnt_every_text_with_two_is_counted_however_many_there_are():
    texts = [{"text": f"words {n % 150}", "price": n / 7, "views": n / 3} for n in range(200)]
    labels = Labels(["price"])
    list(labels.over(texts))
    assert labels.contradicting == {"price": {"texts": 50, "kept": False}}

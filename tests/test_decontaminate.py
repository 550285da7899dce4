"""Decontamination: no passage of a held-out document is trained on, and boilerplate does not count."""

from __future__ import annotations

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.core.errors import PretrainError
from pretrain.data.deduplication.decontaminate import Decontaminate


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return corpus_with(tmp_path_factory.mktemp("held"), ["one two three four five six", "A short, one!"])


def corpus_with(folder, texts):
    """A corpus whose held-out splits hold these texts; one of its own is trained on."""
    place = folder / "c"
    for split, chosen in (("train", ["trained on"]), ("validation", texts[:1]), ("test", texts[1:])):
        (place / split).mkdir(parents=True)
        Dataset.from_list([{"text": t, "domain": "d"} for t in chosen]).to_parquet(place / split / "part-00000.parquet")
    (place / "corpus.json").write_text("{}")
    return place


def kept(texts, held_out, **fields):
    corpus = Dataset.from_list([{"text": text, "domain": "d"} for text in texts])
    return Decontaminate(corpora=(str(held_out),), **fields)(corpus)["text"]


def test_a_document_with_a_held_out_passage_goes_and_others_stay_in_order(held_out):
    texts = [
        "b",
        "it says: ONE, two; three four. And more",
        "two three four five",
        "one two three 4 five",
        "trained on",
    ]
    assert list(kept(texts, held_out, length=4)) == ["b", "one two three 4 five", "trained on"]
    assert list(kept(texts, held_out, length=5)) == [texts[i] for i in (0, 1, 2, 3, 4)]


def test_copies_of_a_short_held_out_document_go_and_what_quotes_it_stays(held_out):
    texts = ["a short\none", "it was a short one", "A SHORT ONE"]
    assert list(kept(texts, held_out)) == ["it was a short one"]


def test_passages_of_many_documents_are_boilerplate(held_out):
    texts = [f"{n} one two three four {n}" for n in range(4)] + ["three four five six"]
    assert len(kept(texts, held_out, length=4, common=4)) == 0
    assert list(kept(texts, held_out, length=4, common=3)) == texts[:4]
    copies = ["One two three four five six"] * 4
    assert list(kept([*copies, "x"], held_out, length=4, common=3)) == ["x"]


@settings(max_examples=40)
@given(
    st.lists(st.text("ab ", max_size=12), min_size=1, max_size=6),
    st.lists(st.text("ab ", max_size=12), min_size=1, max_size=6),
    st.integers(1, 4),
)
def test_what_is_left_shares_no_run_with_what_is_held_out(tmp_path_factory, texts, judged, length):
    held = corpus_with(tmp_path_factory.mktemp("held"), judged)
    rows = [f"{text} end{number}" for number, text in enumerate(texts)]

    def runs(text):
        words = text.split()
        return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}

    passages = set().union(*map(runs, judged))
    assert list(kept(rows, held, length=length, common=1000)) == [r for r in rows if not runs(r) & passages]


def test_what_is_no_corpus_or_has_no_text_is_named(held_out, tmp_path):
    with pytest.raises(PretrainError, match="accepted: at least one data stage"):
        Decontaminate(corpora=())
    with pytest.raises(PretrainError, match=f"{tmp_path} is not a corpus"):
        Decontaminate(corpora=(str(tmp_path),))(Dataset.from_list([{"text": "a"}]))
    with pytest.raises(PretrainError, match="a corpus with image; accepted: one with text"):
        Decontaminate(corpora=(str(held_out),))(Dataset.from_list([{"image": "a"}]))

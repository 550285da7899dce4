"""Self-play: what the model answers is what its answers are to be preferred to."""

from __future__ import annotations

import pytest
from datasets import Dataset
from servers import completion, serving

from pretrain.core.errors import PretrainError
from pretrain.corpus.examples import Examples
from pretrain.corpus.store import Corpus, write_corpus
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.data._work import working
from pretrain.data.generation.spin import Spin

ROWS = [
    {"text": "What is one and one?", "target": "two", "domain": "a", "id": "x"},
    {"text": "Which is red: a rose or a leaf?", "target": "a rose", "domain": "a", "id": "y"},
    {"text": "And three?", "target": "three", "domain": "b", "id": "z"},
    {"text": "", "target": "nothing was asked", "domain": "b", "id": "0"},
    {"text": "Say no.", "target": "no", "domain": "b", "id": "1"},
]
SAID = {"What is one and one?": "eleven", "Which is red: a rose or a leaf?": "a leaf", "And three?": " three\n", "Say no.": "I'm sorry"}  # fmt: skip


@pytest.fixture
def served():
    with serving() as made:
        made.answer = lambda body: completion(SAID[body["messages"][-1]["content"]])
        yield made


def test_the_models_answers_are_rejected_for_the_true_ones(served, tmp_path) -> None:
    corpus = Dataset.from_list(ROWS)
    with working(tmp_path) as desk:
        made = Spin(server=served.url, served="m", system="Be brief.")(corpus)
    assert made.to_list() == [
        ROWS[0] | {"chosen": "two", "rejected": "eleven"}, ROWS[1] | {"chosen": "a rose", "rejected": "a leaf"},
    ]  # fmt: skip
    assert all(body["messages"][0] == {"role": "system", "content": "Be brief."} for *_, body in served.seen)
    (report,) = desk.reports
    assert (report["asked"], report["used"], report["dropped"]) == (4, 3, {"refusal": 1})


def test_documents_that_are_held_out_have_no_pairs_and_are_left_out(tmp_path, prepared) -> None:
    rows = [{"text": f"some text number {n}", "id": str(n), "domain": "d"} for n in range(40)]

    def paired(corpus):
        return corpus.add_column("chosen", ["yes"] * len(corpus)).add_column("rejected", ["no"] * len(corpus))

    write_corpus(rows, tmp_path / "corpus", validation=0.2, test=0.2, near_duplicates=None, operations=[paired])
    corpus = Corpus(tmp_path / "corpus")
    tokenizer = load_tokenizer(prepared / "tokenizer")
    train, held_out = (
        Examples(corpus, split, tokenizer, ("text", "chosen", "rejected")) for split in ("train", "validation")
    )
    assert len(train) == len(corpus.split("train")) > 10 and len(held_out) == 0 < len(corpus.split("validation"))


def test_a_second_iteration_takes_the_place_of_the_first(served) -> None:
    corpus = Dataset.from_list(ROWS[:2]).add_column("chosen", ["", ""]).add_column("rejected", ["old", "older"])
    assert Spin(server=served.url, served="m")(corpus)["rejected"][:] == ["eleven", "a leaf"]


def test_a_column_that_is_not_there_is_one_clear_error(served) -> None:
    with pytest.raises(PretrainError, match=r"spin: no column 'targets' \(did you mean 'target'"):
        Spin(server=served.url, served="m", target="targets")(Dataset.from_list(ROWS))


def test_what_it_has_no_use_for_is_refused() -> None:
    with pytest.raises(PretrainError, match="spin: domain 'web': accepted: none"):
        Spin(server="http://localhost:1/v1", served="m", domain="web")

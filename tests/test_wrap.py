"""WRAP: each passage once more in a style, introductions cut, the real beside the synthetic."""

from __future__ import annotations

from collections import Counter

import pytest
from datasets import Dataset
from servers import completion, serving

from pretrain import engine
from pretrain.core.errors import PretrainError
from pretrain.core.files import read_json
from pretrain.corpus.store import Corpus
from pretrain.data._chunks import chunks
from pretrain.data._work import working
from pretrain.data.generation.wrap import Wrap, without_introduction
from pretrain.recipe import check

LONG = " ".join(f"Sentence number {n} says that the harbour was quiet in week {n}." for n in range(1, 30))
ROWS = [
    {"text": LONG, "domain": "a", "id": "x", "label": 1},
    {"text": "", "domain": "a", "id": "y", "label": 2},
    {"text": "Two cats sat on a wall. They were grey.", "domain": "b", "id": "z", "label": None},
]  # fmt: skip


@pytest.fixture
def served():
    with serving() as made:
        made.answer = lambda body: completion("Here is a paraphrase:\n\nIn other words: " + passage(body)[::-1])
        yield made


def passage(body):
    """What is to be rephrased."""
    return body["messages"][-1]["content"].partition(":\n")[2]


def test_each_passage_is_written_anew_after_the_real_document(served):
    made = Wrap(server=served.url, served="m", tokens=60)(Dataset.from_list(ROWS))
    passages = chunks(LONG, 60)
    assert len(passages) > 3 and [row["id"] for row in made] == [
        "x", *(f"x#medium-{n}" for n in range(len(passages))), "y", "z", "z#medium-0",
    ]  # fmt: skip
    texts = ["In other words: " + each.strip()[::-1] for each in passages]
    assert [row["text"] for row in made][: len(texts) + 1] == [LONG, *texts]
    assert [row["label"] for row in made] == [1] * (len(texts) + 1) + [2, None, None]
    assert made.features == Dataset.from_list(ROWS).features
    assert sorted(map(passage, (body for *_, body in served.seen))) == sorted(
        [*(each.strip() for each in passages), ROWS[2]["text"]]
    )


def test_real_and_synthetic_are_as_many_passages_and_either_may_stand_alone(served):
    corpus = Dataset.from_list(ROWS)
    both = Wrap(server=served.url, served="m", tokens=60, domain="synthetic")(corpus)
    alone = Wrap(server=served.url, served="m", tokens=60, real=False)(corpus)
    assert both.filter(lambda row: row["domain"] != "synthetic").to_list() == corpus.to_list()
    synthetic = both.filter(lambda row: row["domain"] == "synthetic")
    assert synthetic["text"][:] == alone["text"][:] and Counter(alone["domain"][:]) == {"a": len(alone) - 1, "b": 1}
    assert len(alone) == sum(len(chunks(row["text"], 60)) for row in ROWS)


def test_a_style_is_drawn_by_the_passage_and_the_seed(served):
    operation = Wrap(server=served.url, served="m", styles=("easy", "medium", "hard", "qa"), tokens=20)
    passages = chunks(LONG * 20, 20)
    drawn = [operation.style(each) for each in passages]
    assert set(drawn) == {"easy", "medium", "hard", "qa"} and min(Counter(drawn).values()) > 0.5 * len({*passages}) / 8
    operation(Dataset.from_list(ROWS[::-1]))
    words = {
        "easy": "toddler",
        "medium": "Wikipedia",
        "hard": "erudite scholar",
        "qa": '"Question:" followed by "Answer:"',
    }
    asked = {text.partition(":\n")[2]: text for text in served.asked}
    for each in chunks(LONG, 20):
        assert words[operation.style(each)] in asked[each.strip()]
        assert sum(word in asked[each.strip()].partition(":\n")[0] for word in words.values()) == 1
    first, other = (Wrap(server=served.url, served="m", styles=("easy", "qa"), seed=seed) for seed in (0, 1))
    assert [first.style(each) for each in passages] != [other.style(each) for each in passages]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Here's a paraphrase of the passage:\n\nTwo cats sat.", "Two cats sat."),
        ("Sure! Here is the following in high-quality English: Two cats sat.", "Sure! Here is the following in high-quality English: Two cats sat."),
        ("Here is the paragraph in high-quality English: Two cats sat.", "Two cats sat."),
        ("The following text says it: two cats.", "two cats."),
        ("A paraphrased version without an end", None),
        ("Paraphrase: here is the paraphrase again. Cats.", None),
        ("Two cats sat. A paraphrase of it: they sat.", "Two cats sat. A paraphrase of it: they sat."),
        ("Two cats: grey ones.", "Two cats: grey ones."),
        ("", None),
    ],
)  # fmt: skip
def test_an_introduction_is_cut_at_its_colon_or_blank_line(text, left):
    assert without_introduction(text) == left


def test_an_answer_that_speaks_of_itself_is_left_out(served, tmp_path):
    served.answer = lambda body: completion("This paraphrase has no end and says nothing else of use.")
    with working(tmp_path) as desk:
        made = Wrap(server=served.url, served="m")(Dataset.from_list(ROWS))
    (report,) = desk.reports
    assert made.to_list() == ROWS and report["dropped"] == {"unfit": report["asked"]} and report["used"] == 0
    assert report["documents"] == {"a": {"before": 2, "after": 2}, "b": {"before": 1, "after": 1}}


def test_prompts_of_ones_own_are_asked(served, tmp_path):
    path = tmp_path / "prompts.yaml"
    path.write_text("medium: {system: You are brief., user: 'Say it in Latin:\n\n\n{text}'}")
    Wrap(server=served.url, served="m", prompts=str(path))(Dataset.from_list(ROWS[2:]))
    assert served.seen[0][2]["messages"] == [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": f"Say it in Latin:\n\n{ROWS[2]['text']}"},
    ]
    with pytest.raises(PretrainError, match="prompt 'qa'"):
        Wrap(server=served.url, served="m", prompts=str(path), styles=("qa",))(Dataset.from_list(ROWS))


@pytest.mark.parametrize(("fields", "message"), [
    ({"styles": ()}, "styles \\[\\]: accepted: one or more of easy"),
    ({"styles": ("qa", "qa")}, "accepted: one or more of easy, medium, hard, qa, each once"),
    ({"styles": ("loud",)}, "styles"),
    ({"tokens": 0}, "tokens 0: accepted: 1 or more"),
])  # fmt: skip
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(PretrainError, match=message):
        Wrap(generator="x", **fields)


def test_a_corpus_without_texts_is_refused(served):
    with pytest.raises(PretrainError, match="wrap: no column 'text'"):
        Wrap(server=served.url, served="m")(Dataset.from_list([{"image": 1}]))


def test_a_run_goes_on_asks_nothing_twice_and_runs_again_for_other_prompts(served, tmp_path, stories):
    source = tmp_path / "text"
    source.mkdir()
    for number, story in enumerate(stories[:12]):
        (source / f"{number}.txt").write_text(story["text"][:400])
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("medium: {user: 'say:\n\n{text}'}")
    operation = {
        "method": "wrap",
        "server": served.url,
        "served": "m",
        "prompts": str(prompts),
        "parallel": 1,
        "retries": 0,
    }

    def run(**more):
        stage = {
            "stage": "data",
            "name": "corpus",
            "sources": [{"files": str(source)}],
            "test": 0.2,
            "operations": [operation | more],
        }
        engine.run(check({"stages": [stage]}, output=tmp_path / "run"), say=engine.silent)
        return list(Corpus(tmp_path / "run" / "corpus" / "corpus").documents("train"))

    good, served.answer = served.answer, lambda body: good(body) if len(served.seen) < 4 else (500, b"gone", {})
    with pytest.raises(PretrainError, match="HTTP 500: gone"):
        run()
    served.answer = good
    served.seen.clear()
    documents = run()
    synthetic = [document["id"] for document in documents if "#" in document["id"]]
    assert len(synthetic) == len(documents) / 2 > 3 and len(served.seen) <= len(synthetic) - 3 + 4
    info = read_json(tmp_path / "run" / "corpus" / "corpus" / "corpus.json")
    assert info["added"] == {"wrap": len(synthetic)} and info["operations"][0]["used"] == len(synthetic)
    asked = len(served.seen)
    assert run(domain="new") and len(served.seen) == asked  # another stage, the same prompts
    prompts.write_text("medium: {user: 'say again:\n\n{text}'}")
    run()
    assert len(served.seen) > asked

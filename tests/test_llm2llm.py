"""LLM2LLM: what a student gets wrong of the seeds, and of nothing else, is what a teacher writes more of."""

from __future__ import annotations

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import completion, serving

from pretrain.core.errors import PretrainError
from pretrain.corpus.store import write_corpus
from pretrain.data._work import working
from pretrain.data.generation._rouge import Words, alike, rouge_l, rouge_tokens
from pretrain.data.generation.llm2llm import LLM2LLM, ROUND, questions

ROWS = [
    {"text": f"Is the harbour number {n} of {'wood' if n % 2 else 'stone'}?", "target": "yes" if n % 2 else "no", "domain": "a", "id": f"s{n}"}
    for n in range(6)
]  # fmt: skip
TASK = {"method": "seq2seq", "prompt": "{text}\n", "target": "target"}


@pytest.fixture
def served():
    with serving() as made:
        made.answer = lambda body: completion(
            f"1. Question: Written for {len(made.seen)}: {asked(body)[::-1]}\nAnswer: {true(body)}"
        )
        yield made


def asked(body):
    return body["messages"][-1]["content"].partition("question:\n\n")[2].partition("\n\nThe answer")[0]


def true(body):
    return body["messages"][-1]["content"].partition("this answer:\n\n")[2].partition("\n\n")[0]


class Student(LLM2LLM):
    """One that answers yes to all."""

    name = "llm2llm"

    def wrong(self, documents, here):
        return [document["target"] != "yes" for document in documents]


def operation(served, **more):
    return Student(server=served.url, served="teacher", student="s", task=TASK, parallel=1, **more)


def test_only_seeds_that_are_wrong_have_new_examples_after_them(served, tmp_path):
    with working(tmp_path) as desk:
        made = operation(served)(Dataset.from_list(ROWS))
    assert sorted(map(asked, (body for *_, body in served.seen))) == [
        row["text"] for row in ROWS if row["target"] == "no"
    ]
    assert [row["id"] for row in made] == ["s0", "s0#llm2llm-1-0", "s1", "s2", "s2#llm2llm-1-0", "s3", "s4", "s4#llm2llm-1-0", "s5"]  # fmt: skip
    assert made[ROUND][:] == [0, 1, 0, 0, 1, 0, 0, 1, 0] and {row["target"] for row in made if row[ROUND]} == {"no"}
    assert [{k: v for k, v in row.items() if k != ROUND} for row in made if not row[ROUND]] == ROWS
    (report,) = desk.reports
    assert (report["seeds"], report["wrong"], report["added"], report["round"]) == (6, 3, 3, 1)


def test_errors_are_taken_from_the_seeds_and_never_from_what_was_written(served):
    first = operation(served)(Dataset.from_list(ROWS))
    before = len(served.seen)
    second = operation(served, seed=1)(first)
    again = {asked(body) for *_, body in served.seen[before:]}
    assert again == {row["text"] for row in ROWS if row["target"] == "no"}
    assert sorted(second[ROUND][:]) == [0] * 6 + [1] * 3 + [2] * 3 and len({*second["id"]}) == len(second)


def test_copies_and_answers_without_the_form_are_left_out_and_asked_for_again(served, tmp_path):
    wrong = [row for row in ROWS if row["target"] == "no"]
    said = iter([
        *(f"1. Question: {row['text']}\nAnswer: no" for row in wrong), "Question: what\nAnswer: no", "1. Question: what?", "1. Question: a\nAnswer:",
        *("1. Question: Are bricks of clay, and is clay of stone?\nAnswer: no\n2. Question: Are there two?\nAnswer: no" for _ in range(9)),
    ])  # fmt: skip
    served.answer = lambda body: completion(next(said))
    with working(tmp_path) as desk:
        made = operation(served, attempts=3)(Dataset.from_list(ROWS))
    assert (
        len(served.seen) == 9 and sum(made[ROUND][:]) == 2
    )  # two questions for three seeds: the third finds them there
    (report,) = desk.reports
    assert report["left"]["too alike"] >= 4


def test_a_class_that_is_none_of_the_task_is_left_out(served):
    task = {"method": "classification", "label": "target"}
    served.answer = lambda body: completion(
        f"1. Question: {asked(body)[::-1]}\nAnswer: perhaps\n2. Question: new {asked(body)[::-1]}\nAnswer: no"
    )
    made = Student(server=served.url, served="m", student="s", task=task, per_seed=2, attempts=1)(
        Dataset.from_list(ROWS)
    )
    assert {row["target"] for row in made} == {"yes", "no"} and sum(made[ROUND][:]) == 3


def test_a_pool_stands_in_with_the_nearest_of_the_same_answer_each_once(tmp_path):
    pool = [
        {"text": f"Is the harbour number {n} of this {word}?", "target": "no", "domain": "p"}
        for n, word in enumerate(["old stone", "clay"] * 3)
    ]
    write_corpus(
        [*pool, {"text": "Is the harbour number 0 of some stone?", "target": "yes", "domain": "p"}],
        tmp_path / "pool",
        validation=0,
        test=0,
    )
    made = Student(pool=str(tmp_path / "pool"), student="s", task=TASK)(Dataset.from_list(ROWS))
    new = [row["text"] for row in made if row[ROUND]]
    assert new[0] == "Is the harbour number 0 of this old stone?" and len({*new}) == len(new) == 3


def test_as_many_seeds_by_chance_for_comparison(served):
    made = [operation(served, seeds="any", seed=seed)(Dataset.from_list(ROWS)) for seed in range(4)]
    picked = [tuple(row["id"].partition("#")[0] for row in each if row[ROUND]) for each in made]
    assert all(len(each) == 3 for each in picked) and len({*picked}) > 1


@pytest.mark.parametrize(("compared", "said", "expected", "same"), [
    ("", "a  b", "a  b", True), ("", "Yes", "yes", True), ("", "page 3", "chapter 3", False), ("", "no", "yes", False),
    (r"#+ (.*)", "so 2\n#### 1,200", "why\n#### 1200", True), (r"#+ (.*)", "#### $5.0", "#### 5", True),
    (r"#+ (.*)", "the answer is 5", "#### 5", False), (r"#+ (.*)", "#### five", "#### Five", True),
])  # fmt: skip
def test_an_answer_is_compared_as_the_authors_do(compared, said, expected, same):
    made = LLM2LLM(generator="t", student="s", task=TASK, compared=compared)
    assert made.same(said, expected) is same


WORDS = st.text(alphabet="ab c,D1", max_size=30)


@settings(max_examples=300, deadline=None)
@given(WORDS, WORDS)
def test_rouge_l_is_that_of_the_package_and_no_length_hides_a_copy(first, second):
    package = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = package.RougeScorer(["rougeL"], use_stemmer=False)
    one, two = ([w for w in rouge_tokens(text) if w.isascii() and w.isalnum()] for text in (first, second))
    expected = scorer.score(first, second)["rougeL"].fmeasure
    assert rouge_l(one, two) == pytest.approx(expected)
    first_words, second_words = (Words.of(text) for text in (first, second))
    for threshold in (0.3, 0.7, 0.95) if one and two else ():
        assert alike(first_words, [second_words], threshold) == (expected > threshold)


@pytest.mark.parametrize(("text", "found"), [
    ("Sure! Here it is:\n\n1. Question: a b\nc\nAnswer: x\n#### 5\n2. Question: d\nAnswer: y", [("a b\nc", "x\n#### 5"), ("d", "y")]),
    ("1. Question: a\nAnswer: b\nAnswer: c", []), ("Question: a\nAnswer: b", []), ("", []), ("1. Question:\nAnswer: b", []),
])  # fmt: skip
def test_numbered_questions_with_answers_are_read_and_no_others(text, found):
    assert questions(text) == found


@pytest.mark.parametrize(("fields", "message"), [
    ({"student": ""}, "llm2llm: student ''"), ({"pool": "p"}, "pool: accepted: without a generator"),
    ({"generator": ""}, "neither: accepted: a generator"), ({"domain": "d"}, "domain 'd': accepted: none"),
    ({"task": {"method": "seq2seq", "prompt": "{text}{other}"}}, "of one column and its answer"),
    ({"task": "causal_lm"}, "one that learns from labels"), ({"compared": "#+"}, "with a group"), ({"compared": "("}, "compared"),
])  # fmt: skip
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(PretrainError, match=message):
        LLM2LLM(**({"generator": "t", "student": "s", "task": TASK} | fields))


def test_a_corpus_without_the_tasks_columns_is_refused():
    with pytest.raises(PretrainError, match="llm2llm: no column 'target'"):
        LLM2LLM(generator="t", student="s", task=TASK)(Dataset.from_list([{"text": "a"}]))

"""TransformLLM: passages with questions and answers from a bank of prompts, and only whole ones."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import completion, serving

from pretrain.core.errors import PretrainError
from pretrain.data._chunks import chunks
from pretrain.data._work import working
from pretrain.data.generation._comprehension import GAP, formed, pairs, ruled
from pretrain.data.generation.transform_llm import TransformLLM

LONG = " ".join(f"Clause {n} says that the tenant shall pay for repairs in month {n}." for n in range(1, 25))
ROWS = [
    {"text": LONG, "domain": "law", "id": "x", "label": 1},
    {"text": "", "domain": "law", "id": "y", "label": 2},
    {"text": "The lease ends in May. It may be renewed.", "domain": "law", "id": "z", "label": 3},
    {"text": "Two cats sat on a wall.", "domain": "other", "id": "w", "label": 4},
]


@pytest.fixture
def served():
    with serving() as made:
        made.answer = lambda body: completion(
            "Sure!\n1. **Question:** Who pays?\n**Answer:** The tenant, it says.\n\nQuestion: And who else?"
        )
        yield made


def test_each_passage_becomes_one_text_with_its_questions_in_place_of_the_document(served, tmp_path):
    with working(tmp_path) as desk:
        made = TransformLLM(server=served.url, served="m", tokens=60, only=("law",), domain="read")(
            Dataset.from_list(ROWS)
        )
    passages = [each.strip() for each in chunks(LONG, 60)]
    task = "\n\nQuestion: Who pays?\nAnswer: The tenant, it says."
    assert made["text"][:] == [*(p + task for p in passages), ROWS[2]["text"] + task, ROWS[3]["text"]]
    assert made["id"][:] == [*(f"x#comprehension-{n}" for n in range(len(passages))), "z#comprehension-0", "w"]
    assert made["domain"][:] == ["read"] * (len(made) - 1) + ["other"] and made["label"][0] == 1
    (report,) = desk.reports
    assert report["asked"] == report["used"] == len(passages) + 1 and report["documents_without_tasks"] == 1


def test_prompts_are_drawn_by_the_passage_and_the_seed_and_may_be_chosen(served):
    operation = TransformLLM(server=served.url, served="m", tasks=2)
    drawn = [operation.drawn(f"passage {n}") for n in range(400)]
    counts = Counter(kind for each in drawn for kind in each)
    assert {*counts} == {*operation.bank} and min(counts.values()) > 40 and all(len({*each}) == 2 for each in drawn)
    assert drawn != [
        TransformLLM(server=served.url, served="m", tasks=2, seed=1).drawn(f"passage {n}") for n in range(400)
    ]
    few = TransformLLM(server=served.url, served="m", tasks=5, kinds=("summary", "terms"))
    assert {*few.drawn("a")} == {"summary", "terms"}
    made = few(Dataset.from_list(ROWS[2:3]))
    assert len(served.asked) == 2 and made["text"][0].count("Question:") == 2


@pytest.mark.parametrize("answer", [
    "It is about a lease and about a tenant.", "Question: Who pays for the repairs?", "Answer: the tenant, as it says",
    "Question: [the question]\nAnswer: [the answer]", "Question: [the question]\nAnswer: the tenant pays, it says", "Question: who pays?\nAnswer: [the answer]", "Question:\nAnswer: nothing was asked", "Answer: a b c\nQuestion: d e f",
])  # fmt: skip
def test_an_answer_without_a_whole_pair_is_left_out(served, tmp_path, answer):
    served.answer = lambda body: completion(answer)
    with working(tmp_path) as desk:
        made = TransformLLM(server=served.url, served="m", real=True)(Dataset.from_list(ROWS[2:]))
    assert made.to_list() == ROWS[2:] and desk.reports[0]["dropped"] == {"unfit": 2}


def test_a_bank_of_ones_own_is_asked_whatever_its_names(served, tmp_path):
    path = tmp_path / "bank.yaml"
    path.write_text("mine: {system: Be brief., user: 'Ask on: {text}'}\nother: {user: 'Or on: {text}'}")
    TransformLLM(server=served.url, served="m", prompts=str(path), kinds=("mine",))(Dataset.from_list(ROWS[3:]))
    assert [m["content"] for m in served.seen[0][2]["messages"]] == ["Be brief.", "Ask on: Two cats sat on a wall."]
    with pytest.raises(PretrainError, match=r"kinds: 'mini' \(did you mean 'mine'\?\): accepted: mine, other"):
        TransformLLM(server=served.url, served="m", prompts=str(path), kinds=("mini",))(Dataset.from_list(ROWS))
    path.write_text("mine: {user: 'Ask.'}")
    with pytest.raises(PretrainError, match=r"prompt 'mine': no \{text\} in it"):
        TransformLLM(server=served.url, served="m", prompts=str(path))(Dataset.from_list(ROWS))


WORDS = st.text(alphabet="abc \n:.?", min_size=1, max_size=40).map(str.strip).filter(bool)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), max_size=5, unique=True))
def test_what_is_formed_is_read_again(made):
    assert pairs(formed(made) or "") == made


def test_rules_ask_what_the_passage_answers():
    seen = set()
    for seed in range(60):
        task = ruled(LONG, np.random.default_rng(seed))
        ((question, answer),) = pairs(task)
        quoted = question.split('"')[1]
        if GAP in quoted:
            assert quoted.replace(GAP, answer) in LONG
        elif answer in ("(A)", "(B)"):
            first, second = (LONG.index(text) for text in question.split('"')[1::2])
            assert (first < second) == (answer == "(A)")
            seen.add(answer)
        else:
            assert f"{quoted} {answer}" in LONG
        seen.add(question.split(" ")[1])
    assert seen == {"word", "follows", "comes", "(A)", "(B)"}
    assert ruled("Only one. And two.", np.random.default_rng(0)) is None


def test_rules_need_no_model_and_leave_no_passage_out():
    made = TransformLLM(rules=True, tokens=60)(Dataset.from_list(ROWS))
    assert (
        sum("Question:" in text for text in made["text"][:]) == len(chunks(LONG, 60))
        and made["text"][-1] == ROWS[3]["text"]
    )


@pytest.mark.parametrize(("fields", "message"), [
    ({"rules": True}, "rules: accepted: without a generator"), ({"kinds": ("a", "a")}, "accepted: each once"),
    ({"generator": ""}, "neither: accepted: a generator"), ({"tasks": 0}, "tasks 0: accepted: 1 or more"),
])  # fmt: skip
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(PretrainError, match=message):
        TransformLLM(**({"generator": "x"} | fields))

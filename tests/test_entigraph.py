"""EntiGraph: entities and a summary of each document, then a document for each pair and triple of them."""

from __future__ import annotations

import json
import re
from itertools import combinations
from math import comb

import pytest
from datasets import Dataset
from servers import completion, serving

from pretrain.core.errors import PretrainError
from pretrain.data._work import working
from pretrain.data.generation.entigraph import EntiGraph, readable

ENTITIES = {"a": ["Ann", "harbour", "ice", "March", "boat"], "b": ["Bob", "wall"], "c": ["alone"]}
ROWS = [
    {"text": f"Document {name} speaks of {', '.join(names)}.", "title": f"T{name}", "domain": name, "id": name, "n": number}
    for number, (name, names) in enumerate(ENTITIES.items())
]  # fmt: skip


def parts(body):
    """What is asked: the document's name, and the entities."""
    text = body["messages"][-1]["content"]
    entities = text.partition("### Entities:\n")[2]
    return re.search(r"Document (\w) ", text)[1], tuple(line[2:] for line in entities.splitlines())


def answered(body):
    name, entities = parts(body)
    if not entities:
        return completion(f'Here it is: {{"summary": "About {name}.", "entities": {json.dumps(ENTITIES[name])}}}')
    return completion(f"### Discussion of {name} in relation to {' and '.join(entities)} here")


@pytest.fixture
def served():
    with serving() as made:
        made.answer = answered
        yield made


def asked(served):
    return [parts(body) for *_, body in served.seen]


@pytest.fixture
def corpus():
    return Dataset.from_list(ROWS)


def test_each_pair_and_each_triple_gives_a_document_in_place_of_the_real_one(served, corpus, tmp_path):
    with working(tmp_path) as desk:
        made = EntiGraph(server=served.url, served="m")(corpus)
    wanted = []
    for name, names in ENTITIES.items():
        groups = [*combinations(range(len(names)), 2), *combinations(range(len(names)), 3)]
        wanted += [(f"{name}#summary", f"About {name}.")]
        for group in groups:
            kind = "pair" if len(group) == 2 else "triple"
            shown = " and ".join(names[entity] for entity in group)
            identity = f"{name}#{'-'.join([kind, *map(str, group)])}"
            wanted.append((identity, f"### Discussion of {name} in relation to {shown} here"))
    assert [(row["id"], row["text"]) for row in made] == wanted
    counts = {name: 1 + comb(len(names), 2) + comb(len(names), 3) for name, names in ENTITIES.items()}
    (report,) = desk.reports
    assert report["documents"] == {name: {"before": 1, "after": count} for name, count in counts.items()}
    assert len(served.seen) == len(made) == report["asked"] and report["without_entities"] == 0
    assert report["used"] == len(made) - 3  # summaries come with the entities
    assert {body["temperature"] for *_, body in served.seen} == {1.0} and {row["n"] for row in made} == {0, 1, 2}


def test_as_many_pairs_and_triples_as_are_wanted_are_drawn_by_document_and_seed(served, corpus):
    fields = {"server": served.url, "served": "m", "pairs": 3, "triples": 2}

    def groups(rows, **more):
        served.seen.clear()
        EntiGraph(**fields | more)(rows)
        return sorted(entities for name, entities in asked(served) if name == "a" and entities)

    first = groups(corpus)
    assert [len(group) for group in first].count(2) == 3 and [len(group) for group in first].count(3) == 2
    assert groups(corpus.select([2, 0])) == first != groups(corpus, seed=1)
    assert [len(group) for group in groups(corpus, pairs=None, triples=0)] == [2] * 10
    assert groups(corpus, pairs=0, triples=0) == []
    of_three = groups(corpus, pairs=None, triples=None, entities=3)
    assert of_three == sorted([*combinations(ENTITIES["a"][:3], 2), tuple(ENTITIES["a"][:3])])


def test_entities_are_asked_for_until_they_can_be_read(served, corpus, tmp_path):
    tries = []

    def stumble(body):
        name, entities = parts(body)
        if entities or name != "b":
            return completion("no JSON") if name == "c" and not entities else answered(body)
        tries.append(body.get("seed"))
        return completion("{not yet}") if len(tries) < 3 else answered(body)

    served.answer = stumble
    with working(tmp_path) as desk:
        made = EntiGraph(server=served.url, served="m", attempts=4, real=True)(corpus)
    assert len(set(tries)) == len(tries) == 3
    assert [row["id"] for row in made if row["domain"] != "a"] == ["b", "b#summary", "b#pair-0-1", "c"]
    (report,) = desk.reports
    assert report["dropped"] == {"unfit": 2 + 4} and report["without_entities"] == 1
    served.seen.clear()
    EntiGraph(server=served.url, served="m", attempts=4, temperature=0.0)(corpus)
    assert asked(served).count(("c", ())) == 1  # greedily it would say the same


def test_the_document_and_its_title_stand_before_the_entities(served, corpus):
    EntiGraph(server=served.url, served="m", title="title", triples=0, only=("b",))(corpus)
    systems = [body["messages"][0]["content"] for *_, body in served.seen]
    users = [body["messages"][1]["content"] for *_, body in served.seen]
    content = '"Tb".\nDocument b speaks of Bob, wall.'
    assert users == [
        f"### Document Content:\n{content}", f"### Document Content:\n{content}\n### Entities:\n- Bob\n- wall",
    ]  # fmt: skip
    assert "JSON" in systems[0] and "### Discussion of Interaction between <entity1> and <entity2>" in systems[1]
    with pytest.raises(PretrainError, match="title 'titel' \\(did you mean 'title'\\?\\): accepted: a column"):
        EntiGraph(server=served.url, served="m", title="titel")(corpus)


def test_documents_of_other_domains_stay_as_they_are(served, corpus):
    made = EntiGraph(server=served.url, served="m", only=("b",), domain="synthetic")(corpus)
    assert [row["id"] for row in made] == ["a", "b#summary", "b#pair-0-1", "c"]
    assert made["domain"][:] == ["a", "synthetic", "synthetic", "c"] and {name for name, _ in asked(served)} == {"b"}
    assert made.select([0, 3]).to_list() == [ROWS[0], ROWS[2]]
    with pytest.raises(PretrainError, match="only: no document of the domain 'd'.*accepted: a, b, c"):
        EntiGraph(server=served.url, served="m", only=("d",))(corpus)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ('{"summary": " s ", "entities": ["a", "b\\n c", "a", ""]}', ["s", "a", "b c"]),
        ('```json\n{"entities": ["a"]}\n``` done', ["", "a"]),
        ('{"summary": ["x"], "entities": ["{a}"]}', ["", "{a}"]),
        ('{"summary": "s", "entities": []}', None),
        ('{"summary": "s", "entities": [1]}', None),
        ('{"summary": "s", "entities": {"a": 1}}', None),
        ('["a"]', None),
        ('{"summary": "s", "entities": ["a"', None),
        ("", None),
    ],
)
def test_what_of_an_answer_can_be_read(answer, wanted):
    text = readable(answer)
    assert (text and json.loads(text)) == wanted


@pytest.mark.parametrize(("fields", "message"), [
    ({"attempts": 0}, "attempts 0: accepted: 1 or more"), ({"pairs": -1}, "pairs -1: accepted: 0 or more"),
    ({"entities": 0}, "entities 0"),
])  # fmt: skip
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(PretrainError, match=message):
        EntiGraph(generator="x", **fields)

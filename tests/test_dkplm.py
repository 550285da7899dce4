"""Rare entities of a text and their facts, and the objective that reads them in the place of the entities."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from closeness import products, rounding
from datasets import Dataset
from torch import nn

from pretrain.core.batch import Context, Example, Vocabulary
from pretrain.core.encoding import Encoder
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import embeddings
from pretrain.data._work import working
from pretrain.data.rewriting.long_tail_entities import LongTailEntities, named, names_of, surface
from pretrain.objectives.knowledge._masked import encoded, masked_loss
from pretrain.objectives.knowledge.dkplm import COLUMNS, DKPLM

TEXT = "the quick brown fox sees a dog"
FACTS = [(10, 19, -1, "kind of", "animal"), (27, 30, 1, "chases", "lazy cat")]
ROWS = [
    {"text": TEXT} | dict(zip(COLUMNS, map(list, zip(*FACTS, strict=True)), strict=True)),
    {"text": "it sleeps over there"} | {column: [] for column in COLUMNS},
]
TRIPLES = [
    {"head": "brown fox", "relation": "kind of", "tail": "animal"},
    {"head": "Cat", "relation": "chases", "tail": "dog"},
    {"head": "dog", "relation": "kind of", "tail": "animal"},
    {"head": "same", "relation": "is", "tail": "same"},
]


@pytest.fixture(scope="module")
def context(shelf):
    return Context(Vocabulary.of(shelf.tokenizer), 48, np.random.default_rng(0), encoder=Encoder(shelf.tokenizer))


def fresh(context, seed=0, length=48):
    return Context(context.vocabulary, length, np.random.default_rng(seed), encoder=context.encoder)


def prepared(context, rows=ROWS, **fields):
    return DKPLM(**{"rate": 0.4} | fields).prepare([Example(row, 0, n) for n, row in enumerate(rows)], context)


def test_without_entities_the_loss_and_its_gradients_are_those_of_hidden_tokens_to_the_bit(shelf, context):
    batch, gradients = prepared(fresh(context), ROWS[1:]), []
    assert not batch["weight_decoding"] and not batch["entity_BL"].any()
    method = DKPLM(rate=0.4)
    for alone in (False, True):
        model = shelf.model("bert", initializer_range=0.3)
        torch.manual_seed(0)
        pooler = method.modules(model)
        loss = masked_loss(model, encoded(model, batch), batch)[0] if alone else method.loss(model, batch, pooler).value
        loss.backward()
        gradients.append([loss.detach()] + [weight.grad for weight in model.parameters() if weight.grad is not None])
    assert all(map(torch.equal, *gradients)) and len(gradients[0]) == len(gradients[1])


def test_entities_are_read_as_their_facts_by_the_formula(shelf, context):
    model, method, batch = shelf.model("bert", initializer_range=0.3), DKPLM(rate=0.4, decoding_weight=0.5), None
    batch = prepared(fresh(context))
    torch.manual_seed(0)
    pooler = method.modules(model)

    def vector(text):
        ids = [context.vocabulary.begin, *context.encoder.ids([text])[0], context.vocabulary.eos]
        states = model.bert(input_ids=torch.tensor([ids])).last_hidden_state[0]
        weight = (states @ pooler.attention.weight[0] + pooler.attention.bias).softmax(0)
        return pooler.norm(nn.functional.gelu(pooler.layer(weight @ states)))

    with torch.no_grad():
        loss = method.loss(model, batch, pooler)
        vectors = embeddings(model)(batch["tokens_BL"]).clone()
        factor = torch.ones_like(vectors)
        for number, (*_, sign, relation, other) in enumerate(FACTS, 1):
            places = batch["entity_BL"] == number
            vectors[places] = vector(other) + sign * vector(relation)
            factor[places] = vector(relation)
        inputs = {"attention_mask": batch["mask_BL"], "token_type_ids": batch["segment_BL"]}
        theirs = model(inputs_embeds=vectors, **inputs, labels=batch["target_BL"]).loss
        states = model.bert(inputs_embeds=vectors, **inputs).last_hidden_state
        logits = model.cls(states * factor)[batch["entity_BL"] > 0]
        decoding = nn.functional.cross_entropy(logits, batch["tokens_BL"][batch["entity_BL"] > 0])
    terms, steps = products(model)
    limit = 4 * rounding(terms, terms**0.5 * max(1.0, float(theirs), float(decoding)), steps=steps)
    assert float(loss.parts["masked_lm"]) == pytest.approx(float(theirs), abs=limit)
    assert float(loss.parts["decoding"]) == pytest.approx(float(decoding), abs=limit)
    assert float(loss.value) == pytest.approx(float(theirs) + 0.5 * float(decoding), abs=2 * limit)


def test_a_replaced_entity_keeps_its_tokens_as_targets_and_hides_none(context):
    for seed in range(10):
        batch = prepared(fresh(context, seed))
        replaced = batch["entity_BL"] > 0
        texts = [context.encoder.tokenizer.decode(batch["tokens_BL"][0][batch["entity_BL"][0] == n]) for n in (1, 2)]
        assert texts[0].strip() == "brown fox" and texts[1].strip() == "dog"
        assert torch.equal(batch["entity_target_BL"][replaced], batch["tokens_BL"][replaced])
        assert (batch["target_BL"][replaced] == -100).all() and (batch["entity_target_BL"][~replaced] == -100).all()
        assert int(batch["weight_decoding"]) == int(replaced.sum())
        assert int(batch["weight"]) == int((batch["target_BL"] != -100).sum()) > 0


def test_of_a_text_that_is_cut_the_entities_that_are_left_are_replaced(context):
    whole = int(prepared(fresh(context), ROWS[:1])["mask_BL"].sum())
    batch = prepared(fresh(context, length=whole - 2), ROWS[:1])
    assert batch["entity_BL"].max() in (1, 2) and (batch["entity_BL"][0, whole - 3 :] == 0).all()


def test_the_model_afterwards_knows_nothing_of_facts(shelf, context):
    model = shelf.model("bert")
    names = [*dict(model.named_parameters())]
    method = DKPLM()
    pooler = method.modules(copy.deepcopy(model))
    method.loss(model, prepared(fresh(context)), pooler).value.backward()
    assert [*dict(model.named_parameters())] == names and not method.export(pooler)


def test_lists_of_other_lengths_are_refused_by_their_document(context):
    with pytest.raises(PretrainError, match="dkplm: document 'd1': entity_start, .*: accepted: lists of one length"):
        prepared(fresh(context), [ROWS[0] | {"id": "d1", "entity_sign": [1]}])
    with pytest.raises(PretrainError, match="accepted: shares that come to 1 at most"):
        DKPLM(masked=0.8, random=0.3)


def made_corpus(tmp_path, rows):
    place = tmp_path / "made" / "corpus"
    (place / "train").mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(place / "train" / "part-0.parquet")
    (place / "corpus.json").write_text("{}")
    return str(tmp_path / "made")


def test_facts_are_seen_from_both_of_their_ends_and_names_found_the_longest_first(tmp_path):
    facts = LongTailEntities(triples=made_corpus(tmp_path, TRIPLES)).facts()
    assert facts.keys() == {"brown fox", "animal", "cat", "dog"}
    assert facts["dog"] == [(1, "chases", "Cat"), (-1, "kind of", "animal")]
    text = "A Brown  fox, a dog's DOG and dogs."
    assert [(name, text[start:end]) for name, start, end in named(text, facts | {"fox": []}, 2)] == [
        ("brown fox", "Brown  fox"), ("dog", "DOG"),
    ]  # fmt: skip


def test_names_may_have_signs_and_scripts_no_spaces():
    facts = {surface(name): [] for name in ("St. Louis", "U.S.", "C", "北京大学", "北京", "fox sees")}
    text = "In st.  Louis, U.S. C++: 在北京大学和北京。 A fox. Sees"
    spans = [text[start:end] for _, start, end in named(text, facts, 4)]
    assert spans == ["st.  Louis", "U.S", "C", "北京大学", "北京"]
    assert surface(" -- ") == "" and names_of([" -- ", "a  b"]) == ["a b"]


def test_what_is_rare_in_text_and_rich_in_facts_is_chosen(tmp_path):
    texts = ["The animal and the cat and the dog.", "An animal.", "The animal, a brown fox.", "Nothing."]
    rows = [{"text": text, "entity_sign": 7} for text in texts]
    method = LongTailEntities(triples=made_corpus(tmp_path, TRIPLES), share=0.34)
    with working(tmp_path) as desk:
        made = method(Dataset.from_list(rows)).to_list()
        report = desk.reports[-1]
    # The animal is named thrice, of 1.5 times on average; the dog has two facts, the cat one.
    assert [[row["text"][s:e] for s, e in zip(row["entity_start"], row["entity_end"], strict=True)] for row in made] == [
        ["dog"], [], ["brown fox"], [],
    ]  # fmt: skip
    assert (made[2]["entity_sign"], made[2]["entity_relation"], made[2]["entity_other"]) == (
        [-1],
        ["kind of"],
        ["animal"],
    )
    assert {key: report[key] for key in ("entities", "named", "mentions", "long_tail", "chosen")} == {
        "entities": 4, "named": 4, "mentions": 6, "long_tail": 3, "chosen": 2,
    }  # fmt: skip
    drawn = {
        LongTailEntities(triples=method.triples, seed=s)(Dataset.from_list(rows))[0]["entity_sign"][-1]
        for s in range(20)
    }
    assert drawn == {-1, 1}
    none = LongTailEntities(triples=method.triples, share=0)(Dataset.from_list(rows))
    assert not any(map(any, none["entity_start"]))


def test_tails_may_be_named_by_their_concepts(tmp_path):
    rows = [
        {"words": ["fox", "reynard"], "concept": "n1", "broader": "n2"},
        {"words": ["canine"], "concept": "n2", "broader": "n2"},
        {"words": ["stone"], "concept": "n3", "broader": "n9"},
    ]
    method = LongTailEntities(
        made_corpus(tmp_path, rows), head="words", relation=None, tail="broader", concept="concept"
    )
    assert method.facts() == {
        "fox": [(-1, "broader", "canine")], "reynard": [(-1, "broader", "canine")], "canine": [(1, "broader", "fox")],
    }  # fmt: skip
    with pytest.raises(PretrainError, match="triples: no column 'tail'; accepted: a corpus with it"):
        LongTailEntities(method.triples, head="words", relation=None).facts()
    with pytest.raises(PretrainError, match="is not a corpus .*accepted: a data stage"):
        LongTailEntities(str(tmp_path)).facts()

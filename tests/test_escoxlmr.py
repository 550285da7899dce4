"""A taxonomy as pairs, the objective that learns their relations, and WordNet as a taxonomy."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from closeness import products, rounding
from datasets import Dataset
from torch import nn

from pretrain.core.batch import Context, Example, Vocabulary
from pretrain.core.encoding import Encoder
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import new_model
from pretrain.corpus.sources import Package, Skipped, WordNet, read
from pretrain.corpus.sources.knowledge.wordnet import concept
from pretrain.data._work import working
from pretrain.data.rewriting.taxonomy_pairs import TaxonomyPairs
from pretrain.objectives._fine_tuning import segments
from pretrain.objectives.knowledge.relation_prediction import RelationPrediction

# Two groups of 30, one document whose group is its own, concepts of three.
ROWS = [{"text": f"t{n}", "concept": f"c{n // 3}", "domain": "alone" if n == 60 else f"g{n // 30}"} for n in range(61)]
PAIRS = [
    {"text": "the quick brown fox", "pair": "a fox is quick", "relation": "linked"},
    {"text": "the lazy dog", "pair": "zebras sleep over there", "relation": "random"},
    {"text": "it jumps", "pair": "it sleeps", "relation": "grouped"},
]


@pytest.fixture(scope="module")
def context(shelf):
    return Context(Vocabulary.of(shelf.tokenizer), 48, np.random.default_rng(0), encoder=Encoder(shelf.tokenizer))


def prepared(context, rows=PAIRS, **fields):
    return RelationPrediction(rate=0.4, **fields).prepare([Example(r, 0, n) for n, r in enumerate(rows)], context)


def test_each_pair_is_of_the_relation_that_it_says_and_each_is_as_likely(tmp_path):
    by_text = {row["text"]: row for row in ROWS}
    counts, partners = Counter(), Counter()
    with working(tmp_path) as desk:
        for seed in range(40):
            made = TaxonomyPairs(seed=seed)(Dataset.from_list(ROWS)).to_list()
            for row in made:
                other = by_text[row["pair"]]
                assert other["text"] != row["text"]
                if row["relation"] == "linked":
                    assert other["concept"] == row["concept"]
                if row["relation"] == "grouped":
                    assert other["domain"] == row["domain"]
                counts[row["relation"]] += row["text"] != "t60"
                if row["text"] == "t4" and row["relation"] == "linked":
                    partners[row["pair"]] += 1
            assert desk.reports[-1]["relations"] == Counter(row["relation"] for row in made)
            assert made[60]["relation"] == "random"  # it has no other, of its concept or of its group
            assert [{k: row[k] for k in ROWS[0]} for row in made] == ROWS
    assert all(abs(count - 800) < 4 * (2400 * 2 / 9) ** 0.5 for count in counts.values()) and len(counts) == 3
    assert set(partners) == {"t3", "t5"}


def test_random_partners_are_all_others_alike():
    rows = [{"text": str(n), "concept": None, "domain": None} for n in range(4)]
    drawn = Counter(TaxonomyPairs(seed=seed)(Dataset.from_list(rows))[1]["pair"] for seed in range(300))
    assert set(drawn) == {"0", "2", "3"} and min(drawn.values()) > 100 - 4 * (300 * 2 / 9) ** 0.5


def test_a_corpus_without_pairs_is_refused():
    with pytest.raises(PretrainError, match="taxonomy_pairs: 1 documents: accepted: 2 or more"):
        TaxonomyPairs()(Dataset.from_list(ROWS[:1]))
    with pytest.raises(PretrainError, match="taxonomy_pairs.*'topic'.*accepted: "):
        TaxonomyPairs(concept="topic")(Dataset.from_list(ROWS))


def test_the_loss_is_that_of_masked_tokens_and_that_of_the_relations(shelf, context):
    model, method = shelf.model("bert", initializer_range=0.3), RelationPrediction(rate=0.4, relation_weight=0.5)
    batch = prepared(context)
    torch.manual_seed(0)
    head = method.modules(model)
    inputs = {
        "input_ids": batch["tokens_BL"],
        "attention_mask": batch["mask_BL"],
        "token_type_ids": batch["segment_BL"],
    }
    with torch.no_grad():
        found = method.loss(model, batch, head)
        theirs = model(**inputs, labels=batch["target_BL"]).loss
        states = model.bert(**inputs).last_hidden_state[:, 0]
        scores = torch.tanh(states @ head[0].weight.T + head[0].bias) @ head[2].weight.T + head[2].bias
        relation = nn.functional.cross_entropy(scores, torch.tensor([1, 0, 2]))
    terms, steps = products(model)
    limit = rounding(terms, terms**0.5 * max(1.0, float(theirs)), steps=steps)
    assert float(found.parts["masked_lm"]) == pytest.approx(float(theirs), abs=limit)
    assert float(found.parts["relation"]) == pytest.approx(float(relation), abs=limit)
    assert float(found.value) == pytest.approx(float(theirs) + 0.5 * float(relation), abs=2 * limit)


def test_tokens_of_both_descriptions_are_hidden_and_none_that_are_special(context, shelf):
    seen = [0, 0]
    for seed in range(10):
        some = Context(context.vocabulary, 48, np.random.default_rng(seed), encoder=context.encoder)
        plain = prepared(some, masked=0.0, random=0.0)
        batch = prepared(Context(context.vocabulary, 48, np.random.default_rng(seed), encoder=context.encoder))
        chosen = batch["target_BL"] >= 0
        assert torch.equal(torch.where(chosen, batch["target_BL"], batch["tokens_BL"]), plain["tokens_BL"])
        assert not torch.tensor(context.vocabulary.special_V)[batch["target_BL"][chosen]].any()
        assert not (chosen & (batch["mask_BL"] == 0)).any() and int(batch["weight"]) == int(chosen.sum())
        for segment in (0, 1):
            seen[segment] += int((chosen & (batch["segment_BL"] == segment)).sum())
    assert min(seen) > 30 and batch["relation_B"].tolist() == [1, 0, 2]


def test_a_model_with_one_vector_of_segments_reads_pairs_too(context):
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = new_model("roberta", fields | {"type_vocab_size": 1}, task="masked", vocabulary=context.vocabulary)
    assert segments(model.config, {"segment_BL": torch.ones(1, 1)}) == {}
    method = RelationPrediction()
    assert float(method.loss(model, prepared(context), method.modules(model)).value) > 0


@pytest.mark.parametrize("fields, said", [
    ({"relations": ("linked",)}, r"relations \['linked'\]: accepted: 2 or more, each once"),
    ({"relations": ("a", "a")}, "accepted: 2 or more, each once"),
    ({"masked": 0.8, "random": 0.3}, "accepted: shares that come to 1 at most"),
])  # fmt: skip
def test_what_cannot_be_told_apart_is_refused(fields, said):
    with pytest.raises(PretrainError, match=f"^relation_prediction: .*{said}"):
        RelationPrediction(**fields)


def test_an_unknown_relation_is_refused_by_its_document(context):
    with pytest.raises(PretrainError, match="relation_prediction: document 'd1': relation 'same': accepted: one of"):
        prepared(context, [PAIRS[0] | {"relation": "same", "id": "d1"}])


LINES = """\
  1 This software and database is being provided to you, the LICENSEE, by
00001740 03 n 01 entity 0 002 ~ 00001930 n 0000 + 00001931 v 0101 | that which is perceived to exist
00001930 05 n 02 house_cat 0 Felis_catus 1 002 #m 00001740 n 0000 @ 00001740 n 0000 | a small cat; "it sleeps"
00001931 18 n 01 Plato 0 001 @i 00001930 n 0000 | a philosopher
nonsense
00001932 99 n 01 word 0 000 | of a file that there is not
"""


def test_concepts_are_read_as_the_format_says(tmp_path):
    (tmp_path / "data.noun").write_text(LINES)
    skipped = Skipped()
    entity, cat, plato = read(WordNet(str(tmp_path), parts=("noun",)), skipped)
    assert entity["text"] == "entity: that which is perceived to exist" and entity["broader"] == entity["concept"]
    assert cat["text"] == 'house cat, Felis catus: a small cat; "it sleeps"' and cat["words"] == [
        "house cat",
        "Felis catus",
    ]
    assert (cat["concept"], cat["broader"], cat["domain"]) == ("n00001930", "n00001740", "noun.animal")
    assert plato["broader"] == "n00001930" and plato["domain"] == "noun.person"
    assert skipped.reasons == {"lines that are no concept": 2}
    with pytest.raises(PretrainError, match="no data.verb; accepted: a folder with the files of WordNet"):
        list(read(WordNet(str(tmp_path))))
    with pytest.raises(PretrainError, match="adverb"):
        WordNet(str(tmp_path), parts=("adverb",))
    assert concept("", "n") is None


def test_wordnet_itself_is_read_whole(package):
    package(debian="wordnet-base")
    skipped = Skipped()
    source = WordNet("usr/share/wordnet", parts=("verb",), package=Package(debian="wordnet-base"))
    documents = list(read(source, skipped))
    assert len(documents) == 13767 and not skipped.reasons  # as wnstats(7WN) counts them
    known = {document["concept"] for document in documents}
    assert all(document["broader"] in known for document in documents)
    assert {document["domain"] for document in documents} == {n for n in source.domains() if n.startswith("verb")}

"""Hidden tokens beside the tags of words and the order of sentences, and the tags of a dictionary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import products, rounding
from datasets import Dataset
from transformers import BertForPreTraining, BertForTokenClassification

from pretrain.core.batch import Context, Example, Vocabulary
from pretrain.core.encoding import Encoder
from pretrain.core.errors import PretrainError
from pretrain.core.packages import Package, package_folder
from pretrain.data._work import working
from pretrain.data.rewriting.dictionary_tags import DictionaryTags, Words, lines
from pretrain.objectives.knowledge._masked import encoded, masked_loss
from pretrain.objectives.knowledge.linguistic_mlm import LinguisticMLM, drawn

TAGS = {"tags": ("d", "n", "v"), "names": ("O", "B")}
ROWS = [
    {"text": "The fox runs. A dog sleeps.", "tags": ["d", "n", "v", "d", "n", "v"], "names": "O B O O B O"},
    {"text": "dogs sleep", "tags": "n v", "names": ["O", "O"]},
    {"text": "A fox sleeps. The dog runs. dogs run.", "tags": "d n v d n v n v", "names": "O B O O B O O O"},
]
DICTIONARY = "北京 10 ns\n大学 8 n\n北京大学 6 nt\n生 3 v\n学生 5 n\n大 4 a\n学 2 v\npython 9 eng\nAT&T 3 nz\n"


@pytest.fixture(scope="module")
def context(shelf):
    return Context(Vocabulary.of(shelf.tokenizer), 48, np.random.default_rng(0), encoder=Encoder(shelf.tokenizer))


def fresh(context, seed=0, length=48):
    return Context(context.vocabulary, length, np.random.default_rng(seed), encoder=context.encoder)


def prepared(context, rows=ROWS, **fields):
    examples = [Example(row, 0, number) for number, row in enumerate(rows)]
    return LinguisticMLM(**{"tags": TAGS, "rate": 0.4} | fields).prepare(examples, context)


def test_without_weight_the_loss_and_its_gradients_are_those_of_hidden_tokens_to_the_bit(shelf, context):
    batch, gradients = prepared(fresh(context)), []
    method = LinguisticMLM(tags=TAGS, tag_weight=0, order_weight=0)
    for alone in (False, True):
        model = shelf.model("bert", initializer_range=0.3)
        torch.manual_seed(0)
        heads = method.modules(model)
        loss = masked_loss(model, encoded(model, batch), batch)[0] if alone else method.loss(model, batch, heads).value
        loss.backward()
        gradients.append([loss.detach()] + [w.grad for w in model.parameters() if w.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) and all(map(torch.equal, *gradients))


def test_each_term_is_that_of_transformers_models_of_the_same_weights(shelf, context):
    model, batch = shelf.model("bert", initializer_range=0.3), prepared(fresh(context))
    method = LinguisticMLM(tags=TAGS, tag_weight=0.5, order_weight=2.0)
    torch.manual_seed(0)
    heads = method.modules(model)
    ordered = BertForPreTraining(model.config).eval()
    ordered.bert.load_state_dict(model.bert.state_dict(), strict=False)
    ordered.cls.predictions.load_state_dict(model.cls.predictions.state_dict())
    ordered.bert.pooler.dense.load_state_dict(heads[0][0].state_dict())
    ordered.cls.seq_relationship.load_state_dict(heads[0][2].state_dict())
    inputs = {
        "input_ids": batch["tokens_BL"],
        "attention_mask": batch["mask_BL"],
        "token_type_ids": batch["segment_BL"],
    }
    with torch.no_grad():
        found = method.loss(model, batch, heads)
        theirs = ordered(**inputs, labels=batch["target_BL"], next_sentence_label=batch["order_B"]).loss
        tagged = []
        for number in range(2):
            model.config.num_labels = len([*TAGS.values()][number])
            tagger = BertForTokenClassification(model.config).eval()
            tagger.bert.load_state_dict(model.bert.state_dict(), strict=False)
            tagger.classifier.load_state_dict(heads[1 + number].state_dict())
            tagged.append(tagger(**inputs, labels=batch[f"tag{number}_BL"]).loss)
    terms, steps = products(model)
    limit = rounding(terms, terms**0.5 * max(1.0, float(theirs)), steps=steps)
    assert float(found.parts["masked_lm"] + found.parts["order"]) == pytest.approx(float(theirs), abs=2 * limit)
    for name, loss in zip(TAGS, tagged, strict=True):
        assert float(found.parts[name]) == pytest.approx(float(loss), abs=limit)
    total = found.parts["masked_lm"] + 2 * found.parts["order"] + 0.5 * (found.parts["tags"] + found.parts["names"])
    assert float(found.value) == pytest.approx(float(total), abs=4 * limit)


def test_runs_of_sentences_follow_one_another_or_have_changed_places(context):
    ids = [context.encoder.ids([row["text"]])[0] for row in ROWS]
    parted = [context.encoder.ids(["A fox sleeps. ", "The dog runs. "])[0], []]
    seen = set()
    for seed in range(60):
        batch = prepared(fresh(context, seed), masked=0.0, random=0.0)
        assert batch["order_B"][1] == -100 and int(batch["weight_order"]) == 2
        for b in (0, 2):
            length, first = (
                int(batch["mask_BL"][b].sum()),
                int((batch["segment_BL"][b] == 0)[: batch["mask_BL"][b].sum()].sum()),
            )
            row = batch["tokens_BL"][b, :length].tolist()
            one, two = row[1 : first - 1], row[first:-1]
            assert row[0] == context.vocabulary.begin and row[first - 1] == row[-1] == context.vocabulary.eos
            assert (two + one if batch["order_B"][b] else one + two) == ids[b]
            seen.add((b, int(batch["order_B"][b]), len(one)))
    assert len(seen) == 2 + 4  # one place to part the first at, two the third, each in both orders
    assert len(parted[0]) in {length for b, _, length in seen if b == 2}


def test_a_long_document_begins_at_a_sentence_and_fills_the_row():
    rng = np.random.default_rng(0)
    seen = {tuple(map(tuple, drawn(30, [0, 7, 12, 19, 25], 18, rng)[0])) for _ in range(200)}
    whole = {(min(a[0], b[0]), max(a[1], b[1])) for a, b in seen}
    assert whole == {(0, 18), (7, 25), (12, 30)}
    assert {max(a[0], b[0]) for a, b in seen if min(a[0], b[0]) == 7} == {12, 19}
    assert drawn(30, [0], 18, rng) == ([(0, 18)], -100)


def test_each_word_has_its_tags_at_its_first_token_wherever_that_stands(context):
    for seed in range(8):
        batch = prepared(fresh(context, seed), masked=0.0, random=0.0)
        plain = {"tags": {}, "names": {}}
        for number, column in enumerate(TAGS):
            for b, row in enumerate(ROWS):
                places = (batch[f"tag{number}_BL"][b] >= 0).nonzero().flatten().tolist()
                values = row[column].split() if isinstance(row[column], str) else row[column]
                assert len(places) == len(values) == len(row["text"].split())
                told = [TAGS[column][int(batch[f"tag{number}_BL"][b, place])] for place in places]
                swapped = batch["order_B"][b] == 1
                assert sorted(told) == sorted(values) and (swapped or told == list(values))
                plain[column][b] = places
            assert int(batch[f"weight_{column}"]) == 16
        assert plain["tags"] == plain["names"]


def test_words_of_a_script_without_spaces_are_those_of_a_column(context):
    row = {"text": "北京大学。学生", "words": ["北京大学", "。", "学生"], "tags": ["n", "d", "n"], "names": "B O O"}
    batch = prepared(fresh(context), [row], words="words", masked=0.0, random=0.0)
    assert int(batch["weight_tags"]) == 3 and int(batch["weight_order"]) == 1
    with pytest.raises(PretrainError, match="document 0: words: accepted: words as they follow in its text"):
        prepared(fresh(context), [row | {"words": ["学生", "。", "北京大学"]}], words="words")


@pytest.mark.parametrize("row, said", [
    ({"tags": "d n"}, "document 'd1' has 6 words and 2 tags: accepted: as many"),
    ({"tags": "d n v d n q"}, "document 'd1': tags 'q'.*accepted: one of its tags"),
])  # fmt: skip
def test_wrong_tags_are_refused_by_their_document(context, row, said):
    with pytest.raises(PretrainError, match=f"linguistic_mlm: {said}"):
        prepared(fresh(context), [ROWS[0] | {"id": "d1"} | row])


@pytest.mark.parametrize("fields, said", [
    ({"tags": {"tags": ("n",)}}, "tags tags: .*accepted: 2 or more, each once"),
    ({"tags": {"order": ("a", "b")}}, "tags order: accepted: a column of another name than order"),
    ({"tags": TAGS, "masked": 0.8, "random": 0.3}, "accepted: shares that come to 1 at most"),
])  # fmt: skip
def test_what_cannot_be_told_apart_is_refused(fields, said):
    with pytest.raises(PretrainError, match=f"^linguistic_mlm: .*{said}"):
        LinguisticMLM(**fields)


def test_the_words_are_those_whose_product_of_frequencies_is_largest():
    words = Words.of(lines(DICTIONARY, "x"))
    assert words.parted("北京大学生") == ["北京", "大", "学生"] or words.parted("北京大学生") == ["北京大学", "生"]

    def ways(run):
        yield from ([[]] if not run else [])
        for end in range(1, len(run) + 1):
            if run[:end] in words.shares or end == 1:
                yield from ([run[:end], *rest] for rest in ways(run[end:]))

    def product(parts):
        return sum(words.shares.get(part, words.least) for part in parts)

    for run in ("北京大学生", "学生大学", "大学大学生北京", "新北京"):
        assert product(words.parted(run)) == pytest.approx(max(map(product, ways(run))), rel=1e-12)
    assert words.parted("用Python 3.10在北京。") == ["用", "Python", "3", ".", "10", "在", "北京", "。"]


def made_corpus(tmp_path: Path, text: str) -> str:
    place = tmp_path / "made" / "corpus"
    (place / "train").mkdir(parents=True, exist_ok=True)
    Dataset.from_list([{"text": text}]).to_parquet(place / "train" / "part-0.parquet")
    (place / "corpus.json").write_text("{}")
    return str(tmp_path / "made")


def test_a_dictionarys_tags_are_written_beside_the_words(tmp_path):
    method = DictionaryTags(dictionary=made_corpus(tmp_path, DICTIONARY))
    with working(tmp_path) as desk:
        (row, empty) = method(
            Dataset.from_list([{"text": "学生在北京, Python", "tags": 3}, {"text": "", "tags": 4}])
        ).to_list()
        report = desk.reports[-1]
    assert row["words"] == ["学生", "在", "北京", ",", "Python"] and row["text"] == "学生在北京, Python"
    assert row["tags"] == ["n", "x", "n", "x", "e"] and row["entities"] == ["O", "O", "ns", "O", "O"]
    assert empty["words"] == empty["tags"] == empty["entities"] == []
    assert report["tags"] == {"e": 1, "n": 2, "x": 2} and report["dictionary"] == 9 and report["words"] == 5
    whole = DictionaryTags(dictionary=method.dictionary, letters=None)(Dataset.from_list([{"text": "学生在北京"}]))
    assert whole[0]["tags"] == ["n", "x", "ns"]


def test_what_is_no_dictionary_is_refused(tmp_path):
    assert [*lines("a b 3 n\nc v\n  d 7 \n", "x")] == [("a b", 3.0, "n"), ("c", 1.0, "v"), ("d", 1.0, "7")]
    with pytest.raises(PretrainError, match="dictionary: 'alone': accepted: lines WORD"):
        [*lines("alone", "x")]
    with pytest.raises(PretrainError, match="is not a corpus .*accepted: a data stage"):
        DictionaryTags(dictionary=str(tmp_path))(Dataset.from_list([{"text": "a"}]))
    with pytest.raises(PretrainError, match="accepted: text and kind"):
        DictionaryTags(dictionary=made_corpus(tmp_path, "a"), tag="kind")(Dataset.from_list([{"text": "a"}]))


def test_jiebas_dictionary_is_read_whole(package):
    package(debian="python3-jieba")
    folder = package_folder(Package(debian="python3-jieba"))
    words = Words.of(lines((folder / "usr/lib/python3/dist-packages/jieba/dict.txt").read_text(), "x"))
    assert len(words.tags) == 349045 and words.tag("北京大学") == "nt"
    assert words.parted("我来到北京清华大学") == ["我", "来到", "北京", "清华大学"]  # as its readme says

"""Errors by rules and edits: what is put in is taken out to the character, and counted as the shared tasks count it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.core.errors import PretrainError
from pretrain.core.grammar.edits import Counts, Edit, aligned, corrected, counted, from_m2, tags_of, to_m2
from pretrain.core.grammar.rules import LANGUAGES, read_grammar, with_errors
from pretrain.data._work import working
from pretrain.data.rewriting.grammatical_errors import GrammaticalErrors
from pretrain.evaluation.generation.error_correction import ErrorCorrection, Pair

# A right text, a type of error, and what becomes of it when that is the only one.
ERRORS = {
    "turkish": [
        ("Onlar da geldi.", "de_joined", "Onlarda geldi."), ("Ali'nin de evi", "de_joined", "Ali'ninde evi"),
        ("Ben de De da", "de_harmony", "Ben da Da de"), ("sen de", "de_hardened", "sen te"), ("çay ya da kahve", "ya_da", "çay yada kahve"),
        ("Ayşe de geldi", "de_apostrophe", "Ayşe'de geldi"), ("Ankara'da, evlerde içinde", "de_suffix", "Ankara da, evler de için de"),
        ("öyle ki o", "ki_joined", "öyleki o"), ("Belki gelir", "ki_apart", "Bel ki gelir"), ("bir plan", "consonants", "bir pılan"),
        ("yavaş yavaş", "reduplication", "yavaşyavaş"), ("geldi mi? iyi misiniz", "question", "geldimi? iyimisiniz"), ("başlayacağım", "future", "başlıyacağım"),
        ("gidecek, izleyecek", "future_e", "gidecek, izliyecek"), ("resmin burnu", "vowel_kept", "resmin burunu"), ("Burada ve nerede", "vowel_lost", "Burda ve nerde"),
        ("kitabın rengi", "consonant_kept", "kitapın renki"), ("hukukun sepeti", "consonant_softened", "hukuğun sepedi"),
        ("kabul etti", "etmek_joined", "kabuletti"), ("hissetti", "etmek_apart", "his etti"), ("ayakkabım", "compound", "ayak kabım"),
        ("olabilir, gidiverdi", "verb_compound", "ola bilir, gidi verdi"), ("kütüphanede", "borrowed_ending", "kütüp hanede"), ("Hiçbiri", "pronoun_apart", "Hiç biri"),
        ("İyi. Irmak", "capital", "iyi. ırmak"), ("hâlâ kâğıdı", "circumflex", "hala kâğıdı"), ("Dr. Ali", "abbreviation", "Dr Ali"),
    ],
    "english": [
        ("an apple", "article", "a apple"), ("a tree", "article_an", "an tree"), ("in the house", "article_lost", "in house"), ("Its tail is longer than", "homophone", "It's tail is longer then"),
        ("They were", "agreement", "They was"), ("should have gone", "modal_of", "should of gone"), ("Without it", "apart", "With out it"), ("A lot", "joined", "Alot"),
        ("Receiving", "vowels", "Recieving"), ("necessary", "letters", "neccessary"), ("we don't", "apostrophe_lost", "we dont"), ("two values", "apostrophe_plural", "two value's"),
        ("so I do", "pronoun_i", "so i do"), ("on Monday", "proper_noun", "on monday"), ("consists of", "preposition", "consists in"), ("However, it", "comma", "However it"), ("So it is. Yes", "capital", "so it is. yes"),
    ],
    "german": [
        ("dass er", "dass_das", "das er"), ("das, das er", "das_dass", "das, dass er"), ("Seit ihr", "seit_seid", "Seid ihr"), ("der Hund", "noun", "der hund"), ("Größe", "sharp_s", "Grösse"),
        ("er muss", "double_s", "er muß"), ("gar nicht", "joined", "garnicht"), ("Bildungspolitik", "compound", "Bildungs Politik"), ("gut, weil es", "comma", "gut weil es"),
        ("mehr als", "als_wie", "mehr wie"), ("Widerstand", "wieder", "Wiederstand"), ("Standards", "letters", "Standarts"), ("Er geht. Ach", "capital", "er geht. ach"),
    ],
}  # fmt: skip
GRAMMARS = {language: read_grammar("x", language) for language in ERRORS}
CASES = [(language, *case) for language, cases in ERRORS.items() for case in cases]


@pytest.mark.parametrize(("language", "right", "kind", "wrong"), CASES)
def test_each_rule_makes_its_error_and_the_edits_undo_it(language, right, kind, wrong):
    whole = GRAMMARS[language]
    alone = replace(whole, rules=tuple(rule for rule in whole.rules if rule.type == kind))
    made, edits = with_errors(right, alone, np.random.default_rng(0), rate=1000)
    assert made == wrong and {edit.type for edit in edits} == {kind}
    assert corrected(made, from_m2(to_m2(edits))) == right


def test_each_shipped_rule_has_an_example():
    for language in LANGUAGES:
        types = [rule.type for rule in GRAMMARS[language].rules]
        assert [*dict.fromkeys(case[1] for case in ERRORS[language])] == types


PIECES = [word for _, right, _, wrong in CASES for text in (right, wrong) for word in text.split()]
TEXTS = st.lists(
    st.tuples(st.sampled_from([*PIECES, "|||", "A", "'de", "Şey,"]), st.sampled_from([" ", " ", " ", "\n", "  ", "\t", "\u2028"])), max_size=30
).map(lambda parts: "".join(f"{word}{blank}" for word, blank in parts))  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.sampled_from(LANGUAGES), st.integers(0, 5))
def test_the_recorded_edits_restore_any_text_to_the_character(text, language, seed):
    operation = GrammaticalErrors(language=language, rate=20, seed=seed)
    made, edits = operation.with_errors(text, GRAMMARS[language])
    assert corrected(made, from_m2(to_m2(edits))) == text
    tags = tags_of(edits, len(made.split()))
    assert [tag[0] for tag in tags].count("B") == len(edits) and (made != text) == bool(edits)
    assert operation.with_errors(text, GRAMMARS[language]) == (made, edits)
    for number, (tag, token) in enumerate(zip(tags, made.split(), strict=True)):
        if tag == "O":  # a token without a tag is one of the right text
            assert number == 0 or token in text.split()


@settings(max_examples=300, deadline=None)
@given(*[st.lists(st.sampled_from("abc"), max_size=8)] * 2)
def test_aligned_edits_make_the_target_at_least_cost(source, target):
    edits = aligned(source, target)
    assert corrected(" ".join(source), edits) == " ".join(target)
    assert all(a.end < b.first for a, b in pairwise(edits))  # runs that right tokens part
    assert aligned(source, source) == []


def test_edits_are_those_of_errant():
    """As `errant_parallel -lev -merge all-merge` (3.0.2) writes them."""
    expected = {
        ("a b c", "a x c"): [(1, 2, "x")],
        ("a b a", "a a b"): [(1, 3, "a b")],
        ("e c", "a b c d"): [(0, 1, "a b"), (2, 2, "d")],
    }
    expected |= {("a a", "a a a"): [(0, 0, "a")], ("a b b", "b"): [(0, 2, "")]}
    for (source, target), edits in expected.items():
        assert [(e.first, e.end, e.correction) for e in aligned(source.split(), target.split())] == edits


def test_precision_recall_and_f_of_edits():
    true = [Edit(0, 1, "", "a"), Edit(3, 4, "", "b"), Edit(6, 6, "", "c")]
    proposed = [Edit(0, 1, "x", "a"), Edit(3, 4, "", "other")]
    counts = counted(proposed, true)
    assert counts == (1, 2, 3) and counted(proposed, true, correction=False) == (2, 2, 3)
    assert counts.scores() == pytest.approx((1 / 2, 1 / 3, 1.25 * (1 / 2) * (1 / 3) / (0.25 / 2 + 1 / 3)))
    assert Counts(0, 0, 0).scores() == (1, 1, 1) and Counts(0, 2, 3).scores() == (0, 0, 0)


def test_m2_that_is_none_is_refused_and_edits_must_lie_beside_one_another():
    assert from_m2("A -1 -1|||noop|||-NONE-|||REQUIRED|||-NONE-|||0") == []
    with pytest.raises(PretrainError, match="accepted: A FIRST END"):
        from_m2("A 1|||x|||y")
    for edits in ([Edit(0, 2, "", "x"), Edit(1, 2, "", "y")], [Edit(1, 4, "", "x")]):
        with pytest.raises(PretrainError, match="accepted: edits beside one another"):
            corrected("a b c", edits)


def test_documents_get_errors_and_columns_and_sentences_apart(tmp_path):
    rows = [
        {"text": "I should have gone. However, they don't receive a lot.", "domain": "a", "id": "x", "target": "old"},
        {"text": "", "domain": "b", "id": "y", "target": "old"}, {"text": "Nothing here.", "domain": "b", "id": "z", "target": "old"},
    ]  # fmt: skip
    operation = GrammaticalErrors(rate=1000, types=("modal_of", "joined", "vowels"))
    with working(tmp_path) as desk:
        made = operation(Dataset.from_list(rows)).to_list()
    assert [row["target"] for row in made] == [row["text"] for row in rows]
    assert made[0]["text"] == "I should of gone. However, they don't recieve alot."
    assert made[0]["tags"].split() == ["O", "B-modal_of", "I-modal_of", *["O"] * 4, "B-vowels", "B-joined"]
    assert all(corrected(row["text"], from_m2(row["edits"])) == row["target"] for row in made)
    assert desk.reports[0]["types"] == {"joined": 1, "modal_of": 1, "vowels": 1} and desk.reports[0]["with_errors"] == 1
    apart = GrammaticalErrors(rate=1000, sentences=True)(Dataset.from_list(rows)).to_list()
    assert [row["id"] for row in apart] == ["x#sentence-0", "x#sentence-1", "z#sentence-0"]
    assert [row["target"] for row in apart] == [
        "I should have gone.",
        "However, they don't receive a lot.",
        "Nothing here.",
    ]


def test_rates_are_those_of_the_rules_times_the_factor():
    grammar = read_grammar("x", "english", "", ("modal_of",))
    text = "should have " * 4000
    for factor in (0.4, 1.0):
        _, edits = with_errors(text, grammar, np.random.default_rng(0), factor)
        expected = 0.5 * factor
        assert abs(len(edits) / 4000 - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5


def test_rules_of_ones_own_are_read_and_wrong_ones_refused(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text(json.dumps({"latin": {"rules": {"quod": {"rate": 1, "words": {"quod": "qvod"}}}}}))
    operation = GrammaticalErrors(language="latin", rules=str(path))
    assert operation(Dataset.from_list([{"text": "Quod erat"}]))["text"][:] == ["Qvod erat"]
    with pytest.raises(PretrainError, match=r"language 'latim' \(did you mean 'latin'\?\): accepted: latin"):
        _ = GrammaticalErrors(language="latim", rules=str(path)).grammar
    with pytest.raises(PretrainError, match="types: 'articles'.*accepted: .*article"):
        _ = GrammaticalErrors(types=("articles",)).grammar
    for rule in ({"rate": 1}, {"rate": 2, "words": {"a": "b"}}, {"rate": 1, "find": "(", "wrong": "x"}, {"rate": 1, "find": "(a)", "wrong": "{2}"},
                 {"rate": 1, "words": {"a": 1}}, {"rate": 1, "words": {"a": "b"}, "wrong": "c"}, "x"):  # fmt: skip
        path.write_text(json.dumps({"latin": {"rules": {"quod": rule}}}))
        with pytest.raises(PretrainError, match="latin: quod"):
            _ = operation.__class__(language="latin", rules=str(path)).grammar


class Answers:
    """An evaluation whose model answers as is said."""

    def __init__(self, answer, **fields):
        self.evaluation = ErrorCorrection(**{"resamples": 20} | fields)
        self.answer = answer

    def metrics(self, sentences):
        answers = [self.answer(sentence) for sentence in sentences]
        return self.evaluation._measured(sentences, answers, ["a", "b"] * (len(sentences) // 2))


@pytest.fixture(scope="module")
def sentences():
    text = [
        {"text": f"In the {n} cases they don't receive a lot of values, which I should have seen."} for n in range(20)
    ]
    return ErrorCorrection(rate=2.0).pairs(text)[0]


def test_a_perfect_corrector_and_one_that_does_nothing(sentences):
    perfect = Answers(lambda s: s.target).metrics(sentences)
    assert {
        perfect.metrics[f"{part}_{m}"] for part in ("correction", "detection") for m in ("precision", "recall", "f05")
    } == {1.0}
    assert perfect.metrics["correction_exact"] == 1.0 and perfect.domains.keys() == {"a", "b"}
    assert sum(row["errors"] for row in perfect.listed) == sum(len(s.edits) for s in sentences)
    assert {row["corrected"] for row in perfect.listed} == {1.0}
    idle = Answers(lambda s: s.source).metrics(sentences)
    assert (
        idle.metrics["correction_precision"],
        idle.metrics["correction_recall"],
        idle.metrics["correction_f05"],
    ) == (1, 0, 0)
    assert idle.metrics["correction_exact"] == np.mean([s.source == s.target for s in sentences])


def test_what_is_wrongly_corrected_is_detected_all_the_same():
    sentence = Pair("he go home now", "he goes home", aligned(["he", "go", "home", "now"], ["he", "goes", "home"]))
    measured = Answers(lambda s: "he went home", source="wrong").metrics([sentence] * 2).metrics
    assert (measured["correction_precision"], measured["correction_recall"]) == (
        0.5,
        0.5,
    )  # "now" is right, "went" is not
    assert measured["detection_f05"] == 1.0 and measured["errors"] == 4


def test_tags_are_detection_alone(sentences):
    tagger = Answers(lambda s: tags_of(s.edits, len(s.source.split())), objective="tagging").metrics(sentences)
    assert tagger.metrics["detection_f05"] == 1.0 and "correction_f05" not in tagger.metrics
    blind = Answers(lambda s: ["B-x"] * len(s.source.split()), objective="tagging").metrics(sentences)
    assert blind.metrics["detection_recall"] == 1.0 > blind.metrics["detection_precision"] > 0


def test_held_out_documents_are_measured_whole_or_sentence_by_sentence():
    text = {"text": "I should have gone.\nA lot of it. ", "domain": "a"}
    (whole,), _ = ErrorCorrection(rate=1000, types=("modal_of", "joined")).pairs([text])
    assert whole[:2] == ("I should of gone.\nAlot of it.", "I should have gone.\nA lot of it.")
    parts, names = ErrorCorrection(rate=1000, types=("modal_of", "joined"), sentences=True).pairs([text])
    assert [part[:2] for part in parts] == [
        ("I should of gone.", "I should have gone."),
        ("Alot of it.", "A lot of it."),
    ]
    assert names == ["a", "a"]


def test_an_objective_that_neither_corrects_nor_tags_is_refused():
    for objective in ("classification", {"method": "seq2seq", "prompt": "{other}"}):
        with pytest.raises(PretrainError, match="accepted: seq2seq or tagging"):
            ErrorCorrection(objective=objective)

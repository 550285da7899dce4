"""What counts of words alone reach stands beside a model of labels: as a yardstick, in evaluations and in the report."""

from __future__ import annotations

import json
import random
import time

import numpy as np
import pytest
from test_preflight import FALLING, FLAT, RISING, page_of
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.core.quick.confusion import wrong_answers
from pretrain.engine import run
from pretrain.evaluation.tasks import _word_counts
from pretrain.evaluation.tasks._word_counts import answers, words_of
from pretrain.report.classes import confident
from pretrain.report.page import _cards
from pretrain.report.summary import headline, summarise

ENGLISH = {
    "food": ["bread", "soup", "apple", "cook", "taste", "salt"],
    "sport": ["ball", "goal", "team", "run", "match", "win"],
}
CHINESE = {"food": "饭汤果煮味盐", "sport": "球门队跑赛赢"}


def rows(words, count, join, seed=0):
    """Texts of which only a few words or characters tell the label."""
    rng = random.Random(seed)
    common = "的一是在了人" if isinstance(words["food"], str) else ["the", "and", "of", "to", "in", "it"]
    made = []
    for number in range(count):
        label = sorted(words)[number % 2]
        made.append({"text": join.join(rng.choices(words[label], k=2) + rng.choices(common, k=8)), "label": label})
    return made


def share(answered, asked):
    return np.mean([a == row["label"] for a, row in zip(answered, asked, strict=True)])


@pytest.mark.parametrize(("words", "join"), [(ENGLISH, " "), (CHINESE, "")], ids=["spaces", "no spaces"])
def test_word_counts_tell_labels_of_texts_with_and_without_spaces(words, join):
    learnt, asked = rows(words, 200, join), rows(words, 50, join, seed=1)
    assert share(answers(learnt, asked, ("text", "label"), numbers=False).values, asked) == 1.0


def test_texts_without_spaces_are_counted_by_characters_and_pairs():
    assert words_of("Eat 吃饭!") == ["eat", "吃", "饭", "吃饭", "!"]
    assert words_of("ACGT" * 10)[:3] == ["a", "c", "g"]  # a sequence is no word


def test_of_pairs_the_words_of_both_count():
    rng = random.Random(0)

    def pairs(count):
        for number in range(count):
            first = rng.sample("abcdefghijklmnop", 5)
            second = first[::-1] if number % 2 else rng.sample("qrstuvwxyzabcdef", 5)
            yield {"text": " ".join(first), "other": " ".join(second), "label": "same" if number % 2 else "other"}

    learnt, asked = list(pairs(300)), list(pairs(60))
    assert share(answers(learnt, asked, ("text", "other", "label"), numbers=False).values, asked) > 0.95


def test_numbers_are_told_by_a_regression_on_the_words():
    learnt, asked = rows(ENGLISH, 200, " "), rows(ENGLISH, 50, " ", seed=1)
    for row in [*learnt, *asked]:
        row["label"] = {"food": 1.0, "sport": 5.0}[row["label"]]
    true = np.array([row["label"] for row in asked])
    answered = np.array(answers(learnt, asked, ("text", "label"), numbers=True).values)
    assert np.mean((answered - true) ** 2) < 0.2 * true.var()


def test_nothing_is_said_where_there_is_nothing_to_learn_from():
    asked = rows(ENGLISH, 4, " ")
    assert answers([], asked, ("text", "label"), numbers=False) is None
    assert answers([{"text": "a b", "label": "x"}] * 9, asked, ("text", "label"), numbers=False) is None
    assert answers([{"text": " ", "label": str(n)} for n in range(4)], asked, ("text", "label"), numbers=False) is None


def spelled(count, seed):
    """Texts of made-up words of which no two are alike, whose label is the ending of one of them."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        words = ["".join(rng.choices("bcdfgklmnprst", k=6)) for _ in range(5)]
        words[rng.randrange(5)] += ("ation", "ology")[number % 2]
        made.append({"text": " ".join(words), "label": ("act", "science")[number % 2]})
    return made


def test_the_training_documents_choose_what_is_counted():
    learnt, asked = spelled(200, 0), spelled(60, 1)
    best = answers(learnt, asked, ("text", "label"), numbers=False)
    assert best.words == "ridge regression on character n-grams" and share(best.values, asked) > 0.9
    words = answers(rows(ENGLISH, 200, " "), asked[:2], ("text", "label"), numbers=False)
    assert words.words == "naive Bayes on word counts"  # all are as good: the first
    for row in [*learnt, *asked]:
        row["label"] = {"act": 1.0, "science": 5.0}[row["label"]]
    numbers = answers(learnt, asked, ("text", "label"), numbers=True)
    error = np.mean((np.array(numbers.values) - [row["label"] for row in asked]) ** 2)
    assert numbers.words == "ridge regression on character n-grams" and error < 2


def test_what_is_asked_does_not_choose():
    learnt = spelled(200, 0)
    first = answers(learnt, spelled(60, 1), ("text", "label"), numbers=False)
    other = answers(learnt, rows(ENGLISH, 60, " "), ("text", "label"), numbers=False)
    assert first.words == other.words


def test_of_very_many_classes_the_cheap_counts_are_left(monkeypatch):
    monkeypatch.setattr(_word_counts, "MOST_WORK", 1)
    best = answers(spelled(200, 0), spelled(10, 1), ("text", "label"), numbers=False)
    assert best.words.endswith("naive Bayes on word counts") and len(best.values) == 10


def test_counting_takes_seconds_whatever_the_documents_are():
    rng = random.Random(0)
    long = " ".join(rng.choices([f"w{n}" for n in range(5000)], k=20_000))
    learnt = [{"text": long[n:], "label": str(n % 3)} for n in range(400)]
    begun = time.process_time()
    answers(learnt, learnt[:50], ("text", "label"), numbers=False)
    assert time.process_time() - begun < 20  # all of the 50 million letters take minutes


RECIPE = """
name: tune
stages:
  - {{stage: data, name: corpus, sources: [{{files: {data}}}], validation: 0.15, test: 0.15, near_duplicates: null}}
  - {{stage: tokenizer, name: tokenizer, corpus: corpus, vocab_size: 300}}
  - stage: train
    name: tuned
    corpus: corpus
    tokenizer: tokenizer
    model: {{family: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 1}}
    objective: {objective}
    length: 32
    budget: {{steps: 1}}
  - {{stage: evaluate, name: evaluation, checkpoint: tuned, corpus: corpus, compressors: false,
      evaluations: [{{method: task, objective: {objective}}}]}}
"""


@pytest.mark.processes
def test_a_classifier_is_measured_and_reported_beside_word_counts_of_what_it_has_learnt_from(tmp_path):
    """In the stage, in the report, and of a file by the command, as long as the run's corpus is there."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows(ENGLISH, 400, " ")), encoding="utf-8")
    (tmp_path / "r.yaml").write_text(RECIPE.format(data=data, objective="classification"))
    result = run(tmp_path / "r.yaml", output=tmp_path / "run", say=lambda text: None)
    metrics = result.stages["evaluation"]["metrics"]
    assert metrics["accuracy_of_counts"] == 1.0 > metrics["accuracy"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "worse than word counts" in page and "word counts: 1;" in page
    record = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    assert record["yardsticks"] == {"accuracy_of_counts": "naive Bayes on word counts"}
    wrong, counts = record["mistakes"], record["confusion"]
    assert len(wrong) == min(50, sum(n for truth, row in counts.items() for name, n in row.items() if name != truth))
    assert all(row["true"] != row["answered"] and 0.5 <= row["probability"] <= 1 for row in wrong)
    assert [row["probability"] for row in wrong] == sorted((row["probability"] for row in wrong), reverse=True)
    assert "Its surest mistakes" in page and wrong[0]["text"] in page
    new = tmp_path / "new.jsonl"
    new.write_text("\n".join(json.dumps(row) for row in rows(ENGLISH, 40, " ", seed=7)), encoding="utf-8")
    asked = ["evaluate", str(tmp_path / "run"), "--data", str(new), "--json"]
    assert json.loads(CliRunner().invoke(app, asked).stdout)["metrics"]["accuracy_of_counts"] == 1.0
    plain = json.loads(CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), str(new), "--json"]).stdout)
    assert plain["metrics"] == json.loads(CliRunner().invoke(app, asked).stdout)["metrics"]  # DATA in its place
    for given in ([], [str(new), "--data", str(new)]):
        refused = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), *given])
        assert "DATA" in str(refused.exception) and "accepted: a corpus, a file" in str(refused.exception)
    (corpus,) = (tmp_path / "run").glob("data-*/corpus")
    corpus.rename(tmp_path / "elsewhere")
    assert "accuracy_of_counts" not in json.loads(CliRunner().invoke(app, asked).stdout)["metrics"]


def of_labels(held_out, **metrics):
    """A page whose evaluation has these metrics alone."""
    page = page_of(0.0, 0.0, (0.0, 0.0), held_out)
    intervals = {name: (value - 0.05, value + 0.05) for name, value in metrics.items() if name in ("accuracy", "mse")}
    page["evaluations"] = [
        {"name": "test", "of": "tuned", "metrics": metrics | {"documents": 50.0}, "intervals": intervals}
    ]
    return page


def test_the_report_judges_against_the_best_of_what_costs_nothing():
    below = summarise(of_labels(FLAT, accuracy=0.304, majority=0.13, naive_bayes=0.684))
    assert "where naive Bayes on word counts gives 0.684" in below.result
    assert "worse than word counts: 0.304 where naive Bayes on word counts" in below.judgement
    assert "Good" not in below.judgement
    assert "more passes, a pretrained model to begin with (init: NAME, or pretrain new … --init NAME)" in below.advice
    assert below.command.endswith("--set tuned.budget.epochs=12")
    risen = summarise(of_labels(RISING, accuracy=0.304, majority=0.13, naive_bayes=0.684))
    assert risen.advice.startswith("Next: more labelled documents") and not risen.command
    close = summarise(of_labels(FLAT, accuracy=0.7, majority=0.13, naive_bayes=0.684)).judgement
    assert "better than word counts, but not surely so: the interval reaches down to 0.65" in close
    above = summarise(of_labels(FLAT, accuracy=0.9, majority=0.13, naive_bayes=0.684)).judgement
    assert above == "Good: it is better than naive Bayes on word counts of the same training documents."
    rare = summarise(of_labels(FLAT, accuracy=0.85, majority=0.9, naive_bayes=0.8))
    assert "always answering the commonest class gives 0.9" in rare.result and "no text is as good" in rare.judgement


def test_the_report_calls_the_counts_what_the_evaluation_chose():
    page = of_labels(FLAT, accuracy=0.46, majority=0.13, accuracy_of_counts=0.71)
    page["evaluations"][0]["yardsticks"] = {"accuracy_of_counts": "ridge regression on character n-grams"}
    told = summarise(page)
    assert "where ridge regression on character n-grams gives 0.71" in told.result
    assert "worse than character n-grams: 0.46 where ridge regression on character n-grams" in told.judgement
    page["trainings"] = []
    assert "character n-grams: 0.71; the commonest alone: 0.13" in str(_cards(page | {"stages": []}, headline(page)))


@pytest.mark.parametrize(("sure", "said"), [(0.95, True), (0.75, False)])
def test_the_report_says_where_scores_promise_more_than_they_keep(sure, said):
    judged = summarise(of_labels(FLAT, accuracy=0.7, majority=0.13, confidence=sure)).judgement
    assert ("promise too much: 0.95 on average, where 0.70 are right" in judged) is said


@pytest.mark.parametrize(
    ("more", "said"), [("", "Note: "), (": says little of new text", "Do not trust that number: ")]
)
def test_the_report_distrusts_a_number_only_where_many_documents_were_trained_on(more, said):
    page = of_labels(FLAT, accuracy=0.7, majority=0.13)
    page["evaluations"][0]["seen"] = f"1 of 99 documents was in the training data{more}"
    assert f"{said}1 of 99 documents" in summarise(page).judgement


def test_the_report_names_the_worst_class_of_those_with_enough_documents():
    page = of_labels(FLAT, accuracy=0.9, majority=0.13)
    page["evaluations"][0]["confusion"] = {
        "good": {"good": 30}, "bad": {"good": 15, "bad": 5}, "few": {"good": 3, "few": 1}, "missed": {"good": 20},
    }  # fmt: skip
    judged = summarise(page).judgement
    assert (
        "Worst of the classes with 10 test documents or more is “bad”: of its 20 test documents 5 are answered right, and 5 are answered so in all"
        in judged
    )
    assert "It never answers “missed” (20)" in judged
    del page["evaluations"][0]["confusion"]["few"]
    assert "Worst is “bad”: of its 20" in summarise(page).judgement
    page["evaluations"][0]["confusion"] = {"good": {"good": 30}, "bad": {"bad": 20}}
    assert "Worst" not in summarise(page).judgement


def test_wrong_answers_are_listed_by_confidence_and_bounded():
    texts = ["x" * 1000, "b", "c"] + ["d"] * 80
    true, answered = ["1", "2", "1"] + ["1"] * 80, ["2", "2", "2"] + ["2"] * 80
    listed = wrong_answers(texts, true, answered, [0.9, 1.0, 0.95] + [0.5] * 80, [7, None, None] + [None] * 80)
    assert len(listed) == 50 and [row["probability"] for row in listed[:3]] == [0.95, 0.9, 0.5]
    assert listed[1] == {"id": "7", "text": "x" * 239 + "…", "true": "1", "answered": "2", "probability": 0.9}
    assert "id" not in listed[0]
    shown = str(confident([*listed, {"text": "<b>", "true": "1", "answered": "2", "probability": 0.1}]))
    assert shown.count("<tr>") == 13 and "evaluation.json has 51" in shown
    assert "&lt;b&gt;" in str(confident([{"text": "<b>", "true": "1", "answered": "2", "probability": 0.1}]))
    assert not confident([]) and not confident([{"text": "a"}])


def test_a_regression_is_judged_by_its_error_and_told_nothing_of_classes():
    worse = summarise(of_labels(FLAT, mse=1.0, mse_of_mean=2.0, mse_of_counts=0.5)).judgement
    assert "worse than word counts: 1 where ridge regression on word counts" in worse
    good = summarise(of_labels(FLAT, mse=0.2, mse_of_mean=2.0, mse_of_counts=0.5))
    assert good.judgement.startswith("Good") and "what it takes for what" not in good.advice
    assert summarise(of_labels(FLAT, accuracy=0.9, majority=0.1)).advice.startswith("Next: see below what it takes for")
    assert "fell" in summarise(of_labels(FALLING, mse=0.2, mse_of_mean=2.0)).advice


def test_word_counts_stand_on_the_card_of_the_number():
    page = of_labels(FLAT, accuracy=0.304, majority=0.13, naive_bayes=0.684)
    page["trainings"] = []
    assert "word counts: 0.684; the commonest alone: 0.13" in str(_cards(page | {"stages": []}, headline(page)))

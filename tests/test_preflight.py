"""What a plan says of the documents before anything runs, and what an evaluation says of what it was trained on."""

from __future__ import annotations

import csv
import json

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.core.errors import PretrainError
from pretrain.core.quick.confusion import (
    class_rows,
    confusion_of,
    doubtful,
    misspelt,
    mistakes,
    never_answered,
    respelt,
)
from pretrain.corpus.overlap import distrusted, overlap_warning, trained_on
from pretrain.corpus.sources import Files
from pretrain.corpus.store import write_corpus
from pretrain.evaluation import Measured
from pretrain.forecast import check_documents, forecast
from pretrain.identity import plan
from pretrain.inference.measuring import _print_classes
from pretrain.objectives._metrics import classification, regression, tagging
from pretrain.recipe import load
from pretrain.report.classes import classes
from pretrain.report.data import plots
from pretrain.report.summary import summarise
from pretrain.stages.evaluate import LEAST, summary

ROWS = [(f"text number {n} {'good' if n % 2 else 'bad'}", "yes" if n % 2 else "no", n) for n in range(40)]


def recipe(tmp_path, objective="{method: classification, label: label}", source="", rows=ROWS):
    """A classifier of a table, as a plan sees it."""
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label", "number"), *rows])
    stages = f"""
name: mine
stages:
  - {{name: corpus, stage: data, sources: [{{files: {tmp_path}/data.csv{source}}}], validation: 0.2, test: 0.2}}
  - {{name: tokenizer, stage: tokenizer, corpus: corpus, vocab_size: 300, cls: true, mask: true}}
  - name: tuned
    stage: train
    corpus: corpus
    tokenizer: tokenizer
    model: {{family: bert, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2}}
    objective: {objective}
    length: 32
    budget: {{epochs: 8}}
  - {{name: test, stage: evaluate, checkpoint: tuned, corpus: corpus, compressors: false,
      evaluations: [{{method: task, objective: {objective}}}]}}
"""
    (tmp_path / "mine.yaml").write_text(stages)
    return load(tmp_path / "mine.yaml", output=tmp_path / "run")


def checked(loaded):
    return check_documents(loaded, plan(loaded))


@pytest.mark.parametrize(
    ("objective", "source", "message"),
    [
        ("{method: classification, label: lable}", "", r"mine.yaml:\d+: tuned.objective.label: .*'lable' \(did you mean 'label'"),
        ("{method: classification, label: label, pair: txt}", "", r"tuned.objective.pair: .*'txt' \(did you mean 'text'"),
        ("{method: regression, label: label}", "", r"column 'label' holds 'no'; accepted: numbers"),
        ("{method: classification, label: label}", ", text: txet", r"corpus.sources.0: .*data.csv:2 \(row 1\): no column 'txet' \(did you mean 'text'"),
        ("{method: classification, label: label}", ", text: txet, on_error: skip", r"corpus.sources.0: .*data.csv:2 \(row 1\): no column 'txet' .*tables: text to read the file as it stands$"),
        ("{method: classification, label: label}", ", required: [label, lable]", r"corpus.sources.0: required 'lable': no row has one \(did you mean 'label'\?\); accepted: text, label, number"),
    ],
)  # fmt: skip
def test_a_column_that_no_document_has_is_refused_before_anything_runs(tmp_path, objective, source, message):
    with pytest.raises(PretrainError, match=message):
        checked(recipe(tmp_path, objective, source))


def test_a_required_column_without_a_value_is_called_empty_and_is_not_its_own_correction(tmp_path):
    loaded = recipe(tmp_path, "{method: classification, label: label}", ", required: [team]")
    rows = "".join(f"text {n},{'yes' if n % 2 else 'no'},{n},\n" for n in range(40))
    (tmp_path / "data.csv").write_text(f"text,label,number,team\n{rows}")
    with pytest.raises(
        PretrainError, match="required 'team': its column is empty in every row; accepted: text, label, n"
    ):
        checked(loaded)


SOURCES = {
    "stdlib": (["stdlib"], ("python", "docstrings")),
    "packages": ([{"packages": ["yaml", "click"]}], ("yaml", "click")),
    "functions": ([{"functions": ["yaml"]}], ("yaml",)),
    "files": ([{"files": "FOLDER"}], ("txt", "md")),
    "named": ([{"files": "FOLDER", "domain": "mine"}], ("mine",)),
    "several": (["stdlib", {"files": "FOLDER"}], ("python", "docstrings", "txt", "md")),
    "corpus": (None, ("python", "docstrings")),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(
    "naming",
    [
        lambda domain: {"mixture": {domain: 1.0}},
        lambda domain: {"policies": [{"method": "domain_upsampling", "mixture": {domain: 1.0}}]},
        lambda domain: {"policies": [{"method": "stability_gap", "domain": domain}]},
    ],
    ids=["mixture", "upsampling", "stability_gap"],
)
def test_a_domain_that_no_document_has_is_refused_before_anything_runs(tmp_path, name, naming):
    for file in ("a.txt", "b.md"):
        (tmp_path / "texts" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "texts" / file).write_text("some words")
    sources, domains = SOURCES[name]
    data = {"stage": "data", "name": "corpus"}
    if sources is None:
        documents = [
            {"text": f"{domain} {n}", "domain": domain, "id": f"{domain}{n}"} for n in range(9) for domain in domains
        ]
        write_corpus(documents, tmp_path / "there" / "corpus", validation=0.2, test=0.2)
    else:
        data["sources"] = yaml.safe_load(json.dumps(sources).replace("FOLDER", str(tmp_path / "texts")))
    train = {
        "stage": "train", "name": "model", "corpus": "corpus" if sources else str(tmp_path / "there"),
        "tokenizer": str(tmp_path), "model": {"family": "llama"}, "budget": {"steps": 2},
    }  # fmt: skip

    def stages(domain):
        (tmp_path / "r.yaml").write_text(yaml.safe_dump({"stages": [data] * bool(sources) + [train | naming(domain)]}))
        return checked(load(tmp_path / "r.yaml", output=tmp_path / "run"))

    for domain in domains:
        stages(domain)
    accepted = ", ".join(sorted(domains))
    with pytest.raises(
        PretrainError, match=rf"model\.\S+: no document is of the domain 'other'; accepted: {accepted}$"
    ):
        stages("other")


def test_labels_that_cannot_be_learnt_are_told_before_training(tmp_path):
    assert checked(recipe(tmp_path)) == []
    (line,) = checked(recipe(tmp_path, rows=[*ROWS, ("an odd one", "maybe", 3)]))
    assert "1 label has a single row ('maybe')" in line
    (line,) = checked(recipe(tmp_path, "{method: classification, label: number}"))
    assert "40 different values in 40 rows" in line
    with pytest.raises(PretrainError, match="holds one label, 'yes'; accepted: 2 or more"):
        checked(recipe(tmp_path, rows=[(text, "yes", n) for text, _, n in ROWS]))


def test_labels_that_name_rows_or_hardly_come_again_are_told(tmp_path):
    rows = [(text, label, f"day {n % 22}") for text, label, n in (*ROWS, *ROWS)]
    (line,) = checked(recipe(tmp_path, "{method: classification, label: number}", rows=rows))
    assert "22 labels, 3.6 rows each" in line
    named = recipe(tmp_path, "{method: classification, label: id}")
    table = (tmp_path / "data.csv").read_text().replace("number", "id", 1)
    (tmp_path / "data.csv").write_text(table)
    (line,) = checked(named)
    assert "40 different values in 40 rows" in line


def test_a_label_that_is_the_text_or_as_long_is_told_before_training(tmp_path):
    def long(n):
        return "a label that goes on and on and is a text of its own rather than a label, " * 2 + str(n)

    (line,) = checked(recipe(tmp_path, "{method: classification, text: label, label: text}"))
    assert "'text' has 40 different values in 40 rows: names of rows rather than labels" in line
    rows = [(text, long(n), n) for text, _, n in ROWS]
    for objective in ("{method: classification, label: label}", "{method: smart}"):
        (line,) = checked(recipe(tmp_path, objective, rows=rows))
        assert "'label' has 40 different values" in line
    assert checked(recipe(tmp_path, rows=[(text, long(n % 2), n) for text, _, n in ROWS])) == []
    with pytest.raises(PretrainError) as error:
        checked(recipe(tmp_path, "{method: regression, label: label}", rows=rows))
    assert "column 'label' holds 'a label that goes on" in str(error.value) and long(0) not in str(error.value)
    documents = [{"text": text, "label": label, "domain": "a", "id": text} for text, label, _ in ROWS]
    write_corpus(documents, tmp_path / "there" / "corpus", validation=0.2, test=0.2)
    raw = yaml.safe_load((recipe(tmp_path, "{method: classification, text: label, label: text}").path).read_text())
    raw["stages"] = [stage | {"corpus": str(tmp_path / "there")} for stage in raw["stages"][1:]]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(raw))
    (line,) = checked(load(tmp_path / "other.yaml", output=tmp_path / "run"))
    assert "'text' has " in line and "different values" in line


def test_an_evaluation_of_the_labels_of_another_column_is_told_before_training(tmp_path):
    rows = [(text, label, n % 4) for text, label, n in ROWS]
    raw = yaml.safe_load(recipe(tmp_path, rows=rows).path.read_text())
    raw["stages"][2]["objective"]["label"] = "number"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw))
    (line,) = checked(load(tmp_path / "mine.yaml", output=tmp_path / "run"))
    assert line == "stage 'test': asks for the labels of 'label', and 'tuned' learns those of 'number'"


def test_labels_are_not_asked_of_a_model_that_learns_from_text_alone(tmp_path):
    raw = yaml.safe_load(recipe(tmp_path).path.read_text())
    raw["stages"][2]["objective"] = "masked_lm"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw))
    words = (
        r"test\.checkpoint: classification measures labels, and 'tuned' learns none: its objective is masked_lm; "
        "accepted: a checkpoint that classification has trained"
    )
    with pytest.raises(PretrainError, match=words):
        checked(load(tmp_path / "mine.yaml", output=tmp_path / "run"))


def test_a_language_model_is_not_asked_for_labels(tiny, prepared):
    from pretrain.corpus.tokenizers import load_tokenizer
    from pretrain.evaluation.tasks.task import Task

    documents = [{"text": text, "label": label} for text, label, _ in ROWS]
    with pytest.raises(PretrainError, match="task: a BertForMaskedLM gives no labels; accepted: a checkpoint that"):
        Task()(tiny("bert", vocab_size=512), load_tokenizer(prepared / "tokenizer"), documents)


def test_a_rate_that_no_model_learns_at_is_told_before_training(tmp_path):
    raw = yaml.safe_load(recipe(tmp_path).path.read_text())
    told = {}
    for rate in (4e-3, 4.0):
        raw["stages"][2]["optimizer"] = {"method": "adamw", "lr": rate}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw))
        made = forecast(plan(load(tmp_path / "mine.yaml", output=tmp_path / "run")))
        told[rate] = [odd.text for each in made for odd in each.estimate.warnings if odd.text.startswith("lr ")]
    assert told[4e-3] == [] and ["lr 4: 667 times 0.006" in line for line in told[4.0]] == [True]


def test_an_evaluation_reads_a_split_once_at_most(tmp_path):
    *_, judged = forecast(plan(recipe(tmp_path)))
    assert 0 < judged.estimate.passes <= 1


def test_most_rows_left_out_are_told(tmp_path):
    rows = [(text, label if n < 12 else "", n) for text, label, n in ROWS]
    (line,) = checked(recipe(tmp_path, source=", required: [label]", rows=rows))
    assert "of the first 40 rows" in line and "most are left out: 28 rows without label" in line


def test_a_label_that_is_likely_misspelt_is_told(tmp_path):
    rows = [(text, "numerics" if n % 2 else "other", n) for text, _, n in ROWS]
    rows += [("one more", "numercis", 40), ("and one", "numercis", 41)]
    (line,) = checked(recipe(tmp_path, rows=rows))
    assert "'numercis' (2 rows) is likely 'numerics' (20) misspelt" in line
    pairs = [
        ("scince", "science"),
        ("scienses", "science"),
        ("invalid", "valid"),
        ("level 2", "level 1"),
    ]
    found = misspelt({common: 100 for _, common in pairs} | {rare: 3 for rare, _ in pairs})
    assert found == [("scince", "science")]
    assert misspelt({"plane": 50, "plate": 40}) == []  # both are common


def test_all_labels_that_differ_in_case_alone_are_told_in_one_line_whatever_their_counts(tmp_path):
    names = [f"{'abcdefghijklm'[n]}-part" for n in range(13)]
    rows = [(f"words {n}", names[n % 13], n) for n in range(13 * 6)]
    rows += [(f"words {n}", names[n % 13].upper(), n) for n in range(100, 100 + 12 * 13) if n % 13 != 12 and n % 3]
    (line,) = checked(recipe(tmp_path, rows=rows))
    assert "'label': 12 labels differ from others in case alone: " in line
    for name in names[:12]:
        assert repr(name) in line and repr(name.upper()) in line
    assert "'M-PART'" not in line and "as they stand they are learnt as other labels" in line
    (line,) = doubtful("label", {f"{letter}{mark}x": 8 for letter in "abcdefghijklmno" for mark in " _"})
    assert "15 labels differ from others in blanks or punctuation alone: 'a" in line and ", and 3 more: " in line


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("EMAIL", "email", True), ("Web ", "web", True), ("tk-inter", "tkinter", True), ("I/O", "io", True),
     ("level 1", "Level_1", True), ("spam.", "spam", True), ("C++", "C#", False), ("C", "C++", False),
     ("1.5", "15", False), ("-1", "1", False), ("level -1", "level 1", False), ("A-", "A", False),
     (":)", ":(", False), ("level 1", "level 2", False)],
)  # fmt: skip
def test_labels_are_the_same_whatever_their_case_and_marks_but_not_where_these_tell_them_apart(one, other, same):
    assert bool(respelt({one: 40, other: 50})) == same
    assert respelt({one: 40, other: 50}) == respelt({other: 50, one: 40})
    assert not misspelt({one: 4, other: 50})


def test_a_file_that_is_not_utf_8_is_told_by_the_plan(tmp_path):
    loaded = recipe(tmp_path)
    (tmp_path / "data.csv").write_bytes(b"text,label,number\ncaf\xe9,yes,1\n")
    result = CliRunner().invoke(app, ["run", str(tmp_path / "mine.yaml"), "--dry-run"])
    assert "data.csv:2 (row 1): byte 0xe9 is not UTF-8" in str(result.exception)
    assert loaded.given == ("--output", str(tmp_path / "run"))


def test_labels_of_a_corpus_that_is_there_are_looked_at_too(tmp_path):
    documents = [{"text": text, "label": label, "domain": "a", "id": text} for text, label, _ in ROWS]
    write_corpus(documents, tmp_path / "there" / "corpus", validation=0.2, test=0.2)
    raw = yaml.safe_load((recipe(tmp_path).path).read_text())
    for stage in raw["stages"][1:]:
        stage["corpus"] = str(tmp_path / "there")
    raw["stages"] = raw["stages"][1:]
    raw["stages"][1]["objective"] = {"method": "classification", "label": "lable"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(PretrainError, match="no document has a column 'lable'"):
        checked(load(tmp_path / "other.yaml", output=tmp_path / "run"))


def trained(tmp_path, corpus_address="abcdef123456789"):
    """A checkpoint whose lineage names a corpus beside it."""
    documents = [{"text": f"document {n}\nof words", "domain": "a", "id": str(n)} for n in range(30)]
    write_corpus(documents, tmp_path / "run" / f"data-{corpus_address[:12]}" / "corpus", validation=0.2, test=0.2)
    folder = tmp_path / "run" / "train-1" / "checkpoint"
    folder.mkdir(parents=True)
    lineage = {"stages": [{"stage": "data", "address": corpus_address}]}
    (folder / "pretrain.json").write_text(json.dumps({"lineage": lineage}))
    return folder, tmp_path / "run" / f"data-{corpus_address[:12]}" / "corpus", documents


def test_a_few_documents_that_were_trained_on_are_counted_without_a_judgement(tmp_path):
    folder, corpus, documents = trained(tmp_path)
    learnt = [d for d in documents if trained_on([d], [corpus])]
    fresh = [{"text": f"a new one, {n}"} for n in range(99)]
    few, many = (overlap_warning([*learnt[:n], *fresh[n:]], folder) for n in (1, 10))
    assert few == "1 of 99 documents was in the training data" and not distrusted(few)
    assert many == "10 of 99 documents were in the training data: what is measured says little of new text"
    assert distrusted(many) and distrusted("whether it has seen these documents is unknown")


def test_documents_that_were_trained_on_are_counted_and_held_out_ones_are_not(tmp_path):
    folder, corpus, documents = trained(tmp_path)
    known = json.loads((corpus / "corpus.json").read_text())["documents"]["train"]
    warned = overlap_warning([*documents, {"text": "a new one"}], folder)
    assert warned.startswith(f"{known} of 31 documents were in the training data")
    other_line_ends = [{"text": document["text"].replace("\n", "\r\n")} for document in documents]
    assert len(trained_on(other_line_ends, [corpus])) == known
    assert overlap_warning([{"text": "a new one"}], folder) == ""
    assert overlap_warning(documents, folder, corpus) == ""  # its own held-out ones
    (corpus / "corpus.json").unlink()
    assert "whether it has seen these documents is unknown" in overlap_warning(documents, folder)


def test_of_a_few_documents_there_are_no_intervals_and_it_is_said_why(tiny, prepared):
    from pretrain.corpus.tokenizers import load_tokenizer
    from pretrain.evaluation.likelihood.held_out import HeldOut
    from pretrain.stages.evaluate import evaluate

    model, tokenizer = tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer")
    documents = [{"text": f"some words to read, {n} of them", "domain": "a"} for n in range(LEAST)]
    few = evaluate(model, tokenizer, documents[:1], [HeldOut()], compressors=False)
    assert few["intervals"] == {} and few["no_intervals"].startswith("1 document is too few")
    enough = evaluate(model, tokenizer, documents, [HeldOut()], compressors=False)
    assert enough["intervals"] and "no_intervals" not in enough


def test_the_commonest_class_stands_beside_the_accuracy():
    assert classification(["a", "a", "b", "a"], ["a", "a", "a", "b"]) | {"majority": 0.75, "accuracy": 0.5} == (
        classification(["a", "a", "b", "a"], ["a", "a", "a", "b"])
    )
    assert tagging([["O", "B-X"]], [["O", "O"]])["majority"] == 1.0
    assert regression([1.0, 2.0], [0.0, 2.0])["mse_of_mean"] == 1.0


def test_a_confusion_gives_each_class_its_precision_recall_and_f1():
    from sklearn.metrics import precision_recall_fscore_support

    true, answered = list("aaaabbbcc"), list("aaabbbaac")
    confusion = confusion_of(answered, true)
    expected = precision_recall_fscore_support(true, answered, labels=["a", "b", "c"])
    rows = class_rows(confusion)
    assert [row.name for row in rows] == ["a", "b", "c"] and [row.count for row in rows] == [4, 3, 2]
    for row, precision, recall, f1 in zip(rows, *expected[:3], strict=True):
        assert (row.precision, row.recall, row.f1) == pytest.approx((precision, recall, f1))
    assert mistakes(confusion) == [("a", "b", 1), ("b", "a", 1), ("c", "a", 1)]
    assert never_answered(confusion_of(["a", "a"], ["a", "b"])) == ["b"]
    found = summary({"task": Measured({"accuracy": 0.6}, confusion=confusion)}, [], compressors=False)
    assert found["confusion"] == confusion
    page = str(classes(confusion, "test"))
    assert '<td data-label="recall" class="number">0.750</td>' in page and "a: answered b, 25%" in page
    many = confusion_of([f"c{n}" for n in range(20)], [f"c{(n + 1) % 20}" for n in range(20)])
    assert "The commonest mistakes" in str(classes(many, "test"))


def page_of(accuracy, majority, interval, held_out, *, confusion=None, kept=None, given=(), unit="tokens", objective="classification"):  # fmt: skip
    """A run with an encoder and what was tuned on labels."""
    stages = [
        {"name": name, "stage": "train", "status": "finished", "writes": "checkpoint", "weights": 10**5, "bytes": 4, "family": "bert",
         "lineage": {"tokens": 1000, "unit": unit}, "metrics": metrics, "seconds": 1.0, "inputs": {"init": init} if init else {},
         "config": {"budget": {"epochs": 3}} | ({"init": init} if init else {})}
        for name, init, metrics in (("encoder", "", {"loss": 2.5}), ("tuned", "encoder", {"loss": 0.3}))
    ]  # fmt: skip
    axes = {"tokens": [1000], "seconds": [1.0]}
    trainings = [
        {"name": name, "unit": unit, "objective": [method], "step": axes | {"loss": [1.0], "bits_per_byte": [None]},
         "evaluation": {"loss": losses, "bits_per_byte": [None] * len(losses)}}
        for name, method, losses in (("encoder", "masked_lm", [3.0, 2.5]), ("tuned", objective, held_out))
    ]  # fmt: skip
    trainings[1] |= {} if kept is None else {"kept": kept}
    metrics = {"accuracy": accuracy, "majority": majority, "documents": 50.0}
    evaluation = {"name": "test", "of": "tuned", "metrics": metrics, "intervals": {"accuracy": interval}, "confusion": confusion or {}}  # fmt: skip
    run = {"name": "r", "recipe": "r.yaml", "seed": 0, "stages": stages, "given": list(given)}
    evaluations = [evaluation] if accuracy is not None else []
    return {"run": run, "stages": stages, "trainings": trainings, "evaluations": evaluations, "corpora": [], "folder": "runs/r"}  # fmt: skip


FALLING, FLAT, RISING = [1, 0.8, 0.6, 0.5, 0.4, 0.3], [1, 0.5, 0.3, 0.3, 0.3, 0.3], [1, 0.5, 0.3, 0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    ("given", "judgement", "advice"),
    [
        ((0.9, 0.5, (0.8, 0.95), FLAT), "Good: it is better than", "label more of that"),
        ((0.6, 0.5, (0.4, 0.8), FLAT), "not surely so: the interval reaches down to 0.4", "label more of that"),
        ((0.5, 0.5, (0.4, 0.6), FLAT), "That is not good", "more labelled documents, or a pretrained model"),
        ((0.9, 0.5, (0.8, 0.95), RISING), "Good", "more passes do not help"),
        ((0.9, 0.5, (0.8, 0.95), FALLING), "Good", "train longer; the validation loss still fell"),
    ],
)
def test_a_classifier_is_judged_and_advised_as_one(given, judgement, advice):
    found = summarise(page_of(*given))
    assert f"an accuracy of {given[0]:.3g} on 50 documents" in found.result and "0.5" in found.result
    assert judgement in found.judgement and advice in found.advice
    assert "tokens for each weight" not in found.advice


@pytest.mark.parametrize(("high", "words"), [(1.99, "Good: that is 10% fewer than"), (2.01, "Not sure yet: counting")])
def test_bits_are_good_only_where_the_interval_lies_below_the_counts(high, words):
    page = page_of(0.9, 0.5, (0.8, 0.95), FLAT)
    page["evaluations"] = [
        {"name": "test", "of": "tuned", "metrics": {"bits_per_byte": 1.8}, "intervals": {"bits_per_byte": (1.6, high)},
         "bigram": 2.0, "compressors": {"xz": {"metrics": {"bits_per_byte": 2.5}}}}
    ]  # fmt: skip
    assert summarise(page).judgement.startswith(words)


def test_a_class_that_is_never_answered_is_named():
    found = summarise(page_of(0.9, 0.5, (0.8, 0.95), FLAT, confusion={"a": {"a": 9}, "rare": {"a": 2}}))
    assert "never answers “rare” (2)" in found.judgement and "“rare” (2 test documents)" in found.advice


def test_the_next_command_keeps_what_set_gave_and_replaces_what_it_changes():
    given = ("--set", "tuned.length=64", "--set", "tuned.budget.steps=5", "--output", "runs/my r")
    found = summarise(page_of(0.9, 0.5, (0.8, 0.95), FALLING, given=given))
    assert found.command == (
        "pretrain run r.yaml --set tuned.length=64 --output 'runs/my r' --set tuned.budget.epochs=12"
    )


def test_losses_of_different_objectives_are_never_compared():
    from pretrain.report.charts import changes

    page = page_of(0.9, 0.5, (0.8, 0.95), FLAT, kept=2)
    text = str(changes(page))
    assert "validation loss of classification (nats)" in text and "<b>0.3</b>" in text and "<b>2.5</b>" not in text
    assert {plot["unit"] for plot in plots(page["trainings"])} == {"loss of masked_lm (nats)", "loss of classification (nats)"}  # fmt: skip
    assert plots(page_of(None, 0, (0, 0), FLAT, unit="images", objective="native")["trainings"])[1]["unit"] == "loss of native"  # fmt: skip


def test_what_was_kept_is_shown_and_not_the_end_of_the_curve():
    page = page_of(None, 0, (0, 0), RISING, kept=2)
    found = summarise(page)
    assert "a validation loss of classification (nats) of 0.3." in found.result
    assert "fell by 70%" in found.judgement


@pytest.mark.parametrize(
    ("unit", "words"), [("images", "more images"), ("steps", "more data"), ("tokens", "more text")]
)
def test_other_things_than_text_are_called_what_they_are(unit, words):
    page = page_of(None, 0, (0, 0), RISING, unit=unit, objective="native")
    assert words in summarise(page).advice


def test_a_curve_of_two_points_is_said_to_say_nothing():
    found = summarise(page_of(None, 0, (0, 0), [1.0, 0.9], unit="images", objective="native"))
    assert "measure more often" in found.advice and "levelled off" not in found.advice
    assert found.command == "pretrain run r.yaml --set tuned.evaluate_every=0.05"


@pytest.mark.parametrize(
    ("method", "values", "labels", "kept"),
    [
        ("classification", ["a", "c", "b", "a"], ("a", "b"), [0, 2, 3]),
        ("classification", [1, 2, 3], ("1", "2", "3"), None),
        ("tagging", ["O B-x", "O B-y"], ("O", "B-x"), [0]),
    ],
)
def test_held_out_documents_of_a_class_that_no_training_document_has_are_left_out_and_told(
    method, values, labels, kept
):
    from types import SimpleNamespace

    from pretrain.core.method import method_class
    from pretrain.stages._training_data import _leave_unlearnt

    class HeldOutExamples:
        def __init__(self):
            self.kept, objective = None, method_class(method)()
            self.split = {objective.columns[-1]: values}

        def __len__(self):
            return len(values)

        def keep(self, numbers):
            self.kept = list(numbers)

    examples, lines = HeldOutExamples(), []
    _leave_unlearnt(method_class(method)(), labels, examples, SimpleNamespace(say=lines.append))
    assert examples.kept == kept and len(lines) == (kept is not None)
    assert all("that no training document has" in line for line in lines)


def test_an_evaluation_of_a_file_names_the_row_and_the_label_that_was_never_learnt(tmp_path):
    from types import SimpleNamespace

    from pretrain.core.method import method_class
    from pretrain.inference.measuring import _labelled

    task = method_class("task")()
    model = SimpleNamespace(config=SimpleNamespace(id2label={0: "no", 1: "yes"}))
    opened = (model, SimpleNamespace())
    rows = [("f.csv:2 (row 1)", {"text": "a", "label": "yes"}), ("f.csv:3 (row 2)", {"text": "b", "label": "yse"})]
    with pytest.raises(PretrainError, match=r"f\.csv:3 \(row 2\): label 'yse' \(did you mean 'yes'\?\); accepted"):
        _labelled(rows, Files("f.csv"), task, opened)
    gone = [(where, {"text": row["text"], "lable": row["label"]}) for where, row in rows]
    with pytest.raises(PretrainError, match=r"--label 'label': f\.csv has no such column \(did you mean 'lable'\?\)"):
        _labelled(gone, Files("f.csv"), task, opened)


@pytest.mark.parametrize("width", [80, 200])
def test_names_of_classes_are_whole_at_any_width(width, capsys):
    names = ["tkinter-widgets", "asyncio-streams", "collections-abc", "idlelib-editor", "[odd] name"]
    confusion = {name: {name: 20, names[0]: 3 + n} for n, name in enumerate(names)}
    _print_classes(Console(width=width), confusion)
    out = capsys.readouterr().out
    assert "…" not in out and all(out.count(name) >= 2 for name in names)
    assert ("the commonest mistakes" in out) is (width < 200) is ("true \\ answered" not in out)


def test_what_makes_no_mistakes_has_no_list_of_them(capsys):
    names = [f"a class with a long name {n}" for n in range(8)]
    _print_classes(Console(width=80), {name: {name: 2} for name in names})
    assert "mistakes" not in capsys.readouterr().out


def test_a_source_without_a_document_is_refused_before_anything_is_read_into_a_corpus(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").touch()
    text = f"name: e\nstages:\n- {{stage: data, name: corpus, sources: [{tmp_path / 'empty'}]}}\n"
    (tmp_path / "e.yaml").write_text(text)
    recipe = load(tmp_path / "e.yaml", [], tmp_path / "run")
    with pytest.raises(PretrainError, match="no documents .passed over: 1 empty"):
        check_documents(recipe, plan(recipe))

"""`pretrain new`: what it sees in a folder or a file, and that each recipe it writes runs to its end."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from new_cases import (
    ENGLISH,
    KINDS,
    chats,
    new,
    sentences,
    write_code,
    write_kind,
    write_lines,
    write_prose,
    write_reviews,
)
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.corpus.sources import Skipped, read
from pretrain.engine import run
from pretrain.forecast import forecast
from pretrain.identity import plan
from pretrain.new import written
from pretrain.new.look import look
from pretrain.new.plans import Asked, duration, recipe
from pretrain.new.start import Start, encoder, vocabulary
from pretrain.new.texts.languages import prose_language
from pretrain.new.texts.prompts import fitting, prompts
from pretrain.new.words import quoted
from pretrain.recipe import load
from pretrain.stages.data import build_source


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def base(prepared, tiny, tmp_path_factory):
    from pretrain.corpus.tokenizers import load_tokenizer

    folder = tmp_path_factory.mktemp("base") / "model"
    model = tiny(vocab_size=512, max_position_embeddings=256)
    checkpoint.save(model, load_tokenizer(prepared / "tokenizer"), folder)
    return folder


@pytest.mark.processes
@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_for_each_kind_runs_to_its_end_and_measures(here, kind, stories, base, tmp_path):
    place, more = write_kind(here, kind, stories, base)
    printed = new(place.name, "--budget", "1s", "--output", "r.yaml", *more)
    assert "wrote r.yaml; next: pretrain run r.yaml --dry-run" in printed
    assert len(printed.splitlines()) <= 3 + printed.count("rows of each label") + printed.count("changes nothing")
    assert len((here / "r.yaml").read_text().splitlines()) < 75
    result = run(load(here / "r.yaml"))
    wanted = {"labels": "accuracy", "chat": "exact_match", "pairs": "exact_match", "images": "probe_accuracy",
              "tags": "accuracy", "numbers": "mse"}.get(kind, "bits_per_byte")  # fmt: skip
    assert wanted in result.stages["evaluation"]["metrics"]


@pytest.mark.parametrize("kind", [*KINDS, "book", "tiny", "continue", "compress"])
@pytest.mark.parametrize("budget", [[], ["--budget", "2min"]], ids=["default", "2min"])
def test_a_recipe_passes_its_own_plan_without_a_warning(here, kind, budget, stories, base):
    more: list[object] = []
    if kind in KINDS:
        place, more = write_kind(here, kind, stories, base)
    else:
        place, count = here / "texts", {"book": 1, "tiny": 8}.get(kind, 60)
        place.mkdir()
        for number in range(count):
            words = sentences(ENGLISH, random.Random(number), 2000 if kind == "book" else 12)
            (place / f"{number}.txt").write_text(words)
        more = ["--task", kind, "--init", base] if kind in ("continue", "compress") else []
    assert "warning" not in new(place.name, "--output", "r.yaml", *more, *budget)
    plan = CliRunner().invoke(app, ["run", "r.yaml", "--dry-run"], catch_exceptions=False)
    assert plan.exit_code == 0 and "warning" not in plan.output, plan.output


@pytest.mark.parametrize("budget", ["flops=3e11", "tokens=200k", "steps=200", "epochs=2", "seconds=20"])
def test_with_a_budget_of_another_kind_its_measurements_take_no_more_than_their_share(here, budget):
    Path("docs").mkdir()
    for number in range(60):
        (Path("docs") / f"{number}.txt").write_text(" ".join(random.Random(number).choices(ENGLISH, k=8000)))
    new("docs", "--output", "r.yaml")
    (model,) = [
        each.estimate
        for each in forecast(plan(load(Path("r.yaml"), [f"model.budget.{budget}"])))
        if each.item.stage.name == "model"
    ]
    assert model.plan is not None and not [odd for odd in model.warnings if odd.field == "evaluate_every"]
    assert 20 * model.plan.measurement <= 0.3 * model.plan.seconds


def test_measurements_are_said_to_be_left_out_only_where_a_training_does_leave_them_out(here):
    texts = [" ".join(random.Random(n).choices(ENGLISH, k=200)) for n in range(400)]
    (here / "t.csv").write_text("text,label\n" + "\n".join(f"{t},{'ab'[n % 2]}" for n, t in enumerate(texts)))
    said = {}
    for number, budget in enumerate((["--budget", "0.1s"], ["--budget", "30min"])):
        new("t.csv", "--output", f"{number}.yaml", *budget)
        tuned = Path(f"{number}.yaml").read_text().partition("- name: classifier")[2]
        unit = yaml.safe_load(Path(f"{number}.yaml").read_text())["stages"][-2]["budget"].popitem()[0]
        (said[unit],) = [line for line in tuned.splitlines() if "evaluate_every" in line]
    assert "or fewer" in said["seconds"] and "however long" in said["epochs"] and "or fewer" not in said["epochs"]


def test_what_a_plan_warns_of_for_all_that_is_told_at_once(here):
    write_prose(here / "prose")
    assert "warning: stage 'model': the budget makes" in new("prose", "--budget", "0.01s")


def test_code_is_told_by_its_languages_and_what_is_no_text_of_it_is_named(here, stories):
    write_code(here / "code", stories)
    printed = new("code")
    assert (
        "of code in Python and JavaScript" in printed and "secret-looking (.env)" in printed and "logo.bin" in printed
    )
    source = yaml.safe_load(Path("code.yaml").read_text())["stages"][0]["sources"][0]
    assert source["files"] == "code" and set(source["suffixes"]) == {".py", ".js"}


def test_markup_among_code_is_read_as_it_stands(here, stories):
    write_code(here / "code", stories)
    (here / "code" / "index.html").write_text("<p>Words of a page</p>\n" * 20)
    new("code")
    source = yaml.safe_load(Path("code.yaml").read_text())["stages"][0]["sources"][0]
    assert source["pages"] == "markup" and ".html" in source["suffixes"]


def test_prose_in_two_languages_gets_a_domain_each(here):
    write_prose(here / "prose")
    assert "English and French" in new("prose")
    sources = yaml.safe_load(Path("prose.yaml").read_text())["stages"][0]["sources"]
    assert sources == [
        {"files": "prose/en", "domain": "English", "group": "path"},
        {"files": "prose/fr", "domain": "French", "group": "path"},
    ]


def test_prompts_are_whole_lines_of_words_from_each_language(here):
    write_prose(here / "prose")
    for path in (here / "prose").rglob("*.txt"):
        path.write_text("\x1b[1m%s: {}\n======\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    new("prose")
    lines = yaml.safe_load((here / "prose.yaml").read_text())["stages"][-1]["prompts"]
    assert {prose_language(prompt) for prompt in lines} == {"English", "French"}
    texts = [path.read_text(encoding="utf-8").splitlines()[2] for path in (here / "prose").rglob("*.txt")]
    assert all(any(text.startswith(prompt + " ") for text in texts) for prompt in lines)
    assert [
        fitting(line) for line in ("printf %s and more words", "caf\x00 au lait it is", "a", "= = = = = = = = =")
    ] == [None] * 4
    assert fitting("def area(width, height):") == "def area(width, height):"
    blanks = f"{'a word ' * 11}      and more"
    assert fitting(blanks) == blanks[:80].rstrip() and len(blanks) > 80
    code = '"""What it is about, in words."""\n\nimport os\n\n\nclass Area(Shape):\n    """Of a shape."""\n'
    assert prompts([(".py", code), (".c", "/* Copyright (C) of somebody. */\nint main(void) {\n")], 0) == (
        "class Area(Shape):", "int main(void) {"
    )  # fmt: skip
    assert prompts([(".md", code)], 0) == ('"""What it is about, in words."""',)


def test_a_recipe_is_never_written_over_another(here):
    write_reviews(here / "reviews.csv")
    (here / "reviews.yaml").write_text("mine")
    with pytest.raises(PretrainError, match=r"reviews\.yaml exists; accepted: a name that is free"):
        new("reviews.csv")
    with pytest.raises(PretrainError, match="--label 'nope': reviews.csv has no such column"):
        new("reviews.csv", "--label", "nope")
    assert (here / "reviews.yaml").read_text() == "mine"
    new("reviews.csv", "--force")
    assert load(here / "reviews.yaml").name == "reviews"


def test_a_recipe_is_written_to_no_pipe_and_no_folder_and_through_a_link(here):
    write_reviews(here / "reviews.csv")
    os.mkfifo(here / "pipe.yaml"), (here / "link.yaml").symlink_to("other.yaml"), (here / "folder.yaml").mkdir()
    for more in (["reviews.csv"], ["--starter", "mine"]):
        for name, kind in (
            ("pipe.yaml", "is a named pipe"),
            ("folder.yaml", "is a folder"),
            ("no/x.yaml", "no folder"),
        ):
            with pytest.raises(PretrainError, match=f"{name}:? .*{kind}.*; accepted: a"):
                new(*more, "--output", name, "--force")
        new(*more, "--output", "link.yaml", "--force")
        assert (here / "link.yaml").is_symlink() and load(here / "other.yaml").name
    assert (here / "pipe.yaml").is_fifo() and not (here / "no").exists()


def test_of_texts_that_are_cut_the_true_share_is_told(here):
    rng = random.Random(0)
    rows = [f"{sentences(ENGLISH, rng, 20 if n % 9 == 0 else 1)} {n},{'ab'[n % 2]}" for n in range(99)]
    (here / "t.csv").write_text("\n".join(["text,label", *rows]))
    new("t.csv")
    recipe = load(here / "t.yaml")
    tuned = next(stage for stage in recipe.stages if stage.name == "classifier")
    texts = [row.rpartition(",")[0] for row in rows]
    assert next(stage for stage in recipe.stages if stage.stage == "tokenizer").algorithm == "bytes"
    longer = sum(len(text) + 2 > tuned.length for text in texts)
    assert longer > 9 and f"# {longer} of 99 texts are longer, and cut" in (here / "t.yaml").read_text()


@pytest.mark.parametrize(("odd", "words"), [(0, "no text is longer\n"), (1, "1 of 700 texts is longer, and cut\n")])
def test_a_single_long_text_of_many_is_counted(here, odd, words):
    rows = [f"{n:03} {'and' * (200 if odd and n == 401 else 9)},{'ab'[n % 2]}" for n in range(700)]
    (here / "t.csv").write_text("\n".join(["text,label", *rows]))
    new("t.csv", "--text", "text", "--label", "label")
    assert f"  # {words}" in (here / "t.yaml").read_text()


def test_a_path_that_is_not_there_is_an_error_that_names_what_is_near(here):
    write_reviews(here / "reviews.csv")
    with pytest.raises(PretrainError, match=r"'review.csv': no such file or folder \(did you mean 'reviews.csv'"):
        new("review.csv")
    with pytest.raises(PretrainError, match="--starter with a name"):
        new("nosuch")
    assert not list(here.glob("*.yaml"))
    assert "a starter" in new("mine", "--starter")
    assert load(here / "mine.yaml").name == "mine"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["chat.jsonl"], "chat tunes a checkpoint; accepted: --init"),
        (["reviews.csv", "--task", "compress"], "--task compress makes smaller a checkpoint; accepted: --init"),
        (["reviews.csv", "--task", "continue"], "--task continue goes on with a checkpoint; accepted: --init"),
        (["reviews.csv", "--task", "chat", "--init", "BASE"], "holds no conversations or answers; its columns: number"),
        (["chat.jsonl", "--task", "pretrain"], "holds conversations; accepted: --task chat"),
        (["chat.jsonl", "--task", "classify"], "holds no texts with labels"),
        (["reviews.csv", "--task", "clasify"], "did you mean 'classify'"),
        (["reviews.csv", "--label", "sentimen"], "did you mean 'sentiment'"),
        (["reviews.csv", "--text", "body"], "--text 'body': reviews.csv has no such column"),
        (["reviews.csv", "--budget", "10M"], "--budget '10M': accepted: a time"),
        (["reviews.csv", "--init", "no/such/place"], "--init 'no/such/place': no such folder"),
        (["none.csv"], "'none.csv': no such file or folder"),
        (["archive.zip"], "nothing to learn from"),
        (["scores.csv", "--task", "classify"], "120 different numbers in 'score'; accepted: --task regress"),
        (["bare.csv"], "bare.csv: no column holds texts"),
    ],
)
def test_what_no_recipe_can_do_is_one_line(here, base, arguments, message):
    write_reviews(here / "reviews.csv")
    write_lines(here / "chat.jsonl", chats(8))
    (here / "archive.zip").write_bytes(b"PK\x03\x04")
    scores = [f"some words of the row {n},{n}.5" for n in range(120)]
    (here / "scores.csv").write_text("text,score\n" + "\n".join(scores))
    (here / "bare.csv").write_text("x,y\n1,2\n3,4\n5,6\n")
    given = [str(base) if word == "BASE" else word for word in arguments]
    with pytest.raises(PretrainError, match=message) as error:
        new(*given)
    assert "\n" not in str(error.value) and not list(here.glob("*.yaml"))


def test_a_classifier_cannot_be_gone_on_with_as_a_language_model(here, base, tmp_path):
    place = tmp_path / "classifier"
    place.mkdir()
    (place / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForSequenceClassification"]}')
    write_prose(here / "prose")
    with pytest.raises(PretrainError, match=r"is a bert \(BertForSequenceClassification\); accepted for continue"):
        new("prose", "--task", "continue", "--init", place)


@pytest.fixture
def shaped(tmp_path, tiny, stories):
    """`shaped(entries, width, blocks)`: a checkpoint of random weights, whose tokenizer is of the stories."""
    from pretrain.corpus.tokenizers import train_tokenizer

    def make(entries: int, width: int, blocks: int) -> Path:
        tokenizer = train_tokenizer((story["text"] for story in stories), vocab_size=entries)
        model = tiny(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=blocks,
            max_position_embeddings=256, tie_word_embeddings=True,
        )  # fmt: skip
        checkpoint.save(model, tokenizer, tmp_path / "shaped")
        return tmp_path / "shaped"

    return make


def bytes_of(folder: Path) -> int:
    """Of a checkpoint's weights and tokenizer, or of a GGUF file."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf")) + sum(
        path.stat().st_size for path in folder.glob("tokenizer.json")
    )


@pytest.mark.parametrize(
    ("kind", "size", "stages"),
    [
        ("stories", (2500, 32, 2), ["before", "smaller", "after"]),  # most is vocabulary
        ("prose", (2500, 32, 2), ["before", "trimmed", "smaller", "after"]),  # of which the text uses little
        ("stories", (400, 128, 5), ["before", "quantised", "after"]),  # most is blocks
    ],
)
def test_a_checkpoint_is_made_as_small_as_the_recipe_promises_at_little_loss(here, shaped, stories, kind, size, stages):
    from pretrain.core.quick.quantities import quantity

    (here / "texts").mkdir()
    for number, story in enumerate(stories):
        words = story["text"] if kind == "stories" else sentences(ENGLISH, random.Random(number), 400)
        (here / "texts" / f"{number}.txt").write_text(words)
    folder = shaped(*size)
    new("texts", "--task", "compress", "--init", folder, "--output", "r.yaml")
    assert [stage["name"] for stage in yaml.safe_load(Path("r.yaml").read_text())["stages"]][1:] == stages
    words = " ".join(line.strip("# ") for line in Path("r.yaml").read_text().splitlines() if line.startswith("  #"))
    (before, after, saved) = re.search(r"Of ([\d.]+ \w)B of .* leaves about ([\d.]+ \w)B \(-(\d+)%\)", words).groups()
    result = run(load(Path("r.yaml")))
    made = bytes_of(result.folder / stages[-2] / ("export" if stages[-2] == "smaller" else "checkpoint"))
    assert quantity(before) == pytest.approx(bytes_of(folder), rel=0.01)
    assert quantity(after) == pytest.approx(made, rel=0.15)
    assert int(saved) / 100 == pytest.approx(1 - made / bytes_of(folder), abs=0.05) and int(saved) > 55
    losses = [result.stages[name]["metrics"]["bits_per_byte"] for name in ("before", "after")]
    assert losses[1] < 1.03 * losses[0]


def test_an_export_that_is_not_read_again_is_not_evaluated(here, shaped):
    write_prose(here / "prose")
    new("prose", "--task", "compress", "--init", shaped(2500, 32, 2), "--output", "r.yaml")
    with pytest.raises(PretrainError, match=r"'smaller' exports onnx, which is not read again; accepted: one to gguf"):
        load(Path("r.yaml"), ["smaller.to=onnx", "smaller.numbers=f16"])


def test_of_a_checkpoint_that_a_gguf_file_does_not_take_the_blocks_are_made_smaller(here):
    write_prose(here / "prose")
    seen = look("prose")
    config = {"vocab_size": 8192, "hidden_size": 64, "num_hidden_layers": 4, "architectures": ["LlamaForCausalLM"],
              "num_attention_heads": 4, "intermediate_size": 176, "model_type": "llama"}  # fmt: skip
    text = recipe(Asked("m", seen, "compress", Start("runs/m", config)))
    assert "gptq" in text and "gguf" not in text and "vocabulary's. Of " in text
    assert "vocabulary" not in recipe(Asked("m", seen, "compress", Start("org/name", {})))


@pytest.mark.processes
@pytest.mark.parametrize("task", ["continue", "compress"])
def test_a_checkpoint_is_gone_on_with_or_made_smaller_and_measured_before_and_after(here, base, task):
    write_prose(here / "prose")
    new("prose", "--task", task, "--init", base, "--budget", "1s")
    result = run(load(here / "prose.yaml"))
    before, after = (result.stages[name]["metrics"]["bits_per_byte"] for name in ("before", "after"))
    assert after < before + (0.0 if task == "continue" else 0.2)


def test_of_too_few_documents_none_is_held_out_and_the_recipe_still_runs(here):
    (here / "one").mkdir()
    (here / "one" / "book.txt").write_text(sentences(ENGLISH, random.Random(0), 200))
    assert "too few documents to hold any out" in new("one", "--budget", "1s")
    stages = yaml.safe_load((here / "one.yaml").read_text())["stages"]
    assert [s["stage"] for s in stages] == ["data", "tokenizer", "train", "decode"]
    assert run(load(here / "one.yaml")).stages["model"]["metrics"]["steps"] > 0


def test_whatever_is_not_taken_of_a_folder_is_told(here, stories):
    write_code(here / "code", stories)
    (here / "code" / "logo.png").write_bytes(b"png")
    (here / "code" / "data.csv").write_text("a,b\n1,2\n")
    printed = new("code")
    assert "1 .png file (logo.png)" in printed and "1 .csv file (data.csv)" in printed


def test_the_rows_of_each_label_are_told_and_a_misspelt_one_is_doubted(here):
    rows = [f"words of a longer text {n},{('science', 'arts')[n % 2]}" for n in range(60)]
    (here / "t.csv").write_text("text,label\n" + "\n".join([*rows, "one more of it,scince", "and again of it,scince"]))
    printed = new("t.csv")
    assert "rows of each label: 'science' 30, 'arts' 30, 'scince' 2" in printed
    assert "'scince' (2 rows) is likely 'science' (30) misspelt" in printed


@pytest.mark.parametrize(
    ("column", "became"), [("label", "all are kept"), ("package", "the first of each text is kept")]
)
def test_texts_with_more_than_one_label_are_told_before_and_after_the_corpus_is_made(here, column, became):
    rows = [f"words of a longer text {n},{'ab'[n % 2]},note {n}" for n in range(60)]
    rows += [
        "words of a longer text 2,b,again",
        "words of a longer text 3,b,another copy",
        "words of a longer text 4,,",
    ]
    (here / "t.csv").write_text(f"text,{column},notes\n" + "\n".join(rows))
    printed = new("t.csv", "--label", column)
    assert f"2 rows of 1 text that stands with more than one {column} (line 4, line 62): {became}" in printed
    said = []
    recipe = load(here / "t.yaml", ["encoder.budget={steps: 1}", "classifier.budget={steps: 1}"])
    run(recipe, say=said.append)
    info = json.loads((here / "runs" / "t" / "corpus" / "corpus" / "corpus.json").read_text())
    assert info["contradicting"] == {column: {"texts": 1, "kept": column == "label"}}
    assert info["removed"]["exact"] == (1 if column == "label" else 2)
    line = f"1 text stands with more than one {column!r}"
    assert any(f"warning: {line}" in each for each in said)
    assert line.replace("'", "&#x27;") in (here / "runs" / "t" / "report.html").read_text()


def test_columns_of_texts_that_go_unread_are_named(here):
    rows = [f"words of a longer text {n},{('science', 'arts')[n % 2]},a title of number {n},k{n}" for n in range(60)]
    (here / "t.csv").write_text("text,label,title,key\n" + "\n".join(rows))
    assert "not read: the texts in title (--text takes another column)" in new("t.csv")


def test_rows_that_no_recipe_can_use_are_told_with_their_lines_and_left_out(here):
    rows = [f"words of a longer text {n},{'ab'[n % 2]}" for n in range(60)]
    rows[3], rows[7], rows[8], rows[9] = "a,b,c,d", "words alone,", ",a", "no label either,"
    (here / "t.csv").write_bytes(("text,label\n" + "\n".join(rows)).encode() + "\ncaf\xe9,a".encode("latin-1"))
    printed = new("t.csv")
    for line in ("1 row cannot be read: 4 cells (line 5); left out by on_error: skip", "1 row not in UTF-8",
                 "1 row without a text, passed over (line 10)",
                 "2 rows without a label (line 9, line 11); left out by required: label"):  # fmt: skip
        assert line in printed
    source = yaml.safe_load((here / "t.yaml").read_text())["stages"][0]["sources"][0]
    assert source == {"files": "t.csv", "required": ["label"], "on_error": "skip"}
    skipped = Skipped()
    assert sum(1 for _ in read(build_source(source), skipped)) == 56
    assert skipped.reasons["rows without label"] == 2 and skipped.reasons["empty"] == 1


def test_texts_without_a_label_are_read_by_the_encoder_and_by_nothing_else(here):
    rows = [f"words of a longer text {n},{'ab'[n % 2]}" for n in range(60)]
    without = [f"no label of text {n}," for n in range(62)]
    (here / "t.csv").write_text("text,label\n" + "\n".join([*rows, *without]))
    new("t.csv")
    stages = {stage["name"]: stage for stage in yaml.safe_load((here / "t.yaml").read_text())["stages"]}
    assert stages["corpus"]["sources"] == [{"files": "t.csv", "required": ["label"]}]
    assert stages["texts"]["sources"] == [{"files": "t.csv"}]
    assert {name for name, stage in stages.items() if stage.get("corpus") == "texts"} == {"tokenizer", "encoder"}
    shares = [(stages[name]["validation"], stages[name]["test"]) for name in ("corpus", "texts")]
    assert shares[0] == shares[1], "so that what is held out of the one is held out of the other"
    run(load(here / "t.yaml", ["encoder.budget={steps: 1}", "classifier.budget={steps: 1}"]))
    counts = [
        json.loads((here / "runs" / "t" / name / "corpus" / "corpus.json").read_text())["read"]
        for name in ("corpus", "texts")
    ]
    assert counts == [60, 122]
    (here / "whole.csv").write_text("text,label\n" + "\n".join(rows))
    new("whole.csv")
    assert "texts" not in {s["name"] for s in yaml.safe_load((here / "whole.yaml").read_text())["stages"]}


def labelled_texts(place: Path, without: int) -> None:
    """800 texts of 30 words with two labels, and texts without."""
    words = random.Random(0).choices(sentences(ENGLISH, random.Random(0), 400).split(), k=24_000)
    texts = [" ".join(words[n * 30 : n * 30 + 30]).replace(",", "") for n in range(800)]
    rows = [f"{text},{'ab'[n % 2]}" for n, text in enumerate(texts)]
    place.write_text(
        "text,label\n" + "\n".join([*rows, *(f"{text} more {n}," for n, text in enumerate(texts[:without]))])
    )


@pytest.mark.parametrize("without", [800, 100])
def test_an_encoder_of_the_texts_comes_first_and_the_mean_of_its_states_tells_the_label(here, without):
    labelled_texts(here / "t.csv", without)
    new("t.csv")
    stages = {stage["name"]: stage for stage in yaml.safe_load((here / "t.yaml").read_text())["stages"]}
    encoder, classifier = stages["encoder"], stages["classifier"]
    assert encoder["model"]["classifier_pooling"] == "mean" and encoder["model"]["num_hidden_layers"] == 1
    assert encoder["objective"] == "masked_lm" and classifier["init"] == "encoder"
    assert float(classifier["optimizer"]["lr"]) == float(encoder["optimizer"]["lr"]) == 4e-3
    assert classifier["budget"] == {"epochs": 12} and classifier["batch_rows"] == 32
    assert classifier["policies"][0]["metric"] == "accuracy"
    load(here / "t.yaml")


def test_labels_that_are_missing_are_told_by_the_plan_of_any_recipe(here):
    write_reviews(here / "reviews.csv")
    new("reviews.csv")
    with (here / "reviews.csv").open("a") as file:
        file.write("90,some more words of it,\n")
    plan = CliRunner().invoke(app, ["run", "reviews.yaml", "--dry-run"])
    assert "1 row without 'sentiment', which is learnt like a label; required: [sentiment]" in plan.output


def test_a_table_without_a_header_loses_no_row_to_it(here):
    rows = [f"some longer text of number {n} to read,{'yes' if n % 2 else 'no'}" for n in range(60)]
    (here / "bare.csv").write_text("\n".join(rows))
    assert "a table of 60 rows without a header" in new("bare.csv")
    source = yaml.safe_load((here / "bare.yaml").read_text())["stages"][0]["sources"][0]
    assert source == {"files": "bare.csv", "text": "0", "header": False}
    assert sum(1 for _ in read(build_source(source))) == 60
    (here / "headed.csv").write_text("\n".join(["review,liked", *rows]))
    assert look("headed.csv").table.rows == 60 and "without a header" not in new("headed.csv")


@pytest.mark.parametrize(
    "value, task, other",
    [("{c}", "classify", "regress"), ("{c}.0", "classify", "regress"), ("{c}.5", "regress", "classify"),
     ("{n}", "regress", "classify")],
)  # fmt: skip
def test_numbers_are_classes_where_they_are_few_and_whole_and_the_other_task_takes_them_otherwise(
    here, value, task, other
):
    rows = [f"some longer text of number {n} to read,{value.format(n=n * 3 % 29, c=n % 5)}" for n in range(60)]
    (here / "t.csv").write_text("\n".join(["text,score", *rows]))
    printed = new("t.csv")
    assert f"guessed --task {task}; the numbers in score are taken for" in printed and f"else --task {other}" in printed
    objective = {"classify": "classification", "regress": "regression"}
    assert f"method: {objective[task]}" in (here / "t.yaml").read_text()
    assert ("standardise: true" in (here / "t.yaml").read_text()) is (task == "regress")
    assert ("metric: accuracy, better: higher" in (here / "t.yaml").read_text()) is (task == "classify")
    new("t.csv", "--task", other, "--output", "other.yaml")
    assert f"method: {objective[other]}" in (here / "other.yaml").read_text()


def test_of_two_columns_that_may_be_the_label_the_guess_is_told(here):
    rows = [f"words of a longer text {n},{'ab'[n % 2]},{'xyz'[n % 3]}" for n in range(60)]
    (here / "t.csv").write_text("text,topic,sentiment\n" + "\n".join(rows))
    assert "the label may as well be topic: --label" in new("t.csv")
    assert "3 labels in sentiment" in Path("t.yaml").read_text()
    new("t.csv", "--label", "topic", "--output", "other.yaml")
    assert "label: topic" in Path("other.yaml").read_text()


def test_on_a_terminal_it_asks_which_of_two_columns_is_the_label(here, monkeypatch):
    rows = [f"words of a longer text {n},{'ab'[n % 2]},{'xyz'[n % 3]}" for n in range(60)]
    (here / "t.csv").write_text("text,topic,sentiment\n" + "\n".join(rows))
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(written, "sys", SimpleNamespace(stdin=terminal, stdout=terminal))
    asked = CliRunner().invoke(app, ["new", "t.csv"], input="topic\n")
    assert "which column is the label: sentiment, topic" in asked.output
    assert "2 labels in topic" in Path("t.yaml").read_text()


def test_files_without_an_ending_and_compressed_ones_are_named_as_the_recipe_can(here):
    (here / "notes").mkdir()
    for number in range(4):
        with gzip.open(here / "notes" / f"{number}.txt.gz", "wt", encoding="utf-8") as file:
            file.write(sentences(ENGLISH, random.Random(number), 5))
    (here / "notes" / "LICENSE").write_text("the terms of it " * 9)
    assert look("notes").endings == (".txt.gz",) and len(look("notes").files) == 4
    new("notes")
    assert "suffixes: [.txt.gz]" in (here / "notes.yaml").read_text()


@pytest.mark.parametrize(
    "header, row, kind, columns",
    [
        (
            "sentence1,sentence2,label",
            "a cat sat {n},a dog ran {n},{c}",
            "classify",
            ("sentence1", "sentence2", "label"),
        ),
        ("title,stars", "quite a long title {n},{c}", "classify", ("title", None, "stars")),
        ("text,score", "quite a long text {n},{n}.5", "regress", ("text", None, "score")),
        ("question,answer", "what is a {n} then,it is the {n} indeed", "chat", ("question", None, "answer")),
        ("id,body", "{n},only some words {n}", "prose", ("body", None, None)),
    ],
)
def test_columns_are_told_by_names_and_values(here, header, row, kind, columns):
    (here / "t.csv").write_text("\n".join([header, *(row.format(n=n, c=n % 2) for n in range(50))]))
    table = look("t.csv").table
    assert table is not None and table.kind == kind and (table.text, table.pair, table.label) == columns


def test_a_data_file_of_a_programs_tests_makes_no_table_of_its_folder(here, stories):
    write_code(here / "code", stories)
    write_reviews(here / "code" / "fixture.csv", 4000)
    assert look("code").kind == "code" and look("code", table=True).kind == "table"


@pytest.mark.parametrize(
    "text, language",
    [("It was the best of times and it was not the worst of them", "English"), ("Der Hund und die Katze sind nicht da", "German"),
     ("Он не был в городе, и это было хорошо, как и что", "Russian"), ("今日は天気がいいですね。散歩に行きましょう", "Japanese"),
     ("今天天气很好我们去公园散步吧", "Chinese"), ("x = 1", None)],
)  # fmt: skip
def test_the_language_of_prose(text, language):
    assert prose_language(text) == language


def test_words_are_quoted_where_yaml_would_read_them_otherwise():
    for word in ("review", "no", "a: b", "# x", "1.5", "null", "Größe", "a b", "*"):
        assert yaml.safe_load(f"x: {quoted(word)}") == {"x": word}
    assert [duration(s) for s in (45, 90, 600, 7200)] == ["45s", "90s", "10min", "2h"]


def test_sizes_grow_with_time_and_text():
    assert encoder(10, 1e4, 512) < encoder(3600, 1e8, 8192)
    assert encoder(3600, 1e4, 512) == encoder(10, 1e4, 512)  # there is too little text for more
    assert [vocabulary(size) for size in (1e3, 4e4, 1e5, 1e9)] == [256, 320, 512, 16384]


def test_it_answers_without_torch(here):
    write_reviews(here / "reviews.csv")
    probe = "import sys, atexit; atexit.register(lambda: print('HEAVY' if 'torch' in sys.modules else 'LIGHT')); "
    probe += "sys.argv = ['pretrain', 'new', 'reviews.csv']; from pretrain.cli import app; app()"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("LIGHT\n")


def test_a_label_that_names_rows_is_refused_and_labels_of_one_row_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [(n, f"some words to read, number {n}", "yes" if n % 2 else "no") for n in range(30)]
    with open("data.csv", "w", newline="") as file:
        csv.writer(file).writerows([("id", "text", "label"), *rows, (30, "an odd one out", "maybe")])
    outcome = CliRunner().invoke(app, ["new", "data.csv", "--label", "id"])
    assert "31 different values in 31 rows" in str(outcome.exception) and "(label)" in str(outcome.exception)
    outcome = CliRunner().invoke(app, ["new", "data.csv"], catch_exceptions=False)
    assert "a single row has the label 'maybe'" in outcome.output


def test_a_folder_is_described_with_all_that_is_left_out_and_its_recipe_passes_the_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {f"src/m{n}.py": f"def f{n}(x):\n    return x + {n}\n" for n in range(40)} | {
        "src/fast.pyx": "cdef int a\n", "src/conf.py": "password=hunter2\n", "app.min.js": "var a", "a.svg": "<svg/>", "b.svg": "<svg/>",
        ".gitignore": "out/\n", "out/x.py": "x = 1\n",
    }  # fmt: skip
    for name, text in files.items():
        (Path("mine") / name).parent.mkdir(parents=True, exist_ok=True)
        (Path("mine") / name).write_text(text)
    Path("mine/src/old.py").write_bytes(b"# caf\xe9\nx = 1\n")
    outcome = CliRunner().invoke(app, ["new", "mine", "--budget", "1min"], catch_exceptions=False)
    said_of = (
        "src/conf.py, line 1: password=…",
        "2 .svg files",
        "1 generated (app.min.js)",
        "1 ignored by git (out)",
        "Cython",
    )
    assert all(words in outcome.output for words in said_of), outcome.output
    assert "not UTF-8, so left out (on_error: skip): mine/src/old.py:1" in outcome.output
    plan = CliRunner().invoke(app, ["run", "mine.yaml", "--dry-run"])
    assert plan.exception is None or plan.exit_code == 0, plan.exception
    text = Path("mine.yaml").read_text()
    Path("mine.yaml").write_text(text.replace(", on_error: skip", ""))
    stopped = CliRunner().invoke(app, ["run", "mine.yaml", "--dry-run"])
    assert "mine/src/old.py:1: byte 0xe9 is not UTF-8" in str(stopped.exception)


def test_no_name_of_a_column_or_a_file_becomes_a_line_of_the_recipe(here):
    rows = [{"a text\nseed: 7\u2028output: /x": f"words {n} of some length", "label": "ab"[n % 2]} for n in range(60)]
    (here / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    new("odd.jsonl", "--text", next(iter(rows[0])), "--label", "label")
    recipe = load(here / "odd.yaml")
    assert recipe.seed == 0 and recipe.output == Path("runs/odd")
    comments = [line for line in (here / "odd.yaml").read_text().splitlines() if line.lstrip().startswith("#")]
    assert any("a text seed: 7 output: /x" in line for line in comments)


def test_a_budget_that_the_recipe_has_no_use_for_is_told(here):
    labelled_texts(here / "t.csv", 0)
    told = new("t.csv", "--budget", "2h")
    assert "--budget 2h changes nothing: more passes over the text" in told
    assert "changes nothing" not in new("t.csv", "--budget", "5s", "--force")


def test_a_budget_beyond_the_passes_that_help_is_told_of_a_model_that_goes_on_too(here, base):
    write_prose(here / "prose")
    assert "--budget 2h changes nothing" in new("prose", "--task", "continue", "--init", base, "--budget", "2h")

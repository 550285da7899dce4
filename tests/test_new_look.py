"""What `pretrain new` makes of folders with loose files, how it begins prompts, and what it holds out after a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pretrain.core.errors import PretrainError
from pretrain.core.files import sealed, write_json
from pretrain.corpus.store import side
from pretrain.new.look import Look, look
from pretrain.new.plans import Asked, recipe
from pretrain.new.start import Start, start_of
from pretrain.new.texts.prompts import beginnings, fitting, prompts
from pretrain.records import write_stage

ENGLISH = "The house was old and the garden was full of trees that had not been cut for many years. "
GERMAN = "Das Haus war alt und der Garten war voller Bäume, die seit vielen Jahren nicht geschnitten worden sind. "


@pytest.fixture
def two_languages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, text in (("en", ENGLISH), ("de", GERMAN)):
        for number in range(60):
            path = Path("texts", folder, f"{number}.txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{number}. {text * 20}\n")
    return Path("texts")


def test_a_loose_file_beside_folders_of_languages_hides_no_domain(two_languages):
    plain = look("texts").domains
    assert plain == (("texts/de", "German"), ("texts/en", "English"))
    (two_languages / "README.md").write_text(f"# Texts\n\n{ENGLISH * 3}\n")
    assert look("texts").domains == (*plain, ("texts/README.md", "English"))
    for number in range(4):
        (two_languages / f"note{number}.md").write_text(f"{number} {ENGLISH * 3}\n")
    assert look("texts").domains == (*plain, ("texts/*.md", "English"))


def test_prompts_of_prose_are_whole_words_as_they_stand_from_where_a_sentence_begins():
    wrapped = "and went on without a word, as they had always\ndone before.\n\nThe old lighthouse stood on a rock, and its keep-\ners had left it many years ago, when the harbour was closed for good.\n"
    assert prompts([(".txt", wrapped)], 0.0) == (
        "The old lighthouse stood on a rock, and its keep-\ners had left it many years",
    )
    assert fitting(f"The old lighthouse\n  stood on {'a rock ' * 6}, its keep-\ners had left") == (
        f"The old lighthouse\n  stood on {'a rock ' * 6}, its"
    )
    assert beginnings("A heading\n=========\nThe first words\nof it. 100 %d\nand so on") == [
        "A heading", "The first words", "and so on"
    ]  # fmt: skip
    assert beginnings("One two three.\n\nFour fi", whole=False) == ["One two three."]
    assert fitting("word " * 15 + "final") == ("word " * 15 + "final"), "80 letters that end with a word stay whole"
    assert fitting("word " * 15 + "finally") == ("word " * 15).strip()


def a_run(folder, validation, test):
    """What a finished run of a corpus and a model has left, as far as `new` reads it."""
    stages = []
    for kind, name, part in (("data", "corpus", "corpus"), ("train", "model", "checkpoint")):
        home = folder / f"{kind}-0123456789ab"
        (home / part).mkdir(parents=True)
        config = {"validation": validation, "test": test} if kind == "data" else {}
        record = {
            "name": name, "stage": kind, "address": "01", "config": config, "methods": {}, "metrics": {},
            "finished": "2026-01-01T00:00:00+00:00", "seconds": 1.0, "flops": 0, "files": {},
        }  # fmt: skip
        write_stage(home / "stage.json", record)
        (folder / name).symlink_to(home.name)
        stages.append({"name": name, "stage": kind, "folder": home.name, "address": "01", "status": "finished"})
    write_json(folder / "data-0123456789ab" / "corpus" / "corpus.json", {"documents": {}})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64}
    write_json(folder / "train-0123456789ab" / "checkpoint" / "config.json", config)
    write_json(folder / "run.json", sealed({"name": "r", "recipe": "", "seed": 0, "stages": stages}))


@pytest.mark.parametrize("name", ["runs/r", "runs/r/model", "runs/r/model/checkpoint"])
def test_what_a_run_held_out_stays_held_out_in_what_goes_on_from_it(two_languages, name):
    a_run(Path("runs/r"), 0.03, 0.07)
    start = start_of(name)
    assert start.held == (0.03, 0.07)
    data, *others = yaml.safe_load(recipe(Asked("next", look("texts"), "continue", start)))["stages"]
    assert (data["validation"], data["test"]) == (0.03, 0.07)
    kept = next(stage for stage in others if stage["name"] == "kept")
    assert kept["corpus"] == "runs/r/corpus@0123456789ab" and kept["checkpoint"] == "model", "what is forgotten shows"
    texts = [path.read_text() for path in sorted(Path("texts").rglob("*.txt"))]
    assert all(side(t, data["validation"], data["test"]) == side(t, 0.03, 0.07) for t in texts)
    other = yaml.safe_load(recipe(Asked("next", look("texts"), "continue", Start("org/model", start.config))))[
        "stages"
    ][0]
    assert (other["validation"], other["test"]) != (0.03, 0.07), "of another's checkpoint nothing is known"


def test_text_of_another_encoding_is_named_where_there_is_no_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old").mkdir()
    for number in range(3):
        Path("old", f"{number}.txt").write_bytes(GERMAN.encode("latin-1"))
    with pytest.raises(PretrainError, match=r"old: not UTF-8: 0\.txt:1 and 2 more; accepted: text in UTF-8 \(iconv"):
        look("old")
    Path("old.csv").write_bytes("text,team\nEine Straße hier,a\nnoch ein Weg für alle,b\n".encode("cp1252"))
    where = r"no rows that can be read \(old\.csv:2 \(row 1\): byte 0xdf is not UTF-8\)"
    with pytest.raises(PretrainError, match=rf"{where}; accepted: text in UTF-8 \(iconv -f latin1"):
        look("old.csv")
    Path("lines.jsonl").write_text("one\ntwo\n")
    with pytest.raises(PretrainError, match=r"no rows that can be read .*; accepted: one JSON object a line$"):
        look("lines.jsonl")


def test_a_budget_of_passes_says_what_the_last_of_them_teaches():
    asked = Asked("m", Look("t", "prose", (), 1.0), "pretrain", passes=25)
    assert asked.spent("")["why"].endswith("the last teaches 21% of what as much new text would")
    assert "4 are nearly as good as new text" in asked.spent("")["why"]

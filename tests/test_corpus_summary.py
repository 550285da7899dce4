"""`pretrain corpus` tells what is in a folder or a corpus before a model learns from it."""

from __future__ import annotations

import csv
import json
import sys

import pytest
from documents_made import WORDS, put, zipped
from typer.testing import CliRunner

from pretrain import engine
from pretrain.cli import app
from pretrain.core.errors import PretrainError
from pretrain.corpus.look.summary import summarized
from pretrain.recipe import check


@pytest.fixture
def folder(tmp_path):
    """Ten documents in three languages, one of them twice and one nearly so, and files that are passed over."""
    home = tmp_path / "mine"
    for n in range(6):
        put(home / f"{n}.txt", " ".join(f"{n * k} {WORDS['en']}" for k in range(4 + n)))
    put(home / "again.txt", (home / "3.txt").read_bytes())
    put(home / "nearly.md", (home / "5.txt").read_text() + "And one more.")
    put(home / "more.zip", zipped({"de.txt": (WORDS["de"] * 3).encode(), "fr.txt": (WORDS["fr"] * 3).encode()}))
    put(home / ".hidden", "x")
    put(home / "bad.txt", b"caf\xe9")
    put(home / "pic.bin", b"\0\1\2")
    return home


def test_a_folder_is_counted_by_kind_with_its_copies_and_what_is_passed_over(folder):
    pytest.importorskip("py3langid")
    summary = summarized(str(folder))
    assert summary["files"] == 11 and summary["bytes"] == sum(
        p.stat().st_size for p in folder.iterdir() if p.name != ".hidden"
    )
    assert {kind: facts["files"] for kind, facts in summary["kinds"].items()} == {
        ".txt": 8,
        ".zip": 1,
        ".md": 1,
        ".bin": 1,
    }
    assert summary["read"]["whole"] and summary["read"]["documents"] == 10 and summary["read"]["expected"] is None
    assert summary["domains"] == {"txt": 9, "md": 1} and summary["languages"]["documents"] == {
        "en": 8,
        "de": 1,
        "fr": 1,
    }
    assert (summary["copies"]["exact"], summary["copies"]["near"], summary["copies"]["sample"]) == (1, 1, 10)
    lengths = sorted(
        [len(p.read_text()) for p in folder.glob("[0-9an]*.[tm]*")] + [len(WORDS[c]) * 3 for c in ("de", "fr")]
    )
    assert summary["characters"]["0"] == lengths[0] and summary["characters"]["100"] == lengths[-1]
    assert (
        summary["read"]["text_bytes"]
        == sum(lengths) + len((WORDS["de"] + WORDS["fr"]).encode()) * 3 - len(WORDS["de"] + WORDS["fr"]) * 3
    )
    counts = {reason: facts["count"] for reason, facts in summary["passed_over"].items()}
    assert counts == {"hidden": 1, "not UTF-8": 1, "binary": 1}
    assert len(summary["samples"]) == 3 and len({sample["id"] for sample in summary["samples"]}) == 3


def test_the_page_says_it_in_lines_and_json_holds_all(folder):
    pytest.importorskip("py3langid")
    shown = CliRunner().invoke(app, ["corpus", str(folder)])
    assert shown.exit_code == 0, shown.output
    for words in (
        ".txt 8", "10, ", "en 80%, ", "(of 10 documents)", "1 exact (10.0%), 1 near ones among 10 documents",
        "1 not UTF-8", "bad.txt:1", "shortest",
    ):  # fmt: skip
        assert words in shown.output, words
    assert "a sample" not in shown.output
    printed = CliRunner().invoke(app, ["corpus", str(folder), "--json"])
    made, again = json.loads(printed.output), summarized(str(folder))
    made["read"].pop("seconds"), again["read"].pop("seconds")  # type: ignore[misc]
    assert made == again


def test_what_takes_too_long_is_a_sample_that_says_so(folder):
    summary = summarized(str(folder), seconds=0)
    read = summary["read"]
    assert not read["whole"] and read["documents"] == 1 and read["files"] <= 1
    assert summary["files"] == 11 and read["bytes"] < summary["bytes"]
    assert read["expected"] == round(summary["bytes"] / read["bytes"])
    rows = "".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(1000))
    one = put(folder / "rows.jsonl", rows)
    assert summarized(str(one), seconds=0)["read"]["documents"] == 1  # of a table that is not read to its end
    shown = CliRunner().invoke(app, ["corpus", str(folder), "--seconds", "0.1"])
    assert shown.exit_code == 0 and CliRunner().invoke(app, ["corpus", str(folder), "--seconds", "0"]).exit_code != 0


def test_a_corpus_and_a_run_are_summarized_as_they_lie_there(folder, tmp_path):
    stage = {
        "name": "data",
        "stage": "data",
        "sources": [{"files": str(folder), "on_error": "skip"}],
        "validation": 0.2,
        "test": 0.2,
    }
    engine.run(check({"output": str(tmp_path / "run"), "stages": [stage]}))
    for place in (tmp_path / "run", tmp_path / "run" / "data", tmp_path / "run" / "data" / "corpus"):
        summary = summarized(str(place))
        assert summary["read"]["whole"] and summary["read"]["documents"] == sum(summary["splits"].values())
        assert summary["removed"]["exact"] == 1 and summary["copies"]["exact"] == 0
        assert summary["passed_over"]["not UTF-8"]["count"] == 1
    part = summarized(str(tmp_path / "run"), seconds=-1)
    assert not part["read"]["whole"] and part["read"]["documents"] == 1
    shown = CliRunner().invoke(app, ["corpus", str(tmp_path / "run")])
    assert "left out    1 exact" in shown.output and "splits" in shown.output


def test_without_the_package_languages_are_not_told_and_the_rest_is(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.delitem(sys.modules, "py3langid.langid", raising=False)
    shown = CliRunner().invoke(app, ["corpus", str(folder)])
    assert shown.exit_code == 0 and "not told; pip install 'pretrain[language]' tells them" in shown.output


def test_where_nothing_is_the_error_names_it(tmp_path):
    with pytest.raises(PretrainError, match="nosuch"):
        summarized(str(tmp_path / "nosuch"))
    put(tmp_path / "x" / "pic.bin", b"\0\1")
    shown = CliRunner().invoke(app, ["corpus", str(tmp_path / "x")])
    assert shown.exit_code == 0 and "documents   0" in shown.output and "1 binary" in shown.output


def test_one_of_a_reason_is_said_in_the_singular(folder):
    put(folder / "in.zip", zipped({"a.zip": b"", "../b.txt": b"x"}))
    shown = CliRunner().invoke(app, ["corpus", str(folder)])
    assert "1 archive in archives" in shown.output and "1 name that lead" in shown.output


def packages(path):
    """A table without a column `text`: names, texts with line ends, one of five sections."""
    rows = [(f"p{n}", f"a package\nthat does the thing number {n}", "abcde"[n % 5]) for n in range(40)]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("name", "description", "section"), *rows])
    return path


def test_the_column_of_a_tables_texts_is_guessed_and_told_and_may_be_named(tmp_path):
    path = packages(tmp_path / "p.csv")
    shown = CliRunner().invoke(app, ["corpus", str(path)])
    assert shown.exit_code == 0 and "documents   40, " in shown.output and "passed over" not in shown.output
    assert f"texts       in description of {path} (--text takes another column)" in shown.output
    printed = json.loads(CliRunner().invoke(app, ["corpus", str(path), "--json", "--text", "name"]).output)
    assert printed["columns"] == {str(path): "name"} and printed["read"]["documents"] == 40
    assert {sample["text"][0] for sample in printed["samples"]} == {"p"}
    lines = {sample["id"] for sample in printed["samples"]}
    assert lines <= {f"{path}:{2 * n + 2}" for n in range(40)}


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    path = packages(tmp_path / "p.csv")
    done = CliRunner().invoke(app, ["corpus", str(path), "--text", "descriptoin"])
    assert isinstance(done.exception, PretrainError)
    message = str(done.exception)
    assert "--text 'descriptoin'" in message and "did you mean 'description'" in message
    assert message.endswith("accepted: name, description, section")
    put(tmp_path / "n.csv", "a,b\nx1,2\nx3,4\n")
    with pytest.raises(PretrainError, match="n.csv: no column holds texts; accepted: --text with one of a, b"):
        CliRunner().invoke(app, ["corpus", str(tmp_path / "n.csv")], catch_exceptions=False)
    both = CliRunner().invoke(app, ["corpus", str(tmp_path)])  # among others it is told, and passed over
    assert both.exit_code == 0 and "documents   40, " in both.output
    assert "n.csv: no column holds texts; accepted: --text with one of a, b" in both.stderr
    assert "2 rows without the column 'text' (" in both.stdout

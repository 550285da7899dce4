"""What `pretrain new` makes of the columns of a table: numbers with a few bad cells, two texts a row, what goes unread."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest
import yaml
from new_cases import new, write_lines
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.core.errors import PretrainError
from pretrain.corpus.sources import Skipped, read
from pretrain.engine import run
from pretrain.recipe import load
from pretrain.stages.data import build_source

WORDS = [
    "red",
    "blue",
    "small",
    "large",
    "house",
    "garden",
    "car",
    "bike",
    "with",
    "near",
    "old",
    "new",
    "sold",
    "offered",
    "kitchen",
    "river",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(rng):
    return " ".join(rng.choices(WORDS, k=rng.randint(5, 12)))


def write(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def prices(path="table.csv", odd=(("n/a", 40),), name="price", count=120):
    """Texts with a price each, but for some cells."""
    rng, cells = random.Random(0), {place: cell for cell, place in odd}
    rows = [
        (n, f"2024-01-{n % 28 + 1:02d}", words(rng), cells.get(n, f"{rng.randint(100, 9000) / 10}"))
        for n in range(count)
    ]
    write(path, ("id", "date", "description", name), rows)


def source_of(path):
    return yaml.safe_load(Path(path).read_text())["stages"][0]["sources"][0]


@pytest.mark.parametrize(
    "more", [[], ["--label", "price"], ["--task", "regress"], ["--task", "regress", "--label", "price"]]
)
def test_a_column_of_numbers_with_a_bad_cell_is_one_whose_bad_row_is_named_and_passed_over(here, more):
    prices()
    printed = new("table.csv", "--budget", "1s", *more)
    assert "numbers in price" in printed
    assert "1 row without a number in price (line 42: 'n/a'); left out by numbers: price" in printed
    source = source_of("table.yaml")
    assert source == {"files": "table.csv", "text": "description", "numbers": ["price"], "on_error": "skip"}
    skipped = Skipped()
    assert sum(1 for _ in read(build_source(source), skipped)) == 119
    assert skipped.reasons == {"rows without a number in price": 1}
    assert skipped.names["rows without a number in price"] == ["table.csv:42"]


@pytest.mark.processes
def test_numbers_with_a_bad_cell_are_learnt_to_the_end(here):
    prices(odd=(("n/a", 40), ("nan", 41), ("about 5", 42)))
    printed = new("table.csv", "--budget", "1s")
    assert "3 rows without a number in price (line 42: 'n/a', line 43: 'nan', line 44: 'about 5')" in printed
    result = run(load("table.yaml"))
    assert result.stages["evaluation"]["metrics"]["mse"] > 0
    assert sum(result.stages["corpus"]["metrics"][f"documents/{s}"] for s in ("train", "validation", "test")) <= 117


def test_a_bad_cell_further_down_than_was_looked_at_stops_with_its_line(here):
    prices(odd=())
    new("table.csv", "--budget", "1s")
    with open("table.csv", "a") as file:
        file.write("999,2024-01-01,some words of it,unknown\n")
    refused = CliRunner().invoke(app, ["run", "table.yaml", "--dry-run"]).exception
    wanted = (
        r"table.csv:122 \(row 121\): column 'price' holds 'unknown', no number; accepted: numbers, or on_error: skip"
    )
    with pytest.raises(PretrainError, match=wanted):
        raise refused


@pytest.mark.parametrize(
    "numbers, message",
    [
        ("[prize]", r"no column 'prize' \(did you mean 'price'"),
        ("[date]", "column 'date' holds '2024-01-01', no number"),
        ("[date], on_error: skip", "numbers 'date': no row has a number there"),
    ],
)
def test_columns_of_numbers_that_are_none_are_refused_by_the_plan(here, numbers, message):
    prices()
    stage = f"{{stage: data, sources: [{{files: table.csv, text: description, numbers: {numbers}}}]}}"
    Path("r.yaml").write_text(f"stages:\n  - {stage}\n")
    refused = CliRunner().invoke(app, ["run", "r.yaml", "--dry-run"]).exception
    with pytest.raises(PretrainError, match=message):
        raise refused


def test_a_recipe_without_the_field_is_told_of_the_bad_cell_and_how_to_pass_over_it(here):
    prices()
    new("table.csv", "--budget", "1s")
    text = Path("table.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("numbers:", "on_error:"))]
    Path("table.yaml").write_text("\n".join(lines))
    refused = CliRunner().invoke(app, ["run", "table.yaml", "--dry-run"]).exception
    with pytest.raises(PretrainError) as raised:
        raise refused
    assert (
        "table.csv:42 (row 41): column 'price' holds 'n/a'; accepted: numbers, or in its source numbers: [price]"
        in str(raised.value)
    )


@pytest.mark.parametrize(
    "name, kind",
    [("price", "regression"), ("salePriceEUR", "regression"), ("Price (EUR)", "regression"), ("views", None),
     ("timestamp", None)],
)  # fmt: skip
def test_numbers_are_learnt_where_their_name_says_so_and_are_named_where_not(here, name, kind):
    prices(name=name)
    printed = new("table.csv", "--budget", "1s")
    assert ("method: regression" in Path("table.yaml").read_text()) == bool(kind)
    assert f"not read: id, date{'' if kind else f', {name}'}" in printed


def test_dates_and_ids_are_no_labels_unless_they_are_asked_for(here):
    rng = random.Random(0)
    for name, value in (("date", "2024-02-{:02d}"), ("when", "{}.3.2024"), ("user_id", "u{}"), ("split", "part {}")):
        write("t.csv", ("text", name), [(words(rng), value.format(n % 9 + 1)) for n in range(90)])
        printed = new("t.csv", "--force")
        assert "guessed --task pretrain" in printed and f"not read: {name}" in printed
    assert "9 labels in split" in new("t.csv", "--label", "split", "--force")


def pairs(header=("id", "first", "second", "label")):
    rng = random.Random(0)
    write("pairs.csv", header, [(n, words(rng), words(rng), "ab"[n % 2]) for n in range(90)])


@pytest.mark.parametrize(
    "names",
    [("sentence1", "sentence2"), ("premise", "hypothesis"), ("words_a", "words_b"), ("Text 1", "Text 2")],
)
def test_two_texts_a_row_are_seen_by_their_names_and_read(here, names):
    pairs(("id", *names, "label"))
    printed = new("pairs.csv")
    assert f"texts in {names[0]} and {names[1]}, 2 labels" in printed and "not read: id" in printed
    tuned = next(stage for stage in yaml.safe_load(Path("pairs.yaml").read_text())["stages"] if "objective" in stage
                 and stage["name"] == "classifier")  # fmt: skip
    assert tuned["objective"]["pair"] == names[1] and source_of("pairs.yaml")["text"] == names[0]


def test_a_second_text_of_another_name_is_named_and_taken_by_an_option(here):
    pairs()
    printed = new("pairs.csv")
    assert "not read: the texts in first (--text takes another column), id; --pair reads a second text" in printed
    assert "# not read: first, id" in Path("pairs.yaml").read_text()
    assert "texts in first and second" in new("pairs.csv", "--pair", "second", "--force")
    text = Path("pairs.yaml").read_text()
    assert "pair: second" in text and "--text first --pair second" in text
    assert "texts in second and first" in new("pairs.csv", "--pair", "first", "--text", "second", "--force")
    plan = CliRunner().invoke(app, ["run", "pairs.yaml", "--dry-run"])
    assert plan.exit_code == 0 and "warning" not in plan.output, plan.output


@pytest.mark.parametrize(
    "options, message",
    [
        (["--pair", "secnd"], r"--pair 'secnd': pairs.csv has no such column \(did you mean 'second'"),
        (["--pair", "label", "--label", "label"], "--pair 'label' is the label already"),
        (["--pair", "first", "--text", "first"], "--pair 'first' is the text already"),
    ],
)
def test_a_second_text_that_cannot_be_taken_is_refused(here, options, message):
    pairs()
    with pytest.raises(PretrainError, match=message):
        new("pairs.csv", *options)


def test_a_second_text_needs_something_to_learn_of_the_two(here):
    rng = random.Random(0)
    write("t.csv", ("text", "more"), [(words(rng), words(rng)) for _ in range(60)])
    with pytest.raises(
        PretrainError, match="--pair 'more': t.csv is taken for texts without labels; accepted: a table"
    ):
        new("t.csv", "--pair", "more")


def test_two_recipes_have_two_names_and_so_two_runs(here):
    prices("docs.csv")
    write_lines(here / "docs.jsonl", [{"text": f"some words of it, {n}"} for n in range(60)])
    names = []
    for place, output in (
        ("docs.csv", "docs.csv.yaml"),
        ("docs.jsonl", "docs.jsonl.yaml"),
        ("docs.csv", "more/docs.yaml"),
    ):
        Path(output).parent.mkdir(exist_ok=True)
        new(place, "--output", output)
        names.append(load(output).output)
    assert names == [Path("runs/docs-csv"), Path("runs/docs-jsonl"), Path("runs/docs")]
    (here / "runs" / "docs").mkdir(parents=True)
    (here / "runs" / "docs" / "run.json").write_text("{}")
    assert "its name is docs-2: runs/docs is the run of another recipe" in new("docs.jsonl")
    assert load("docs.yaml").output == Path("runs/docs-2")
    assert "its name is" not in new("docs.csv", "--output", "more/docs.yaml", "--force")
    Path("mine.yaml").write_text("name: other\n" + Path("docs.yaml").read_text().replace("name: docs-2\n", ""))
    assert "its name is other-2" in new("docs.csv", "--output", "other.yaml")


def test_a_broken_line_of_json_is_named_by_its_number_and_read_past(here):
    write_lines(here / "docs.jsonl", [{"text": f"some words of it, {n}"} for n in range(60)])
    lines = (here / "docs.jsonl").read_text().splitlines()
    lines[8], lines[20], lines[30] = lines[8][:12], '["a list"]', ""
    (here / "docs.jsonl").write_text("\n".join(lines))
    printed = new("docs.jsonl")
    assert "a table of 57 rows" in printed and "2 rows cannot be read: " in printed
    assert "(line 9, line 21); left out by on_error: skip" in printed and source_of("docs.yaml")["on_error"] == "skip"

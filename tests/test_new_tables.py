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
from pretrain.forecast import check_documents
from pretrain.identity import plan
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
        (
            ["--pair", "label", "--label", "label"],
            "--label and --pair name the same column, 'label'; accepted: a column each",
        ),
        (
            ["--pair", "first", "--text", "first"],
            "--text and --pair name the same column, 'first'; accepted: a column each",
        ),
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


def tickets():
    """Texts with a title, a team, a number, a name of each row and a tag a word."""
    rng, rows = random.Random(0), []
    for n in range(90):
        text = words(rng)
        tags = " ".join("AB"[len(word) % 2] for word in text.split())
        rows.append((text, f"{words(rng)} and {n}", "ab"[n % 2], f"{rng.random():.4f}", f"n{n}", tags))
    write("t.csv", ("text", "title", "team", "score", "name", "tags"), rows)


@pytest.mark.parametrize("more", [[], ["--task", "classify"], ["--task", "regress"], ["--task", "chat"]])
def test_the_column_of_texts_is_no_label_whatever_the_task(here, more):
    rng = random.Random(0)
    write("t.csv", ("text", "team"), [(words(rng) + str(n), "ab"[n % 2]) for n in range(60)])
    with pytest.raises(PretrainError, match="--label 'text': the column of texts is no label; accepted: team$"):
        new("t.csv", "--label", "text", *more)
    assert not list(here.glob("*.yaml"))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--label", "team", "--text", "team"], r"--text and --label name the same column, 'team'; .* a column each"),
        (["--label", "team", "--pair", "team"], "--label and --pair name the same column, 'team'"),
        (["--text", "title", "--pair", "title", "--label", "title"], "--text and --label and --pair name the same"),
        (["--label", "text", "--text", "title"], "the column 'text' cannot be the label beside the texts in 'title'"),
        (["--pair", "text", "--text", "title", "--label", "team"], "'text' cannot be the second text beside"),
        (["--label", "name"], r"90 different values in 90 rows, so it names rows .*\(team"),
        (["--label", "name", "--task", "regress"], "90 different values in 90 rows, so it names rows"),
        (["--label", "title", "--task", "classify"],
         r"--label 'title' holds texts, .*90 different values\); accepted: --task chat, or a column .*\(team"),
        (["--label", "title", "--task", "regress"], "--label 'title' holds texts, .*accepted: --task chat, or a column of"),
        (["--label", "score", "--task", "classify"], "90 different numbers in 'score'; accepted: --task regress"),
        (["--label", "score", "--task", "chat"], "--label 'score' holds numbers .*accepted: --task regress"),
        (["--label", "team", "--task", "regress"], "--label 'team' holds labels .2 different values.; .*--task classify"),
        (["--label", "tags", "--task", "regress"], "--label 'tags' holds a tag for each word; accepted: --task classify"),
    ],
)  # fmt: skip
def test_a_column_that_cannot_be_what_it_is_named_for_is_refused_in_one_line(here, options, message):
    tickets()
    with pytest.raises(PretrainError, match=message) as error:
        new("t.csv", *options)
    assert "\n" not in str(error.value) and not list(here.glob("*.yaml"))


def test_the_label_that_is_named_is_taken_where_another_column_has_tags(here):
    tickets()
    assert "a tag a word in tags" in new("t.csv")
    assert "taken for a quantity" in (told := new("t.csv", "--label", "score", "--force")) and "else" not in told
    assert "2 labels in team" in new("t.csv", "--label", "team", "--force")
    assert "label: team" in Path("t.yaml").read_text() and "tagging" not in Path("t.yaml").read_text()
    told = "tags has a tag for each word, so --task classify gives each word one"
    assert told in new("t.csv", "--label", "tags", "--task", "classify", "--force")
    assert told not in new("t.csv", "--label", "tags", "--force")


def test_a_label_that_the_task_does_not_read_is_told(here):
    tickets()
    told = "--task pretrain learns of the texts alone: --label team changes nothing"
    assert told in new("t.csv", "--label", "team", "--task", "pretrain")
    assert "changes nothing" not in new("t.csv", "--task", "pretrain", "--text", "title", "--force")
    Path("notes.txt").write_text("some words of it\n" * 60)
    with pytest.raises(PretrainError, match="--label 'team': notes.txt is no table, .*accepted: a table"):
        new("notes.txt", "--label", "team")


def test_a_query_beside_a_text_is_its_second_text_and_each_stays_what_it_is(here):
    rng = random.Random(0)
    write("t.csv", ("query", "text", "label"), [(f"q {words(rng)}", words(rng), "ab"[n % 2]) for n in range(90)])
    assert "texts in text and query" in new("t.csv")
    first = next(iter(read(build_source(source_of("t.yaml")), Skipped())))
    assert first["query"].startswith("q ") and not first["text"].startswith("q ")


def test_a_warning_names_the_recipe_by_the_file_that_is_written(here):
    rng = random.Random(0)
    write("t.csv", ("text", "label"), [(words(rng) + f" {n}", "one") for n in range(60)])
    printed = new("t.csv", "--label", "label", "--output", "more.of.it.yaml")
    assert "warning: more.of.it.yaml:" in printed and "holds one label" in printed
    number = int(printed.partition("more.of.it.yaml:")[2].partition(":")[0])
    assert "label" in Path("more.of.it.yaml").read_text().splitlines()[number - 1]


def many_labels(count, path="many.csv"):
    """Texts of which some have none, with some hundred labels."""
    rng = random.Random(0)
    rows = [(f"{words(rng)} {n}" if n % 50 else "", f"label {rng.randrange(count // 4)}") for n in range(count)]
    write(path, ("text", "owner"), rows)
    return rows


@pytest.mark.parametrize("count", [3_000, 10_800])
def test_one_number_of_labels_is_told_and_of_which_rows(here, count):
    rows = many_labels(count)
    printed = new("many.csv", "--label", "owner", "--task", "classify")
    labels = len({label for text, label in rows[:10_000] if text})
    of = " (of the first 10,000 rows)" if count > 10_000 else ""
    assert f"texts in text, {labels:,} labels in owner{of}\n" in printed and f"rows of each label{of}: " in printed
    assert f"'owner' has {labels:,} labels, " in printed and printed.count(f"{labels:,} labels") == 2


def test_what_is_said_of_labels_before_a_training_says_of_which_rows(monkeypatch, here):
    from pretrain.stages import _preflight

    many_labels(800)
    new("many.csv", "--label", "owner", "--task", "classify")
    monkeypatch.setattr(_preflight, "ROWS", 100)
    recipe = load("many.yaml")
    (line,) = check_documents(recipe, plan(recipe))
    assert "different values in the first 100 rows: " in line


COMMAS = {
    "decimal": ("45,0", "12,5"), "with points at thousands": ("1.234,5", "45,0"), "negative": ("-3,25", "7,5"),
    "at thousands": ("1,234", "12,500"), "both": ("1,234.5", "2,000.75"),
}  # fmt: skip


@pytest.mark.parametrize("cells", COMMAS.values(), ids=COMMAS)
def test_numbers_with_commas_are_no_labels_and_are_refused_in_one_line(here, cells):
    rng = random.Random(0)
    lines = [f"{words(rng)} {n};{cells[n % 2]}" for n in range(60)]
    (here / "t.csv").write_text("\n".join(["text;score", *lines]))
    message = "t.csv: the numbers in 'score' have commas"
    for options in ([], ["--label", "score"], ["--task", "regress"], ["--task", "classify", "--label", "score"]):
        with pytest.raises(PretrainError, match=rf"{message} .*; accepted: a decimal point, .*\(1234\.5\)$"):
            new("t.csv", *options)
    assert not list(here.glob("*.yaml"))
    assert "texts in text" in new("t.csv", "--task", "pretrain")  # which reads no numbers
    assert "numbers" not in (here / "t.yaml").read_text() and "on_error: skip" not in (here / "t.yaml").read_text()


def test_numbers_with_points_between_semicolons_are_learnt(here):
    rng = random.Random(0)
    lines = [f"{words(rng)} {n};{n / 4}" for n in range(60)]
    (here / "t.csv").write_text("\n".join(["text;score", *lines]))
    assert "guessed --task regress" in new("t.csv")


def test_words_with_commas_are_labels(here):
    rng = random.Random(0)
    lines = [f"{words(rng)} {n};{['north,1', 'south,2'][n % 2]}" for n in range(60)]
    (here / "t.csv").write_text("\n".join(["text;side", *lines]))
    assert "2 labels in side" in new("t.csv")


def test_numbers_over_decades_are_learnt_by_their_logarithms_and_other_numbers_are_told(here):
    rng = random.Random(0)
    rows = [(words(rng), round(10 ** rng.uniform(0, 5), 2), rng.randint(10, 900)) for _ in range(200)]
    write("wide.csv", ("text", "price", "pages"), rows)
    printed = new("wide.csv", "--output", "wide.yaml")
    assert "the numbers in price span 4." in printed and "the label may as well be pages: --label" in printed
    written = Path("wide.yaml").read_text()
    assert written.count("log: true") == 2  # where it is trained and where it is measured
    write("narrow.csv", ("text", "price"), [(text, 50 + price % 9) for text, price, _ in rows])
    assert "decades" not in new("narrow.csv", "--output", "narrow.yaml")
    assert "log: true" not in Path("narrow.yaml").read_text()


def test_texts_with_more_than_one_number_are_told(here):
    rng = random.Random(0)
    texts = [f"{words(rng)} {n}" for n in range(280)]
    write("twice.csv", ("text", "price"), [(text, n / 10 + 0.05) for n, text in enumerate([*texts, *texts[:20]])])
    assert "40 rows of 20 texts that stand with more than one price" in new("twice.csv", "--output", "twice.yaml")


def test_of_labels_of_which_one_has_nearly_all_rows_it_is_told_what_to_look_at(here):
    rng = random.Random(0)
    rows = [(f"{words(rng)} {n}", "rare" if n % 12 == 0 else "usual") for n in range(240)]
    write("uneven.csv", ("text", "priority"), rows)
    for more in ([], ["--label", "priority"]):
        printed = new("uneven.csv", "--output", "r.yaml", "--force", *more)
        assert "92% of the rows are 'usual'" in printed and "macro_f1" in printed
    write("even.csv", ("text", "priority"), [(text, "ab"[n % 2]) for n, (text, _) in enumerate(rows)])
    assert "macro_f1" not in new("even.csv", "--output", "e.yaml")

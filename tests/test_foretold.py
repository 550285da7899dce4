"""What was expected of a run stands beside what came out: the dial's loss with its text, the FLOPs of a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from page_cases import example, put
from small_recipe import small_recipe
from test_dial import RECIPE
from test_report import measured, page_of

from pretrain import recipe as recipes
from pretrain.report.data import collect
from pretrain.report.page import write
from pretrain.report.summary import summarise
from pretrain.stages._size import write as write_sizes


def settled(folder: Path, source: dict, **size):
    """What the dial chooses for a corpus of one source."""
    raw = json.loads(json.dumps(RECIPE))
    raw["stages"][0]["sources"] = [source]
    raw["stages"][2] |= size
    path = folder / "auto.yaml"
    path.write_text(yaml.safe_dump(raw))
    return recipes.load(path, [], folder / "run").sizes


def expectation(sizes) -> str:
    return next(line for line in sizes[0].lines() if line.startswith("expected"))


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a word of text\n" * 20_000)
    return {"files": str(tmp_path / "texts")}


def test_an_expectation_says_which_text_it_is_of_and_gives_no_interval_for_other_text(tmp_path, texts):
    line = expectation(settled(tmp_path, texts))
    assert "bits per byte on text like Python's library (other text differs" in line and " to " not in line
    line = expectation(settled(tmp_path, {"stdlib": True}))
    assert "on Python's library (" in line and " to " in line and "differs" not in line


def test_an_expectation_by_a_law_of_ones_own_names_it_and_keeps_its_interval(tmp_path, texts):
    from pretrain.dial.law import load
    from pretrain.stages._size import LAW

    load(LAW).write(tmp_path / "law.json")
    line = expectation(settled(tmp_path, texts, size={"law": str(tmp_path / "law.json")}))
    assert f"on the text that {tmp_path / 'law.json'} was measured on (" in line and " to " in line


def test_the_expectation_is_kept_with_the_run_and_set_beside_what_came_out(tmp_path, texts):
    sizes = settled(tmp_path, texts)
    folder = example(tmp_path / "r")
    evaluation = json.loads((folder / "test" / "evaluation.json").read_text())
    put(folder / "test" / "stage.json", {"inputs": {"checkpoint": "model"}, "seconds": 1.0, "metrics": {}})
    put(folder / "test" / "evaluation.json", evaluation)
    (folder / "encoder" / "log.jsonl").unlink()
    write_sizes(sizes, folder)
    kept = collect(folder)["expected"]["model"]
    assert kept == {"bits_per_byte": sizes[0].choice.prediction.bits, "of": "text like Python's library"}
    text = write(folder).read_text()
    assert (
        f"{kept['bits_per_byte']:.2f} was expected on text like Python&#x27;s library, and other text differs" in text
    )
    assert f"expected on text like Python&#x27;s library {kept['bits_per_byte']:.2f}" in text  # on the card


@pytest.mark.parametrize(("bits", "words"), [(1.5, "less than that"), (1.95, "as expected"), (2.5, "more than that")])
def test_what_came_out_is_judged_by_an_interval_where_the_law_is_of_this_text(bits, words):
    page = page_of(measured(bits)) | {"expected": {"model": {"bits_per_byte": 2, "of": "this", "interval": [1.9, 2.1]}}}
    assert f"2.00 (1.90 to 2.10) was expected on this: it is {words}" in summarise(page).judgement
    assert "expected" not in summarise(page | {"expected": {"other": page["expected"]["model"]}}).judgement
    assert "expected" not in summarise(page | {"expected": {"model": "damaged"}}).judgement


def planned(flops: float, budget: dict) -> dict:
    page = page_of(measured(1.9), held_out=[5, 4, 3, 3, 3, 3], budget=budget)
    page["stages"][0] |= {"planned": {"flops": 1e13, "steps": 100.0}, "flops": flops}
    return page


def test_a_run_that_made_far_fewer_flops_than_planned_says_why_and_what_to_do():
    summary = summarise(planned(1.7e12, {"seconds": 240}))
    assert (
        "Its 4 min made 17% of the FLOPs that were planned (1.7 T of 10 T): its machine was busy" in summary.judgement
    )
    assert "quiet machine, with a thread for each core" in summary.advice and "tokens" in summary.advice
    assert summary.command == "pretrain run 'my recipe.yaml' --set model.budget.flops=1e+13"
    expected = {"expected": {"model": {"bits_per_byte": 2.0, "of": "other text"}}}
    assert (
        "was expected of all the FLOPs that were planned"
        in summarise(planned(1.7e12, {"seconds": 240}) | expected).judgement
    )


def test_a_run_that_made_far_more_flops_says_so_and_is_advised_as_any_other():
    summary = summarise(planned(4e13, {"seconds": 240}))
    assert "made 400% of the FLOPs" in summary.judgement and "quicker" in summary.judgement
    assert "quiet" not in summary.advice


@pytest.mark.parametrize(
    ("flops", "budget"), [(9e12, {"seconds": 240}), (1.7e12, {"flops": 1.7e12}), (1.7e12, {"steps": 9})]
)
def test_a_run_that_made_what_its_budget_asked_for_says_nothing_of_it(flops, budget):
    assert "planned" not in summarise(planned(flops, budget)).judgement


def test_a_finished_training_keeps_what_it_was_planned_to_make(tmp_path, stories):
    from pretrain.engine import run, silent

    path = tmp_path / "r.yaml"
    path.write_text(small_recipe(tmp_path, stories[:40], budget={"steps": 3}))
    run(path, output=tmp_path / "run", say=silent, report=False)
    record = json.loads((tmp_path / "run" / "model" / "stage.json").read_text())
    assert record["planned"]["steps"] == 3 and record["planned"]["flops"] == pytest.approx(record["flops"], rel=0.2)
    assert collect(tmp_path / "run")["stages"][2]["planned"] == record["planned"]


def taken_for(folder: Path, rate: float) -> None:
    """Have a run's sizes chosen as on a machine of so many FLOP/s."""
    from pretrain.core.files import sealed, write_json

    (folder / "run").mkdir()
    write_json(folder / "run" / "plan.json", sealed({"rate": rate, "beside": {"block": 1e-5, "logit": 1e-12}}))


def test_a_size_that_cannot_be_trained_in_its_time_is_told_early_with_the_command_for_one_that_can(
    tmp_path, texts, monkeypatch
):
    from pretrain import engine
    from pretrain.engine import run

    expected = engine.plan_of  # of a machine a hundred times as quick as this one, whichever that is
    quick = lambda *given: (plan := expected(*given)) and replace(plan, flops=100 * plan.flops)  # noqa: E731
    monkeypatch.setattr(engine, "plan_of", quick)

    taken_for(tmp_path, 3e12)
    sizes = settled(tmp_path, texts, budget={"seconds": 1.5}, length=64)
    lines: list[str] = []
    run(tmp_path / "auto.yaml", output=tmp_path / "run", say=lines.append)
    (told,) = [line for line in lines if "of the FLOPs; for such a speed" in line]
    made = json.loads((tmp_path / "run" / "model" / "stage.json").read_text())
    assert made["metrics"]["steps"] > 10
    command = told.partition("Ctrl-C, then ")[2].partition(";")[0]
    assert command.startswith(f"pretrain run {tmp_path / 'auto.yaml'} --output {tmp_path / 'run'} --set model.budget.")
    other = recipes.load(tmp_path / "auto.yaml", [command.split()[-1]], tmp_path / "run").sizes[0].choice.shape
    assert f"chooses width {other.width}, {other.depth} block" in told and f"vocabulary {other.vocabulary:,}:" in told
    assert other.weights < sizes[0].choice.shape.weights
    summary = summarise(collect(tmp_path / "run"))
    assert (
        "If the machine will stay as slow, train a smaller model, since this one was sized for more" in summary.advice
    )
    assert made["planned"]["instead"]["size"] in summary.advice and "--set model.budget.flops=" in summary.command


@pytest.mark.parametrize(("flops", "less"), [("1.2e12", True), ("2e12", False)])
def test_the_advice_of_a_smaller_size_says_why_and_what_its_budget_is(flops, less):
    page = planned(1.7e12, {"seconds": 240})
    name = page["stages"][0]["name"]
    changes = {f"{name}.budget.flops": flops}
    page["stages"][0]["planned"]["instead"] = {"size": "width 64, 2 blocks, vocabulary 512", "changes": changes}
    summary = summarise(page)
    assert "than it makes in this time: width 64, 2 blocks, vocabulary 512. The budget below" in summary.advice
    assert f"{float(flops) / 1e12:g} T FLOPs are what that size makes here in about the same time" in summary.advice
    assert ("(less than this run made: small matrices are multiplied at fewer FLOP/s):" in summary.advice) == less
    assert f"--set {name}.budget.flops={flops}" in summary.command


@pytest.mark.parametrize("share", [0.5, 0.1, 0.02])
def test_the_size_for_a_slower_machine_is_what_its_budget_of_flops_chooses_and_takes_the_time(tmp_path, texts, share):
    from pretrain.dial.choose import slowed

    taken_for(tmp_path, 1e11)
    (before,) = settled(tmp_path, texts, budget={"seconds": 600})
    other = before.instead(share)
    (place, flops), *_ = other.changes.items()
    (again,) = recipes.load(tmp_path / "auto.yaml", [f"{place}={flops}"], tmp_path / "run").sizes
    choice = slowed(before.task, share)
    assert again.choice.shape == choice.shape and again.choice.shape.weights < before.choice.shape.weights
    assert choice.seconds == pytest.approx(600, rel=0.05)


def test_a_size_that_nobody_chose_by_a_time_has_no_other(tmp_path, texts):
    (sizes,) = settled(tmp_path, texts, budget={"flops": 1e12})
    assert sizes.instead(0.1) is None
    (sizes,) = settled(tmp_path, texts, budget={"seconds": 600})
    assert sizes.instead(0.999) is None, "the same"

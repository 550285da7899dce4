"""Claims: each runs at smoke scale; budgets, tuning and data are equal and apart; what is recorded is what is shown."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from page_cases import browser_page, claim_result
from small_recipe import small_recipe

from pretrain.core.errors import PretrainError
from pretrain.core.registry import methods
from pretrain.experiments.claims import Claim, claims, load_claim
from pretrain.experiments.page import page
from pretrain.experiments.protocol import TUNING_SEEDS, Point
from pretrain.experiments.queue import run as run_queue
from pretrain.experiments.results import Result, check_budgets, recorded
from pretrain.experiments.table import markdown, rows
from pretrain.experiments.trials import check_leaks, run_all
from pretrain.papers import standings
from pretrain.recipe import check

FOLDER = Path(__file__).parent.parent / "claims"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SIMPLE = """\
title: {title}
arxiv: "1711.05101"
claim: Half the steps.
base: small
metric: model.loss
baseline: {{name: slow, set: {{model.schedule: constant}}}}
method: {{name: quick, set: {{model.schedule: {{method: cosine, warmup: 0.1}}}}}}
tune: {{field: model.optimizer.lr, baseline: [1e-5, 1e-2], method: [1e-2, 1e-5]}}
scales: {{smoke: {{budget: 5e7, seeds: 2}}, cpu: {{budget: 1e8, seeds: 2}}}}
"""


def run(claim: Claim, scale: str, **given) -> Result:
    """Run one claim; what stops it is raised."""
    (*found,), failed = run_queue([claim], scale, **given)
    if failed:
        raise PretrainError(failed[claim.name])
    return found[0]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Where runs go: shared by the workers of one test session, so that what claims share is made once."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "claims"


@pytest.fixture
def simple(tmp_path, stories):
    often = {
        "optimizer": "adamw",
        "budget": {"steps": 1},
        "evaluate_every": 40,
        "evaluate_tokens": 256,
        "save_every": 0,
    }
    base = small_recipe(tmp_path, stories[:40], held_out=0.2, **often)
    (tmp_path / "bases").mkdir()
    for scale in ("smoke", "cpu"):
        (tmp_path / "bases" / f"small-{scale}.yaml").write_text(base)
    (tmp_path / "simple.yaml").write_text(SIMPLE.format(title="Decoupled Weight Decay Regularization"))
    return load_claim(tmp_path / "simple.yaml")


@pytest.mark.claims
@pytest.mark.parametrize("name", NAMES)
def test_claim_runs_at_smoke_scale(name, runs, tmp_path):
    found = run(load_claim(FOLDER / f"{name}.yaml"), "smoke", output=runs, results=tmp_path, say=lambda text: None)
    assert [run["seed"] for run in found["runs"]["method"]] == list(range(2))
    assert found["word"] in ("reproduced", "not reproduced", "undecided", "equal", "under-trained")
    assert [json.loads(path.read_text())["word"] for path in tmp_path.glob("*.json")] == [found["word"]]


@pytest.mark.parametrize("name", NAMES)
def test_claim_names_a_paper_whose_method_is_here_and_has_all_scales(name):
    claim = load_claim(FOLDER / f"{name}.yaml")
    here = {info.title: info.arxiv for info in methods().values()}  # or a source of documents, which a recipe shows
    here |= {row.paper.title: row.paper.arxiv for row in standings(FOLDER.parent) if row.recipe}
    assert here[claim.title] == claim.arxiv
    assert set(claim.scales) == {"smoke", "cpu", "gpu"}


@pytest.mark.parametrize("name", NAMES)
def test_claim_is_a_valid_recipe_for_both_sides_at_every_scale_and_size(name):
    whole = load_claim(FOLDER / f"{name}.yaml")
    for scale, claim in ((each, claim) for each in whole.scales for claim in whole.sized(each)):
        for side in ("baseline", "method"):
            value = getattr(claim.tune, side)[0] if claim.tune else None
            trial = claim.trial(scale, Point(side, value, 0), Path())
            stages = {stage.name: stage for stage in check(trial.recipe).stages}
            assert {"corpus", "tokenizer", "model"} <= set(stages) and claim.metric.partition(".")[0] in stages


def test_both_sides_search_as_many_rates_and_are_judged_on_other_data_and_seeds(simple, tmp_path):
    found = run(simple, "cpu", output=tmp_path / "runs", results=tmp_path / "results", say=lambda text: None)
    assert len(found["tuned"]["baseline"]) == len(found["tuned"]["method"]) == 2 + 2 * 2  # a third each, then two whole
    assert found["chosen"] == {"baseline": 1e-2, "method": 1e-2}  # the rate that learns, wherever it stands in the list
    assert not set(TUNING_SEEDS) & {run["seed"] for run in found["runs"]["method"]}
    for a, b in zip(found["runs"]["baseline"], found["runs"]["method"], strict=True):
        assert abs(a["flops"] - b["flops"]) <= 0.01 * b["flops"]
    spent = [trial["flops"] / trial["share"] for side in found["tuned"].values() for trial in side]
    assert max(spent) <= 1.03 * min(spent)


def test_evaluation_stages_are_searched_on_validation_and_judged_on_test():
    claim = next(c for c in claims(FOLDER).values() if c.metric.startswith("evaluation."))
    value = claim.tune.method[0] if claim.tune else None
    splits = {
        split: [
            s["split"]
            for s in claim.trial("smoke", Point("method", value, 0, split=split), Path()).recipe["stages"]
            if s["stage"] == "evaluate"
        ]
        for split in ("validation", "test")
    }
    assert splits == {"validation": ["validation"], "test": ["test"]}


def test_unequal_budgets_are_an_error(simple):
    pair = {"baseline": [{"seed": 0, "flops": 1000}], "method": [{"seed": 0, "flops": 1011}]}
    with pytest.raises(PretrainError, match="equal to 1%"):
        check_budgets(simple, "cpu", pair)
    pair["method"][0]["flops"] = 1010
    check_budgets(simple, "cpu", pair)


def test_documents_that_are_judged_on_must_not_be_trained_on(simple, tmp_path):
    raw = simple.recipe("method", "cpu")
    leaky = json.loads(json.dumps(raw))
    other = tmp_path / "other"
    other.mkdir()
    for path in (tmp_path / "text").iterdir():
        (other / path.name).write_text(path.read_text() + " ")  # another split for each
    leaky["stages"].insert(
        1,
        raw["stages"][0]
        | {"name": "more", "sources": [{"files": str(tmp_path / "text")}], "validation": 0.0, "test": 0.0},
    )
    leaky["stages"][-1]["corpus"] = "more"
    leaky["stages"].append(
        {"stage": "evaluate", "name": "evaluation", "checkpoint": "model", "corpus": "corpus", "compressors": False}
    )
    for found, stages in ((False, raw["stages"]), (True, leaky["stages"])):
        claim = simple.model_copy(update={"metric": "evaluation.loss", "curve": None}) if found else simple
        trial = claim.trial("smoke", Point("method", 1e-2, 0), tmp_path / "runs")
        trial = replace(trial, recipe=trial.recipe | {"stages": stages}, metric=claim.metric, curve=claim.curve)
        run_all([trial], say=lambda text: None)
        if found:
            with pytest.raises(PretrainError, match="documents of corpus/test are in the training split of 'more'"):
                check_leaks(trial)
        else:
            check_leaks(trial)


def test_what_is_finished_is_not_run_again_and_the_same_outcome_is_one_file(simple, tmp_path):
    first = run(simple, "smoke", output=tmp_path / "runs", results=tmp_path / "results", say=lambda text: None)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("stage.json")}
    again = run(simple, "smoke", output=tmp_path / "runs", results=tmp_path / "results", say=lambda text: None)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("stage.json")} == stamps
    assert again["runs"] == first["runs"] and len(recorded(tmp_path / "results")) == 1
    assert sum(p.parent.name.startswith("data-") for p in stamps) == 1  # both sides and all seeds share it


def test_more_metrics_are_recorded_and_shown_beside_the_one_that_is_judged(simple, tmp_path):
    claim = simple.model_copy(update={"also": ("model.flops", "model.steps")})
    found = run(claim, "smoke", output=tmp_path / "runs", results=tmp_path / "results", say=lambda text: None)
    assert list(found["also"]) == ["model.flops", "model.steps"]
    flops = [run["also"]["model.flops"] for run in found["runs"]["method"]]
    assert flops == [run["flops"] for run in found["runs"]["method"]]
    assert found["also"]["model.flops"]["method"] == [statistics.mean(flops), statistics.stdev(flops)]
    steps = found["also"]["model.steps"]["method"]
    assert f"`model.steps` {steps[0]:.4g} ± {steps[1]:.2g} |" in markdown([found])
    assert "model.steps" in page([found])


@pytest.mark.processes
def test_two_processes_give_what_one_gives(simple, tmp_path):
    alone = run(simple, "smoke", output=tmp_path / "a", results=tmp_path / "results", say=lambda text: None)
    both = run(simple, "smoke", output=tmp_path / "b", results=tmp_path / "results", jobs=2, say=lambda text: None)
    for side in ("baseline", "method"):
        assert [r["final"] for r in both["runs"][side]] == pytest.approx(
            [r["final"] for r in alone["runs"][side]], rel=1e-5
        )


def test_a_rerun_that_contradicts_stands_beside_the_first(simple, tmp_path):
    found = run(simple, "smoke", output=tmp_path / "runs", results=tmp_path / "results", say=lambda text: None)
    other = found | {
        "word": "reproduced" if found["word"] != "reproduced" else "not reproduced",
        "finished": "2030-01-01T00:00:00+00:00",
    }
    assert [row["contradicted"] for row in rows([found, other])] == [True, True]
    assert markdown([found, other]).count("contradicted by a rerun") == 2
    assert "contradicted" not in markdown([found])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("metric:", "metrik:"), "metrik: unknown field; accepted: title"),
        (("[1e-2, 1e-5]", "[1e-2]"), "2 values against 1: accepted: as many for both sides"),
        (("base: small", "base: tall"), "tall-smoke.yaml cannot be read"),
        (("model.schedule: constant", "modle.schedule: constant"), "no stage 'modle' \\(did you mean 'model'\\?\\)"),
        (("model.loss", "model.los"), "unknown metric of stage 'model' 'los'"),
        (("model.loss", "modle.loss"), "unknown stage of the metric 'modle'"),
        (("smoke:", "smok:"), "scales"),
        (("budget: 5e7", "budget: -1"), "greater than 0"),
    ],
)
def test_a_mistake_in_a_claim_file_is_one_line(simple, tmp_path, change, message):
    simple.path.write_text(simple.path.read_text().replace(*change))
    with pytest.raises(PretrainError, match=message) as error:
        run(load_claim(simple.path), "smoke", output=tmp_path / "runs", results=tmp_path / "r", say=lambda text: None)
    assert "\n" not in str(error.value)


def test_recorded_results_spent_equal_budgets_and_equal_tuning():
    for result in recorded(FOLDER / "results"):
        assert len(result["tuned"]["baseline"]) == len(result["tuned"]["method"]), result["name"]
        if result["claim"]["equal"] == "flops" and result["scale"] != "smoke":
            for a, b in zip(result["runs"]["baseline"], result["runs"]["method"], strict=True):
                assert abs(a["flops"] - b["flops"]) <= 0.01 * max(a["flops"], b["flops"]), result["name"]


def test_the_table_in_the_docs_is_made_from_the_results():
    results = recorded(FOLDER / "results")
    if results:
        assert (FOLDER.parent / "docs" / "claims.md").read_text() == markdown(results)


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_filters_and_draws_curves_in_a_browser(tmp_path, width):
    known = {info.kind: info.title for info in methods().values()}
    results = [
        claim_result("conda", "reproduced", known["optimiser"]), claim_result("miniplm", "not reproduced", known["data operation"]),
        claim_result("ctcd", "undecided", known["objective"]),
    ]  # fmt: skip
    (tmp_path / "claims.html").write_text(page(results))
    errors: list[str] = []
    with browser_page(width, 900, "light") as tab:
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(f"file://{tmp_path}/claims.html")
        assert tab.locator("details").count() == 3
        tab.fill("#search", "MINI")
        assert tab.locator("details .title").all_inner_texts()[0].startswith("miniplm")
        tab.fill("#search", "")
        tab.select_option("#word", "reproduced")
        assert tab.locator("details").count() == 1
        tab.locator("summary").click()
        tab.wait_for_selector("svg path.curve")
        assert tab.locator("svg path.curve").count() == 2
        assert "Half the steps </script> & <b>more</b>." in tab.locator(".body").inner_text()
        tab.select_option("#kind", "data operation")
        assert tab.locator("#none").is_visible()
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert errors == []

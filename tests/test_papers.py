"""The table of papers: each row resolves, none claims more than is there, and it answers at once."""

from __future__ import annotations

import json
import math
import re
import resource
import subprocess
import sys
from dataclasses import replace
from inspect import getdoc
from pathlib import Path

import pytest
import yaml
from processor import libraries
from servers import completion, serving
from typer.testing import CliRunner

from pretrain import engine, papers
from pretrain.cli import app
from pretrain.core import checkpoint
from pretrain.core.checkpoint import surgery_of
from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.core.registry import info, methods
from pretrain.experiments.claims import load_claim
from pretrain.experiments.results import recorded
from pretrain.experiments.table import word_of
from pretrain.papers import ABSTRACT, CODE, NOT_YET, STAGES, STANDS, TEXT, TIERS, Check, Claim, Standing, key, standings
from pretrain.recipe import load
from pretrain.training.loader import Loader

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes" / "papers").glob("*.yaml"))
ROWS = standings()
STANDING = [row for row in ROWS if row.status == STANDS]
MODALITIES = {
    "3d", "agent", "brain", "code", "graph", "image-generation", "medical", "other", "protein-bio", "speech-audio",
    "tabular", "text", "timeseries", "video", "vision", "vision-language",
}  # fmt: skip


def overclaims(row: Standing) -> str:
    """What a row says that is not there; empty where all is."""
    paper, check = row.paper, row.check
    for name in row.methods:
        found, words = info(name), getdoc(method_class(name)) or ""
        own = key(found.title) == key(paper.title) or (paper.arxiv is not None and found.arxiv == paper.arxiv)
        if not own and (name not in paper.made_of or not (paper.arxiv and paper.arxiv in words)):
            return f"method {name} is of another paper"
    if (row.status == STANDS) != bool(row.methods or row.recipe):
        return "it stands without a method and a recipe"
    if check is not None and check.against not in (CODE, TEXT, ABSTRACT):
        return f"checked against {check.against!r}"
    if (
        check is not None
        and check.against == CODE
        and not (
            re.fullmatch(r"[\w.-]+/[\w.-]+", check.repository or "")
            and re.fullmatch(r"[0-9a-f]{40}", check.commit or "")
            and check.what
        )
    ):
        return "the authors' code without repository, commit and what was compared"
    if check is not None and check.against != CODE and (check.repository or check.commit):
        return "a repository that nothing was compared with"
    return ""


def test_all_321_papers_are_there_each_by_a_name_of_its_own():
    assert len(ROWS) == 321
    for field in ("name", "title", "arxiv"):
        assert len({key(getattr(row.paper, field)) for row in ROWS}) == 321, field


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.paper.name)
def test_a_row_is_whole_and_claims_no_more_than_is_there(row):
    paper = row.paper
    assert paper.tier in TIERS and paper.stage in STAGES
    assert paper.modality and set(paper.modality) <= MODALITIES
    assert re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv)
    assert paper.does[0].isupper() or paper.does[0].isdigit()
    assert paper.does.endswith(".") and 50 < len(paper.does) < 260 and ". " not in paper.does
    assert overclaims(row) == ""
    for name in (*row.methods, *paper.made_of):
        assert name in methods()
    if row.recipe:
        assert key(papers.header(ROOT / row.recipe)) == key(paper.title)
        assert load(ROOT / row.recipe).stages
    for claim in row.claims:
        assert key(load_claim(ROOT / "claims" / f"{claim.name}.yaml").title) == key(paper.title)


def test_what_says_too_much_is_found():
    gptq = next(row for row in ROWS if "gptq" in row.methods)
    other = next(row for row in ROWS if row.methods == ("odm",))
    said = {
        "another paper": replace(gptq, methods=("odm",)),
        "another paper, named by hand": replace(gptq, methods=("odm",), paper=replace(gptq.paper, made_of=("odm",))),
        "without a commit": replace(gptq, paper=replace(gptq.paper, check=Check(CODE, "a/b"))),
        "without a repository": replace(gptq, paper=replace(gptq.paper, check=Check(CODE, None, "0" * 40, "x"))),
        "an unknown word": replace(other, paper=replace(other.paper, check=Check("a summary"))),
        "a repository for an abstract": replace(other, paper=replace(other.paper, check=Check(ABSTRACT, "a/b"))),
    }
    for what, row in said.items():
        assert overclaims(row), what

    class Boasting(Standing):
        status = STANDS

    assert overclaims(Boasting(gptq.paper))


def test_no_method_of_a_paper_of_the_table_is_left_out():
    titles = {key(row.paper.title): row for row in ROWS}
    for found in methods().values():
        if found.ours and key(found.title) in titles:
            row = titles[key(found.title)]
            assert found.name in row.methods and found.arxiv == row.paper.arxiv
    assert len([row for row in STANDING if row.methods]) >= 69
    assert all(row.methods == () and row.check is None for row in ROWS if row.status == NOT_YET)


def test_verdicts_are_those_of_the_newest_results():
    newest = {
        result["name"]: result for result in recorded(ROOT / "claims" / "results")
    }  # the last of a name is the newest
    claims = [claim for row in ROWS for claim in row.claims]
    assert {claim.name for claim in claims if claim.verdict} == {n for n in newest if any(c.name == n for c in claims)}
    for claim in claims:
        last = newest.get(claim.name)
        found = (claim.verdict, claim.scale) if last else (None, None)
        assert found == ((word_of(last), last["scale"]) if last else (None, None))
    titles = {key(row.paper.title) for row in ROWS}
    for path in (ROOT / "claims").glob("*.yaml"):
        if key(yaml.safe_load(path.read_text())["title"]) in titles:
            assert path.stem in {claim.name for claim in claims}


def test_the_newest_of_several_results_counts_whatever_the_files_are_called(tmp_path):
    claims = tmp_path / "claims"
    (claims / "results").mkdir(parents=True)
    title = next(row for row in ROWS if row.methods == ("odm",)).paper.title
    (claims / "odm.yaml").write_text(f'# A word before.\ntitle: "{title}"\narxiv: "2312.02406"\n')
    for name, day, word in (("a", 2, "reproduced"), ("b", 1, "not reproduced"), ("c", 0, "undecided")):
        result = {
            "name": "odm",
            "scale": "cpu",
            "word": word,
            "protocol": 2,
            "finished": f"2026-01-0{day + 1}T00:00:00",
        }
        (claims / "results" / f"odm-cpu-{name}.json").write_text(json.dumps(result))
    old = {"name": "odm", "scale": "cpu", "word": "undecided", "finished": "2026-02-01T00:00:00"}  # of protocol 1
    (claims / "results" / "odm-cpu-d.json").write_text(json.dumps(old))
    row = papers.find(standings(tmp_path), "odm")
    assert row.claims == (Claim("odm", "reproduced", "cpu", "2026-01-03T00:00:00", 2),) and row.recipe is None
    for name in "abc":
        (claims / "results" / f"odm-cpu-{name}.json").unlink()
    (earlier,) = papers.find(standings(tmp_path), "odm").claims
    assert earlier.verdict == "superseded: undecided"
    assert str(row.claims[0]) == "odm: reproduced (cpu)" and str(Claim("odm")) == "odm: not recorded"


def test_a_recipe_is_found_by_the_title_in_its_header(tmp_path):
    folder = tmp_path / "recipes" / "papers"
    folder.mkdir(parents=True)
    (folder / "any-name.yaml").write_text(
        "# Bridging the gap between computational photography and visual recognition (arXiv:1901.09482).\nname: x\n"
    )
    row = papers.find(standings(tmp_path), "UG^2")
    assert row.recipe == "recipes/papers/any-name.yaml" and row.status == STANDS and row.check == Check()
    assert papers.find(ROWS, "UG^2").status == NOT_YET


@pytest.mark.parametrize("word, name", [
    ("gptq", "GPTQ"), ("2210.17323", "GPTQ"), ("arXiv:2210.17323v2", "GPTQ"), ("https://arxiv.org/abs/2210.17323", "GPTQ"),
    ("odm", "ODM (Online Data Mixing)"), ("Online Data Mixing", "ODM (Online Data Mixing)"),
    ("efficient online data mixing for language model pre-training", "ODM (Online Data Mixing)"),
    ("gradual_pruning", "Sparse pre-training (average-parameter law)"), ("clip", "CLIP"), ("x-clip", "X-CLIP"),
])  # fmt: skip
def test_a_paper_is_found_by_name_title_number_and_method(word, name):
    assert papers.find(ROWS, word).paper.name == name


def test_each_paper_answers_to_its_own_name_and_number():
    for row in ROWS:
        assert papers.find(ROWS, row.paper.name) is row and papers.find(ROWS, row.paper.arxiv) is row


@pytest.mark.parametrize(
    "word, hint", [("gptqq", "did you mean 'gptq'"), ("2210.17324", "did you mean '2210.17323'"), ("zzzz", "accepted")]
)
def test_an_unknown_paper_names_the_nearest(word, hint):
    with pytest.raises(PretrainError, match=hint):
        papers.find(ROWS, word)


def run(*words: str):
    return CliRunner().invoke(app, ["papers", *words])


def test_the_command_prints_rows_lists_and_one_paper():
    rows = json.loads(run("--json").stdout)
    assert len(rows) == 321 and set(rows[0]) >= {
        "title",
        "arxiv",
        "tier",
        "modality",
        "methods",
        "recipe",
        "claim",
        "status",
    }
    chosen = json.loads(run("online", "MIXING", "--json").stdout)
    assert [row["methods"] for row in chosen] == [["odm"]] and chosen[0]["claim"] == "odm"
    tier = json.loads(run("--json", "--tier", "core", "--modality", "code", "--stage", "compress").stdout)
    assert tier and all(r["tier"] == "core" and "code" in r["modality"] and r["stage"] == "compress" for r in tier)
    listed = run("gptq").stdout
    assert "GPTQ" in listed and "1 paper, 1 of them stands here" in listed
    page = run("show", "gptq").stdout
    assert "https://arxiv.org/abs/2210.17323" in page and "IST-DASLab/gptq at 2d65066eeb06" in page
    assert json.loads(run("show", "clip", "--json").stdout)["status"] == NOT_YET
    for wrong, said in (
        (("--tier", "cor"), "did you mean 'core'"),
        (("--modality", "txt"), "did you mean 'text'"),
        (("show",), "accepted: the name"),
    ):
        assert said in str(run(*wrong).exception)


def test_it_answers_at_once_and_imports_nothing_heavy():
    def seconds() -> float:
        """Processor time, interpreter start included: the wall clock is the other tests' too."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "pretrain", "papers", "--json"], capture_output=True, check=True, cwd=ROOT
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    least = libraries()
    assert any(seconds() < 4 * least for _ in range(3))  # 1.4 to 1.7 times
    program = "import sys, runpy; sys.argv = ['pretrain', 'papers'];\ntry: runpy.run_module('pretrain', run_name='__main__')\nexcept SystemExit: pass\nprint('|' + ' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(out.stdout.rpartition("|")[2].split())
    assert not loaded & {"torch", "transformers", "datasets", "numpy", "yaml", "rich.console", "pretrain.recipe"}


def small(*stages: str) -> list[str]:
    sizes = ("hidden_size=32", "intermediate_size=48", "num_hidden_layers=1", "num_attention_heads=2")
    return [f"{stage}.model.{size}" for stage in stages for size in sizes]


def short(*stages: str) -> list[str]:
    settings = ("length=64", "batch_rows=4", "budget={steps: 3}", "evaluate_tokens=600", "evaluate_every=0")
    return [f"{stage}.{setting}" for stage in stages for setting in settings]


@pytest.fixture(scope="module")
def text(tmp_path_factory, stories):
    """Three domains, by suffix: `py`, the docstrings in two halves as `txt` and `md`."""
    folder = tmp_path_factory.mktemp("text")
    for number, story in enumerate(stories):
        suffix = ("txt", "md")[number // 2 % 2] if story["domain"] == "docstrings" else "py"
        (folder / f"{number}.{suffix}").write_text(story["text"])
    return folder


def data(*stages: str, sources: str) -> list[str]:
    given = (f"sources={sources}", "validation=0.15", "test=0.15")
    return [f"{stage}.{setting}" for stage in stages for setting in given]


def finite(result) -> dict[str, dict[str, float]]:
    for stage in result.stages.values():
        assert all(math.isfinite(v) for v in stage["metrics"].values() if isinstance(v, float))
    return {name: stage["metrics"] for name, stage in result.stages.items()}


def lineage(folder: Path) -> list[str]:
    record = json.loads((folder / "checkpoint" / "pretrain.json").read_text())
    return [stage["name"] for stage in record["lineage"]["stages"]]


def test_each_recipe_of_a_paper_is_found_and_run_here():
    assert len(RECIPES) > 30
    assert {row.recipe for row in ROWS if row.recipe} == {f"recipes/papers/{path.name}" for path in RECIPES}


@pytest.mark.processes
def test_the_unlearning_recipe_measures_membership_and_loss_before_and_after(tmp_path):
    settings = [
        "corpus.sources=[{packages: [networkx, sklearn], limit: 30}]", "forgotten.sources=[{packages: [networkx], limit: 30}]",
        "tokenizer.vocab_size=512", "model.model.hidden_size=32", "model.model.intermediate_size=48",
        "model.model.num_hidden_layers=1", "model.model.num_attention_heads=2", "model.length=64", "model.budget.steps=4",
        "unlearnt.length=64", "unlearnt.budget.steps=2",
    ]  # fmt: skip
    engine.run(load(ROOT / "recipes/papers/unlearning.yaml", settings, tmp_path), say=lambda text: None)
    for name, metric in (("before", "loss/networkx"), ("after", "loss/networkx"), ("membership_before", "min_k_auroc"), ("membership_after", "min_k_auroc")):  # fmt: skip
        assert f'"{metric.partition("/")[0]}' in next(tmp_path.rglob(f"{name}/evaluation.json")).read_text()


@pytest.mark.processes
def test_the_private_recipe_tunes_by_both_accountants_and_compares(tmp_path):
    few = "sources=[{functions: [networkx], limit: 20, longest: 200}]"
    settings = [
        "code.sources=[{packages: [networkx], limit: 20}]", f"instructions.{few}", f"private.{few}", "private.test=0.3",
        "tokenizer.vocab_size=512", *small("general"), *(f"{n}.budget.tokens=300" for n in ("general", "instructed")),
        *(f"{n}.{field}" for n in ("renyi", "edgeworth") for field in ("batch_rows=2", "budget.steps=2")),
        *(f"task_{n}.evaluations.0.resamples=2" for n in ("before", "renyi", "edgeworth")),
    ]  # fmt: skip
    found = finite(engine.run(load(ROOT / "recipes/papers/ew-tune.yaml", settings, tmp_path), say=lambda text: None))
    assert all("bartscore" in found[f"task_{name}"] for name in ("before", "renyi", "edgeworth"))
    assert all(found[name]["noise_multiplier"] > 0 and found[name]["epsilon"] <= 8 for name in ("renyi", "edgeworth"))


@pytest.mark.processes
def test_the_recipe_of_noisy_labels_compares_two_encoders_by_three_ways_to_tune(tmp_path):
    few = "sources=[{packages: [networkx, sklearn], limit: 30}]"
    settings = [
        *(f"{name}.{few}" for name in ("clean", "noisy", "others")), "tokenizer.vocab_size=512",
        *(f"{n}.{field}" for n in ("of_clean", "of_noisy") for field in (
            "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=1", "model.num_attention_heads=2",
            "length=64", "budget.steps=2")),
        *(f"{n}_{way}.evaluations=[{{method: nmtune, steps: 2, resamples: 1, weight: {weight}}}]"
          for n in ("clean", "noisy") for way, weight in (("network", 0), ("nmtune", 0.01))),
    ]  # fmt: skip
    found = finite(engine.run(load(ROOT / "recipes/papers/nmtune.yaml", settings, tmp_path), say=lambda text: None))
    assert all("nmtune_accuracy" in found[f"{n}_{way}"] for n in ("clean", "noisy") for way in ("network", "nmtune"))
    assert all("probe_accuracy" in found[f"{name}_linear"] for name in ("clean", "noisy"))


@pytest.mark.processes
def test_the_curation_recipe_filters_tunes_corrects_and_compares(tmp_path):
    few = "sources=[{functions: [networkx], limit: 20, longest: 200}]"
    held_out = [f"{name}.test=0.3" for name in ("noisy", "filtered", "corrected")]
    tuned = ("instructed", "without", "first", "second")
    settings = [
        "code.sources=[{packages: [networkx], limit: 20}]", *(f"{n}.{few}" for n in ("instructions", "noisy", "filtered", "corrected")),
        "tokenizer.vocab_size=512", *small("general"), *(f"{n}.budget.tokens=300" for n in ("general", *tuned)), *held_out,
        *(f"task_{n}.evaluations.0.resamples=2" for n in ("noisy", "filtered", "corrected")),
    ]  # fmt: skip
    found = finite(engine.run(load(ROOT / "recipes/papers/clear.yaml", settings, tmp_path), say=lambda text: None))
    assert all("bartscore" in found[f"task_{name}"] for name in ("noisy", "filtered", "corrected"))
    reports = {
        name: json.loads((tmp_path / name / "corpus/corpus.json").read_text())["operations"]
        for name in ("noisy", "filtered", "corrected")
    }
    assert [[row["method"] for row in rows] for rows in reports.values()] == [
        ["label_noise"], ["label_noise", "clear"], ["label_noise", "clear", "clear"]
    ]  # fmt: skip
    (counts,) = reports["filtered"][1]["documents"].values()
    assert 0.4 * counts["before"] <= counts["after"] < counts["before"]


@pytest.mark.processes
def test_the_rephrasing_recipe_trains_on_both_and_on_the_real_alone(tmp_path, text):
    with serving() as served:
        served.answer = lambda body: completion(
            "It says in other words: " + body["messages"][-1]["content"][-60:][::-1]
        )
        settings = [
            *data("corpus", "rephrased", sources=f"[{{files: {text}}}]"), "tokenizer.vocab_size=512", *small("real", "both"),
            *short("real", "both"), f"rephrased.operations.0.server={served.url}",
        ]  # fmt: skip
        found = finite(engine.run(load(ROOT / "recipes/papers/wrap.yaml", settings, tmp_path), say=lambda text: None))
    (report,) = json.loads((tmp_path / "rephrased/corpus/corpus.json").read_text())["operations"]
    assert report["asked"] == report["used"] == report["documents"]["rephrased"]["after"] >= len(served.seen) > 100
    assert all(found[f"measured_{name}"]["bits_per_byte"] > 0 for name in ("real", "both"))
    assert found["rephrased"]["documents/test"] == found["corpus"]["documents/test"]


@pytest.mark.processes
def test_the_refining_recipe_annotates_tunes_two_refiners_and_trains_on_what_they_leave(tmp_path, text):
    def answer(body):
        asked = body["messages"][-1]["content"]
        if "web text" not in asked:
            scale = "Educational score" if "educational value" in asked else "Extraction Quality Score"
            return completion(f"{scale}: {4 - 4 * ('|' in asked)}")
        return completion("```python\nuntouch_doc()\n```")

    with serving() as served:
        served.answer = answer
        seeds = [f"{name}.operations.1.server={served.url}" for name in ("seeds_document", "seeds_chunk")]
        settings = [
            *data("corpus", sources=f"[{{files: {text}}}]"), *(f"{n}.sources=[{{files: {text}}}]" for n in ("seeds_document", "seeds_chunk")),
            *seeds, "tokenizer.vocab_size=512", *small("raw", "clean"), *short("raw", "clean"), "kept.operations.0.max_new_tokens=4",
            "refined.operations.0.max_new_tokens=4", *(f"{n}_refiner.budget={{steps: 2}}" for n in ("document", "chunk")),
        ]  # fmt: skip
        found = finite(engine.run(load(ROOT / "recipes/papers/prox.yaml", settings, tmp_path), say=lambda text: None))
    reports = {n: json.loads((tmp_path / n / "corpus/corpus.json").read_text())["operations"][-1] for n in ("seeds_document", "seeds_chunk", "kept", "refined")}  # fmt: skip
    assert reports["seeds_document"]["programs"].keys() == {"kept", "dropped"} and reports["seeds_chunk"]["programs"].keys() == {"untouched"}  # fmt: skip
    assert {report["method"] for report in reports.values()} == {"prox"} and reports["kept"]["asked"] > 50
    assert all(found[f"measured_{name}"]["bits_per_byte"] > 0 for name in ("raw", "clean"))
    assert {"raw", "document_refiner", "chunk_refiner"} <= {*lineage(tmp_path / "clean")}


@pytest.mark.processes
def test_the_recipe_of_wrong_seeds_goes_three_rounds_each_from_the_base(tmp_path):
    few = "[{functions: [networkx, sklearn], limit: 24, longest: 300}]"
    with serving() as served:
        served.answer = lambda body: completion(f"1. Question: {len(served.seen)} " * 3 + "of these?\nAnswer: networkx")
        settings = [
            "general.sources=[{packages: [networkx], limit: 20}]", f"seed.sources={few}", "tokenizer.vocab_size=512",
            *small("base"), "base.budget={steps: 2}", *(f"round_{n}.operations.0.server={served.url}" for n in (1, 2, 3)),
            *(f"student_{n}.budget={{steps: 2}}" for n in range(4)), *(f"task_{n}.evaluations.0.resamples=2" for n in range(4)),
        ]  # fmt: skip
        found = finite(
            engine.run(load(ROOT / "recipes/papers/llm2llm.yaml", settings, tmp_path), say=lambda text: None)
        )
    assert all(0 <= found[f"task_{n}"]["accuracy"] <= 1 for n in range(4))
    reports = [
        json.loads((tmp_path / f"round_{n}/corpus/corpus.json").read_text())["operations"][-1] for n in (1, 2, 3)
    ]
    assert [report["round"] for report in reports] == [1, 2, 3] and len({report["seeds"] for report in reports}) == 1
    sizes = [found[name]["documents/train"] for name in ("seed", "round_1", "round_2", "round_3")]
    assert sizes == sorted(sizes) and sizes[1] - sizes[0] == reports[0]["added"] > 0
    assert {"base", "student_2", "round_3"} <= {*lineage(tmp_path / "student_3")}


@pytest.mark.processes
def test_the_recipe_of_grammatical_errors_trains_three_correctors_and_counts_edits(tmp_path, text):
    tiny = ("d_model=32", "d_ff=48", "d_kv=8", "num_layers=1", "num_heads=2")
    rules = {"language": "english", "sentences": True, "resamples": 20}
    tasks = {
        "corrected_translator": {"method": "seq2seq", "prompt": "{text}", "answer": 8}, "detected": "tagging",
        "corrected_decoder": {"method": "seq2seq", "prompt": "{text}\n", "answer": 8},
    }  # fmt: skip
    settings = [
        *data("right", "wrong", sources=f"[{{files: {text}}}]"), "tokenizer.vocab_size=512", "wrong.operations.0.language=english",
        *(f"translator.model.{size}" for size in tiny), *small("encoder", "language_model"), *short("translator", "encoder", "tagger", "language_model", "decoder"),
        *(f"{name}.max_documents=8" for name in tasks),
        *(f"{name}.evaluations={json.dumps([rules | {'method': 'error_correction', 'objective': task}])}" for name, task in tasks.items()),
    ]  # fmt: skip
    recipe = load(ROOT / "recipes/papers/gecturk.yaml", settings, tmp_path)
    measured = finite(engine.run(recipe, say=lambda text: None))
    (report,) = json.loads((tmp_path / "wrong/corpus/corpus.json").read_text())["operations"]
    assert report["edits"] == sum(report["types"].values()) > 50 and len(report["types"]) > 8
    assert {measured[name]["errors"] for name in tasks} == {measured["detected"]["errors"]} and measured["detected"][
        "errors"
    ] > 5
    assert "correction_f05" in measured["corrected_decoder"] and "correction_f05" not in measured["detected"]
    assert {"encoder", "wrong"} <= {*lineage(tmp_path / "tagger")}


@pytest.mark.processes
def test_the_recipe_of_training_data_varies_age_quality_and_domains(tmp_path, text):
    sources = f"[{{files: {text}, suffixes: [.py], domain: older}}, {{files: {text}, suffixes: [.txt], domain: newer}}, {{files: {text}, suffixes: [.md], domain: docstrings}}]"
    models = ("older", "newer", "whole", "quality", "inverse", "without_docstrings")
    settings = [
        *data("corpus", "good", "scored", "above", "below", sources=sources), "tokenizer.vocab_size=512", *small(*models), *short(*models), "corpus.near_duplicates=null",
        "good.sources=" + f"[{{files: {text}, suffixes: [.md]}}]", "above.operations.1.least=0.5", "below.operations.1.most=0.5",
        "older.mixture={older: 1, newer: 0, docstrings: 0}", "newer.mixture={older: 0, newer: 1, docstrings: 0}", "without_docstrings.mixture={older: 1, newer: 1, docstrings: 0}",
    ]  # fmt: skip
    recipe = load(ROOT / "recipes/papers/pretrainers-guide.yaml", settings, tmp_path)
    measured = finite(engine.run(recipe, say=lambda text: None))
    sizes = {name: measured[name]["documents/train"] for name in ("corpus", "above", "below")}
    assert sizes["above"] > 0 < sizes["below"] and sizes["above"] + sizes["below"] == sizes["corpus"]
    assert all({"loss/older", "loss/newer"} <= measured[f"measured_{name}"].keys() for name in models)


@pytest.mark.processes
def test_the_recipe_of_reading_comprehension_goes_on_with_it_and_with_the_real(tmp_path, text):
    with serving() as served:
        served.answer = lambda body: completion(
            f"Question: What does it say?\nAnswer: It says {body['messages'][-1]['content'][-40:][::-1]} in short."
        )
        settings = [
            *data("corpus", "read", sources=f"[{{files: {text}}}]"), "tokenizer.vocab_size=512", *small("base"),
            *short("base", "raw", "comprehension"), f"read.operations.0.server={served.url}", "read.operations.0.only=[txt]",
            "base.mixture={py: 0.5, md: 0.5, txt: 0}", "raw.mixture={txt: 0.8, py: 0.1, md: 0.1}", "comprehension.mixture={comprehension: 0.8, py: 0.1, md: 0.1}",
        ]  # fmt: skip
        found = finite(
            engine.run(load(ROOT / "recipes/papers/transform-llm.yaml", settings, tmp_path), say=lambda text: None)
        )
    (report,) = json.loads((tmp_path / "read/corpus/corpus.json").read_text())["operations"]
    documents = report["documents"]
    assert documents["comprehension"]["after"] >= documents["txt"]["before"] > 0 == documents["txt"]["after"]
    assert documents["py"]["before"] == documents["py"]["after"]
    assert all(found[f"measured_{name}"]["bits_per_byte"] > 0 for name in ("base", "raw", "comprehension"))


@pytest.mark.processes
def test_the_recipe_of_synthetic_documents_goes_on_with_them_and_with_the_real(tmp_path, text):
    def answer(body):
        text = body["messages"][-1]["content"]
        if "### Entities:" not in text:
            return completion(json.dumps({"summary": "It is a summary.", "entities": [*text.split()[-4:], "it"]}))
        return completion(
            "### Discussion of it in relation to " + " and ".join(text.rpartition("### Entities:")[2].split())
        )

    with serving() as served:
        served.answer = answer
        sources = f"[{{files: {text}}}]"
        mixtures = {
            "base": {"py": 0.5, "md": 0.5, "txt": 0},
            "raw": {"txt": 0.9, "py": 0.1, "md": 0},
            "synthetic": {"entigraph": 0.9, "py": 0.1, "md": 0},
        }
        settings = [
            *data("corpus", "enlarged", sources=sources), "tokenizer.vocab_size=512", *small("base"), *short("base", "raw", "synthetic"),
            f"enlarged.operations.0.server={served.url}", "enlarged.operations.0.only=[txt]", "enlarged.operations.0.pairs=4",
            "enlarged.operations.0.triples=2", *(f"{name}.mixture={json.dumps(mixture)}" for name, mixture in mixtures.items()),
        ]  # fmt: skip
        found = finite(
            engine.run(load(ROOT / "recipes/papers/entigraph.yaml", settings, tmp_path), say=lambda text: None)
        )
    (report,) = json.loads((tmp_path / "enlarged/corpus/corpus.json").read_text())["operations"]
    documents = report["documents"]
    assert documents["entigraph"]["after"] > 3 * documents["txt"]["before"] > 0 == documents["txt"]["after"]
    assert documents["py"]["before"] == documents["py"]["after"] and report["without_entities"] == 0
    assert all(found[f"measured_{name}"]["bits_per_byte"] > 0 for name in ("base", "raw", "synthetic"))
    assert {"base", "enlarged"} <= {*lineage(tmp_path / "synthetic")}


@pytest.mark.processes
def test_experts_reduced_for_a_task_are_tuned_and_measured_beside_as_few_from_the_start(tmp_path, text):
    settings = [
        *data("general", "task", sources=f"[{{files: {text}}}]"), "tokenizer.vocab_size=512", *small("wide", "small"),
        "wide.model.num_key_value_heads=2", "small.model.num_key_value_heads=2",
        *short("wide", "small", "reduced_tuned", "small_tuned"), "reduced.length=64", "reduced.calibration_rows=8",
    ]  # fmt: skip
    found = finite(
        engine.run(load(ROOT / "recipes/papers/expert-pruning.yaml", settings, tmp_path), say=lambda text: None)
    )
    assert found["reduced_evaluation"]["loss"] > 0 and found["small_evaluation"]["loss"] > 0
    configs = {name: json.loads(next(tmp_path.rglob(f"{name}/checkpoint/config.json")).read_text()) for name in ("wide", "reduced_tuned", "small_tuned")}  # fmt: skip
    assert [config["num_local_experts"] for config in configs.values()] == [8, 4, 4]


@pytest.mark.processes
def test_pre_gated_experts_are_tuned_measured_and_written_with_beside_plain_ones(tmp_path, text):
    settings = [
        *data("corpus", sources=f"[{{files: {text}}}]"), "tokenizer.vocab_size=512", *small("general"),
        "general.model.num_hidden_layers=2", "general.model.num_key_value_heads=2", *short("general", "gated_tuned", "plain_tuned"),
        *(f"{n}_evaluation.max_documents=4" for n in ("gated", "plain")), *(f"{n}_samples.max_new_tokens=4" for n in ("gated", "plain")),
    ]  # fmt: skip
    found = finite(
        engine.run(load(ROOT / "recipes/papers/pre-gated-experts.yaml", settings, tmp_path), say=lambda text: None)
    )
    assert found["gated_evaluation"]["loss"] > 0 and found["plain_evaluation"]["loss"] > 0
    assert found["gated_samples"]["expert_prefetched"] > 0 == found["plain_samples"]["expert_prefetched"]
    assert found["plain_samples"]["expert_misses"] > 0


@pytest.mark.processes
def test_a_dense_model_becomes_experts_whose_router_is_trained_in_turn_with_them(tmp_path, text):
    trained = ("dense", "router_1", "experts_1", "router_2", "experts_2", "pruned_tuned")
    settings = [
        *data("corpus", sources=f"[{{files: {text}}}]"), "tokenizer.vocab_size=512", *small("dense"), *short(*trained),
        *(f"{name}.length=64" for name in ("mixture", "pruned")), "mixture.surgeries=[{method: read_me, embedding_dim: 16}]",
        "pruned.surgeries=[{method: read_me, experts: 1, embedding_dim: 16}]", "mixture_evaluation.max_documents=9",
    ]  # fmt: skip
    metrics = finite(
        engine.run(
            load(ROOT / "recipes/papers/router-decoupled-experts.yaml", settings, tmp_path), say=lambda text: None
        )
    )
    assert (metrics["mixture"]["read_me/experts"], metrics["pruned"]["read_me/experts"]) == (3, 1)
    assert metrics["mixture"]["read_me/neurons_of_any"] > metrics["pruned"]["read_me/neurons_of_any"] == 0.5
    measured = metrics["mixture_evaluation"]
    assert measured["loss"] > 0 and metrics["pruned_evaluation"]["loss"] > 0
    assert 0 <= measured["hit_rate_lru"] <= measured["hit_rate_belady"] <= 1
    assert lineage(tmp_path / "experts_2")[-4:] == ["mixture", "router_1", "experts_1", "router_2"]


@pytest.mark.processes
def test_a_model_with_codebooks_is_measured_beside_one_without_read_and_steered(tmp_path, text):
    settings = [
        *data("corpus", sources=f"[{{files: {text}}}]"), "tokenizer.vocab_size=512", *small("general"),
        *short("general", "with", "without"), "coded.length=64", "coded.calibration_rows=8", "with_evaluation.max_documents=9",
        "coded.surgeries=[{method: codebook_features, codes: 30, k: 3}]", "steered.method.codes=['0.feed_forward:0']",
        "steered.max_new_tokens=4", "without_evaluation.max_documents=9",
    ]  # fmt: skip
    found = finite(
        engine.run(load(ROOT / "recipes/papers/codebook-features.yaml", settings, tmp_path), say=lambda text: None)
    )
    assert 0 < found["coded"]["code_error"] < 1
    log = [json.loads(line) for line in next(tmp_path.rglob("with/log.jsonl")).read_text().splitlines()]
    assert any(row.get("parts", {}).keys() >= {"lm", "reconstruction"} for row in log), log[:3]
    assert found["with_evaluation"]["codes"] == 3 * 30 and "loss" in found["without_evaluation"]
    listed = json.loads(next(tmp_path.rglob("with_evaluation/codes.json")).read_text())["code_activations"]
    assert {row["code"].partition(":")[0] for row in listed} == {"0.attention.0", "0.attention.1", "0.feed_forward"}
    assert lineage(next(tmp_path.rglob("with/checkpoint")).parent)[-2:] == ["general", "coded"]


def test_a_binary_encoder_is_pretrained_from_its_teacher_and_measured_beside_it(tmp_path, text):
    settings = [
        *data("corpus", sources=f"[{{files: {text}}}]"), "tokenizer.vocab_size=512", *small("teacher"),
        *short("teacher", "pretrained"), "binary.length=64",
        *(f"of_{stage}.evaluations=[{{method: probe, label: domain}}]" for stage in ("teacher", "binary", "pretrained")),
    ]  # fmt: skip
    found = finite(
        engine.run(load(ROOT / "recipes/papers/binary-encoder.yaml", settings, tmp_path), say=lambda text: None)
    )
    assert {"probe_accuracy", "probe_loss"} <= found["of_binary"].keys() == found["of_pretrained"].keys()
    log = [json.loads(line) for line in next(tmp_path.rglob("pretrained/log.jsonl")).read_text().splitlines()]
    assert any(row.get("parts", {}).get("features", 0) > 0 for row in log), log[:3]
    assert lineage(next(tmp_path.rglob("pretrained/checkpoint")).parent)[-2:] == ["teacher", "binary"]


@pytest.mark.processes
def test_students_of_three_sizes_are_taken_out_of_superlms_and_tuned_beside_their_teacher(tmp_path, text):
    spaces = {"tiny": ([16], 40_000), "small": ([24, 32], 60_000), "base": ([48], 90_000)}
    sizes = "head_size: 8, num_attention_heads: [2, 3, 4, 6], num_hidden_layers: [1, 2], mlp_ratio: [1.0, 2.0]"
    settings = [
        *data("corpus", sources=f"[{{files: {text}}}]"), "tokenizer.vocab_size=512", "teacher.model.hidden_size=48",
        "teacher.model.intermediate_size=96", "teacher.model.num_hidden_layers=2", "teacher.model.num_attention_heads=6",
        *short("teacher", *(f"{name}_superlm" for name in spaces), *(f"{name}_tuned" for name in (*spaces, "teacher"))),
        *(f"{name}_superlm.objective={{method: autodistil, teacher: teacher, hidden_size: {width}, {sizes}}}" for name, (width, _) in spaces.items()),
        *(f"{name}.surgeries=[{{method: autodistil_search, max_parameters: {most}, hidden_size: {width}, {sizes}}}]" for name, (width, most) in spaces.items()),
        *(f"{name}.{field}" for name in spaces for field in ("length=64", "calibration_rows=4")),
    ]  # fmt: skip
    recipe = ROOT / "recipes/papers/few-shot-architecture-search.yaml"
    found = finite(engine.run(load(recipe, settings, tmp_path), say=lambda text: None))
    for name, (widths, most) in spaces.items():
        assert found[name]["parameters"] <= most and found[name]["autodistil/hidden_size"] in widths
        assert found[name]["autodistil/distance"] > 0 and "accuracy" in found[f"of_{name}"]
        assert lineage(next(tmp_path.rglob(f"{name}_tuned/checkpoint")).parent)[-2:] == [f"{name}_superlm", name]
    log = [json.loads(line) for line in next(tmp_path.rglob("small_superlm/log.jsonl")).read_text().splitlines()]
    assert any(row.get("parts", {}).keys() >= {"largest", "smallest", "sampled"} for row in log), log[:3]


def test_the_recipes_mix_domains_as_their_papers_do():
    stages = {
        s.name: s
        for name in ("stream-of-domains", "upsampled-domain")
        for s in load(ROOT / f"recipes/papers/{name}.yaml").stages
    }
    stream = [stages[name].mixture for name in ("first", "second", "third")]
    assert all(list(mixture.values()) == [1.0] for mixture in stream) and len({*map(str, stream)}) == 3
    assert set(stages["encoder"].mixture.values()) == {0.5} and len(stages["encoder"].mixture) == 2


@pytest.mark.processes
def test_a_small_model_goes_on_for_a_while_and_then_for_longer(tmp_path, text):
    settings = [*data("general", sources=f"[{{files: {text}, suffixes: [.py]}}]"), *data("domain", sources=f"[{{files: {text}, suffixes: [.txt, .md]}}]"),
                "tokenizer.vocab_size=500", *small("base"), *short("base", "some", "more")]  # fmt: skip
    found = finite(
        engine.run(load(ROOT / "recipes/papers/small-model-adaptation.yaml", settings, tmp_path), say=lambda text: None)
    )
    for stage in ("base", "some", "more"):
        assert {"bits_per_byte"} <= set(found[f"{stage}_domain"]) & set(found[f"{stage}_general"])
    assert (
        found["base_domain"]["bits_per_byte"]
        != found["some_domain"]["bits_per_byte"]
        != found["more_domain"]["bits_per_byte"]
    )
    assert [name for name in lineage(tmp_path / "more") if name in ("base", "some", "domain")] == [
        "base",
        "domain",
        "some",
    ]


def recipe_run(name: str, settings: list[str], folder: Path) -> dict[str, dict[str, float]]:
    return finite(engine.run(load(ROOT / f"recipes/papers/{name}.yaml", settings, folder), say=lambda text: None))


def weights(folder: Path) -> int:
    return (folder / "checkpoint/model.safetensors").stat().st_size


TINY_GPT2 = ("n_embd=32", "n_layer=2", "n_head=2")


@pytest.mark.processes
def test_the_recipe_of_the_query_layer_trains_a_model_with_it_and_one_without(tmp_path, text):
    names = ("model", "plain")
    settings = [*data("corpus", sources=f"[{{files: {text}}}]"), "corpus.operations=[deduplicate]", "tokenizer.vocab_size=512", *short(*names),
                *(f"{name}.model.{size}" for name in names for size in TINY_GPT2)]  # fmt: skip
    found = recipe_run("pangu-alpha", settings, tmp_path)
    made = [[row["method"] for row in surgery_of(checkpoint.load(tmp_path / name / "checkpoint")[0])] for name in names]
    assert made == [["query_layer"], []]
    assert all(found[name]["bits_per_byte"] > 0 for name in ("with_query_layer", "without"))


@pytest.mark.processes
def test_the_recipe_of_filtered_text_asks_for_labels_in_four_ways(tmp_path, text):
    filters = [f"{{method: quality_subset, domain: {d}, share: 0.9, reference: chosen}}" for d in ("py", "txt")]
    words = {"plain": "py: [code], txt: [text]", "more": "py: [code, class], txt: [text, words]"}
    ask = "{{method: label_words, label: domain, resamples: 2, words: {{{}}}{}}}"
    settings = [
        *data("corpus", "chosen", sources=f"[{{files: {text}}}]"), f"corpus.operations=[deduplicate, {', '.join(filters)}]",
        "tokenizer.vocab_size=512", *(f"model.model.{size}" for size in TINY_GPT2), *short("model"),
        *(f"{name}.evaluations=[{ask.format(words[which], more)}]" for name, which, more in (
            ("usual", "plain", ", calibrate: false"), ("calibrated", "plain", ""), ("expanded", "more", ""),
            ("few_shot", "more", ", shots: 1, pool: corpus"))),
        *(f"{name}.max_documents=20" for name in ("usual", "calibrated", "expanded", "few_shot")), "model.batch_rows=8",
    ]  # fmt: skip
    found = recipe_run("yuan", settings, tmp_path)
    losses = [found[name]["label_loss"] for name in ("usual", "calibrated", "expanded", "few_shot")]
    assert len({*losses}) == 4 and found["corpus"]["documents/train"] < found["chosen"]["documents/train"]


@pytest.mark.processes
def test_the_suite_of_sizes_is_trained_alike_and_measured(tmp_path, text):
    names = ("small", "medium", "large")
    settings = [*data("corpus", sources=f"[{{files: {text}}}]"), "tokenizer.vocab_size=512", *short(*names),
                *(f"{name}.model.{size}" for n, name in enumerate(names) for size in (f"hidden_size={16 << n}", f"word_embed_proj_dim={16 << n}", "ffn_dim=32", "num_hidden_layers=1", "num_attention_heads=2"))]  # fmt: skip
    found = recipe_run("opt", settings, tmp_path)
    assert all(found[name]["restarts"] == 0 and found[f"of_{name}"]["bits_per_byte"] > 0 for name in names)
    sizes = [weights(tmp_path / name) for name in names]
    assert sizes == sorted(sizes) and len({*sizes}) == 3
    stages = {stage.name: stage for stage in load(ROOT / "recipes/papers/opt.yaml").stages}
    rates = [stages[name].optimizer.lr for name in names]
    assert rates == sorted(rates, reverse=True)  # which fall as the models grow


@pytest.mark.processes
def test_the_recipe_of_two_vocabularies_compares_bits_and_a_task(tmp_path, text):
    encoders, decoders, tuned = ("small", "large"), ("small_decoder", "large_decoder"), ("tuned_small", "tuned_large")
    settings = [
        *data("corpus", "pages", sources=f"[{{files: {text}}}]"), "corpus.operations=[deduplicate]",
        "small_words.vocab_size=400", "large_words.vocab_size=600", *small(*encoders), *short(*encoders, *decoders, *tuned),
        *(f"{name}.model.{size}" for name in decoders for size in TINY_GPT2),
    ]  # fmt: skip
    found = recipe_run("cluecorpus", settings, tmp_path)
    assert [found[f"{name}_words"]["vocabulary"] for name in encoders] == [400, 600]
    assert all(
        {"bits_per_byte"} <= {*found[f"bits_{name}"]} and {"accuracy"} <= {*found[f"task_{name}"]} for name in encoders
    )
    assert weights(tmp_path / "small") < weights(tmp_path / "large")


@pytest.mark.processes
def test_the_grid_of_sizes_and_domains_is_trained_from_scratch_and_from_a_multilingual_model(tmp_path, text):
    shares = {
        "one_10": (".py",),
        "one_50": (".py",),
        "one_100": (".py",),
        "mixed_10": (),
        "mixed_50": (),
        "mixed_100": (),
        "world": (".txt",),
        "pages": (),
    }
    trained = (
        "from_one_10",
        "from_one_50",
        "from_one_100",
        "from_mixed_10",
        "from_mixed_50",
        "scratch",
        "multilingual",
    )
    tuned = ("one_10", "one_100", "mixed_10", "scratch", "further")
    settings = [
        *(given for name, suffixes in shares.items() for given in data(name, sources=f"[{{files: {text}, suffixes: {json.dumps(suffixes)}}}]")),
        "words.vocab_size=400", "world_words.vocab_size=500", *small(*trained), *short(*trained, "further", *(f"tuned_{n}" for n in tuned)),
        *(f"filled_{name}.max_documents=8" for name in ("one_10", "one_50", "one_100", "mixed_10", "mixed_50", "scratch")),
        *(f"task_{name}.max_documents=8" for name in tuned),
    ]  # fmt: skip
    found = recipe_run("bertu", settings, tmp_path)
    assert all(found[f"filled_{name}"]["masked_loss"] > 0 for name in ("one_10", "mixed_50", "scratch"))
    assert all("accuracy" in found[f"task_{name}"] for name in tuned)
    assert "multilingual" in lineage(tmp_path / "tuned_further") and "multilingual" not in lineage(
        tmp_path / "tuned_scratch"
    )


def test_the_grid_has_a_tenth_a_half_and_all_of_one_domain_and_of_a_mixture():
    stages = {stage.name: stage for stage in load(ROOT / "recipes/papers/bertu.yaml").stages}
    limits = [[source.limit for source in stages[name].sources] for name in ("one_10", "one_50", "one_100", "mixed_10", "mixed_50", "mixed_100")]  # fmt: skip
    assert limits[2] == [None] and limits[5] == [None, None]
    assert sum(limits[0]) == sum(limits[3]) and sum(limits[1]) == sum(
        limits[4]
    )  # as many pages of the one as of the other


@pytest.mark.processes
def test_a_language_of_its_own_is_compared_with_one_of_four(tmp_path, text):
    names = ("german", "multilingual", "tuned_german", "tuned_multilingual")
    settings = [
        *data("german_pages", "parts", sources=f"[{{files: {text}}}]"), *data("many_pages", sources=f"[{{files: {text}}}]"),
        *(f"{name}.operations=[deduplicate]" for name in ("german_pages", "many_pages")), "multilingual.mixture={py: 1, txt: 1}",
        "german_words.vocab_size=400", "many_words.vocab_size=500", *small(*names[:2]), *short(*names),
        *(f"task_{name}.max_documents=8" for name in names[:2]),
    ]  # fmt: skip
    found = recipe_run("gottbert", settings, tmp_path)
    assert all("accuracy" in found[f"task_{name}"] for name in names[:2])


@pytest.fixture
def drawn(monkeypatch):
    """The domains of each training row that any loader has handed out, in order."""
    found: list[str] = []
    step = Loader.step

    def spy(self, *args, **kwargs):
        batches = step(self, *args, **kwargs)
        found.extend(
            self.shards.domain_names[d] for of_objectives in batches for d in of_objectives[0]["domain_B"].tolist()
        )
        return batches

    monkeypatch.setattr(Loader, "step", spy)
    return found


@pytest.mark.processes
def test_a_stream_of_domains_is_read_one_by_one_and_measured_on_all(tmp_path, text, drawn):
    settings = [*data("corpus", sources=f"[{{files: {text}}}]"), "tokenizer.vocab_size=500", *small("first"), *short("first", "second", "third"),
                "first.mixture={py: 1.0}", "second.mixture={txt: 1.0}", "third.mixture={md: 1.0}"]  # fmt: skip
    finite(engine.run(load(ROOT / "recipes/papers/stream-of-domains.yaml", settings, tmp_path), say=lambda text: None))
    assert drawn == ["py"] * 12 + ["txt"] * 12 + ["md"] * 12
    matrix = [
        json.loads((tmp_path / f"after_{s}" / "evaluation.json").read_text())["domains"]
        for s in ("first", "second", "third")
    ]
    assert all(set(row) == {"py", "txt", "md"} for row in matrix)
    assert len({json.dumps(row) for row in matrix}) == 3
    assert [name for name in lineage(tmp_path / "third") if name in ("first", "second")] == ["first", "second"]


def test_a_small_domain_is_read_as_often_as_a_large_one_from_the_first_step_on(tmp_path, text, drawn):
    sources = f"[{{files: {text}, suffixes: [.py]}}, {{files: {text}, suffixes: [.txt]}}]"
    settings = [*data("corpus", "balanced", sources=sources), "tokenizer.vocab_size=500", *small("encoder"), *short("encoder"),
                "encoder.budget={steps: 16}", "encoder.mixture={py: 0.5, txt: 0.5}"]  # fmt: skip
    finite(engine.run(load(ROOT / "recipes/papers/upsampled-domain.yaml", settings, tmp_path), say=lambda text: None))
    sizes = {end: sum(len(path.read_text()) for path in text.glob(f"*.{end}")) for end in ("py", "txt")}
    assert sizes["txt"] < 0.3 * sizes["py"]
    # Fair draws of at least 64 rows: 0.5 within three standard deviations of 0.0625; as the rows come it were below 0.3.
    assert len(drawn) >= 64 and abs(drawn.count("txt") / len(drawn) - 0.5) < 0.19
    assert set(drawn[:16]) == {"py", "txt"}
    config = json.loads((tmp_path / "encoder" / "checkpoint" / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]


@pytest.mark.processes
def test_an_encoder_loses_a_script_and_goes_on_with_several_languages_at_once(tmp_path, text, drawn):
    (tmp_path / "ru").mkdir()
    for number in range(8):
        (tmp_path / "ru" / f"{number}.txt").write_text(f"Все люди рождаются свободными и равными, раз {number}. " * 20)
    latin = {"deu_Latn": ".py", "dan_Latn": ".txt", "ita_Latn": ".md"}
    sources = {name: f"{{files: {text}, suffixes: [{end}], domain: {name}}}" for name, end in latin.items()}
    settings = [*data("world", sources=f"[{sources['deu_Latn']}, {{files: {tmp_path}/ru, domain: rus_Cyrl}}]"),
                *data("targets", sources=f"[{sources['dan_Latn']}, {sources['ita_Latn']}]"), "words.vocab_size=420", *small("base"), *short("base", "adapted", "alone"),
                "base.mixture={deu_Latn: 1, rus_Cyrl: 1}", "adapted.mixture={dan_Latn: 1, ita_Latn: 1}", "adapted.budget={steps: 12}"]  # fmt: skip
    recipe = ROOT / "recipes/papers/multilingual-adaptive-fine-tuning.yaml"
    found = finite(engine.run(load(recipe, settings, tmp_path / "runs"), say=lambda text: None))
    assert found["trimmed"]["trim_scripts/tokens"] < found["trimmed"]["trim_scripts/tokens_before"]
    assert found["trimmed"]["bytes"] < found["trimmed"]["bytes_before"]
    assert all({"masked_loss/dan_Latn", "masked_loss/ita_Latn"} <= set(found[s]) for s in ("before", "after"))
    rows = [domain for domain in drawn if domain in ("dan_Latn", "ita_Latn")][:48]  # of `adapted`: 0.5 within three
    assert abs(rows.count("ita_Latn") / 48 - 0.5) < 0.22


@pytest.mark.processes
def test_an_encoder_from_scratch_has_the_words_of_its_domain_and_the_other_those_it_came_with(tmp_path, text):
    settings = [*data("general", sources=f"[{{files: {text}, suffixes: [.txt, .md]}}]"), *data("domain", sources=f"[{{files: {text}, suffixes: [.py]}}]"),
                *data("examples", sources="[{functions: [click, networkx], limit: 24}]"), "general_words.vocab_size=400", "domain_words.vocab_size=450",
                *small("generalist", "scratch"), *short("generalist", "mixed", "scratch", "tuned_mixed", "tuned_scratch"),
                "task_mixed.max_documents=16", "task_scratch.max_documents=16"]  # fmt: skip
    recipe = ROOT / "recipes/papers/pretrain-from-scratch-on-a-domain.yaml"
    found = finite(engine.run(load(recipe, settings, tmp_path), say=lambda text: None))
    sizes = {
        s: json.loads((tmp_path / s / "checkpoint" / "config.json").read_text())["vocab_size"]
        for s in ("mixed", "tuned_mixed", "scratch", "tuned_scratch")
    }
    assert sizes["mixed"] == sizes["tuned_mixed"] < sizes["scratch"] == sizes["tuned_scratch"]
    assert "generalist" in lineage(tmp_path / "mixed") and "generalist" not in lineage(tmp_path / "tuned_scratch")
    assert all(0 <= found[f"task_{side}"]["accuracy"] <= 1 for side in ("mixed", "scratch"))
    spent = {stage.name: stage.budget.limit for stage in load(recipe).stages if stage.stage == "train"}
    assert spent["generalist"] + spent["mixed"] == spent["scratch"]


@pytest.mark.processes
def test_the_recipe_of_holdings_scores_two_tasks_before_three_encoders_are_tuned_on_them(tmp_path):
    trained = [f"{way}_{name}" for way in ("choosing", "telling") for name in ("double", "adapted", "custom")]
    few = "networkx, sklearn], limit: 20"
    settings = [
        "general.sources=[{packages: [datasets], limit: 20}]", f"domain.sources=[{{packages: [{few}}}]",
        f"questions.sources=[{{questions: [{few}}}]", f"packages.sources=[{{functions: [{few}}}]",
        *(f"{name}.vocab_size=512" for name in ("general_words", "domain_words")), *small("generalist", "custom"),
        *short("generalist", "double", "adapted", "custom", *trained),
    ]  # fmt: skip
    found = finite(engine.run(load(ROOT / "recipes/papers/casehold.yaml", settings, tmp_path), say=lambda text: None))
    for task in ("questions", "packages"):
        score = found[f"specificity_{task}"]
        assert score["domain_specificity"] == pytest.approx(score["general_loss"] - score["domain_loss"])
    assert all("label_loss" in found[f"{task}_{n}"] for task in ("choice", "package") for n in ("double", "adapted"))
    encoders = ("generalist", "double", "adapted", "custom")
    assert [n for n in lineage(tmp_path / "choosing_adapted") if n in encoders] == ["generalist", "adapted"]


@pytest.mark.processes
def test_the_recipe_of_a_taxonomy_goes_on_with_and_without_its_relations(tmp_path, package):
    package(debian="wordnet-base")
    few = "[{wordnet: usr/share/wordnet, parts: [verb], limit: 200, package: {debian: wordnet-base}}]"
    trained = ("encoder", "related", "masked", "tuned_related", "tuned_masked")
    settings = [
        "general.sources=[{packages: [datasets], limit: 20}]", f"taxonomy.sources={few}", f"subjects.sources={few}",
        "words.vocab_size=512", *small("encoder"), *short(*trained),
    ]  # fmt: skip
    found = finite(engine.run(load(ROOT / "recipes/papers/escoxlm-r.yaml", settings, tmp_path), say=lambda text: None))
    assert all(0 <= found[f"task_{name}"]["accuracy"] <= 1 for name in ("related", "masked"))
    (report,) = json.loads((tmp_path / "taxonomy/corpus/corpus.json").read_text())["operations"]
    assert report["relations"].keys() == {"random", "linked", "grouped"}


@pytest.mark.processes
def test_the_recipe_of_a_cascade_filters_two_languages_and_goes_on_with_a_deeper_model(tmp_path, package):
    pytest.importorskip("py3langid")
    package(debian="manpages-zh")
    few = "[{manuals: usr/share/man/zh_CN/man1, domain: chinese, limit: 60, package: {debian: manpages-zh}}]"
    settings = [
        f"raw_pages.sources={few}", "raw_pages.validation=0.2", "raw_pages.test=0.2", "tokenizer.vocab_size=512",
        *(f"clean.model.{size}" for size in ("hidden_size=32", "intermediate_size=48")),
        *(f"raw.model.{size}" for size in ("hidden_size=32", "intermediate_size=48")), *short("clean", "raw", "deeper", "longer"),
    ]  # fmt: skip
    found = finite(engine.run(load(ROOT / "recipes/papers/yi.yaml", settings, tmp_path), say=lambda text: None))
    assert found["clean_pages"]["documents/train"] < found["raw_pages"]["documents/train"]
    assert found["clean_pages"]["documents/test"] == found["raw_pages"]["documents/test"]
    assert json.loads((tmp_path / "deeper/checkpoint/config.json").read_text())["num_hidden_layers"] == 12
    assert all(found[f"measured_{n}"]["bits_per_byte"] > 0 for n in ("raw", "clean", "longer", "deeper"))


@pytest.mark.processes
def test_the_recipe_of_tags_and_order_has_both_beside_hidden_tokens(tmp_path, package):
    package(debian="python3-jieba")
    package(debian="manpages-zh")
    trained = ("linguistic", "masked", "tuned_linguistic", "tuned_masked", "tuned_robust")
    few = "[{manuals: usr/share/man/zh_CN/man5, package: {debian: manpages-zh}}]"
    settings = [
        "words.vocab_size=512", f"pages.sources={few}", "pages.operations.1={method: deduplicate}",
        *small("linguistic", "masked"), *short(*trained),
    ]  # fmt: skip
    found = finite(engine.run(load(ROOT / "recipes/papers/mengzi.yaml", settings, tmp_path), say=lambda text: None))
    assert all(0 <= found[f"task_{name}"]["accuracy"] <= 1 for name in ("linguistic", "masked", "robust"))
    report = json.loads((tmp_path / "pages/corpus/corpus.json").read_text())["operations"][-1]
    assert report["dictionary"] == 349045 and set(report["entities"]) <= {"O", "nr", "nrt", "ns", "nt", "nz"}


@pytest.mark.processes
def test_the_recipe_of_facts_goes_on_with_and_without_them(tmp_path, package):
    package(debian="wordnet-base")
    few = "[{wordnet: usr/share/wordnet, parts: [verb], limit: 200, package: {debian: wordnet-base}}]"
    trained = ("encoder", "knowing", "masked", "tuned_knowing", "tuned_masked")
    verbs = "[{wordnet: usr/share/wordnet, parts: [verb], package: {debian: wordnet-base}}]"
    settings = [
        "general.sources=[{packages: [datasets], limit: 20}]", f"facts.sources={verbs}", f"subjects.sources={few}",
        f"texts.sources={few}", f"plain.sources={few}", "words.vocab_size=512", *small("encoder"), *short(*trained),
    ]  # fmt: skip
    found = finite(engine.run(load(ROOT / "recipes/papers/dkplm.yaml", settings, tmp_path), say=lambda text: None))
    assert all(0 <= found[f"task_{name}"]["accuracy"] <= 1 for name in ("knowing", "masked"))
    (report,) = json.loads((tmp_path / "texts/corpus/corpus.json").read_text())["operations"]
    assert 0 < report["chosen"] < report["mentions"] and 0 < report["long_tail"] < report["named"]

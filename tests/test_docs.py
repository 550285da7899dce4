"""Documentation: the made pages are up to date, links lead somewhere, the guide's example works as printed."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from package_code import nodes, texts

from pretrain.core.errors import PretrainError
from pretrain.core.registry import info, kinds, methods
from pretrain.docs.guarantees import SECTIONS, guarantees_page, promises
from pretrain.docs.made import made, stale

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])


def test_the_made_pages_are_those_of_the_docstrings():
    for path, text in made(ROOT).items():
        assert path.read_text() == text, f"{path}: run `make docs`"
    assert not stale(ROOT), "run `make docs`"


PROMISING = """
import pytest
@pytest.mark.promise("Trust", "Nothing is read.")
def test_a(): ...
@pytest.mark.parametrize("x", [1])
@pytest.mark.promise("Trust", "Nothing is")
def test_b(x): ...
@pytest.mark.promise("%s", "%s")
def %s(): ...
"""


def test_a_promise_names_the_tests_that_say_it_or_its_beginning(tmp_path):
    path = tmp_path / "test_some.py"
    path.write_text(PROMISING % ("Pages", "A page is.", "test_c"))
    page = guarantees_page(tmp_path)
    assert "- Nothing is read (`test_some.py::test_a`, `test_some.py::test_b`)." in page
    assert page.index("Nothing is read") < page.index("## Pages") < page.index("- A page is (`test_some.py::test_c`).")
    path.write_text(PROMISING % ("Page", "A page is.", "test_c"))
    with pytest.raises(PretrainError, match="unknown section of promises 'Page' .did you mean 'Pages'"):
        guarantees_page(tmp_path)
    path.write_text(PROMISING % ("Pages", "A page is.", "helper"))
    with pytest.raises(PretrainError, match=r"test_some.py:8: accepted: a section and a sentence, on a test"):
        guarantees_page(tmp_path)


def test_each_section_of_the_guarantees_holds_promises():
    sections = {promise.section for promise in promises(ROOT / "tests")}
    assert sections == {section.name for section in SECTIONS}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_are_there(page):
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
        if link.startswith("https://"):
            continue
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), f"{link}#{anchor}"


def test_the_guides_example_is_found_and_works_as_printed(tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "adding-a-method.md").read_text(), re.DOTALL)[1]
    shutil.copytree(ROOT / "pretrain", tmp_path / "pretrain", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pretrain" / "optim" / "schedules" / "polynomial.py").write_text(code)

    def run(*words):
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    rows = json.loads(run("-m", "pretrain", "methods", "polynomial", "--json"))
    assert rows[0]["arxiv"] == "1606.00915" and rows[0]["kind"] == "schedule"
    program = (
        "from pretrain.optim.schedules.polynomial import Polynomial as P; print(P(0, 2.0).factor(50, 100), P().name)"
    )
    assert run("-c", program).split() == ["0.25", "polynomial"]
    planned = run("-m", "pretrain", "run", str(ROOT / "recipes" / "quickstart.yaml"), "--dry-run", "--output", "out",
                  "--set", "model.schedule={method: polynomial, power: 2.0}")  # fmt: skip
    assert "model" in planned


def test_the_recipe_of_a_labelled_table_works_as_printed(tmp_path, monkeypatch):
    from pretrain.forecast import forecast, warnings
    from pretrain.identity import plan
    from pretrain.recipe import load

    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "recipes.md").read_text().partition("## A labelled table")[2]
    Path("reviews.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    rows = [
        f"a review of {number} words that somebody wrote,{'good' if number % 2 else 'bad'}" for number in range(400)
    ]
    Path("reviews.csv").write_text("\n".join(["review,sentiment", *rows, "no label,"]) + "\n")
    Path("path/to/checkpoint").mkdir(parents=True)
    config = {
        "model_type": "bert",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 99,
    }
    Path("path/to/checkpoint/config.json").write_text(json.dumps(config))
    planned = plan(load(Path("reviews.yaml")))
    assert [item.stage.name for item in planned] == ["corpus", "classifier", "evaluation"]
    assert not warnings(forecast(planned))


def test_each_method_opens_with_a_title_that_the_papers_list_has_or_that_it_names(tmp_path):
    for found in methods().values():
        assert found.title and (found.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}|[\w.-]+/\d+", found.arxiv))
        assert found.kind in kinds()


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(PretrainError, match=r"unknown schedule 'cosin' \(did you mean 'cosine'\?\)"):
        info("cosin", "schedule")


def test_no_file_or_function_is_too_long_to_read():
    for name, text in texts().items():
        assert text.count("\n") <= 420, name
        for node in nodes(name):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 65, (name, node.name)

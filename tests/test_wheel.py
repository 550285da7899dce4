"""The package as others install it: from its wheel, without the repository, without what only extras bring."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import textwrap
import tomllib
import warnings
import zipfile
from pathlib import Path

import pytest
from small_recipe import small_recipe

import pretrain
from pretrain.core.errors import PretrainError
from pretrain.core.system import shipped
from pretrain.core.system.extras import EXTRAS, extras_named
from pretrain.experiments.claims import claims, load_claim

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parent.parent
PARTS = ("pretrain", "recipes", "claims", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
MISSING = f"""
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = name.partition(".")[0] in {sorted({*EXTRAS, "mergekit", "playwright", "pytest"})!r}
        return None if missing else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def listed(folder):
    """The files of the repository that are not made."""
    return {
        p
        for p in folder.rglob("*")
        if p.is_file() and not {"__pycache__", "shipped"} & {*p.parts} and p.suffix != ".pyc"
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, with no network."""
    home = tmp_path_factory.mktemp("wheel")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, home / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, home / "source" / name)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", home / "made", home / "source"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "-q", *map(str, build)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return next((home / "made").glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """Where the wheel is installed, with this environment's libraries behind it but for those of extras."""
    folder = tmp_path_factory.mktemp("site")
    install = ["install", "--no-deps", "--no-index", "--no-compile", "--target", folder, wheel]
    subprocess.run([sys.executable, "-m", "pip", "-q", *map(str, install)], check=True)
    (folder / "sitecustomize.py").write_text(MISSING)
    return folder


@pytest.fixture
def installed(site, tmp_path):
    """Run the command line of the installed package in an empty folder."""

    def run(*arguments, code=None):
        words = ["-c", textwrap.dedent(code)] if code else ["-m", "pretrain", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(site), "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return run


def test_the_wheel_holds_the_package_the_recipes_and_the_claims(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {str(path.relative_to(ROOT)) for path in listed(ROOT / "pretrain")} <= names
    for part in ("recipes", "claims"):
        assert {f"pretrain/shipped/{path.relative_to(ROOT)}" for path in listed(ROOT / part)} <= names
    assert wheel.stat().st_size < 5_000_000


def test_the_installed_package_knows_its_recipes_claims_and_papers(installed, site):
    where = installed(code="import pretrain; print(pretrain.__file__)").stdout
    assert where.startswith(str(site))
    claimed = installed("claim", "list")
    assert "lion" in claimed.stdout and "reproduced" in claimed.stdout, claimed.stderr
    rows = json.loads(installed("papers", "--json").stdout)
    recipes = [row["recipe"] for row in rows if row["recipe"]]
    assert "recipes/papers/stream-of-domains.yaml" in recipes and sum(row["status"] == "stands" for row in rows) > 50
    loaded = installed(
        code=f"""
        from pretrain.recipe import load
        print(*[load(name).name for name in ({recipes[0]!r}, "quickstart", "recipes/baseline.yaml")])
        """
    )
    assert loaded.stdout.split() == [Path(recipes[0]).stem, "quickstart", "baseline"], loaded.stderr
    wrong = installed("run", "quikstart")
    assert wrong.returncode == 1 and "did you mean 'quickstart'" in wrong.stderr


def test_the_installed_package_trains_reports_and_lists_its_runs(installed, stories, tmp_path):
    (tmp_path / "small.yaml").write_text(small_recipe(tmp_path, stories[:30], budget={"steps": 2}))
    done = installed("run", "small.yaml")
    assert done.returncode == 0 and (tmp_path / "runs" / "small" / "report.html").exists(), done.stderr
    model = next(line.removeprefix("model: ") for line in done.stdout.splitlines() if line.startswith("model: "))
    assert installed("generate", model, "--prompt", "def ", "--max-new-tokens", 4).stdout.startswith("def ")
    assert "runs/small" in installed("runs", "list").stdout


def test_what_an_extra_brings_is_told_in_one_line(installed, stories, tmp_path):
    text = small_recipe(tmp_path, stories[:30], budget={"steps": 2}, optimizer="schedule_free")
    (tmp_path / "small.yaml").write_text(text)
    done = installed("run", "small.yaml")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "stage 'model': pytorch_optimizer is missing; accepted: pip install 'pretrain[optimizers]'" in done.stderr


def test_all_modules_are_imported_without_what_extras_bring(installed):
    """But for the one that extends a class of lm-eval's and the server's, which are imported when these are there."""
    done = installed(
        code="""
        import importlib, pkgutil, pretrain
        for module in pkgutil.walk_packages(pretrain.__path__, "pretrain."):
            try:
                if not module.name.endswith("__main__"):
                    importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                print(module.name, error.name)
        """
    )
    without = ["pretrain.evaluation.tasks._harness lm_eval", "pretrain.inference.serving.app starlette"]
    assert done.stdout.split("\n")[:-1] == without, done.stderr


def test_the_names_of_missing_packages_lead_to_extras():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS.values()) | {"dev"} == extras.keys()
    with (
        pytest.raises(PretrainError, match=r"soundfile is missing; accepted: pip install 'pretrain\[audio\]'"),
        extras_named(),
    ):
        raise ModuleNotFoundError("No module named 'soundfile'", name="soundfile")
    with pytest.raises(PretrainError, match=r"pretrain\[images\]"), extras_named():
        raise ImportError("ViTImageProcessor requires the PIL library but it was not found")
    with pytest.raises(ImportError, match="something else"), extras_named():
        raise ImportError("something else")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_of_ones_own_comes_before_what_is_shipped(elsewhere):
    assert (
        shipped.recipe_file("quickstart")
        == shipped.recipe_file("recipes/quickstart.yaml")
        == ROOT / "recipes" / "quickstart.yaml"
    )
    assert shipped.recipe_file("papers/stream-of-domains").parent == ROOT / "recipes" / "papers"
    (elsewhere / "quickstart").mkdir()  # a folder is no recipe
    assert shipped.recipe_file("quickstart") == ROOT / "recipes" / "quickstart.yaml"
    (elsewhere / "recipes").mkdir()
    (elsewhere / "recipes" / "quickstart.yaml").write_text("")
    assert shipped.recipe_file("recipes/quickstart.yaml") == Path("recipes/quickstart.yaml")
    with pytest.raises(PretrainError, match="recipe mine.yaml cannot be read: no such file; accepted: .*quickstart"):
        shipped.recipe_file("mine.yaml")
    (elsewhere / "prose.yaml").write_text("")
    for name in ("prose.yml", "pros.yaml", "prose"):
        with pytest.raises(PretrainError, match=r"no such file \(did you mean 'prose.yaml'\?\)"):
            shipped.recipe_file(name)
    with pytest.raises(PretrainError, match=r"is a folder; accepted: a recipe's path: .*prose.yaml"):
        shipped.recipe_file(elsewhere.resolve())


def test_claims_are_the_shipped_ones_and_results_go_to_the_users_folder(elsewhere, monkeypatch):
    from typer.testing import CliRunner

    from pretrain import cli_claim
    from pretrain.experiments import queue

    asked = []
    monkeypatch.setattr(
        queue, "run", lambda chosen, scale, **named: asked.append((chosen[0].path, named["results"])) or ([], {})
    )
    for name in ("lion", "claims/lion.yaml"):
        assert CliRunner().invoke(cli_claim.app, ["run", name], catch_exceptions=False).exit_code == 0
    assert asked == [(ROOT / "claims" / "lion.yaml", Path("claims/results"))] * 2
    (elsewhere / "claims" / "results").mkdir(parents=True)
    result = json.loads(next((ROOT / "claims" / "results").glob("lion-*.json")).read_text())
    (elsewhere / "claims" / "results" / "lion-mine.json").write_text(json.dumps(result | {"scale": "mine"}))
    (row,) = (
        line
        for line in CliRunner().invoke(cli_claim.app, ["list"], env={"COLUMNS": "200"}).output.splitlines()
        if "mine:" in line
    )
    assert row
    assert "lion" in claims(shipped.claims_folder(Path("claims")))
    (elsewhere / "claims" / "own.yaml").write_text((ROOT / "claims" / "lion.yaml").read_text())
    assert [*claims(shipped.claims_folder(Path("claims")))] == ["own"]
    load_claim(elsewhere / "claims" / "own.yaml").recipe("baseline", "smoke")  # on the shipped base


def test_the_sources_are_of_python_3_11_and_nothing_in_them_goes_away_by_3_13():
    gone = {
        "distutils",
        "imp",
        "asynchat",
        "asyncore",
        "cgi",
        "crypt",
        "pipes",
        "telnetlib",
        "audioop",
        "pkg_resources",
    }
    for path in [*(ROOT / "pretrain").rglob("*.py"), ROOT / "setup.py"]:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text, feature_version=(3, 11))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an escape that means nothing is an error to come
            compile(text, str(path), "exec")
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name.partition(".")[0] for name in names} & gone, path
    assert pretrain.__version__

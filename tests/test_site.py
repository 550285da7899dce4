"""The site of `docs/`: built without network, true to the code; and the closing words of `make quickstart`."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import typer
from package_code import nodes, texts

from pretrain import recipe
from pretrain.cli import app
from pretrain.docs.site import labelled
from pretrain.docs.stages import EXAMPLES, described, examples, names
from pretrain.stages import Stage, stage_classes

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])


# Built without network


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    away = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # where nothing answers
    built = subprocess.run(command, cwd=ROOT, env=os.environ | away, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_built_and_no_link_or_anchor_is_broken(site):
    for page in DOCS.rglob("*.md"):
        place = page.relative_to(DOCS).with_suffix(".html")
        assert (site / place.with_name("index.html" if page.stem == "README" else place.name)).is_file(), page
    assert "bits_per_byte" in (site / "first-afternoon.html").read_text()
    assert (site / "curves.html").read_text() == (DOCS / "claims.html").read_text()


def test_pages_fetch_nothing_from_elsewhere(site):
    fetched = re.compile(
        r"""<(?:script|img|iframe)\b[^>]*\bsrc=["']?(?:https?:)?//|"""
        r"""<link\b[^>]*\brel=["']?(?:stylesheet|preconnect|icon)[^>]*href=["']?(?:https?:)?//|@import|url\(["']?https?://"""
    )
    for path in site.rglob("*"):
        if path.suffix in (".html", ".css"):
            assert not fetched.search(path.read_text()), path


def test_recipes_that_pages_lead_to_are_shown_in_the_site(site):
    assert 'href="files/recipes/quickstart.yaml.html"' in (site / "recipes.html").read_text()
    assert "stdlib" in (site / "files" / "recipes" / "quickstart.yaml.html").read_text()


# True to the code


def test_the_examples_of_the_stages_are_a_recipe(monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = recipe.load(EXAMPLES)
    assert {stage.stage for stage in loaded.stages} == set(stage_classes())


@pytest.mark.parametrize("name", names())
def test_each_stage_says_what_each_field_does_and_shows_an_example(name):
    cls = stage_classes()[name]
    opening, _, sentences = described(cls)
    assert set(sentences) | set(described(Stage)[2]) == set(cls.model_fields)
    assert opening.endswith(".") and all(sentence.endswith(".") for sentence in sentences.values())
    assert f"stage: {name}" in "\n".join(examples(name))


def templates(name: str) -> list[str]:
    """The strings of a file of the package, with `…` for what is put into them."""
    found = []
    for node in nodes(name):
        if isinstance(node, ast.JoinedStr):
            parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            found.append(re.sub("…+", "…", "".join(parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


@cache
def said() -> tuple[str, ...]:
    """All strings of the package."""
    return tuple(text for name in texts() for text in templates(name))


def quotes() -> list[str]:
    blocks = re.findall(r"^```text\n(.*?)^```", (DOCS / "troubleshooting.md").read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("quote", quotes())
def test_errors_that_are_explained_are_those_of_the_code(quote):
    assert len(quote.replace("…", "")) >= 10
    assert any(quote in text for text in said()), quote


# Commands


def parsed(words: list[str]) -> None:
    """Raises what `pretrain` would say of a command's words, and runs nothing."""
    command, context, name = typer.main.get_command(app), None, "pretrain"
    while True:
        context = command.make_context(name, list(words), parent=context)
        if not hasattr(command, "commands"):
            return
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])


def commands(text: str) -> list[str]:
    """The lines that call `pretrain`, whole, from its name on."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    calls = [re.match(r"^\s*(?:torchrun .*-m |python -m |\S*/)?(pretrain \w.*)", line) for line in lines]
    return [call[1] for call in calls if call]


def shown_commands() -> list[str]:
    found = []
    for page in (page for page in PAGES if page.name != "commands.md"):
        blocks = re.findall(r"^```(?:console|bash|sh)?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        found += [command for block in blocks for command in commands(block)]
    return sorted(set(found))


@pytest.mark.parametrize("command", shown_commands())
def test_commands_on_pages_are_understood(command):
    parsed(shlex.split(command, comments=True)[1:])


def test_a_command_that_is_not_understood_is_an_error():
    for wrong in (["run"], ["runn", "recipe.yaml"], ["run", "recipe.yaml", "--dry"], ["runs", "shw", "x"]):
        with pytest.raises(Exception, match=r"[Mm]issing|[Nn]o such"):
            parsed(wrong)


def test_the_quickstart_ends_with_where_to_look_and_three_commands_that_are_understood(tmp_path):
    place = tmp_path / "venv"
    (place / "bin").mkdir(parents=True)
    (place / "bin" / "pretrain").write_text("#!/bin/sh\necho ran $*\n")
    (place / "bin" / "pretrain").chmod(0o755)
    (place / "installed").touch()
    alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    made = subprocess.run(
        ["make", "quickstart", f"VENV={place}"], cwd=ROOT, env=alone, check=True, capture_output=True, text=True
    )
    lines = made.stdout.splitlines()
    assert lines[0] == "ran run recipes/quickstart.yaml" and not made.stderr
    closing = "\n".join(lines[1:])
    name = recipe.load(ROOT / "recipes" / "quickstart.yaml").output
    assert f"{name}/report.html" in closing
    suggested = commands(closing)
    assert len(suggested) == 3 and closing.count(str(place / "bin" / "pretrain")) == 3
    for command in suggested:
        parsed(shlex.split(command, comments=True)[1:])


def test_each_cell_of_a_table_is_named_by_the_head_of_its_column():
    table = "<table><thead><tr><th>a <b>x</b></th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>"  # fmt: skip
    assert '<td data-label="a x">1</td><td data-label="b">2</td>' in labelled(table)

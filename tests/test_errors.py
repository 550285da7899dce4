"""Errors and warnings lead to what the user has written."""

from __future__ import annotations

import sys
import warnings
from contextlib import contextmanager, nullcontext

import pytest
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.core import errors
from pretrain.core.errors import PretrainError, warn
from pretrain.corpus.sources import Files, read
from pretrain.recipe import load


def said_by(*command: str) -> str:
    result = CliRunner().invoke(app, [*command])
    return f"{result.output} {result.exception}"


def test_a_warning_is_of_the_line_that_called_the_package(monkeypatch):
    """Through functions of the package and context managers of the standard library."""
    inside: dict[str, object] = {"warn": warn, "contextmanager": contextmanager}
    code = "def said():\n  warn('odd')\n@contextmanager\ndef within():\n  said()\n  yield\ndef outer():\n  with within():\n    pass\n"
    exec(compile(code, f"{errors.HERE}some.py", "exec"), inside)  # as if it stood in the package
    for call in (inside["said"], inside["outer"]):
        assert callable(call)
        with warnings.catch_warnings(record=True) as seen, nullcontext():
            warnings.simplefilter("always")
            line = sys._getframe().f_lineno + 1
            call()
        assert [(each.filename, each.lineno) for each in seen] == [(__file__, line)]


def test_of_many_endings_an_error_names_the_first_and_how_many_there_are(tmp_path):
    (tmp_path / "a.bin").write_text("x")
    with pytest.raises(PretrainError) as raised:
        list(read(Files(str(tmp_path), suffixes=[f".e{number}" for number in range(200)])))
    assert "end with .e0, .e1, " in str(raised.value) and "… (200 endings) at" in str(raised.value)
    assert len(str(raised.value).replace(str(tmp_path), "")) < 200  # however long the path is


def test_an_unknown_decoding_is_told_with_its_option(tmp_path):
    assert "--method: unknown decoding 'beem'" in said_by(
        "generate", str(tmp_path), "--prompt", "a", "--method", "beem"
    )


def test_an_unknown_kind_of_stage_is_told_by_the_name_of_the_stage(tmp_path):
    (tmp_path / "r.yaml").write_text("stages:\n- {name: mine, stage: evalute}\n- {stage: evalute}\n")
    with pytest.raises(PretrainError, match=r"r.yaml:2: mine.stage: unknown stage 'evalute'"):
        load(tmp_path / "r.yaml")


def test_an_evaluation_without_data_is_told_how_to_ask_for_the_split_of_a_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "as RUN/corpus is of a run in RUN, whose test split" in said_by("evaluate", str(tmp_path))

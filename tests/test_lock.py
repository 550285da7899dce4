"""The lock file holds what the constraints say, and the page of guarantees names tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def test_the_lock_holds_the_versions_of_the_constraints_with_hashes():
    text = (REPOSITORY / "requirements.lock").read_text()
    locked = dict(
        re.findall(
            r"^([\w.-]+==[^\s;]+)(?: ;[^\n\\]*)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n?)+)", text, re.M
        )
    )
    lines = (REPOSITORY / "constraints.txt").read_text().split()
    named = {line.replace("_", "-").lower() for line in lines if not line.startswith("torch==")}
    assert {name.replace("_", "-").lower() for name in locked} == named
    whole = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(whole) == len(locked) + sum(hashes.count("sha256:") for hashes in locked.values())  # and nothing else
    assert all(hashes.count("sha256:") >= 1 for hashes in locked.values())


def test_each_test_that_the_guarantees_name_is_there():
    text = (REPOSITORY / "docs" / "guarantees.md").read_text()
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", text))
    assert len(named) > 20 and text.count("::") == len(re.findall(r"`test_\w+\.py::test_\w+`", text))
    for file, name in named:
        tree = ast.parse((REPOSITORY / "tests" / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"

"""The lock file holds what the constraints say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.promise(
    "The lock",
    "`requirements.lock` holds the versions of `constraints.txt` with the hashes of their files, all but torch.",
)
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

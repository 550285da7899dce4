"""The lock file holds what the constraints say."""

from __future__ import annotations

import base64
import hashlib
import re
import runpy
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

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


@pytest.mark.promise(
    "The lock", "Each package of the lock takes the oldest Python that this one does, its first release too."
)
def test_what_is_locked_takes_the_first_release_of_the_oldest_python():
    """Debian 12 has 3.11.2: a package that wants 3.11.5 ends the set-up there."""
    oldest = f"{tomllib.loads((REPOSITORY / 'pyproject.toml').read_text())['project']['requires-python'].strip('>=')}.0"
    locked = {line.partition("==")[0].lower() for line in (REPOSITORY / "constraints.txt").read_text().split()}
    wanted = {each.metadata["Name"].lower(): each.metadata["Requires-Python"] or "" for each in distributions()}
    assert len(locked & wanted.keys()) > 100
    assert [name for name in locked & wanted.keys() if not SpecifierSet(wanted[name]).contains(oldest)] == []


def made(site: Path, name: str, version: str, *, licence: str = "License: MIT\n") -> Path:
    """A distribution of one module, as pip installs it."""
    module, info = site / f"{name}.py", site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    module.write_text(f"NAME = {name!r}\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{licence}")
    sums = base64.urlsafe_b64encode(hashlib.sha256(module.read_bytes()).digest()).rstrip(b"=").decode()
    (info / "RECORD").write_text(f"{module.name},sha256={sums},{module.stat().st_size}\n{info.name}/RECORD,,\n")
    return module


@pytest.mark.promise(
    "The lock",
    "The audit of `.ci/run` refuses, without a network, a package that the lock does not name, another version, a file "
    "that is not as its RECORD says, code of no package, a package without a licence.",
)
def test_the_audit_names_what_is_not_as_it_was_locked(tmp_path):
    audit = runpy.run_path(str(REPOSITORY / ".ci" / "audit"))
    wanted = audit["pinned"]("first==1.0\nSecond_part==2.0 \\\n    --hash=sha256:00\n")
    assert wanted == {"first": "1.0", "second-part": "2.0"}
    made(tmp_path, "first", "1.0"), made(tmp_path, "second_part", "2.0+cpu"), made(tmp_path, "pip", "99")
    assert audit["audited"]([str(tmp_path)], wanted) == ([], 3)
    made(tmp_path, "third", "3.0", licence="").write_text("NAME = 'other'\n")
    (tmp_path / "start.pth").write_text("import os\n")
    assert audit["audited"]([str(tmp_path)], wanted | {"first": "1.1"})[0] == [
        "first 1.0: the lock has 1.1",
        "third 3.0: the lock does not name it",
        "third 3.0: no licence is named",
        "third 3.0: third.py is not the file that was installed (sha256 differs)",
        f"{tmp_path / 'start.pth'}: of no distribution",
    ]

"""Commands under a limit of memory: how they end is seen from outside."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LIMIT = 2 << 30  # bytes of addresses
COMMAND = """
import os, signal, sys, time
from pretrain.core.system.console import App

app = App()

@app.command()
def one(what: str) -> None:
    if what == "wait":
        open("waiting", "w").write(str(os.getpid()))
        time.sleep(60)
    if what in ("ABRT", "SEGV", "KILL"):
        print("so far", flush=True)
        os.kill(os.getpid(), getattr(signal, "SIG" + what))
    sys.exit(int(what))

app()
"""


def start(folder: Path, what: str, limit: int | None = LIMIT) -> subprocess.Popen[str]:
    """A command of one word, with as much memory as a limit says."""

    def before() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell has ignored for what it runs in the background
        if limit:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, what], cwd=folder, preexec_fn=before, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_library_that_aborts_under_a_limit_of_memory_is_one_line(tmp_path):
    one = start(tmp_path, "ABRT")
    said, error = one.communicate(timeout=60)
    assert said == "so far\n" and one.returncode == 1
    assert error.startswith(
        "error: there is not enough memory: a library ended the process under ulimit -v; accepted: "
    )


def test_what_aborts_without_a_limit_is_not_told_to_be_the_memory(tmp_path):
    one = start(tmp_path, "ABRT", limit=None)
    assert one.communicate(timeout=60) == ("so far\n", "") and one.returncode == -signal.SIGABRT


@pytest.mark.parametrize("what, status", [("0", 0), ("3", 3), ("KILL", -signal.SIGKILL)])
def test_a_status_is_the_childs(tmp_path, what, status):
    one = start(tmp_path, what)
    one.communicate(timeout=60)
    assert one.returncode == status


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_to_a_command_under_a_limit_ends_it(tmp_path, number, status):
    one = start(tmp_path, "wait")
    place = tmp_path / "waiting"
    while not (place.exists() and place.read_text()):
        time.sleep(0.05)
        assert one.poll() is None
    one.send_signal(number)
    one.communicate(timeout=30)
    assert one.returncode == status and not Path(f"/proc/{place.read_text()}").exists()


def test_a_command_whose_parent_is_killed_ends(tmp_path):
    one = start(tmp_path, "wait")
    place = tmp_path / "waiting"
    while not (place.exists() and place.read_text()):
        time.sleep(0.05)
    one.kill()
    one.communicate(timeout=30)
    until = time.monotonic() + 30
    while (
        Path(f"/proc/{place.read_text()}/cmdline").exists() and Path(f"/proc/{place.read_text()}/cmdline").read_bytes()
    ):
        assert time.monotonic() < until
        time.sleep(0.05)

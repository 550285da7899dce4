"""Files are whole or not there, whatever stops the process."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from pretrain.core import files
from pretrain.core.errors import PretrainError

REPLACE = """
import os, signal, sys
from pathlib import Path
from pretrain.core import files
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "clearing":
    files.shutil.rmtree = die
elif sys.argv[2] == "renaming":
    files.os.replace = die
with files.atomic_folder(Path(sys.argv[1])) as work:
    (work / "file").write_text("new")
"""


@pytest.mark.parametrize(("moment", "status"), [("never", 0), ("clearing", -signal.SIGKILL), ("renaming", 0)])
def test_a_folder_is_replaced_in_one_step(tmp_path, moment, status):
    if sys.platform != "linux":
        pytest.skip("only Linux exchanges two folders in one step")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").write_text("old")
    done = subprocess.run([sys.executable, "-c", REPLACE, str(tmp_path / "target"), moment], check=False)
    assert done.returncode == status
    assert (tmp_path / "target" / "file").read_text() == "new"
    files.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_where_folders_cannot_be_exchanged_two_renames_do(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "exchange", lambda one, other: False)
    for text in ("old", "new"):
        with files.atomic_folder(tmp_path / "target") as work:
            (work / "file").write_text(text)
    assert (tmp_path / "target" / "file").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_an_error_inside_leaves_the_old_folder_and_no_rest(tmp_path):
    with files.atomic_folder(tmp_path / "target") as work:
        (work / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), files.atomic_folder(tmp_path / "target") as work:
        (work / "file").write_text("new")
        raise ZeroDivisionError
    assert (tmp_path / "target" / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_texts_are_written_whole_and_broken_json_is_named(tmp_path):
    files.write_json(tmp_path / "a" / "x.json", {"b": 1})
    assert files.read_json(tmp_path / "a" / "x.json") == {"b": 1} and len(list((tmp_path / "a").iterdir())) == 1
    (tmp_path / "a" / "x.json").write_text('{"b": ')
    with pytest.raises(PretrainError, match=r"x.json is not valid JSON"):
        files.read_json(tmp_path / "a" / "x.json")
    with pytest.raises(PretrainError, match=r"missing file .*y.json"):
        files.read_json(tmp_path / "y.json")
    assert files.digest({"a": 1, "b": 2}) == files.digest({"b": 2, "a": 1}) != files.digest({"a": 1, "b": 3})


def test_what_killed_processes_left_is_swept_when_its_place_is_written_again(tmp_path):
    for name in ("rows-48-aa", "rows-480-bb", "train-cc"):
        (tmp_path / f".tmp-{name}").mkdir()
    files.sweep(tmp_path, "rows-48")
    assert {path.name for path in tmp_path.iterdir()} == {".tmp-rows-480-bb", ".tmp-train-cc"}
    files.sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_damage_names_the_first_file_that_is_not_as_it_was_written(tmp_path):
    with files.atomic_folder(tmp_path / "target") as work:
        for name in ("a", "b/c"):
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_text(name)
    folder = tmp_path / "target"
    assert files.damage(folder) == "" and files.damage(tmp_path) == ""
    (folder / "b" / "c").write_text("x")
    assert files.damage(folder).startswith(f"{folder / 'b' / 'c'} is damaged or was replaced")
    assert files.damage(folder, lambda name: name == "a") == ""
    (folder / "a").unlink()
    assert files.damage(folder) == f"{folder / 'a'}: No such file or directory"
    (folder / "checksums.json").write_text((folder / "checksums.json").read_text().replace("a", "b"))
    assert files.damage(folder) == f"{folder / 'checksums.json'} is damaged"


HALF = """
import os, signal, sys
from pathlib import Path
from pretrain.core import files
with files.atomic_text(Path(sys.argv[1])) as file:
    file.write("half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.promise(
    "Faults",
    "What a killed command left of a file that it was writing the next one to write that file removes, and a full disk "
    "leaves nothing of it.",
)
def test_what_a_killed_writer_left_of_a_file_the_next_one_removes_and_no_living_ones(tmp_path):
    place = tmp_path / "out.csv"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", HALF, str(place)], check=False)
    (left,) = tmp_path.iterdir()  # the second has removed what the first left
    with files.atomic_text(place) as first:
        first.write("x" * (1 << 20))
        with files.atomic_text(place) as second:
            assert not left.exists() and len(list(tmp_path.iterdir())) == 2
            second.write("second")
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"] and place.stat().st_size == 1 << 20


@pytest.mark.promise("Faults", "What a killed command left of a file")
def test_a_full_disk_leaves_no_rest_of_a_file(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(PretrainError, match=r"cannot write .*out.csv: File too large"):
            files.write_text(tmp_path / "out.csv", "longer than it may be")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert not list(tmp_path.iterdir())


@pytest.mark.promise(
    "What others have written", "A lock, a log or an output that is a pipe, a device or a socket is refused at once."
)
def test_a_lock_a_log_and_an_output_that_are_no_regular_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe"), (tmp_path / "link").symlink_to("pipe"), (tmp_path / "folder").mkdir()
    start = time.perf_counter()
    for name, kind in (("pipe", "a named pipe"), ("link", "a named pipe"), ("folder", "a folder")):
        with pytest.raises(PretrainError, match=f"{name} is {kind}"), files.locked(tmp_path / name):
            pass
        with pytest.raises(PretrainError, match=f"{name}: it is {kind}"):
            files.write_text(tmp_path / name, "text")
        for force in (False, True):
            with pytest.raises(PretrainError, match=f"^--output .*{name} is {kind}; accepted: another file$"):
                files.output_file(tmp_path / name, force)
    assert time.perf_counter() - start < 1 and (tmp_path / "pipe").is_fifo()


def test_an_output_is_written_through_a_link_to_the_file_that_it_names(tmp_path):
    (tmp_path / "other").write_text("old")
    for name, target in (("link", "other"), ("fresh", "new"), ("self", "self"), ("far", "no/folder")):
        (tmp_path / name).symlink_to(tmp_path / target)
    assert files.output_file(tmp_path / "link", True) == tmp_path / "other"
    assert files.output_file(tmp_path / "fresh", False) == tmp_path / "new"
    for name, match in (("link", "exists"), ("self", "a link to itself"), ("far", "there is no folder")):
        with pytest.raises(PretrainError, match=match):
            files.output_file(tmp_path / name, False)


def test_a_lock_that_is_a_link_empties_no_file(tmp_path):
    (tmp_path / "victim").write_text("text")
    (tmp_path / ".lock").symlink_to("victim")
    with files.locked(tmp_path / ".lock"):
        pass
    assert (tmp_path / "victim").read_text() == "text"

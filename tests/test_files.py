"""Files are whole or not there, whatever stops the process."""

from __future__ import annotations

import signal
import subprocess
import sys

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
